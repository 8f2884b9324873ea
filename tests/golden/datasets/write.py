"""Writes a folder beside it with the installed release of Hugging Face's `datasets`, and what that reads of it.

`python tests/golden/datasets/write.py` needs datasets and Pillow, which no test needs. Written with 5.2.0, 2.14.7
and 1.18.4, the last of which knew no images.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import datasets
from PIL import Image

HERE = Path(__file__).parent
RELEASE = tuple(map(int, datasets.__version__.split(".")[:2]))


def picture(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 2), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def row(number: int) -> dict[str, object]:
    said = [("human", f"<image>\nWhat is {number}?"), ("gpt", f"It is {number}.")]
    found: dict[str, object] = {
        "id": str(number),
        "conversations": [{"from": sender, "value": value} for sender, value in said],
        "length": number,
    }
    if RELEASE >= (2, 0):
        found["image"] = {"bytes": picture(number), "path": f"{number}.png"} if number % 3 else None
    return found


def build(numbers: range) -> datasets.Dataset:
    rows = [row(number) for number in numbers]
    built = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
    if RELEASE >= (2, 0):
        built = built.cast_column("image", datasets.Image())
    return built


def expected(saved: datasets.Dataset) -> list[dict[str, object]]:
    """What the library itself reads; of an image its first pixel."""
    rows = []
    for index in range(len(saved)):
        read = dict(saved[index])
        if read.get("image") is not None:
            read["image"] = list(read["image"].getpixel((0, 0)))
        rows.append(read)
    return rows


def main() -> None:
    folder = HERE / datasets.__version__
    shutil.rmtree(folder, ignore_errors=True)
    whole = datasets.DatasetDict({"train": build(range(7)).shuffle(seed=0), "test": build(range(7, 9))})
    whole["train"] = whole["train"].select(range(6))
    options = {"num_shards": {"train": 2, "test": 1}} if RELEASE >= (2, 8) else {}
    whole.save_to_disk(str(folder), **options)
    if RELEASE >= (2, 0):
        whole["test"].save_to_disk(str(folder / "alone"))  # no DatasetDict
    found = {split: expected(read) for split, read in datasets.load_from_disk(str(folder)).items()}
    (HERE / f"{datasets.__version__}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
