"""Rows as token ids, after the template and the tokenizer and before anything that depends on a model or a run.

A part is a safetensors file: the ids of all its rows end to end in `tokens`, and in `supervised` which of them are
targets; `token_bounds` and `row_bounds` say where a row's tokens and its text in `rows` start and end. That text is
JSON: the row's id, images, and why it cannot be used if it cannot. It keeps its place, so that every row has the number
that it has in the source. `checksums` are of a row's tokens, targets and text.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any

import numpy as np
import torch

from llava_core.data.conversation import Template
from llava_core.data.encoding import compact, conversation_of
from llava_core.data.fingerprint import fingerprint
from llava_core.data.overlong import Encoded, truncated
from llava_core.data.prepare.parts import RowLog, put_file
from llava_core.data.prepared import TEMPLATE_FILE, row_checksum
from llava_core.data.readers import Reader
from llava_core.data.records import EmbeddedImage, Record, TokenSequence, modality_length
from llava_core.durable import FileDigest
from llava_core.errors import BadRow, DataError
from llava_core.safetensors_header import Stored, header

NOTHING = TokenSequence(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_))
IN_MEMORY_BYTES = 1 << 24
BLOCK_BYTES = 1 << 22
LARGE_VOCABULARY = 65500


@dataclass(frozen=True)
class TokensTarget:
    """See the file's docstring.

    Attributes:
        template_name: how a run may name the template.
        takes_images: whether rows with images can be used.
        template_text: what is in the file that the template was read from; it is kept for the run.
        max_length: where longer rows, which then have no images, are cut; None leaves that to the run.
    """

    tokenizer: Any
    template: Template
    template_name: str
    template_text: str | None = None
    takes_images: bool = True
    max_length: int | None = None
    parts_are_kept: bool = True

    @property
    def settings(self) -> Mapping[str, Any]:
        found = {"template": self.template_name, "made_with": fingerprint(self.tokenizer, self.template)}
        if self.template_text is None:
            return found
        return found | {"template_sha256": hashlib.sha256(self.template_text.encode()).hexdigest()}

    def check(self, reader: Reader) -> None:
        if reader.content == "tokens":
            raise DataError("this data set holds token ids: it was tokenised before")

    def file_name(self, number: int) -> str:
        return f"tokens-{number:05d}.safetensors"

    def chunks(self, reader: Reader, rows: range, log: RowLog, folder: Path) -> Iterator[bytes]:
        token_bounds, row_bounds, dtype = array("q", [0]), array("q", [0]), id_type(self.tokenizer)
        checksums = array("q")
        with ExitStack() as stack:
            tokens, supervised, texts = (
                stack.enter_context(SpooledTemporaryFile(IN_MEMORY_BYTES, dir=str(folder))) for _ in range(3)
            )
            for index in rows:
                sequence, described = self._encode(reader, index, log)
                ids, text = sequence.tokens.astype(dtype), json.dumps(described).encode()
                checksums.append(row_checksum(ids, sequence.supervised, text))
                tokens.write(ids.tobytes())
                supervised.write(sequence.supervised.tobytes())
                texts.write(text)
                token_bounds.append(token_bounds[-1] + sequence.tokens.size)
                row_bounds.append(row_bounds[-1] + len(text))
            columns = {
                "token_bounds": _stored("I64", len(token_bounds), 8),
                "row_bounds": _stored("I64", len(row_bounds), 8),
                "checksums": _stored("I64", len(checksums), 8),
                "tokens": _stored("U16" if dtype.itemsize == 2 else "I32", token_bounds[-1], dtype.itemsize),
                "supervised": _stored("BOOL", token_bounds[-1], 1),
                "rows": _stored("U8", row_bounds[-1], 1),
            }
            yield header(columns)
            yield from (np.array(column, dtype="<i8").tobytes() for column in (token_bounds, row_bounds, checksums))
            for spooled in (tokens, supervised, texts):
                yield from blocks(spooled)

    def finish(self, folder: Path, parts: list[Path]) -> dict[str, FileDigest]:
        if self.template_text is None:
            return {}
        return {TEMPLATE_FILE: put_file(folder / TEMPLATE_FILE, [self.template_text.encode()])}

    def _encode(self, reader: Reader, index: int, log: RowLog) -> tuple[TokenSequence, dict[str, Any]]:
        """A row's tokens, and what else is kept of it."""
        try:
            record = reader.read(index)
        except BadRow as bad:
            log.bad(f"row-{index}", index, bad)
            return NOTHING, {"unreadable": [bad.reason, bad.message]}
        assert isinstance(record, Record)
        described: dict[str, Any] = {"id": record.id, "length": modality_length(record)}
        if record.images and self.takes_images:
            described["images"] = [_path(record, image) for image in record.images]
        try:
            sequence, image_starts = self._compact(record, reader)
        except BadRow as bad:
            log.bad(record.id, index, bad)
            return NOTHING, described | {"refused": [bad.reason, bad.message]}
        log.good()
        return sequence, described | ({"image_starts": image_starts} if image_starts else {})

    def _compact(self, record: Record, reader: Reader) -> tuple[TokenSequence, tuple[int, ...]]:
        if record.images and not self.takes_images:
            raise BadRow("unexpected_image", "the row has an image, and these files hold text alone.")
        sequence, image_starts = compact(conversation_of(record, self.template, reader.content), self.tokenizer)
        if self.max_length is None:
            return sequence, image_starts
        whole = Encoded(torch.from_numpy(sequence.tokens), torch.from_numpy(sequence.supervised), (), ())
        kept = truncated(whole, self.max_length)
        return TokenSequence(kept.tokens.numpy(), kept.supervised.numpy()), ()


def id_type(tokenizer: Any) -> np.dtype[Any]:
    """What ids are kept as: megatron-core's choice by the number of ids (indexed_dataset.py, optimal_dtype)."""
    size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    return np.dtype("<u2" if size < LARGE_VOCABULARY else "<i4")


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    """All that was written to a file, a little at a time."""
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        yield block


def _stored(dtype: str, count: int, itemsize: int) -> Stored:
    return Stored(dtype, [count], count * itemsize)


def _path(record: Record, image: str | EmbeddedImage) -> str:
    if isinstance(image, EmbeddedImage):
        raise DataError(
            f"row {record.index} brings its image {image.name!r} along, and token ids are kept with the paths "
            "of images alone: train from this data set as it is, or prepare the rows with paths that it was made of"
        )
    return image
