"""scikit-learn's handwritten digits on disk, as a user's own data would be: PNG files and LLaVA JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_core.demo.texts import QUESTIONS, answer, caption
from llava_core.errors import ConfigError

NUM_TRAIN = 1500
IMAGE_SIZE = 64
"""Pixels of a side, from the 8 of the original: to be looked at. The model's image processor makes 32 of them."""

LEVELS = 16
"""The original's brightest level."""


@dataclass(frozen=True)
class DigitData:
    """Where the files are.

    Attributes:
        captions: stage 1's rows, for the template `plain`.
        conversations: stage 2's rows, for `v1`.
        held_out: rows of digits that no training sees, with the right answers as references.
    """

    folder: Path

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def captions(self) -> Path:
        return self.folder / "captions.json"

    @property
    def conversations(self) -> Path:
        return self.folder / "conversations.json"

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out.json"


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8] with levels from 0 to 16, and labels [1797].

    Raises:
        ConfigError: scikit-learn, whose wheel brings them, is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigError(
            f"the demo's pictures come with scikit-learn, which cannot be imported ({error}). "
            "Install it: pip install 'llava-core[demo]'"
        ) from error
    bunch: Any = datasets.load_digits()
    return bunch.images, bunch.target


def write_data(folder: Path, seed: int) -> None:
    """Write the whole data set into `folder`; the same seed gives the same files.

    Raises:
        ConfigError: see `load_digits`.
    """
    images, labels = load_digits()
    order = np.random.default_rng(seed).permutation(len(labels))
    data = DigitData(folder)
    data.images.mkdir(parents=True, exist_ok=True)
    captions, conversations, held_out = [], [], []
    for number, index in enumerate(order):
        digit = int(labels[index])
        name = f"{number:04d}.png"
        picture(images[index]).save(data.images / name)
        question = QUESTIONS[number % len(QUESTIONS)]
        asked = _row(name, f"<image>\n{question}", answer(question, digit))
        if number < NUM_TRAIN:
            captions.append(_row(name, "<image>\nDescribe the picture.", caption(digit)))
            conversations.append(asked)
        else:
            held_out.append(asked)
    _write_rows(data.captions, captions)
    _write_rows(data.conversations, conversations)
    _write_rows(data.held_out, held_out)


def picture(levels: np.ndarray) -> Image.Image:
    """Levels [8, 8] as a grey picture, white on black, large enough to be looked at."""
    grey = Image.fromarray((levels * (255 / LEVELS)).round().astype(np.uint8))
    return grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)


def _row(name: str, question: str, reply: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    return {"id": name.removesuffix(".png"), "image": name, "conversations": turns}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
