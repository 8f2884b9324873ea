"""What share of a step's work is real: samples as long as those of LLaVA-1.5's 665k, in micro-batches of this library.

    python benchmarks/packing.py [--text-scale 1.0]

The lengths are a model, not the data: LLaVA-1.5's published composition (arXiv:2310.03744, table 7), each part with
rounds and words as its own paper counts them, and lengths of LLaVA-Instruct by its files' published sizes. Text is
drawn around that; an image is 576 tokens, a sample has at most 2048. `--text-scale` makes all texts longer or shorter.
The share of real tokens is that of the micro-batches' own counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from llava_core.data.batch import Batch, Counts, Example
from llava_core.data.loader import Batching
from llava_core.data.packing import pack_samples
from llava_core.data.readers.index import IntArray
from llava_core.data.sampler import Grouping, Order, epoch_order
from llava_core.data.share import Share
from llava_core.engine.pipeline import num_micro_batches

VISUAL_TOKENS, MAX_LENGTH = 576, 2048
SYSTEM_TOKENS, ROUND_TOKENS = 36, 9  # Vicuna's system text with BOS; `USER:`, `ASSISTANT:` and `</s>`
GLOBAL_SIZE, NUM_ROWS = 128, 128 * 120


class Part(NamedTuple):
    """A part of the mixture.

    Attributes:
        thousands: rows.
        rounds: mean number of questions of a row; a row has at least one.
        varies: whether the number of rounds is drawn, as Poisson's, or is always the same.
        question, answer: mean tokens of each.
        once: tokens that a row has once, as the prompt for the answer's form.
        spread: of the logarithm of a text's length.
    """

    name: str
    thousands: int
    rounds: float
    varies: bool
    question: float
    answer: float
    once: float = 0
    spread: float = 0.3
    has_image: bool = True


PARTS = (
    # 126 MB, 20.5 MB and 79.6 MB of JSON: 2.2, 0.9 and 1.0 kB a row with the JSON's own characters.
    Part("LLaVA-Instruct, conversations", 58, 3.5, True, 13, 70, spread=0.5),
    Part("LLaVA-Instruct, descriptions", 23, 1, False, 15, 125),
    Part("LLaVA-Instruct, reasoning", 77, 1, False, 20, 165),
    # Text alone; what passes 2048 tokens was cut.
    Part("ShareGPT", 40, 3, True, 60, 350, spread=1.0, has_image=False),
    # 443,757 questions on 82,783 images, 6.2 words.
    Part("VQAv2", 83, 5.4, True, 8, 2, once=11),
    # 943,000 balanced questions on 72,140 images.
    Part("GQA", 72, 13, True, 11, 2, once=11),
    Part("OKVQA", 9, 1, False, 10, 2, once=11),
    # 1,002,146 questions on 207,572 images.
    Part("OCRVQA", 80, 4.8, True, 9, 6, once=11),
    # One question with its choices, each four times, the choices in another order.
    Part("A-OKVQA", 66, 1, False, 35, 1, once=14),
    Part("TextCaps", 22, 1, False, 60, 17, spread=0.5),
    # Boxes of four decimals; rows were cut to fewer than ten rounds.
    Part("RefCOCO", 48, 5, True, 36, 18),
    # Ten regions of each image.
    Part("Visual Genome", 86, 10, False, 30, 18),
)


class Drawn(NamedTuple):
    """Rows: their lengths in tokens, images included, and what groups them (negative without an image)."""

    lengths: IntArray
    modality_lengths: IntArray
    has_image: np.ndarray


def draw_rows(text_scale: float) -> Drawn:
    """NUM_ROWS rows of the mixture."""
    rng = np.random.default_rng(0)
    weights = np.array([part.thousands for part in PARTS], float)
    which = rng.choice(len(PARTS), NUM_ROWS, p=weights / weights.sum())
    text = np.array([_draw_text(PARTS[number], rng) for number in which]) * text_scale
    has_image = np.array([PARTS[number].has_image for number in which])
    lengths = np.minimum(SYSTEM_TOKENS + text + VISUAL_TOKENS * has_image, MAX_LENGTH).astype(np.int64)
    words = np.maximum(text * 0.75, 1).astype(np.int64)
    return Drawn(lengths, np.where(has_image, words, -words), has_image)


def _draw_text(part: Part, rng: np.random.Generator) -> float:
    rounds = 1 + rng.poisson(part.rounds - 1) if part.varies else int(part.rounds)
    noise = rng.lognormal(-(part.spread**2) / 2, part.spread, (2, rounds))  # of mean 1
    return float(part.once + rounds * ROUND_TOKENS + (noise * [[part.question], [part.answer]]).sum())


@dataclass(frozen=True)
class Mode:
    """How a run forms its micro-batches."""

    name: str
    order: Order
    num_shares: int
    batching: Batching


def modes() -> Iterator[Mode]:
    for num_shares in (1, 8):
        for size in (8192, 16384):
            for order in ("shuffled", "modality_length"):
                yield Mode(f"packed, micro_tokens {size}", order, num_shares, _batching(micro_tokens=size))
        for order in ("shuffled", "modality_length"):
            yield Mode("padded, micro_size 16", order, num_shares, _batching(micro_size=16))
    for num_shares in (1, 4, 8):
        fill = partial(num_micro_batches, num_processes=2, interleaved=False)
        for size in (2048, 4096, 8192, 16384):
            even = Batching(GLOBAL_SIZE, size, None, 0, 1, one_size=True, num_batches=fill)
            yield Mode(f"pipeline of 2, micro_tokens {size}", "modality_length", num_shares, even)


def _batching(*, micro_tokens: int | None = None, micro_size: int | None = None) -> Batching:
    return Batching(GLOBAL_SIZE, micro_tokens, micro_size, pad_id=0, image_size=1)


class Found(NamedTuple):
    """Of an epoch.

    Attributes:
        real: share of real tokens in what is computed.
        full: share of the largest micro-batch that a micro-batch fills on average.
        slowest: tokens that the process with most of a step computes, over the mean of all processes.
    """

    real: float
    full: float
    slowest: float


def measure(mode: Mode, rows: Drawn) -> Found:
    batching = mode.batching
    grouping = None
    if mode.order != "shuffled":
        grouping = Grouping(rows.modality_lengths.tolist(), batching.chunk, GLOBAL_SIZE // batching.chunk)
    order = epoch_order(mode.order, NUM_ROWS, seed=0, epoch=0, grouping=grouping)
    shares = [Share(i, mode.num_shares).of(NUM_ROWS, GLOBAL_SIZE, batching.chunk) for i in range(mode.num_shares)]
    total, num_batches, most, mean = Counts(), 0, 0.0, 0.0
    for start in range(0, NUM_ROWS, GLOBAL_SIZE):
        step = slice(start, start + GLOBAL_SIZE)
        every = _micro_batches(batching, [_examples(rows, order[step][share[step]]) for share in shares])
        each = batching.num_batches(max(map(len, every)))
        own_counts = [
            sum((batch.counts for batch in (*own, *batching.fillers(each - len(own), own))), Counts()) for own in every
        ]
        computed = [counts.tokens + counts.pad_tokens for counts in own_counts]
        total, num_batches = sum(own_counts, total), num_batches + each * len(shares)
        most, mean = most + max(computed), mean + sum(computed) / len(computed)
    room = num_batches * (batching.micro_tokens or MAX_LENGTH * (batching.micro_size or 0))
    return Found(total.tokens / (total.tokens + total.pad_tokens), total.tokens / room, most / mean)


def _micro_batches(batching: Batching, examples: Sequence[Sequence[Example]]) -> list[tuple[Batch, ...]]:
    """Of a step's examples, by process."""
    groups = batching.groups_of_all([[example.length for example in own] for own in examples])
    return [batching.build(own, formed) for own, formed in zip(examples, groups, strict=True)]


def _examples(rows: Drawn, own: IntArray) -> list[Example]:
    return [_example(int(rows.lengths[row]), bool(rows.has_image[row])) for row in own]


def _example(length: int, has_image: bool) -> Example:
    """A sample of this length. Of its image only the positions matter here."""
    tokens = torch.zeros(length, dtype=torch.int64)
    return Example(
        "", tokens, torch.ones(length, dtype=torch.bool), (0,) * has_image, None, (VISUAL_TOKENS,) * has_image
    )


def describe(rows: Drawn) -> str:
    text = rows.lengths - VISUAL_TOKENS * rows.has_image
    points = np.percentile(rows.lengths, [5, 50, 95]).astype(int).tolist()
    return (
        f"{NUM_ROWS} rows, global_size {GLOBAL_SIZE}: {rows.lengths.mean():.0f} tokens on average "
        f"({text.mean():.0f} of text), 5, 50 and 95 % at {points}"
    )


def least_micro_batches(rows: Drawn, size: int) -> tuple[int, int]:
    """Of all steps in the rows' order: micro-batches formed, and the fewest that the tokens could fill."""
    steps = [rows.lengths[start : start + GLOBAL_SIZE].tolist() for start in range(0, NUM_ROWS, GLOBAL_SIZE)]
    return sum(len(pack_samples(step, size)) for step in steps), sum(-(-sum(step) // size) for step in steps)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text-scale", type=float, default=1.0)
    rows = draw_rows(parser.parse_args(arguments).text_scale)
    table = Table(title=describe(rows))
    for column in ("micro-batches", "data.order", "processes", "real tokens", "filled", "slowest / mean"):
        table.add_column(column)
    for mode in modes():
        found = measure(mode, rows)
        shares = f"{found.real:.2%}", f"{found.full:.1%}", f"{found.slowest:.3f}"
        table.add_row(mode.name, mode.order, str(mode.num_shares), *shares)
    Console(width=110).print(table)
    for size in (8192, 16384):
        formed, fewest = least_micro_batches(rows, size)
        print(f"micro_tokens {size}: {formed} micro-batches, at least {fewest} are needed")


if __name__ == "__main__":
    main()
