"""What is refused before a run begins, and what is kept when its end goes wrong."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from llava_core.config import build_config
from llava_core.errors import ConfigError, WeightsError
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts, tiny_parts
from llava_core.train import loop
from llava_core.train.loop import train_model
from tests.unit.train.support import prepare_alone


@pytest.fixture
def parts(tmp_path: Path) -> TinyParts:
    return tiny_parts(tmp_path / "parts")


def settings(parts: TinyParts, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The tiny set-up's settings, two steps long, with changes by section."""
    merged: dict[str, Any] = dict(parts.settings(output))
    merged["train"] = merged["train"] | {"max_steps": 2}
    return merged | {name: merged.get(name, {}) | changes for name, changes in sections.items()}


def run(parts: TinyParts, output: Path, **sections: dict[str, Any]) -> loop.RunResult:
    return train_model(build_config(settings(parts, output, **sections)), console=Console(quiet=True))


def refusal(parts: TinyParts, output: Path, **sections: dict[str, Any]) -> str:
    """The message with which a run is refused; nothing was written."""
    with pytest.raises((ConfigError, WeightsError)) as raised:
        prepare_alone(build_config(settings(parts, output, **sections)), Registry.discover())
    assert not output.exists()
    return str(raised.value)


def test_samples_longer_than_the_models_positions(parts: TinyParts, tmp_path: Path) -> None:
    said = refusal(parts, tmp_path / "run", data={"max_length": 300}, batch={"micro_tokens": 600})
    assert "256 positions" in said


def test_more_layers_to_recompute_than_there_are(parts: TinyParts, tmp_path: Path) -> None:
    said = refusal(parts, tmp_path / "run", train={"recompute": "full", "recompute_layers": 3})
    assert "train.recompute_layers = 3: the language model has 2 layers" in said


@pytest.mark.parametrize("section", ["train", "parallel"])
def test_nothing_moves_from_the_host_to_the_host(section: str, parts: TinyParts, tmp_path: Path) -> None:
    key = {"train": "offload_activations", "parallel": "offload"}[section]
    said = refusal(parts, tmp_path / "run", **{section: {key: True}})
    assert f"{section}.{key}: backend 'cpu' computes in the host's memory" in said


def test_a_tokenizer_with_tokens_beyond_the_embedding(parts: TinyParts, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts.language)
    tokenizer.add_tokens(["colour-word"])
    tokenizer.save_pretrained(parts.language)
    assert "colour-word = 320" in refusal(parts, tmp_path / "run")


def test_a_pad_token_beyond_the_embedding_is_not_used(parts: TinyParts, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts.language)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(parts.language)
    assert run(parts, tmp_path / "run").exit_code == 0


def test_image_settings_of_a_model_that_sees_nothing(parts: TinyParts, tmp_path: Path) -> None:
    text_only = {"vision": None, "language": None, "path": str(parts.language)}
    said = refusal(parts, tmp_path / "run", model=text_only, train={"trainable": ["language"]})
    assert "data.images is set, and this model has no vision tower" in said


@pytest.mark.parametrize("inside", ["file/run", "link/run"])
def test_an_output_that_cannot_be_made(parts: TinyParts, tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is not a folder" in refusal(parts, tmp_path / inside)


def test_a_whole_llava_without_its_projector(parts: TinyParts, tmp_path: Path) -> None:
    export = run(parts, tmp_path / "first").export
    assert export is not None
    tensors = {k: v for k, v in load_file(export / "model.safetensors").items() if "projector" not in k}
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    whole = {"vision": None, "language": None, "path": str(export)}
    assert "multi_modal_projector.linear_1.weight" in refusal(parts, tmp_path / "second", model=whole)


def test_every_wrong_shape_is_listed(parts: TinyParts, tmp_path: Path) -> None:
    file = parts.language / "model.safetensors"
    tensors = load_file(file)
    wrong = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    save_file(tensors | {name: tensors[name][:-1].clone() for name in wrong}, file, metadata={"format": "pt"})
    said = refusal(parts, tmp_path / "run")
    assert all(f"language_model.{name}" in said for name in wrong)


def test_a_rows_id_is_shown_as_it_is(parts: TinyParts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"id": "[/b]strange"} for row in json.loads(parts.data.read_text())]
    parts.data.write_text(json.dumps(rows))
    train_model(build_config(settings(parts, tmp_path / "run[1]")))
    printed = capsys.readouterr().out
    assert "[/b]strange" in printed
    assert "run[1]/hf" in printed.replace("\n", "")


def test_a_finished_run_is_finished(parts: TinyParts, tmp_path: Path) -> None:
    kept = {"every_steps": 5}
    first = run(parts, tmp_path / "run", checkpoint=kept)
    assert first.export is not None
    written = (first.export / "model.safetensors").stat().st_ino
    assert run(parts, tmp_path / "run", checkpoint=kept) == first
    assert (first.export / "model.safetensors").stat().st_ino == written


def test_a_finished_run_without_checkpoints_is_not_trained_over(parts: TinyParts, tmp_path: Path) -> None:
    run(parts, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a finished run and no checkpoint"):
        run(parts, tmp_path / "run")


def test_what_was_learnt_outlives_an_export_that_fails(
    parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "export_model", full)
        with pytest.raises(OSError, match="No space left"):
            run(parts, tmp_path / "run")
    again = run(parts, tmp_path / "run")
    assert (again.steps, again.exit_code) == (2, 0)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


def test_bad_rows_can_be_allowed_when_a_run_goes_on(parts: TinyParts, tmp_path: Path) -> None:
    run(parts, tmp_path / "run", checkpoint={"every_steps": 1})
    (tmp_path / "run/hf").rename(tmp_path / "moved")
    assert run(parts, tmp_path / "run", checkpoint={"every_steps": 1}, data={"max_bad_fraction": 0.5}).steps == 2


def test_an_epoch_whose_last_rows_are_bad_does_not_reach_into_the_next(parts: TinyParts, tmp_path: Path) -> None:
    rows = json.loads(parts.data.read_text())[:6]
    rows[3]["conversations"] = []
    parts.data.write_text(json.dumps(rows))
    data = {"order": "sequential", "max_bad_fraction": 1.0}
    result = run(parts, tmp_path / "run", data=data, batch={"global_size": 1}, train={"max_steps": None, "epochs": 1})
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert result.steps == 6
    assert [line["step"] for line in lines] == [1, 2, 3, 5, 6]
    assert lines[-1]["epoch"] == 1.0


def test_a_run_in_another_thread(parts: TinyParts, tmp_path: Path) -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(run(parts, tmp_path / "run").exit_code))
    thread.start()
    thread.join()
    assert results == [0]


def test_data_and_weights_may_be_moved_between_two_starts(parts: TinyParts, tmp_path: Path) -> None:
    run(parts, tmp_path / "run", checkpoint={"every_steps": 1})
    (tmp_path / "run/hf").rename(tmp_path / "export")
    moved = Path((tmp_path / "parts").rename(tmp_path / "elsewhere"))
    new = TinyParts(moved / "clip", moved / "llama", moved / "data.json", moved / "images")
    assert run(new, tmp_path / "run", checkpoint={"every_steps": 1}).steps == 2
