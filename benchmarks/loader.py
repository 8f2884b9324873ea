"""From files to ready micro-batches: `StepLoader` over each reader, against the peer's own loader.

    python benchmarks/loader.py [--rows 256] [--rounds 3]

CPU seconds of one thread (`time.process_time`) without decoding processes, warm, the contenders taking turns in one
run, the best round of each. Both read the same files in their order and use the same tokenizer; that they read the same
pictures and as many tokens is checked first. A peer that is not installed is left out: energon's and Megatron's rows
need megatron-energon and megatron-core, the row `datasets` needs that library.

The last table says what one accelerator takes: the work of a sample by this library's own count, at TERAFLOPS.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, util
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import loader_data as data
import numpy as np
import torch
from loader_peers import Chats, Pictures, documents
from rich.console import Console
from rich.table import Table
from transformers import LlavaConfig

from llava_core.data.batch import Batch
from llava_core.data.conversation import Template
from llava_core.data.examples import ExampleBuilder
from llava_core.data.image_side import ImageSide
from llava_core.data.image_store import ImageStore
from llava_core.data.images import Aspect, ImageProcessor
from llava_core.data.loader import Batching, StepLoader
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers import Reader
from llava_core.data.readers.energon import EnergonReader
from llava_core.data.readers.instructions import AlpacaReader, ShareGptReader
from llava_core.data.readers.llava import LlavaJsonReader
from llava_core.data.readers.megatron import MegatronReader
from llava_core.data.readers.parquet import ParquetReader
from llava_core.data.readers.saved_datasets import SavedDatasetReader
from llava_core.data.readers.webdataset import WebdatasetReader
from llava_core.data.sources import Source, Sources
from llava_core.data.templates import PLAIN, V1, tokenizer_template
from llava_core.train.flops import step_flops
from llava_core.weights.source import folder_spec

VISUAL_TOKENS, MICRO_TOKENS, GLOBAL_SIZE = 576, 8192, 32
TERAFLOPS = 400
STAGES = {"stage 1": {"projector"}, "stage 2": {"projector", "language"}}


class Contest(NamedTuple):
    """A data set and its two loaders: each call gives the batches of all of it, once."""

    name: str
    peer_name: str
    ours: Callable[[], Iterator[Batch]]
    peer: Callable[[], Iterator[dict[str, torch.Tensor]]]


class Read(NamedTuple):
    """What was read, without padding. `pictures` names each image by the sum of its pixels, in any order."""

    tokens: int
    pictures: list[float]


class Ours:
    """Loaders of this library over data in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pictures(self, reader: Reader, tokenizer: Any, template: Template, aspect: Aspect, images: Path | None) -> Any:
        """With the image processor of LLaVA-1.5."""
        side = ImageSide(ImageProcessor(336, (336, 336), aspect=aspect), VISUAL_TOKENS)
        return self._loader(Source(reader, template, ImageStore(images, 10**8)), tokenizer, side)

    def texts(self, reader: Reader, tokenizer: Any) -> Any:
        """In the tokenizer's chat template; token ids as they are."""
        template = None if reader.content == "tokens" else tokenizer_template(tokenizer)
        return self._loader(Source(reader, template), tokenizer, None)

    def _loader(self, source: Source, tokenizer: Any, images: ImageSide | None) -> Callable[[], Iterator[Batch]]:
        builder = ExampleBuilder(Sources([source]), tokenizer, images, 0, len(tokenizer), MICRO_TOKENS, None)
        batching = Batching(GLOBAL_SIZE, MICRO_TOKENS, None, pad_id=0, image_size=336 if images else 1)
        quarantine, rows = Quarantine(self.folder / "quarantine.jsonl", 0.0), np.arange(source.num_rows)
        loader = StepLoader(builder, lambda epoch: rows, len(rows), batching, quarantine, num_workers=0)
        return lambda: (batch for step in loader.from_start() for batch in step.batches)


def picture_contests(folder: Path, tokenizer: Any, num_rows: int) -> Iterator[Contest]:
    ours, pictures, writer = Ours(folder), data.write_pictures(folder / "images", num_rows), data.Writer()
    data.write_llava(folder, pictures, writer)
    data.write_shards(folder / "shards", pictures, writer)
    for name, template, aspect in (("captions", PLAIN, "square"), ("talks", V1, "pad")):
        path, images = folder / f"{name}.json", folder / "images"
        peer = Pictures(tokenizer, pad=aspect == "pad", captions=name == "captions")
        yield Contest(
            f"llava_json, {'stage 1' if name == 'captions' else 'stage 2'}",
            "LlavaProcessor in a DataLoader",
            ours.pictures(LlavaJsonReader(path), tokenizer, template, aspect, images),
            lambda peer=peer, path=path, images=images: peer.json_rows(path, images),
        )
    peer, shards = Pictures(tokenizer, pad=True, captions=False), folder / "shards"
    tars = ours.pictures(WebdatasetReader(shards), tokenizer, V1, "pad", None)
    yield Contest("webdataset", "webdataset, LlavaProcessor", tars, lambda: peer.shards(shards))
    if installed("megatron.energon"):
        data.describe_shards(shards)
        described = ours.pictures(EnergonReader(shards), tokenizer, V1, "pad", None)
        yield Contest("energon", "energon, LlavaProcessor", described, lambda: peer.energon(shards))


def text_contests(folder: Path, tokenizer: Any, num_rows: int) -> Iterator[Contest]:
    ours, chats, writer = Ours(folder), Chats(tokenizer), data.Writer()
    data.write_texts(folder, num_rows, writer)
    alpaca, talks = folder / "alpaca.json", folder / "sharegpt.json"
    template = "chat template in a DataLoader"
    yield Contest("alpaca", template, ours.texts(AlpacaReader(alpaca), tokenizer), lambda: chats.alpaca(alpaca))
    yield Contest("sharegpt", template, ours.texts(ShareGptReader(talks), tokenizer), lambda: chats.sharegpt(talks))
    table = folder / "talks.parquet"
    yield Contest(
        "parquet", "pyarrow, chat template", ours.texts(ParquetReader(table), tokenizer), lambda: chats.parquet(table)
    )
    if installed("datasets"):
        saved = folder / "talks"
        mapped = ours.texts(SavedDatasetReader(saved), tokenizer)
        yield Contest("datasets", "datasets, chat template", mapped, lambda: chats.saved(saved))
    if installed("megatron.core"):
        prefix = folder / "documents"
        data.write_documents(prefix, tokenizer, num_rows, writer)
        pair = ours.texts(MegatronReader(prefix), tokenizer)
        yield Contest("megatron", "megatron-core, DataLoader", pair, lambda: documents(prefix, tokenizer.pad_token_id))


def installed(module: str) -> bool:
    try:
        found = util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is a part of
        found = False
    if not found:
        print(f"{module} is not installed: its row is left out")
    return found


def read_ours(batches: Iterator[Batch]) -> Read:
    tokens, pictures = 0, []
    for batch in batches:
        tokens += batch.counts.tokens
        pictures += picture_sums(batch.pixels[: batch.counts.images])
    return Read(tokens, sorted(pictures))


def read_peer(batches: Iterator[dict[str, torch.Tensor]]) -> Read:
    tokens, pictures = 0, []
    for batch in batches:
        tokens += int(batch["attention_mask"].sum())
        pictures += picture_sums(batch.get("pixel_values", torch.zeros(0)))
    return Read(tokens, sorted(pictures))


def picture_sums(pixels: torch.Tensor) -> list[float]:
    """The pixels are bit-equal, so their sums are."""
    return [float(image.sum(dtype=torch.float64)) for image in pixels]


def check_same(name: str, ours: Read, peer: Read) -> None:
    """The same pictures; and as many tokens but for the `▁` that a tokenizer puts around an image."""
    assert ours.pictures == peer.pictures, f"{name}: other pictures than the peer's"
    difference = abs(ours.tokens - peer.tokens)
    assert difference <= 2 * len(ours.pictures), f"{name}: {ours.tokens} tokens, {peer.tokens} of the peer"


class Measured(NamedTuple):
    """The best CPU seconds of each, and what they read."""

    ours: float
    peer: float
    read: Read


def measure(contest: Contest, rounds: int) -> Measured:
    ours, peer = read_ours(contest.ours()), read_peer(contest.peer())  # warms up
    check_same(contest.name, ours, peer)
    spent = [(seconds(contest.ours), seconds(contest.peer)) for _ in range(rounds)]
    return Measured(*(min(of_one) for of_one in zip(*spent, strict=True)), ours)


def seconds(start: Callable[[], Iterator[Any]]) -> float:
    batches = start()
    began = time.process_time()
    for _ in batches:
        pass
    return time.process_time() - began


def sample_flops(ours: Callable[[], Iterator[Batch]], trainable: set[str]) -> float:
    """The work of a sample of LLaVA-1.5 7B, on average."""
    with TemporaryDirectory() as folder:
        LlavaConfig(image_seq_length=VISUAL_TOKENS).save_pretrained(folder)  # its defaults are that model's
        spec = folder_spec(Path(folder))
    batches = list(ours())
    return step_flops(spec, trainable, batches) / sum(batch.counts.samples for batch in batches)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="of each data set")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = Table("reader", "peer", "peer images/s", "ours", "peer tokens/s", "ours", "ratio", title=versions())
    needs = Table("LLaVA-1.5 7B", "TFLOP/sample", f"images/s at {TERAFLOPS} TFLOP/s", "cores of ours", "of the peer")
    with TemporaryDirectory() as name:
        llama, llama3 = data.train_tokenizers(Path(name))
        lengths = [f"{characters_per_token(tokenizer):.1f}" for tokenizer in (llama, llama3)]
        print(f"characters a token: {lengths[0]} in pictures' texts, {lengths[1]} in the others")
        pictures = picture_contests(Path(name), llama, options.rows)
        for contest in chain(pictures, text_contests(Path(name), llama3, options.rows)):
            found = measure(contest, options.rounds)
            add_row(table, contest, found)
            add_need(needs, contest, found)
    Console(width=140).print(table, needs)


def characters_per_token(tokenizer: Any) -> float:
    texts = data.prose()
    return sum(map(len, texts)) / sum(len(ids) for ids in tokenizer(texts)["input_ids"])


def add_row(table: Table, contest: Contest, found: Measured) -> None:
    images, spent = len(found.read.pictures), (found.peer, found.ours)
    per_second = [f"{images / one:.0f}" if images else "" for one in spent]
    per_second += [f"{found.read.tokens / one:,.0f}" for one in spent]
    table.add_row(contest.name, contest.peer_name, *per_second, f"{found.peer / found.ours:.2f}")


def add_need(table: Table, contest: Contest, found: Measured) -> None:
    stage = contest.name.rpartition(", ")[2]
    if stage in STAGES:
        flops = sample_flops(contest.ours, STAGES[stage])
        rate = TERAFLOPS * 1e12 / flops
        cores = [f"{rate * spent / len(found.read.pictures):.2f}" for spent in (found.ours, found.peer)]
        table.add_row(stage, f"{flops / 1e12:.1f}", f"{rate:.1f}", *cores)


def versions() -> str:
    names = (
        "torch",
        "transformers",
        "pillow",
        "webdataset",
        "megatron-energon",
        "megatron-core",
        "pyarrow",
        "datasets",
    )
    found = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


if __name__ == "__main__":
    main()
