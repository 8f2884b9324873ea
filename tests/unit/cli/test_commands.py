"""Each command: that it works, and what it says when it cannot."""

from __future__ import annotations

import json
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_core.config import build_config, load_config, recipe_names
from llava_core.testing.datasets import TinyParts, tiny_parts
from llava_core.train import loop
from llava_core.train.interrupt import SIGNALS
from tests.unit.cli.support import run


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def config(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    settings = parts.settings(folder / "run")
    settings["train"] = {"trainable": ["projector"], "max_steps": 2, "precision": "fp32"}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def export(config: Path) -> Path:
    from rich.console import Console

    from llava_core.train.loop import train_model

    result = train_model(load_config(str(config)), console=Console(quiet=True))
    assert result.export is not None
    return result.export


def test_train_runs_a_file_with_overrides(capsys, config: Path, tmp_path: Path) -> None:
    done = run(capsys, "train", config, "train.max_steps=1", "--output", tmp_path / "out", "--backend", "cpu")
    assert done.code == 0, done.err
    assert (tmp_path / "out/hf/model.safetensors").is_file()
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "first sample" in done.out
    assert "⟦" in done.out


def test_after_its_run_the_command_heeds_no_signal(
    capsys, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is written, and its exit code says so."""
    train_model, handlers = loop.train_model, []

    def watched(*arguments: Any, **options: Any) -> loop.RunResult:
        result = train_model(*arguments, **options)
        handlers.extend(map(signal.getsignal, SIGNALS))
        return result

    monkeypatch.setattr(loop, "train_model", watched)
    done = run(capsys, "train", config, "train.max_steps=1", "--output", tmp_path / "out", "--backend", "cpu")
    assert done.code == 0, done.err
    assert handlers == [signal.SIG_IGN] * len(SIGNALS)


def test_train_names_the_nearest_key_and_recipe(capsys, config: Path) -> None:
    wrong_key = run(capsys, "train", config, "optimizer.learning_rte=1")
    assert (wrong_key.code, "optimizer.learning_rate" in wrong_key.err) == (2, True)
    wrong_recipe = run(capsys, "train", "llava15-7b-stf")
    assert (wrong_recipe.code, "llava15-7b-sft" in wrong_recipe.err) == (2, True)


def test_train_lists_what_is_missing_before_it_loads_anything(capsys, config: Path) -> None:
    done = run(capsys, "train", config, "data.path=/no/such.json", "data.images=/no/images")
    assert done.code == 2
    assert "/no/such.json" in done.err
    assert "/no/images" in done.err
    assert done.out == ""


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_printed_with_what_is_still_to_be_given(capsys, recipe: str) -> None:
    done = run(capsys, "train", recipe, "--print-config")
    assert done.code == 0
    assert "data: set path (one data set), or sources (several)" in done.out
    assert yaml.safe_load(done.out)["optimizer"]["schedule"] == "cosine"


def test_a_whole_config_is_printed_as_it_can_be_read_back(capsys, config: Path, tmp_path: Path) -> None:
    done = run(capsys, "train", config, "--print-config")
    (tmp_path / "printed.yaml").write_text(done.out)
    assert load_config(str(tmp_path / "printed.yaml")) == load_config(str(config))


@pytest.mark.parametrize("override", ["train.epochs=x", "optimizer.learning_rte=1"])
def test_a_config_that_cannot_be_used_is_printed_and_is_an_error(capsys, config: Path, override: str) -> None:
    done = run(capsys, "train", config, override, "--print-config")
    assert (done.code, override.partition("=")[0] in done.err) == (2, True), done.err
    assert yaml.safe_load(done.out)["batch"]


@pytest.mark.parametrize("folder", ["/tmp/my runs #2", "/a: b", "2024"])
def test_the_output_folder_is_taken_as_it_stands(capsys, config: Path, folder: str) -> None:
    done = run(capsys, "train", config, "--output", folder, "--backend", "cpu", "--print-config")
    assert done.code == 0, done.err
    printed = yaml.safe_load(done.out)
    assert (printed["output"], printed["backend"]["name"]) == (folder, "cpu")


def test_an_error_of_the_system_ends_with_one_and_its_path(capsys, monkeypatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "/disk/file")

    monkeypatch.setattr("llava_core.cli.main.app", full)
    done = run(capsys, "train")
    assert (done.code, done.err) == (1, "error: No space left on device: /disk/file\n")


def test_the_version_is_printed(capsys) -> None:
    done = run(capsys, "--version")
    assert (done.code, done.out) == (0, f"llava-core {version('llava-core')}\n")


def test_ask_answers(capsys, export: Path, parts: TinyParts) -> None:
    picture = parts.images / "0.png"
    done = run(capsys, "ask", export, picture, "What colour is this?", "--precision", "fp32", "--max-new-tokens", 4)
    assert done.code == 0, done.err


def test_ask_answers_without_an_image_too(capsys, export: Path) -> None:
    options = ["--precision", "fp32", "--max-new-tokens", 4, "--template", "tokenizer"]
    done = run(capsys, "ask", export, "What is red?", *options)
    assert done.code == 0, done.err


def test_ask_says_which_argument_is_wrong(capsys, export: Path, parts: TinyParts) -> None:
    picture = parts.images / "0.png"
    alone = run(capsys, "ask", export, picture)
    assert (alone.code, "there is no question" in alone.err) == (2, True), alone.err
    unquoted = run(capsys, "ask", export, picture, "What", "is", "this?")
    assert (unquoted.code, "Put the question in quotes" in unquoted.err) == (2, True), unquoted.err
    assert run(capsys, "ask", export).code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "cdua"], "unknown backend 'cdua'"),
        (["--temperature", "-1"], "temperature"),
        (["--precision", "int8"], "precision 'int8'"),
        (["--template", "v2"], "unknown template 'v2'"),
    ],
)
def test_ask_refuses_options_it_cannot_honour(capsys, export: Path, parts: TinyParts, arguments, said: str) -> None:
    done = run(capsys, "ask", export, parts.images / "0.png", "What?", *arguments)
    assert (done.code, said in done.err) == (2, True), done.err


def test_ask_names_a_missing_image_and_a_folder_that_is_no_model(capsys, export: Path, parts: TinyParts) -> None:
    no_image = run(capsys, "ask", export, parts.images / "none.png", "What?")
    assert (no_image.code, "none.png" in no_image.err) == (2, True)
    no_model = run(capsys, "ask", parts.images, parts.images / "0.png", "What?")
    assert (no_model.code, "config.json" in no_model.err) == (2, True)


def test_generate_answers_every_row_and_reports_the_bad_ones(capsys, export: Path, parts: TinyParts, tmp_path) -> None:
    rows = ['{"id": "a", "question": "What?", "image": "0.png"}', '{"question": "Say red."}', "not json"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    answers = tmp_path / "answers.jsonl"
    options = ["--images", parts.images, "-o", answers, "--max-new-tokens", 3]
    done = run(capsys, "generate", export, tmp_path / "prompts.jsonl", *options)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [("answer" in line, "error" in line) for line in lines] == [(True, False), (True, False), (False, True)]


def test_generate_names_a_prompts_file_that_is_not_there(capsys, export: Path, tmp_path: Path) -> None:
    done = run(capsys, "generate", export, tmp_path / "none.jsonl", "-o", tmp_path / "answers.jsonl")
    assert (done.code, "none.jsonl" in done.err) == (2, True)
    assert not (tmp_path / "answers.jsonl").exists()


def test_generate_checks_the_answers_file_before_it_loads_the_model(capsys, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"question": "What?"}')
    for output, said in ((tmp_path, "is a folder"), (tmp_path / "prompts.jsonl" / "x", "no folder")):
        done = run(capsys, "generate", tmp_path / "no-model", tmp_path / "prompts.jsonl", "-o", output)
        assert (done.code, said in done.err) == (2, True), done.err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_backends_lists_them_and_shows_ones_kernels(capsys) -> None:
    every = run(capsys, "backends")
    assert every.code == 0
    assert "cpu" in every.out
    one = run(capsys, "backends", "cpu")
    assert one.code == 0
    assert "short_matmul" in one.out


def test_backends_refuses_an_unknown_name(capsys) -> None:
    done = run(capsys, "backends", "cpuu")
    assert (done.code, "Did you mean 'cpu'?" in done.err) == (2, True)


def test_a_config_that_cannot_be_honoured_changes_nothing_on_disk(capsys, config: Path, tmp_path: Path) -> None:
    done = run(capsys, "train", config, "backend.kernels={attention: none}", "--output", tmp_path / "out")
    assert (done.code, "no kernel 'none'" in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_settings_of_the_tiny_parts_are_a_whole_config(parts: TinyParts, tmp_path: Path) -> None:
    assert build_config(parts.settings(tmp_path)).train.max_steps == 6


def test_a_new_backend_needs_nothing_but_an_entry_point(capsys, config: Path, tmp_path: Path, monkeypatch) -> None:
    info = tmp_path / "site/dummy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dummy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llava_core]\ndummy = dummy_plugin\n")
    (tmp_path / "site/dummy_plugin.py").write_text(
        "from llava_core.plugins import Contribution, hookimpl\n"
        "@hookimpl\n"
        "def llava_register_backends():\n"
        "    return [Contribution('dummy', 'dummy_backend:DummyBackend', 'for a test', api_version=1)]\n"
    )
    (tmp_path / "site/dummy_backend.py").write_text(
        "from llava_core.backend import Probe\n"
        "from llava_cpu.backend import CpuBackend\n"
        "class DummyBackend(CpuBackend):\n"
        "    name = 'dummy'\n"
        "    @classmethod\n"
        "    def probe(cls):\n"
        "        return Probe(True, 'always here', super().probe().devices)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "always here" in run(capsys, "backends").out
    done = run(capsys, "train", config, "--backend", "dummy", "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert "dummy" in done.out
    assert (tmp_path / "out/hf/config.json").is_file()
