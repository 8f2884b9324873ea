"""The manifest of a folder that `llava-core data prepare` wrote: how it was made, and what its files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from llava_core.durable import FileDigest
from llava_core.errors import DataError

MANIFEST = "prepared.json"
FORMAT = 1
TEMPLATE_FILE = "template.yaml"
"""What was in the file that the template of token ids was read from, where it was one."""


@dataclass(frozen=True)
class Prepared:
    """A complete folder.

    Attributes:
        request: what was asked for, and of which data: the same request gives the same bytes.
        num_rows: of the source.
        num_bad: those of them that cannot be used.
        files: all but the manifest and the list of bad rows, by name.
    """

    request: Mapping[str, Any]
    num_rows: int
    num_bad: int
    files: Mapping[str, FileDigest]

    def encode(self) -> bytes:
        """The manifest's bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode() + b"\n"


def row_checksum(tokens: NDArray[np.integer], supervised: NDArray[np.bool_], text: bytes) -> int:
    """The CRC-32 of all that is kept of a tokenised row."""
    return crc32(text, crc32(supervised.tobytes(), crc32(tokens.tobytes())))


def read_prepared(folder: Path) -> Prepared:
    """The manifest of a folder, with each of the files that it names there in its size.

    Raises:
        DataError: it is missing, cannot be read, or the files are not what it says.
    """
    file = folder / MANIFEST
    try:
        body = json.loads(file.read_bytes())
        if body["format"] != FORMAT:
            raise DataError(f"{file} has format {body['format']}, expected {FORMAT}: prepare the data anew")
        files = {str(name): FileDigest(**digest) for name, digest in body["files"].items()}
        _check_request(body["request"])
        found = Prepared(body["request"], int(body["num_rows"]), int(body["num_bad"]), files)
    except OSError as error:
        raise DataError(f"{folder} is no prepared data set: {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read ({error!r}): prepare the data anew") from error
    for name, digest in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != digest.size:
            raise DataError(
                f"{folder / name} {'is missing' if size is None else f'has {size} bytes'}, expected {digest.size} "
                "bytes: copy the folder again, or prepare the data anew"
            )
    return found


def _check_request(request: Mapping[str, Any]) -> None:
    """Raises what `read_prepared` explains, for a request that `Preparation` does not write."""
    expected = {"to": str, "source": dict, "settings": dict, "part_size": int}
    for key, kind in expected.items():
        if not isinstance(request[key], kind):
            raise TypeError(f"request.{key} is {request[key]!r}")
    if request["part_size"] < 1:
        raise ValueError(f"request.part_size is {request['part_size']}")
