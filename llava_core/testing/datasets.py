"""A small LLaVA data set and the parts of a small model on disk, as a user would have them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_core.data.templates import V1
from llava_core.testing.models import save_folder, tiny_model, tiny_text_config, tiny_vision_config
from llava_core.testing.tokenizers import train_llama_tokenizer

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "grey": (120, 120, 120)}
QUESTIONS = ("What colour is this?", "Name the colour.")
VOCAB_SIZE = 320


@dataclass(frozen=True)
class TinyParts:
    """Folders of a run: a CLIP tower, a Llama with its tokenizer, and data."""

    vision: Path
    language: Path
    data: Path
    images: Path

    def settings(self, output: Path) -> dict[str, object]:
        """A whole, quick config over these folders, for `build_config`."""
        return {
            "output": str(output),
            "model": {"vision": str(self.vision), "language": str(self.language)},
            "data": {"path": str(self.data), "images": str(self.images), "max_length": 256},
            "batch": {"global_size": 8, "micro_tokens": 512},
            "optimizer": {"learning_rate": 1e-3, "warmup_fraction": 0.03},
            "train": {"trainable": ["projector", "language"], "max_steps": 6, "precision": "fp32"},
            "backend": {"name": "cpu", "threads": 1},
            "log": {"trackers": []},
        }


def tiny_parts(folder: Path, num_rows: int = 40, seed: int = 0) -> TinyParts:
    """Write everything a run needs into `folder`; the same seed gives the same files."""
    parts = TinyParts(folder / "clip", folder / "llama", folder / "data.json", folder / "images")
    save_folder(tiny_model(tiny_vision_config(), seed), parts.vision)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 24},
        "crop_size": {"height": 24, "width": 24},
    }
    (parts.vision / "preprocessor_config.json").write_text(json.dumps(processor))
    text = tiny_text_config(vocab_size=VOCAB_SIZE, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    save_folder(tiny_model(text, seed), parts.language)
    rows = write_dataset(parts, num_rows, seed)
    system = V1.start[0].text.strip()
    corpus = [turn["value"] for row in rows for turn in row["conversations"]] + [system, "USER: ", "ASSISTANT: "] * 9
    train_llama_tokenizer(parts.language, corpus, VOCAB_SIZE, legacy=False)
    return parts


def write_dataset(parts: TinyParts, num_rows: int, seed: int) -> list[dict[str, Any]]:
    """Pictures of one colour and questions about them; every fifth row is text alone, every seventh has two rounds."""
    rng = np.random.default_rng(seed)
    parts.images.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_rows):
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        question = QUESTIONS[rng.integers(len(QUESTIONS))]
        row: dict[str, Any] = {"id": f"row{index}", "image": f"{index}.png"}
        if index % 5 == 4:
            del row["image"]
            turns = [_turn("human", f"Say {colour}."), _turn("gpt", f"{colour}.")]
        else:
            _picture(rng, colour).save(parts.images / f"{index}.png")
            turns = [_turn("human", f"<image>\n{question}"), _turn("gpt", f"It is {colour}.")]
        if index % 7 == 6:
            turns += [_turn("human", "Are you sure?"), _turn("gpt", f"Yes, it is {colour} indeed.")]
        rows.append(row | {"conversations": turns})
    parts.data.write_text(json.dumps(rows))
    return rows


def _picture(rng: np.random.Generator, colour: str) -> Image.Image:
    height, width = rng.integers(20, 60, 2)
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def _turn(sender: str, value: str) -> dict[str, str]:
    return {"from": sender, "value": value}
