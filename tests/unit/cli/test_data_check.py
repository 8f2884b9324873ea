"""`llava-core data check`: its exit codes, what it says, and that the run it looks at is left alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from llava_core.preflight.report import RowProgress
from llava_core.testing.datasets import TinyParts, tiny_parts
from tests.unit.cli.support import run


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    """36 rows, one of them without its image."""
    parts = tiny_parts(tmp_path_factory.mktemp("parts"), num_rows=36)
    (parts.images / "3.png").unlink()
    return parts


@pytest.fixture
def config(parts: TinyParts, tmp_path: Path) -> Path:
    settings = parts.settings(tmp_path / "run")
    settings["train"] = {"trainable": ["projector"], "max_steps": 1, "precision": "fp32"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def test_it_shows_a_sample_and_the_numbers(capsys, config: Path, tmp_path: Path) -> None:
    done = run(capsys, "data", "check", config, "--workers", "0")
    assert done.code == 0, done.err
    assert "first sample, row0" in done.out
    assert "⟦ It is" in done.out
    assert "missing_image" in done.out
    assert "36 of 36 rows" in done.out
    report = json.loads((tmp_path / "run/check/check.json").read_text())
    assert report["rows"]["bad"] == 1
    assert (tmp_path / "run/check/lengths.png").read_bytes().startswith(b"\x89PNG")


def test_strict_takes_no_bad_row(capsys, config: Path, tmp_path: Path) -> None:
    given = (config, "--workers", "0", "--output", tmp_path / "found", "--strict")
    done = run(capsys, "data", "check", *given)
    assert (done.code, "--strict: 1 bad rows" in done.out) == (2, True)
    assert len((tmp_path / "found/quarantine.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_would_stop_a_run_ends_with_2(capsys, config: Path) -> None:
    """Not the run's one step, which has no bad row."""
    given = (config, "data.max_bad_fraction=0", "--workers", "0")
    assert run(capsys, "data", "check", *given).code == 0
    done = run(capsys, "data", "check", *given, "train.max_steps=5")
    assert done.code == 2
    assert "problem: 1 of 36 rows cannot be used (1 missing_image)" in done.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_word_and_no_file(
    capsys, monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    advance = RowProgress.__call__

    def advance_and_signal(progress: RowProgress) -> None:
        advance(progress)
        if progress.done == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RowProgress, "__call__", advance_and_signal)
    done = run(capsys, "data", "check", config, "--workers", "0", "--output", tmp_path / "found")
    assert done.code == 128 + number
    assert done.err == "interrupted after 5 of 36 rows; no report was written\n"
    assert list((tmp_path / "found").iterdir()) == []


@pytest.mark.parametrize("name", ["file", "a" * 300])
def test_a_folder_that_cannot_be_is_named_by_its_option(capsys, config: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    done = run(capsys, "data", "check", config, "--workers", "0", "--output", tmp_path / name)
    assert (done.code, f"error: --output {tmp_path / name}: " in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=/no/such.json"], "data.path = /no/such.json: no such file or folder"),
        (["data.reader=llava_jsno"], "llava_jsno"),
        (["data.template=v2"], "v2"),
        (["data.max_length=100000", "batch.micro_tokens=100000"], "the model has"),
        (["data.max_lenght=100"], "data.max_length"),
    ],
)
def test_what_train_refuses_is_refused_alike(capsys, config: Path, overrides: list[str], said: str) -> None:
    outcomes = [run(capsys, *command, config, *overrides) for command in (("data", "check"), ("train",))]
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert said in outcomes[0].err
    assert outcomes[0].err == outcomes[1].err


def test_rows_that_were_tokenised_before_are_found_to_be_the_same(
    capsys, config: Path, parts: TinyParts, tmp_path: Path
) -> None:
    """Their images too, which are not in what was prepared."""
    request = ("--to", "tokens", "--tokenizer", parts.language, "--output", tmp_path / "tokens")
    done = run(capsys, "data", "prepare", parts.data, *request)
    assert done.code == 0, done.err
    reports, lists = [], []
    for path in (parts.data, tmp_path / "tokens"):
        given = (f"data.path={path}", "--workers", "0", "--output", tmp_path / "check")
        done = run(capsys, "data", "check", config, *given)
        assert done.code == 0, done.err
        report = json.loads((tmp_path / "check/check.json").read_text())
        assert report["sources"][0].pop("path") == str(path)
        reports.append(report)
        lists.append((tmp_path / "check/quarantine.jsonl").read_text())
    assert reports[0] == reports[1]
    assert reports[0]["images"]["usable"] > 0
    assert lists[0] == lists[1]


def test_a_run_is_left_as_it_is(capsys, config: Path, tmp_path: Path) -> None:
    """Checked before and after it, a run has the loss and the files of one that never was, and is finished."""
    for output in ("run", "plain"):
        if output == "run":
            assert run(capsys, "data", "check", config, "--workers", "0").code == 0
        done = run(capsys, "train", config, "checkpoint.every_steps=1", "--output", tmp_path / output)
        assert done.code == 0, done.err
    before = contents(tmp_path / "run")
    assert before.keys() == contents(tmp_path / "plain").keys()
    assert run(capsys, "data", "check", config, "--workers", "0").code == 0
    assert contents(tmp_path / "run") == before
    again = run(capsys, "train", config, "checkpoint.every_steps=1")
    assert "the run is finished" in again.out
    losses = [json.loads((tmp_path / name / "metrics.jsonl").read_text())["loss"] for name in ("run", "plain")]
    assert losses[0] == losses[1]


def contents(folder: Path) -> dict[str, bytes]:
    """What a run's files hold, but for its check."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("check/")}
