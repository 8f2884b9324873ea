"""Writes the files beside it: shards by webdataset, described by `energon prepare` and read by energon's own loader.

`python tests/golden/energon/write.py` needs webdataset and megatron-energon (written with 7.4.1), which no test needs.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import webdataset
from megatron.energon import WorkerConfig, get_loader, get_val_dataset
from megatron.energon.cli.main import main as energon
from megatron.energon.task_encoder import DefaultTaskEncoder
from PIL import Image

HERE = Path(__file__).parent
EXCLUDED = "pretrain-0.tar/b/1"
FIELD_MAP = {"image": "png", "context": "json[0][value]", "answers": "json[1][value]"}


class AsTheyAre(DefaultTaskEncoder):
    """Samples without batching."""

    def encode_sample(self, sample: object) -> object:
        return sample

    def batch(self, samples: list[object]) -> object:
        return samples

    def encode_batch(self, batch: object) -> object:
        return batch


def picture(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 2), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_shards() -> None:
    with webdataset.ShardWriter("pretrain-%d.tar", maxcount=3, verbose=0) as shards:
        for number in range(4):
            said = [("human", f"<image>\nWhat is {number}?"), ("gpt", f"It is {number}.")]
            turns = [{"from": sender, "value": value} for sender, value in said]
            row = {
                "__key__": f"{'ab'[number % 2]}/{number}",
                "png": picture(number),
                "json": json.dumps(turns).encode(),
            }
            shards.write(row)


def prepare() -> None:
    """With the answers of Pai-Megatron-Patch's guide, and a sample excluded by hand."""
    options = ["--non-interactive", "--split-ratio", "1,1,0", "--sample-type", "VQASample", "--num-workers", "1"]
    try:
        energon(["prepare", ".", *options, "--field-map", json.dumps(FIELD_MAP)])
    except SystemExit as left:
        if left.code:
            raise
    split = Path(".nv-meta/split.yaml")
    split.write_text(split.read_text().replace("exclude: []", f"exclude: [{EXCLUDED}]"))


def read(split: str) -> list[list[object]]:
    """Key, question, answer and first pixel of each sample, by energon."""
    alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
    data = get_val_dataset(".", split_part=split, batch_size=1, worker_config=alone, task_encoder=AsTheyAre())
    samples = [sample for (sample,) in get_loader(data)]
    return [[s.__key__, s.context, s.answers, round(float(s.image[0, 0, 0]) * 255)] for s in samples]


if __name__ == "__main__":
    os.chdir(HERE)
    write_shards()
    prepare()
    Path("expected.json").write_text(json.dumps({split: read(split) for split in ("train", "val")}) + "\n")
    for made in (*HERE.glob("*.idx"), *HERE.glob(".nv-meta/index.*")):
        made.unlink()  # energon's own index, of which nothing is read here
