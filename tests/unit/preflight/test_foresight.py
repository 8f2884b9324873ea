"""Bad rows are foreseen to stop a run where its loader does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_core.config import RunConfig
from llava_core.errors import TrainingError
from llava_core.plugins import Registry
from llava_core.preflight.check import check_data
from llava_core.preflight.foresight import MOST_EPOCHS, Foresight, Rows, Stop, foresee
from llava_core.preflight.subject import Subject
from llava_core.testing.datasets import TinyParts
from llava_core.train.schedule import build_schedule
from tests.unit.preflight.conftest import settings


def never(steps: int, tokens: int) -> bool:
    return False


def loader_stops_in(config: RunConfig) -> Stop | None:
    """Where the loader stops a run, whose end is looked at as the training loop does."""
    loader = Subject.of(config, Registry.discover(), 1).loader
    schedule, stepped, done = build_schedule(config, loader.steps_per_epoch), iter(loader), 0
    while (done if schedule.unit == "steps" else loader.tokens) < schedule.total:
        try:
            next(stepped)
        except TrainingError:
            return Stop(loader.epoch + 1, done + 1)
        done += 1
    return None


ALL_OVER, AT_THE_END = range(0, 36, 4), range(28, 40)


@pytest.mark.parametrize(
    ("bad", "train", "data", "stops"),
    [
        pytest.param(ALL_OVER, {"epochs": 1}, {}, False, id="nine bad rows, one epoch"),
        pytest.param(ALL_OVER, {"epochs": 2}, {}, True, id="nine bad rows, two epochs"),
        pytest.param(ALL_OVER, {"max_steps": 5}, {}, False, id="nine bad rows, the steps of an epoch"),
        pytest.param(AT_THE_END, {"max_steps": 2}, {"order": "sequential"}, False, id="over before they come"),
        pytest.param(AT_THE_END, {"max_steps": 5}, {"order": "sequential"}, True, id="the last step is one of them"),
        pytest.param(AT_THE_END, {"max_tokens": 1000}, {"order": "sequential"}, False, id="few tokens"),
        pytest.param(ALL_OVER, {"max_tokens": 9000}, {}, True, id="many tokens"),
        pytest.param(ALL_OVER, {"epochs": 4}, {"max_bad_fraction": 0.225}, None, id="as many as may be"),
    ],
)
def test_a_run_is_foreseen_to_stop_where_its_loader_does(
    parts: TinyParts, tmp_path: Path, bad: range, train: dict[str, Any], data: dict[str, Any], stops: bool | None
) -> None:
    rows = [
        {"id": str(number), "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Blue."}]}
        for number in range(40)
    ]
    for number in bad:
        rows[number]["conversations"] = []
    (tmp_path / "data.json").write_text(json.dumps(rows))
    changes = {"train": {"max_steps": None, **train}, "data": {"path": str(tmp_path / "data.json"), **data}}
    config = settings(parts, tmp_path / "run", **changes)
    stop = loader_stops_in(config)
    found = check_data(Subject.of(config, Registry.discover(), 1), tmp_path / "check", 0, lambda: None)
    assert found.report["run"] == {"stops": stop and {"epoch": stop.epoch, "step": stop.step}, "whole": True}
    assert stops is None or bool(stop) == bool(found.problems) == stops
    if stop is not None:
        assert f"a run would stop in step {stop.step}, in epoch {stop.epoch}." in found.problems[0]


@pytest.mark.parametrize(("limit", "step"), [(0.0, 6), (0.2, 8), (0.5, None)])
def test_the_step_is_the_one_counted_by_hand(limit: float, step: int | None) -> None:
    """Rows 20 to 34 of 80 are bad, four a step. 0 stops at the first, in step 6; of 32 rows 12 are bad, which is 0.375,
    and ten at least."""
    is_bad = np.zeros(80, dtype=np.int64)
    is_bad[20:35] = 1
    rows = Rows(is_bad, 5 * (1 - is_bad))
    found = foresee(rows, lambda _: np.arange(80), 4, limit, lambda steps, tokens: steps >= 20)
    assert found == Foresight(None if step is None else Stop(1, step), whole=True)


def test_a_long_run_is_gone_through_in_part() -> None:
    """One bad row in 200, the last, at a limit of one in 200: never too many, and not looked at for ever."""
    is_bad = np.zeros(200, dtype=np.int64)
    is_bad[-1] = 1
    epochs: list[int] = []

    def order(epoch: int) -> Any:
        epochs.append(epoch)
        return np.arange(200)

    assert foresee(Rows(is_bad, is_bad), order, 8, 1 / 200, never) == Foresight(None, whole=False)
    assert epochs == list(range(MOST_EPOCHS))


def test_data_without_a_bad_row_stops_no_run() -> None:
    none = np.zeros(3, dtype=np.int64)
    assert foresee(Rows(none, none), lambda _: np.arange(3), 2, 0.0, never) == Foresight(None, whole=True)


def test_rows_have_the_tokens_of_their_samples() -> None:
    """Of a bad row, of one dropped for its length, and of one split in two."""
    rows = Rows.of(np.array([1, -1, 0, 2, 1]), np.array([5, 7, 8, 9]))
    assert rows.is_bad.tolist() == [0, 1, 0, 0, 0]
    assert rows.tokens.tolist() == [5, 0, 0, 15, 9]
