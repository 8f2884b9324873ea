"""webdataset shards: each sample has images and what is said about them, as JSON or as a caption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from llava_core.data.overlong import Overlong
from llava_core.data.readers import Content
from llava_core.data.readers.tar_samples import TarSample, TarSamples
from llava_core.data.records import IMAGE_MARK, ROLES, EmbeddedImage, Record, Turn, malformed, parse_text, parse_turns
from llava_core.errors import BadRow, DataError

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif"))


class WebdatasetReader:
    """The samples of a .tar file, or of all in a folder. See `Reader`.

    A sample's `.json` holds a conversation, or a row of LLaVA's JSON; without one, its `.txt` is the caption. Its
    images are its members with an image's suffix, in their order in the tar.

    Raises:
        DataError: as `TarSamples`.
    """

    content: Content = "conversations"
    usual_overlong: Overlong = "truncate"

    def __init__(self, path: Path, *, index_folder: Path | None = None) -> None:
        self.path = path
        shards = find_shards(path)
        self._samples = TarSamples(shards, [shard.name for shard in shards], index_folder)
        if not len(self):
            raise DataError(f"{path} holds no samples: files whose names differ in their suffix alone.")

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def fingerprint(self) -> Mapping[str, str | int]:
        """See `describe_files`."""
        return self._samples.describe(self.path)

    def read(self, index: int) -> Record:
        """Row `index`. See `Reader.read`; reasons `malformed_row`, `malformed_json` and those of `TarSamples.read`."""
        sample = self._samples.read(index)
        return Record(sample.key, index, parse_sample(sample, index), sample_images(sample))


def find_shards(path: Path) -> list[Path]:
    """A .tar file itself, or those in a folder and below, by name. Raises DataError if there are none."""
    if not path.is_dir():
        return [path]
    shards = sorted(path.rglob("*.tar"))
    if not shards:
        raise DataError(f"{path} holds no .tar file; check that it is the folder you mean")
    return shards


def sample_images(sample: TarSample) -> tuple[EmbeddedImage, ...]:
    """The images of a sample, by what their suffix ends with: `a.left.jpg` is one, too."""
    return tuple(
        EmbeddedImage(f"{sample.key}.{suffix}", data)
        for suffix, data in sample.members.items()
        if suffix.rpartition(".")[2] in IMAGE_SUFFIXES
    )


def parse_sample(sample: TarSample, index: int) -> tuple[Turn, ...]:
    """What is said in a sample: a list of messages, a row with `conversations`, or a caption.

    Raises:
        BadRow: `malformed_json`, `malformed_row`.
    """
    row = decode_json(sample, "json", index) if "json" in sample.members else None
    if isinstance(row, list):
        return parse_turns(row, index, "json", ROLES)
    if isinstance(row, dict) and "conversations" in row:
        return parse_turns(row["conversations"], index, "conversations", ROLES)
    if "txt" in sample.members:
        return caption_turns(decode_text(sample, "txt", index))
    found = ", ".join(f".{suffix}" for suffix in sample.members)
    raise malformed(index, sample.key, found, "a .json with a conversation, or a .txt with a caption")


def caption_turns(caption: str) -> tuple[Turn, ...]:
    """A caption as a conversation."""
    return Turn("human", IMAGE_MARK), Turn("assistant", caption)


def decode_json(sample: TarSample, suffix: str, index: int) -> object:
    """A member that is JSON. Raises BadRow `malformed_json`."""
    try:
        return json.loads(sample.members[suffix].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadRow("malformed_json", f"row {index}: {sample.key}.{suffix}: {error}") from error


def decode_text(sample: TarSample, suffix: str, index: int) -> str:
    """A member that is text. Raises BadRow `not_utf8`."""
    try:
        text = sample.members[suffix].decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"row {index}: {sample.key}.{suffix}: {error}") from error
    return parse_text(text, index, suffix)
