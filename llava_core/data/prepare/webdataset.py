"""webdataset shards: a conversation as JSON beside its images, whose bytes are copied as they are.

The members are those of Pai-Megatron-Patch's conversion, which energon then describes: `KEY.jpg`, and in `KEY.json` the
list of turns. A shard has no time, user or machine in it.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_core.data.image_store import ImageStore
from llava_core.data.prepare.parts import RowLog, usable_rows
from llava_core.data.readers import Reader
from llava_core.data.records import EmbeddedImage, Record, Role
from llava_core.durable import FileDigest
from llava_core.errors import BadRow, DataError

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff", "PPM": "ppm"}
SUFFIXES |= {"MPO": "jpg", "JPEG2000": "jp2", "AVIF": "avif"}
"""By the format that an image has, whatever its file is called."""

SENDERS: Mapping[Role, str] = {"human": "human", "assistant": "gpt"}
UNFIT = re.compile(r"[^\w-]")
"""What a key is better without: its first dot would end it, a slash would make a folder."""


@dataclass(frozen=True)
class WebdatasetTarget:
    """See the file's docstring.

    Attributes:
        name: what the shards' names start with.
        images: where the rows' images are.
    """

    name: str
    images: ImageStore
    parts_are_kept: bool = True

    @property
    def settings(self) -> Mapping[str, Any]:
        root = self.images.root
        return {"name": self.name, "images": root and str(root), "max_image_pixels": self.images.max_pixels}

    def check(self, reader: Reader) -> None:
        if reader.content != "conversations":
            raise DataError(f"webdataset shards hold conversations, and this data set holds {reader.content}")

    def file_name(self, number: int) -> str:
        return f"{self.name}-{number:05d}.tar"

    def chunks(self, reader: Reader, rows: range, log: RowLog, folder: Path) -> Iterator[bytes]:
        taken: set[str] = set()
        written = 0
        for row in usable_rows(reader, rows, log):
            assert isinstance(row, Record)
            try:
                images = [self._image(image) for image in row.images]
            except BadRow as bad:
                log.bad(row.id, row.index, bad)
                continue
            key = _key(row, taken)
            for suffix, content in [*_named(images), ("json", _turns(row))]:
                for chunk in _member(f"{key}.{suffix}", content):
                    written += len(chunk)
                    yield chunk
            log.good()
        yield b"\x00" * (2 * tarfile.BLOCKSIZE + -(written + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)

    def finish(self, folder: Path, parts: list[Path]) -> dict[str, FileDigest]:
        return {}

    def _image(self, image: str | EmbeddedImage) -> tuple[str, bytes]:
        """An image's suffix and bytes. Raises BadRow for one that training could not use."""
        content = self.images.read_bytes(image)
        name = image if isinstance(image, str) else image.name
        return SUFFIXES[self.images.format_of(EmbeddedImage(name, content))], content


def _turns(row: Record) -> bytes:
    return json.dumps([{"from": SENDERS[turn.role], "value": turn.text} for turn in row.turns]).encode()


def _key(row: Record, taken: set[str]) -> str:
    """The row's id, made into a key that no other sample of the shard has."""
    key = UNFIT.sub("_", row.id) or "row"
    while key in taken:  # in LLaVA's data several rows may be about one picture, and have its id
        key = f"{key}-{row.index}"
    taken.add(key)
    return key


def _named(images: Sequence[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """One image by its suffix alone; several by their number before it, so that they stay in order by name, too."""
    if len(images) < 2:
        return list(images)
    return [(f"{number:03d}.{suffix}", content) for number, (suffix, content) in enumerate(images)]


def _member(name: str, content: bytes) -> Iterator[bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o444
    yield info.tobuf(tarfile.PAX_FORMAT)
    yield content
    yield b"\x00" * (-len(content) % tarfile.BLOCKSIZE)
