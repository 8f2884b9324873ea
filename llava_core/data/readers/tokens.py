"""Rows that `llava-core data prepare --to tokens` tokenised; `data/prepare/tokens.py` says how they are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from llava_core.data.conversation import Template
from llava_core.data.fingerprint import differences, fingerprint
from llava_core.data.overlong import Overlong
from llava_core.data.prepared import MANIFEST, TEMPLATE_FILE, read_prepared, row_checksum
from llava_core.data.readers import Content
from llava_core.data.readers.index import check_unchanged, open_data
from llava_core.data.records import EncodedRecord, TokenSequence
from llava_core.errors import BadRow, ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokensReader:
    """The rows of a folder, each with the number that it had in the source. See `Reader`.

    Raises:
        DataError: a folder that is not complete, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        prepared = read_prepared(path)
        request = prepared.request
        try:
            if request["to"] != "tokens":
                raise DataError(f"{path} was prepared as {request['to']}, not as token ids: leave data.reader out")
            self.content: Content = request["source"]["content"]
            self.usual_overlong: Overlong = request["source"]["usual_overlong"]
            kept = TEMPLATE_FILE in prepared.files
            self.template: str = str(path / TEMPLATE_FILE) if kept else request["settings"]["template"]
            self._made_with: Mapping[str, str] = request["settings"]["made_with"]
            self._num_rows, self._part_size = prepared.num_rows, int(request["part_size"])
        except (LookupError, TypeError) as error:
            raise DataError(f"{path / MANIFEST} cannot be read ({error!r}): prepare the data anew") from error
        files = {name: digest for name, digest in prepared.files.items() if name != TEMPLATE_FILE}
        if len(files) != -(-self._num_rows // self._part_size):
            raise DataError(
                f"{path / MANIFEST} tells of {self._num_rows} rows by {self._part_size}, and of {len(files)} "
                "files: prepare the data anew"
            )
        self._files = [(path / name, digest.size) for name, digest in sorted(files.items())]
        digests = "".join(files[file.name].sha256 for file, _ in self._files)
        self._digest = hashlib.sha256(digests.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._num_rows

    @property
    def fingerprint(self) -> Mapping[str, str | int]:
        """`path`, `num_bytes`, `num_rows`, and `sha256` of all that the files hold."""
        num_bytes = sum(size for _, size in self._files)
        return {"path": str(self.path), "num_bytes": num_bytes, "num_rows": len(self), "sha256": self._digest}

    def check(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        """The ids are those that this tokenizer gives to what this template writes.

        Raises:
            ConfigError: naming what differs.
        """
        changed = differences(self._made_with, fingerprint(tokenizer, template))
        if changed:
            raise ConfigError(
                f"{self.path} was tokenised otherwise than this run would, with the template {self.template!r}:"
                f"{changed}\nName that template and the model whose tokenizer it was, or prepare the data anew."
            )

    def read(self, index: int) -> EncodedRecord:
        """Row `index`. See `Reader.read`; reasons those of the source's reader."""
        number, row = divmod(index, self._part_size)
        file, size = self._files[number]
        try:
            with open_data(file) as opened:  # safetensors says of a closed file that there is none
                check_unchanged(file, size, opened.seek(0, 2))
            with safe_open(file, framework="numpy") as part:
                kept = _Part(part)
                text = kept.slice("rows", "row_bounds", row).tobytes()
                tokens, supervised = (kept.slice(name, "token_bounds", row) for name in ("tokens", "supervised"))
                (expected,) = part.get_slice("checksums")[row : row + 1].tolist()
            if row_checksum(tokens, supervised, text) != expected:
                raise ValueError("its checksum is another")
            return _record(json.loads(text), index, TokenSequence(tokens.astype(np.int64), supervised))
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"row {index} cannot be read from {file}: {error!r}; copy it again") from error


def _record(described: Mapping[str, Any], index: int, sequence: TokenSequence) -> EncodedRecord:
    """Raises BadRow for a row that could not be read when it was prepared."""
    if "unreadable" in described:
        raise BadRow(*described["unreadable"])
    return EncodedRecord(
        id=described["id"],
        index=index,
        images=tuple(described.get("images", ())),
        sequence=sequence,
        image_starts=tuple(described.get("image_starts", ())),
        modality_length=described["length"],
        refused=BadRow(*described["refused"]) if "refused" in described else None,
    )


DTYPES = {"U16": "<u2", "I32": "<i4", "BOOL": "?", "U8": "u1"}
"""What safetensors calls them."""


class _Part:
    """An open file, of which only what is asked for is read."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def slice(self, name: str, bounds: str, row: int) -> np.ndarray[Any, Any]:
        start, end = self._file.get_slice(bounds)[row : row + 2].tolist()
        values = self._file.get_slice(name)
        size = values.get_shape()[0]
        if not 0 <= start <= end <= size:  # safetensors raises whatever comes of it
            raise ValueError(f"{bounds} {start} and {end}, of {size}")
        if start == end:  # which safetensors refuses at the end of a tensor
            return np.empty(0, dtype=DTYPES[values.get_dtype()])
        return cast("np.ndarray[Any, Any]", values[start:end])
