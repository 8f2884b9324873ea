"""Reads the tensors of a folder without reading the folder: one at a time, mapped from the file where possible."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_core.errors import WeightsError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

PATTERNS = ("model.safetensors", "*.safetensors", "pytorch_model.bin", "pytorch_model*.bin", "*.bin")
"""Without an index the first of these that a folder has; the usual names go first, for some hold other formats too."""


class WeightsFolder(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder or of one file, by their names on disk.

    safetensors are mapped into memory; `.bin` files are loaded with `weights_only`, so that no code in them runs.

    Raises:
        WeightsError: no weights, a missing shard, or a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        for file in weight_files(path):
            for name in self._names(file):
                if name in self._file_of:
                    raise WeightsError(
                        f"{path}: {name!r} is in both {self._file_of[name].name} and {file.name}; "
                        "remove the file that is not meant."
                    )
                self._file_of[name] = file

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        opened = self._open(file)
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _names(self, file: Path) -> list[str]:
        return list(self._open(file).keys())

    def _open(self, file: Path) -> Any:
        key = str(file)
        if key not in self._files:
            self._files[key] = _open_file(file)
        return self._files[key]


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a folder, or the file itself."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise WeightsError(f"no such folder: {path}. Give a Hugging Face folder or a weights file.")
    for index in INDEXES:
        if (path / index).is_file():
            files = [path / shard for shard in _shards(path / index)]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise WeightsError(f"{path / index} names files that are not there: {missing}. Download them again.")
            return files
    for pattern in PATTERNS:
        files = sorted(path.glob(pattern))
        if files:
            return files
    raise WeightsError(
        f"{path} holds no *.safetensors and no *.bin file; it has: {sorted(p.name for p in path.iterdir())}."
    )


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of weights: {error!r}. Is the download complete?") from error


def _open_file(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt", device="cpu")
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (OSError, EOFError, SafetensorError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{file} cannot be read as weights: {error}. Is the download complete?") from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{file} holds a {type(loaded).__name__}; expected a dictionary of tensors by name.")
    odd = next((name for name, value in loaded.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise WeightsError(f"{file}: {odd!r} is a {type(loaded[odd]).__name__}; expected nothing but tensors by name.")
    return loaded
