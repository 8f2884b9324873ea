"""Data sets that are prepared inside the test's process."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_core.data.image_store import ImageStore
from llava_core.data.prepare.parts import Target
from llava_core.data.prepare.run import Preparation
from llava_core.data.prepare.tokens import TokensTarget
from llava_core.data.prepare.webdataset import WebdatasetTarget
from llava_core.data.readers import Reader
from llava_core.data.readers.llava import LlavaJsonlReader
from llava_core.data.templates import BUILTIN_TEMPLATES
from llava_core.testing.datasets import TinyParts
from llava_core.weights.tokenizer import load_tokenizer

_TURNS = '{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "Red."}'

_BAD_LINES = {
    3: '{"id": "gone", "image": "gone.png", "conversations": [TURNS]}',
    7: '{"id": "half", ',
    8: '{"id": "empty", "conversations": []}',
    14: '{"id": "broken", "image": "broken.png", "conversations": [TURNS]}',
    21: '{"id": "two", "image": ["0.png", "1.png"], "conversations": [TURNS]}',
    25: '{"id": "order", "conversations": [{"from": "human", "value": "Who speaks longest of all of us here?"}]}',
}
BAD_LINES = {number: line.replace("TURNS", _TURNS) for number, line in _BAD_LINES.items()}
"""Rows that cannot be read, that the template refuses, and whose image cannot be used."""


@dataclass
class Quiet:
    """A watch that remembers. With `stop_after`, it interrupts after so many rows, as a user would."""

    stop_after: int | None = None
    seen: int = 0
    started_with: int = -1

    def start(self, total: int, done: int) -> None:
        self.started_with = done

    def advance(self, count: int) -> None:
        self.seen += count
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Data:
    """A JSONL file over the pictures of `TinyParts`."""

    parts: TinyParts
    path: Path

    def webdataset(self, output: Path, **settings: Any) -> Preparation:
        store = ImageStore(self.parts.images, 10**6)
        return self._of("webdataset", WebdatasetTarget("rows", store), output, settings)

    def tokens(self, output: Path, template: str = "v1", **settings: Any) -> Preparation:
        tokenizer = load_tokenizer(self.parts.language)
        return self._of("tokens", TokensTarget(tokenizer, BUILTIN_TEMPLATES[template], template), output, settings)

    def _of(self, kind: str, target: Target, output: Path, settings: dict[str, Any]) -> Preparation:
        return replace(preparation(kind, self.path, LlavaJsonlReader(self.path), target, output), **settings)


def preparation(kind: str, source: Path, reader: Reader, target: Target, output: Path) -> Preparation:
    """In small parts, by this process, with whatever rows there are."""
    return Preparation(kind, source, reader, target, output, part_size=5, num_workers=1, max_bad_fraction=1.0)


def write_lines(parts: TinyParts, path: Path, *, bad: bool) -> Data:
    """The rows of the tiny data set, some of them replaced by bad ones."""
    lines = [json.dumps(row) for row in json.loads(parts.data.read_text())]
    if bad:
        (parts.images / "broken.png").write_bytes(b"\x89PNG broken")
        lines = [BAD_LINES.get(number, line) for number, line in enumerate(lines)]
    path.write_text("\n".join(lines))
    return Data(parts, path)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, by its name."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


def listed(folder: Path) -> list[tuple[int, str]]:
    """The rows that the list of bad ones names, and why."""
    path = folder / "quarantine.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["index"], row["reason"]) for row in rows]
