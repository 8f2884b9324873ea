"""Writes the folders beside it as two of the guides do, with the tools that they name.

`python -m tests.golden.guides.write` needs webdataset, megatron-energon (written with 7.4.1) and megatron-core
(0.12.1), of which no test needs the last two.
"""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import numpy as np
import torch
import webdataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.energon.cli.main import main as energon
from PIL import Image

from tests.golden.megatron.write import packed

HERE = Path(__file__).parent
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}
QUESTIONS = (
    "<image>\nGive a brief description of the image.",
    "Render a clear and concise summary of the photo.\n<image>",
)
BOS, EOS = 1, 2
WORDS = range(10, 250)


def pretrain_samples(number: int) -> dict[str, object]:
    """As Pai-Megatron-Patch's convert_llava_pretrain_to_wds.py writes a row of LLaVA-Pretrain."""
    colour = list(COLOURS)[number % 3]
    file = io.BytesIO()
    Image.new("RGB", (12 + number, 30 - number), COLOURS[colour]).save(file, "JPEG")
    turns = [
        {"from": "human", "value": QUESTIONS[number % 2]},
        {"from": "gpt", "value": f"a {colour} thing, number {number}"},
    ]
    return {"__key__": f"{number:09}", "jpg": file.getvalue(), "json": json.dumps(turns).encode()}


def write_shards(folder: Path) -> None:
    """Shards of the guide's names, then `energon prepare` with the guide's answers."""
    folder.mkdir()
    os.chdir(folder)
    with webdataset.ShardWriter("pretrain-%d.tar", maxcount=3, verbose=0) as shards:
        for number in range(24):
            shards.write(pretrain_samples(number))
    field_map = {"image": "jpg", "context": "json[0][value]", "answers": "json[1][value]"}
    options = ["--non-interactive", "--split-ratio", "9,1,0", "--sample-type", "VQASample", "--num-workers", "1"]
    try:
        energon(["prepare", ".", *options, "--field-map", json.dumps(field_map)])
    except SystemExit as left:
        if left.code:
            raise
    for made in (*folder.glob("*.idx"), *folder.glob(".nv-meta/index.*")):
        made.unlink()  # energon's own index, of which nothing is read here


def write_ids(name: str, documents: list[list[int]]) -> None:
    builder = IndexedDatasetBuilder(str(HERE / f"{name}.bin"), dtype=np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(HERE / f"{name}.idx"))


def words(draw: random.Random, fewest: int, most: int) -> list[int]:
    return draw.choices(WORDS, k=draw.randint(fewest, most))


def instruction(draw: random.Random) -> tuple[list[int], list[int]]:
    return [BOS, *words(draw, 3, 8)], [*words(draw, 2, 6), EOS]


if __name__ == "__main__":
    draw = random.Random(0)
    write_ids("wudao_llama3bpe_content_document", [[BOS, *words(draw, 5, 60), EOS] for _ in range(60)])
    write_ids("instructions", [packed([instruction(draw) for _ in range(2)], 40) for _ in range(24)])
    write_shards(HERE / "wds")
