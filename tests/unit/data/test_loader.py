"""Rows to steps: the same for any number of workers, from any position on, with or without bad rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_core.data.batch import Batch
from llava_core.data.examples import ExampleBuilder
from llava_core.data.image_side import ImageSide
from llava_core.data.image_store import ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.loader import Batching, Step, StepLoader
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers.llava import LlavaJsonlReader
from llava_core.data.sampler import epoch_order
from llava_core.data.sources import Source, Sources
from llava_core.data.templates import BUILTIN_TEMPLATES
from llava_core.errors import DataError, TrainingError
from llava_core.testing.datasets import TinyParts
from llava_core.weights.tokenizer import load_tokenizer

GLOBAL_SIZE = 8
PACKED = Batching(GLOBAL_SIZE, 512, None, pad_id=0, image_size=24)
PADDED = Batching(GLOBAL_SIZE, None, 2, pad_id=0, image_size=24)

BAD_ROWS: dict[int, tuple[str, str]] = {
    3: ('{"id": "gone", "image": "gone.png", "conversations": [%s]}', "missing_image"),
    7: ('{"id": "half', "malformed_json"),
    8: ('{"id": "empty", "conversations": []}', "malformed_row"),
    14: ('{"id": "broken", "image": "broken.png", "conversations": [%s]}', "broken_image"),
    21: ('{"id": "two", "image": ["0.png", "1.png"], "conversations": [%s]}', "image_count"),
}
"""A line of the data file, and the reason it is refused for. Rows 7 and 8 cannot or do not matter for their ids."""
TURNS = '{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "Red."}'


@dataclass(frozen=True)
class Rows:
    """A data file, with what is needed to make loaders over it."""

    parts: TinyParts
    data: Path
    folder: Path

    def loader(
        self, num_workers: int = 0, batching: Batching = PACKED, max_bad: float = 1.0, output: str = "run"
    ) -> StepLoader:
        reader = LlavaJsonlReader(self.data)
        processor = ImageProcessor.from_folder(self.parts.vision, "pad")
        source = Source(reader, BUILTIN_TEMPLATES["v1"], ImageStore(self.parts.images, 10**6))
        builder = ExampleBuilder(
            sources=Sources([source]),
            tokenizer=load_tokenizer(self.parts.language),
            images=ImageSide(processor, tile_tokens=9),
            pad_id=0,
            vocab_size=320,
            max_length=256,
            overlong="truncate",
        )
        quarantine = Quarantine(self.folder / output / "quarantine.jsonl", max_bad)
        return StepLoader(
            builder,
            lambda epoch: epoch_order("shuffled", len(reader), 5, epoch),
            len(reader),
            batching,
            quarantine,
            num_workers,
        )

    def quarantined(self, output: str = "run") -> list[dict[str, Any]]:
        path = self.folder / output / "quarantine.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def good(parts: TinyParts, tmp_path: Path) -> Rows:
    lines = [json.dumps(row) for row in json.loads(parts.data.read_text())]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return Rows(parts, tmp_path / "data.jsonl", tmp_path)


@pytest.fixture
def bad(good: Rows) -> Rows:
    """The same rows, five of which cannot be used."""
    lines = good.data.read_text().split("\n")
    for row, (line, _) in BAD_ROWS.items():
        lines[row] = line.replace("%s", TURNS)
    good.data.write_text("\n".join(lines))
    (good.parts.images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    return good


def take(loader: StepLoader, count: int) -> list[Step]:
    return list(islice(loader, count))


def ids(steps: list[Step]) -> list[list[str]]:
    return [[id for batch in step.batches for id in batch.ids] for step in steps]


def assert_same_steps(found: list[Step], expected: list[Step]) -> None:
    assert len(found) == len(expected)
    for step, wanted in zip(found, expected, strict=True):
        assert step.counts == wanted.counts
        for batch, other in zip(step.batches, wanted.batches, strict=True):
            assert_same_batch(batch, other)


def assert_same_batch(batch: Batch, other: Batch) -> None:
    for field in fields(Batch):
        value, wanted = getattr(batch, field.name), getattr(other, field.name)
        assert torch.equal(value, wanted) if isinstance(value, Tensor) else value == wanted, field.name


@pytest.mark.parametrize("num_workers", [1, 2])
def test_any_number_of_workers_gives_the_same_steps(num_workers: int, bad: Rows) -> None:
    expected = take(bad.loader(), 7)
    assert_same_steps(take(bad.loader(num_workers, output="workers"), 7), expected)
    assert bad.quarantined("workers") == bad.quarantined()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_workers_leaves_the_global_generator_alone(num_workers: int, good: Rows) -> None:
    before = torch.get_rng_state()
    take(good.loader(num_workers), 6)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batching", [PACKED, PADDED], ids=["packed", "padded"])
def test_a_state_saved_after_any_step_continues_identically(batching: Batching, bad: Rows) -> None:
    expected = take(bad.loader(batching=batching), 12)  # three epochs, of 5 steps each
    saving = bad.loader(batching=batching)
    for done, _ in enumerate(islice(saving, 10), 1):
        state = json.loads(json.dumps(saving.state_dict()))
        fresh = bad.loader(batching=batching)
        fresh.load_state_dict(state)
        assert_same_steps(take(fresh, 2), expected[done : done + 2])
        assert fresh.epoch in (done // 5, (done + 1) // 5)


def test_workers_continue_where_none_left_off(good: Rows) -> None:
    expected = take(good.loader(), 7)
    first = good.loader()
    take(first, 3)
    fresh = good.loader(num_workers=2)
    fresh.load_state_dict(first.state_dict())
    assert_same_steps(take(fresh, 4), expected[3:])


def test_an_epoch_visits_each_row_once_and_the_last_step_takes_the_rest(good: Rows) -> None:
    steps = take(good.loader(), 5)
    assert [step.counts.samples for step in steps] == [8, 8, 8, 8, 4]
    assert sorted(id for step in ids(steps) for id in step) == sorted(f"row{i}" for i in range(36))
    assert good.loader().steps_per_epoch == 5


def test_bad_rows_are_listed_once_with_id_and_reason(bad: Rows) -> None:
    take(bad.loader(), 15)  # three epochs meet each of them three times
    take(bad.loader(), 5)  # and a restart once more
    listed = {row["index"]: row for row in bad.quarantined()}
    assert len(bad.quarantined()) == len(BAD_ROWS)
    assert {index: row["reason"] for index, row in listed.items()} == {i: why for i, (_, why) in BAD_ROWS.items()}
    assert {i: row["id"] for i, row in listed.items() if i not in (7, 8)} == {3: "gone", 14: "broken", 21: "two"}


def test_a_bad_row_is_never_replaced_and_moves_no_other(good: Rows, bad: Rows) -> None:
    order = epoch_order("shuffled", 36, 5, 0)
    rows = [order[start : start + GLOBAL_SIZE] for start in range(0, 36, GLOBAL_SIZE)]
    expected = [sorted(f"row{row}" for row in step if row not in BAD_ROWS) for step in rows]
    # Sorted within a step: packing has an order of its own there.
    assert [sorted(step) for step in ids(take(bad.loader(), 5))] == expected


def test_padded_micro_batches_keep_the_epochs_order(good: Rows) -> None:
    order = epoch_order("shuffled", 36, 5, 0)
    assert [id for step in ids(take(good.loader(batching=PADDED), 5)) for id in step] == [f"row{i}" for i in order]


def test_a_data_set_of_bad_rows_alone_is_an_error(bad: Rows) -> None:
    bad.data.write_text("\n".join(["{"] * 5))
    with pytest.raises(DataError, match="no row of the data set can be used"):
        take(bad.loader(), 10)


def test_too_many_bad_rows_stop_the_run(bad: Rows) -> None:
    lines = bad.data.read_text().split("\n")
    bad.data.write_text("\n".join(["{" if i % 3 == 0 else line for i, line in enumerate(lines)]))
    with pytest.raises(TrainingError, match="malformed_json") as raised:
        take(bad.loader(max_bad=0.1), 5)
    assert "quarantine.jsonl" in str(raised.value)


def test_no_bad_row_is_allowed_where_the_fraction_is_zero(bad: Rows) -> None:
    with pytest.raises(TrainingError, match="the limit is 0.0%"):
        take(bad.loader(max_bad=0.0), 5)


def test_another_data_set_is_refused(good: Rows) -> None:
    state = good.loader().state_dict()
    good.data.write_text(good.data.read_text() + "\n" + good.data.read_text().split("\n")[0])
    with pytest.raises(DataError, match="the order of samples cannot be continued"):
        good.loader().load_state_dict(state)


def test_packed_and_padded_batches_hold_the_same_samples(good: Rows) -> None:
    for packed, padded in zip(take(good.loader(), 5), take(good.loader(batching=PADDED), 5), strict=True):
        assert samples(packed) == samples(padded)
        assert replace(packed.counts, pad_tokens=0) == replace(padded.counts, pad_tokens=0)
        assert packed.counts.pad_tokens == 0


def samples(step: Step) -> dict[str, tuple[list[int], list[int], list[int], float]]:
    """Each sample's input ids, the positions that predict, their targets, and the sum of its pixels."""
    found = {}
    for batch in step.batches:
        sizes = list(batch.labels_per_sample)
        predicting, targets = batch.label_index.split(sizes), batch.targets.split(sizes)
        image = 0
        for i, id in enumerate(batch.ids):
            start, end = batch.cu_seqlens_host[i : i + 2]
            has_image = bool(((batch.image_index >= start) & (batch.image_index < end)).any())
            pixels = float(batch.pixels[image].sum()) if has_image else 0.0
            image += has_image
            tokens = batch.tokens[start:end].tolist()
            while tokens[-1] == 0:  # the pad id; a sample ends with its answer
                tokens.pop()
            found[id] = (tokens, (predicting[i] - start).tolist(), targets[i].tolist(), pixels)
    return found
