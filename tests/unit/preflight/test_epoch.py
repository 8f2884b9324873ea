"""What the replay says of an epoch is what the loader does in it."""

from __future__ import annotations

import json
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from llava_core.config import RunConfig
from llava_core.data.loader import Step, StepLoader
from llava_core.data.quarantine import Quarantine
from llava_core.data.share import Share
from llava_core.plugins import Registry
from llava_core.preflight.check import check_data
from llava_core.preflight.subject import Subject
from llava_core.testing.datasets import TinyParts
from tests.unit.preflight.conftest import settings

PACKED: dict[str, Any] = {"global_size": 8, "micro_tokens": 512}
PADDED: dict[str, Any] = {"global_size": 8, "micro_tokens": None, "micro_size": 2}


def steps_of(subject: Subject, folder: Path) -> list[list[Step]]:
    """The first epoch's steps of each share, as the loader makes them."""
    loader, count = subject.loader, subject.num_shares
    barrier, told = threading.Barrier(count), [None] * count

    def own(index: int) -> list[Step]:
        def gather(value: Any) -> list[Any]:
            told[index] = value
            barrier.wait(60)
            heard = list(told)
            barrier.wait(60)
            return heard

        quarantine = Quarantine(folder / f"{index}.jsonl", 1.0)
        share = Share(index, count, gather)
        alone = StepLoader(loader.builder, loader.order, loader.num_rows, loader.batching, quarantine, 0, share)
        return list(islice(alone, alone.steps_per_epoch))

    found: dict[int, list[Step]] = {}
    threads = [threading.Thread(target=lambda i=index: found.update({i: own(i)})) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [found[index] for index in range(count)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("order", ["shuffled", "modality_length"])
def test_micro_batches_are_those_of_the_loader(
    parts: TinyParts, tmp_path: Path, world_size: int, batch: dict[str, Any], order: str
) -> None:
    config = settings(parts, tmp_path / "run", batch=batch, data={"order": order, "max_bad_fraction": 1.0})
    assert_as_loader(config, tmp_path, world_size)


@pytest.mark.parametrize("batch", [PACKED, PADDED], ids=["packed", "padded"])
def test_micro_batches_of_a_pipeline_have_one_size_in_each_step(
    parts: TinyParts, tmp_path: Path, batch: dict[str, Any]
) -> None:
    config = settings(parts, tmp_path / "run", batch=batch, data={"max_bad_fraction": 1.0, "overlong": "split"})
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"pipeline": 2})})
    shares = assert_as_loader(config, tmp_path, 4)
    lengths = [{batch.num_tokens for batch in step.batches} for steps in shares for step in steps]
    assert all(len(of_step) == 1 for of_step in lengths)
    assert len(set.union(*lengths)) > 4


def test_images_in_tiles_take_as_many_tokens_as_in_the_loader(parts: TinyParts, tmp_path: Path) -> None:
    tiles = {"image_aspect": "tiles", "max_tiles": 4, "max_bad_fraction": 1.0}
    assert_as_loader(settings(parts, tmp_path / "run", data=tiles), tmp_path, 1)
    report = json.loads((tmp_path / "check/check.json").read_text())
    assert report["tokens"]["image"] > 9 * report["samples"]["images"]  # 9 of a single tile
    assert report["images"]["reasons"] == {"missing_image": 2, "broken_image": 1}


def assert_as_loader(config: RunConfig, folder: Path, world_size: int) -> list[list[Step]]:
    subject = Subject.of(config, Registry.discover(), world_size)
    epoch = check_data(subject, folder / "check", 0, lambda: None).report["epoch"]
    shares = steps_of(subject, folder)
    batches = [batch for steps in shares for step in steps for batch in step.batches]
    counts = [step.counts for step in shares[0]]
    assert epoch["data_parallel"] == len(shares)
    assert epoch["steps"] == len(shares[0])
    assert epoch["micro_batches"] == len(batches)
    assert epoch["computed_tokens"] == sum(batch.cu_seqlens_host[-1] for batch in batches)
    assert epoch["samples"] == sum(count.samples for count in counts)
    assert epoch["tokens"] == sum(count.tokens for count in counts)
    assert epoch["real_share"] == epoch["tokens"] / epoch["computed_tokens"]
    return shares
