"""`llava-core data prepare`, and runs on what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_core.cli.data_prepare import data_name
from llava_core.config import build_config
from llava_core.data.readers.megatron import MegatronReader, MegatronSftReader
from llava_core.errors import ConfigError
from llava_core.testing.datasets import TinyParts, tiny_parts
from tests.unit.cli.support import run


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"), num_rows=12)


def losses(parts: TinyParts, output: Path, **data: object) -> list[float]:
    """Of two steps, each to its last bit."""
    from rich.console import Console

    from llava_core.train.loop import train_model

    settings = parts.settings(output)
    settings["train"] = {"trainable": ["projector"], "max_steps": 2, "precision": "fp32"}
    settings["data"] = {"images": str(parts.images), "max_length": 256, **data}
    train_model(build_config(settings), console=Console(quiet=True))
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_runs_on_all_forms_have_the_same_losses(capsys, parts: TinyParts, tmp_path: Path) -> None:
    made = {
        "webdataset": ("--images", parts.images),
        "tokens": ("--tokenizer", parts.language, "--template", "mistral"),
    }
    expected = losses(parts, tmp_path / "json", path=str(parts.data), template="mistral")
    for kind, options in made.items():
        output = tmp_path / kind
        done = run(capsys, "data", "prepare", parts.data, "--to", kind, "-o", output, "--shard-size", 5, *options)
        assert (done.code, done.err) == (0, "")
        assert "12 rows: 3 files of " in done.out
        assert done.out.endswith(f"train on it with data.path={output}\n")
        template = {"template": "mistral"} if kind == "webdataset" else {}  # tokens bring theirs along
        assert losses(parts, tmp_path / f"{kind}-run", path=str(output), **template) == expected
    written = [(tmp_path / run / "hf/chat_template.jinja").read_bytes() for run in ("json", "tokens-run")]
    assert written[0] == written[1]


def test_a_run_that_would_tokenise_otherwise_is_refused(capsys, parts: TinyParts, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run(capsys, "data", "prepare", parts.data, "--to", "tokens", "-o", output, "--tokenizer", parts.language)
    assert done.code == 0, done.err
    with pytest.raises(
        ConfigError, match=r"was tokenised otherwise than this run would, with the template 'v1':\n  temp"
    ):
        losses(parts, tmp_path / "run", path=str(output), template="mistral")


def test_a_template_file_comes_along(capsys, parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("talk.yaml").write_text('human: ["Q: {text}\\n"]\nassistant: ["A:", {train: " {text}</s>"}]\nstop: ["</s>"]\n')
    options = ("--tokenizer", parts.language, "--template", "talk.yaml", "--shard-size", 5, "--workers", 2)
    done = run(capsys, "data", "prepare", parts.data, "--to", "tokens", "-o", "out", *options)
    assert done.code == 0, done.err
    expected = losses(parts, tmp_path / "json", path=str(parts.data), template="talk.yaml")
    Path("elsewhere").mkdir()
    Path("out").rename("elsewhere/out")
    Path("talk.yaml").unlink()
    assert losses(parts, tmp_path / "tokens", path="elsewhere/out") == expected


def test_documents_and_conversations_for_megatron(capsys, parts: TinyParts, tmp_path: Path) -> None:
    (tmp_path / "docs.txt").write_text("It is red.\nIt is green.\n")
    options = ("--tokenizer", parts.language, "--workers", 2, "--shard-size", 1)
    done = run(capsys, "data", "prepare", tmp_path / "docs.txt", "--to", "megatron", "-o", tmp_path / "docs", *options)
    assert (done.code, done.out.splitlines()[-1]) == (0, f"train on it with data.path={tmp_path / 'docs' / 'docs'}")
    assert len(MegatronReader(tmp_path / "docs/docs")) == 2
    rows = [row for row in json.loads(parts.data.read_text()) if "image" not in row]
    (tmp_path / "chat.v2.json").write_text(json.dumps(rows))
    done = run(
        capsys, "data", "prepare", tmp_path / "chat.v2.json", "--to", "megatron_sft", "-o", tmp_path / "sft",
        *options, "--max-length", 400,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.endswith(f"data.path={tmp_path / 'sft' / 'chat.v2'} data.reader=megatron_sft\n")
    reader = MegatronSftReader(tmp_path / "sft/chat.v2.idx")
    assert sum(len(reader.read(index).sequences) for index in range(len(reader))) == len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "parquet"), "--to parquet: expected one of webdataset, megatron, megatron_sft, tokens."),
        (("--to", "tokens"), "--to tokens needs --tokenizer: the folder of the model"),
        (("--to", "webdataset", "--template", "v1"), "--template means nothing to --to webdataset: leave it out."),
        (("--to", "tokens", "--tokenizer", "x", "--images", "y"), "--images means nothing to --to tokens"),
        (("--to", "megatron", "--tokenizer", "x", "--max-length", "9"), "--max-length means nothing to --to megatron"),
        (("--to", "webdataset", "--images", "nowhere"), "the image folder nowhere is not a folder"),
        (("--to", "webdataset", "--reader", "parque"), "unknown reader 'parque'; there are:"),
        (("--to", "webdataset", "--split", "train"), "the reader 'llava_json' knows no splits"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    capsys, parts: TinyParts, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run(capsys, "data", "prepare", parts.data, "-o", tmp_path / "out", *arguments)
    assert (done.code, message in done.err) == (2, True), done.err
    assert list(tmp_path.iterdir()) == []


def test_a_source_has_a_name_for_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talks").mkdir()
    monkeypatch.chdir(tmp_path / "talks")
    named = [data_name(Path(source)) for source in (".", "../talks/", "../chat.v2.json")]
    assert named == ["talks", "talks", "chat.v2"]
    with pytest.raises(ConfigError, match="SOURCE = / has no name to call files by"):
        data_name(Path("/"))


def test_a_template_for_documents_is_for_documents(capsys, parts: TinyParts, tmp_path: Path) -> None:
    (tmp_path / "docs.txt").write_text("It is red.\n")
    options = ("--to", "tokens", "--tokenizer", parts.language, "-o", tmp_path / "out", "--template")
    done = run(capsys, "data", "prepare", tmp_path / "docs.txt", *options, "v1")
    assert (done.code, "holds documents, which take none" in done.err) == (2, True), done.err
    done = run(capsys, "data", "prepare", parts.data, *options, "text")
    assert (done.code, "is for documents, and this data set holds conversations" in done.err) == (2, True), done.err


def test_bad_rows_are_counted(capsys, parts: TinyParts, tmp_path: Path) -> None:
    rows = [{"conversations": []}, *json.loads(parts.data.read_text())]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    options = ("--to", "webdataset", "--images", parts.images, "-o", tmp_path / "out")
    done = run(capsys, "data", "prepare", tmp_path / "data.json", *options)
    assert f"1 of them cannot be used: {tmp_path / 'out/quarantine.jsonl'} says why" in done.out
    done = run(
        capsys, "data", "prepare", tmp_path / "data.json", *options[:-1], tmp_path / "no", "--max-bad-fraction", 0
    )
    assert (done.code, "1 of 13 rows (7.7%) cannot be used, the limit is 0.0%" in done.err) == (1, True), done.err


@pytest.mark.slow
def test_ctrl_c_ends_every_process_and_the_command_goes_on(parts: TinyParts, tmp_path: Path) -> None:
    rows = json.loads(parts.data.read_text()) * 100
    (tmp_path / "data.json").write_text(json.dumps(rows))
    command = [
        sys.executable, "-m", "llava_core", "data", "prepare", "data.json", "--to", "webdataset", "-o", "out",
        "--images", str(parts.images), "--workers", "2", "--shard-size", "10",
    ]  # fmt: skip
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    parts_done = tmp_path / "out.partial/.work"
    deadline = time.monotonic() + 240
    while not list(parts_done.glob("part-*.json")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = running.communicate(timeout=240)
    assert (running.returncode, err) == (130, "interrupted; the same command goes on with what is finished\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("1,200 rows: 120 files of ")
