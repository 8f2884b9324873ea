"""`llava-core convert`, on an InternLM2 that `train` trained on text alone and `ask` asks under both names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.support import run
from tests.unit.weights.internlm2_folder import llama, save_internlm2

SETTINGS = (
    "data.template=tokenizer",
    "data.max_length=64",
    "batch={global_size: 2, micro_tokens: 128}",
    "optimizer.learning_rate=1e-3",
    "train={trainable: [language], max_steps: 2, precision: fp32}",
    "backend={name: cpu, threads: 1}",
    "log.trackers=[]",
)
ASKED = ("What is this?", "--precision", "fp32", "--backend", "cpu", "--max-new-tokens", 6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rich.console import Console

    from llava_core.config import load_config
    from llava_core.train.loop import train_model

    folder = tmp_path_factory.mktemp("run")
    turns = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "It is a cat."}]
    rows = [{"id": f"{index}", "conversations": turns} for index in range(4)]
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "run.yaml").write_text("{}")
    paths = (f"output={folder / 'out'}", f"data.path={folder / 'data.json'}")
    model = save_internlm2(llama(), folder / "internlm2")
    config = load_config(str(folder / "run.yaml"), [*SETTINGS, *paths, f"model.path={model}"])
    export = train_model(config, console=Console(quiet=True)).export
    assert export is not None
    return export


def test_a_trained_internlm2_answers_alike_under_both_names(capsys, trained: Path, tmp_path: Path) -> None:
    assert json.loads((trained / "config.json").read_text())["model_type"] == "internlm2"
    done = run(capsys, "convert", trained, tmp_path / "llama", "--to", "llama")
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "llama")), done.err
    assert json.loads((tmp_path / "llama/config.json").read_text())["model_type"] == "llama"
    answers = [run(capsys, "ask", folder, *ASKED) for folder in (trained, tmp_path / "llama")]
    assert [answer.code for answer in answers] == [0, 0], answers
    assert answers[0].out == answers[1].out


def test_what_cannot_be_converted_is_named(capsys, trained: Path, tmp_path: Path) -> None:
    done = run(capsys, "convert", trained, tmp_path / "out", "--to", "mistral")
    assert (done.code, "--to mistral: expected one of llama, internlm2" in done.err) == (2, True), done.err
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    done = run(capsys, "convert", trained, tmp_path / "out", "--to", "llama")
    assert (done.code, "is no export of llava-core" in done.err) == (2, True), done.err
