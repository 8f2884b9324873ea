"""Images per second on one core, file bytes to pixels: transformers' PIL processors against `ImageProcessor`.

CPU time of one thread, warm, the contenders in turn within one run. `python benchmarks/images.py`
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from transformers import LlavaImageProcessorPil

from llava_core.data.image_store import ImageStore
from llava_core.data.images import Aspect, ImageProcessor

NUM_IMAGES = 48
ROUNDS = 5
# A size whose crop is cut out by Pillow's box, and its portrait, where that would not be exact.
SIZES = ((500, 400), (400, 500))
ASPECTS: tuple[Aspect, ...] = ("square", "pad")


def write_jpegs(folder: Path, width: int, height: int) -> list[Path]:
    """Smooth colours with some noise: about as hard to decode as a photograph."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{width}x{height}-{i}.jpg" for i in range(NUM_IMAGES)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (10, 13, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + rng.integers(-12, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path, quality=90)
    return paths


def build_contenders(folder: Path, aspect: Aspect) -> dict[str, Callable[[Path], torch.Tensor]]:
    crop = {"height": 336, "width": 336}
    theirs = LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=crop, do_pad=aspect == "pad")
    ours, store = ImageProcessor(336, (336, 336), aspect=aspect), ImageStore(folder, max_pixels=10**8)

    def read_theirs(path: Path) -> torch.Tensor:
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        return theirs(image, return_tensors="pt")["pixel_values"][0]

    return {"transformers": read_theirs, "llava-core": lambda path: ours(store.open(path.name))}


def measure(contenders: dict[str, Callable[[Path], torch.Tensor]], paths: list[Path]) -> dict[str, float]:
    """Images per CPU second of each contender, its best round."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS + 1):  # the first is not the best: it warms up
        for name, read in contenders.items():
            start = time.process_time()
            for path in paths:
                read(path)
            best[name] = min(best[name], time.process_time() - start)
    return {name: len(paths) / seconds for name, seconds in best.items()}


def main() -> None:
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, Pillow {PIL.__version__}, {NUM_IMAGES} JPEGs, 336 x 336")
    print(f"{'image':10}{'aspect':8}{'transformers':>14}{'llava-core':>12}{'ratio':>7}   images per CPU second")
    with TemporaryDirectory() as name:
        for width, height in SIZES:
            paths = write_jpegs(Path(name), width, height)
            for aspect in ASPECTS:
                contenders = build_contenders(Path(name), aspect)
                first, second = (read(paths[0]) for read in contenders.values())
                assert torch.equal(first, second)
                theirs, ours = measure(contenders, paths).values()
                print(f"{f'{width}x{height}':10}{aspect:8}{theirs:14.0f}{ours:12.0f}{ours / theirs:7.2f}")


if __name__ == "__main__":
    main()
