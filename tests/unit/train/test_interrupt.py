"""Signals become a request to stop; a stop saves once and the next start goes on from there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_core.config import build_config
from llava_core.data.share import alone
from llava_core.testing.datasets import TinyParts
from llava_core.train import loop, resume
from llava_core.train.interrupt import StopRequest, stop_on_signals
from tests.unit.train.support import (
    assert_bit_equal,
    engine_tensors,
    metrics_rows,
    quiet,
    run_to_end,
    tiny_run,
    tiny_settings,
)


class StopAtLook(StopRequest):
    """A signal that comes just before the loop looks for the n-th time."""

    def __init__(self, look: int) -> None:
        super().__init__()
        self.looks_left = look

    def agree(self, gather: Callable[[int], list[int]]) -> bool:
        self.looks_left -= 1
        if self.looks_left <= 0:
            self.signal = signal.SIGTERM
        return super().agree(gather)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_request(number: signal.Signals, code: int) -> None:
    with stop_on_signals() as stop:
        assert not stop.agree(alone)
        os.kill(os.getpid(), number)
        assert stop.agree(alone)
        assert stop.exit_code == code


def test_a_signal_to_one_process_stops_all() -> None:
    other = StopRequest()
    assert other.agree(lambda own: [own, int(signal.SIGTERM)])
    assert other.exit_code == 143


def test_a_signal_while_others_are_awaited_is_told_at_the_next_look() -> None:
    stop = StopRequest()

    def slow(own: int) -> list[int]:
        stop.signal = signal.SIGTERM
        return [own, 0]

    assert not stop.agree(slow)
    assert stop.agree(alone)
    assert stop.exit_code == 143


def test_a_signal_after_the_last_look_finds_the_training_done(
    parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plot = loop.plot_loss

    def late(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        plot(folder)

    monkeypatch.setattr(loop, "plot_loss", late)
    config = build_config(tiny_settings(parts, tmp_path / "run", "train.max_steps=2"))
    done = loop.train_model(config, console=quiet())
    assert (done.exit_code, done.steps) == (0, 2)
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


def test_after_a_good_end_signals_are_ignored_if_asked() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with stop_on_signals(then_ignore=True):
            pass
        assert {signal.getsignal(number) for number in before} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with pytest.raises(KeyError), stop_on_signals(then_ignore=True):
        raise KeyError
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_first_signal_decides_the_exit_code() -> None:
    with stop_on_signals() as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.exit_code == 143


def test_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyError), stop_on_signals():
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("look", range(1, 6))  # before each of the four steps, and after the last
@pytest.mark.parametrize("every", ["null", "2"])
def test_whenever_the_signal_comes_the_last_step_is_saved_once(
    look: int, every: str, parts: TinyParts, tmp_path: Path
) -> None:
    overrides = ("train.max_steps=4", f"checkpoint.every_steps={every}", "checkpoint.keep=null")
    run = tiny_run(parts, tmp_path / "run", *overrides)
    taken = run_to_end(run, StopAtLook(look))
    assert len(taken) == look - 1
    saved = [int(path.name.removeprefix("step-")) for path in resume.checkpoint_folder(run).glob("step-*")]
    due = {2, 4} if every == "2" else set()
    assert sorted(saved) == sorted(step for step in due | {len(taken)} if 0 < step <= len(taken))
    again = tiny_run(parts, tmp_path / "run", *overrides)
    assert len(run_to_end(again)) == 4 - len(taken)
    whole = tiny_run(parts, tmp_path / "whole", *overrides)
    run_to_end(whole)
    assert_bit_equal(engine_tensors(again), engine_tensors(whole))
    assert metrics_rows(tmp_path / "run") == metrics_rows(tmp_path / "whole")
