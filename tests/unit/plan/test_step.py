"""The step that is planned: what the busiest process gets of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava_core.data.packing import pack_evenly
from llava_core.data.tiles import DynamicTiles
from llava_core.engine.layout import Layout
from llava_core.errors import ConfigError
from llava_core.plan.step import PlannedStep, planned_batch
from tests.unit.plan.support import SPEC, run_config


@pytest.mark.parametrize(
    ("batch", "data", "expected"),
    [
        ({"global_size": 8, "micro_tokens": 1024}, 1, PlannedStep(512, 2, 8)),
        ({"global_size": 8, "micro_tokens": 1024}, 3, PlannedStep(512, 2, 3)),
        ({"global_size": 8, "micro_tokens": 1200}, 1, PlannedStep(400, 3, 8)),  # filled: packing leaves little room
        ({"global_size": 8, "micro_tokens": 4096}, 4, PlannedStep(512, 2, 2)),  # no more than a process has
        ({"global_size": 12, "micro_size": 2}, 4, PlannedStep(512, 2, 4)),  # six padded micro-batches for four
    ],
)
def test_shares_and_micro_batches(batch: dict[str, int], data: int, expected: PlannedStep) -> None:
    assert PlannedStep.of(run_config(batch=batch), Layout(shard=data)) == expected


def test_samples_of_a_typical_length() -> None:
    config = run_config(batch={"global_size": 8, "micro_tokens": 1024})
    assert PlannedStep.of(config, Layout(), 128) == PlannedStep(128, 8, 8)
    with pytest.raises(ConfigError, match="data.max_length = 512"):
        PlannedStep.of(config, Layout(), 513)


@pytest.mark.parametrize(
    ("batch", "pipeline", "expected"),
    [
        ({"global_size": 4, "micro_tokens": 4096}, 2, (2, 2)),
        ({"global_size": 9, "micro_tokens": 1024}, 2, (2, 5)),
        ({"global_size": 16, "micro_tokens": 2048}, 4, (4, 4)),
        ({"global_size": 4, "micro_size": 4}, 2, (4, 2)),
    ],
)
def test_a_pipelines_schedule_takes_many_micro_batches_over_which_packed_samples_are_spread(
    batch: dict[str, int], pipeline: int, expected: tuple[int, int]
) -> None:
    """As in `Batching.even_groups` with samples of 128 tokens, or of 512."""
    length = 512 if batch.get("micro_tokens") == 1024 else 128
    step = PlannedStep.of(run_config(batch=batch, parallel={"pipeline": pipeline}), Layout(pipeline=pipeline), length)
    assert (step.micro_samples, step.micro_batches) == expected
    assert step.micro_tokens == step.micro_samples * length
    if batch.get("micro_tokens"):
        groups = pack_evenly([length] * batch["global_size"], batch["micro_tokens"], step.micro_batches)
        assert (max(map(len, groups)), len(groups)) == expected


def test_a_micro_batch_has_an_image_a_sample_and_every_text_token_supervised() -> None:
    batch = planned_batch(SPEC, PlannedStep(512, 2, 2))
    assert (batch.counts.images, batch.counts.image_tokens, batch.counts.label_tokens) == (2, 128, 2 * (512 - 64))
    tiled = planned_batch(SPEC, PlannedStep(512, 2, 2, tiling=DynamicTiles(1, 12)))  # eight tiles would leave no text
    assert (tiled.counts.tiles, tiled.counts.image_tokens, len(tiled.pixels)) == (2 * 7, 2 * 7 * 64, 2 * 7)
    anyres = planned_batch(replace(SPEC, image_grid_pinpoints=((112, 224), (224, 224))), PlannedStep(512, 2, 2))
    assert (anyres.counts.tiles, anyres.counts.image_tokens, anyres.num_newlines) == (2 * 5, 2 * (64 + 16 * 17), 2 * 16)
    assert anyres.feature_index is not None
    assert anyres.feature_index.tolist() == list(range(2 * 5 * 64))
    too_short = planned_batch(SPEC, PlannedStep(64, 2, 2))
    assert (too_short.counts.images, too_short.counts.label_tokens) == (0, 2 * 63)
