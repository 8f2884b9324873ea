"""The demo: what it writes, how it ends, and that it can be stopped and started again."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_core.cli.demo import INTERRUPTED
from llava_core.config import RunConfig
from llava_core.data.readers.llava import LlavaJsonReader
from llava_core.demo import digits, stages, towers
from llava_core.demo.digits import NUM_TRAIN, DigitData, load_digits, picture, write_data
from llava_core.demo.pictures import COLUMNS, MAX_WRONG, ROWS, Judged, choose
from llava_core.demo.run import claim, run_demo
from llava_core.demo.texts import NEXT, PARITY, QUESTIONS, WHAT, answer
from llava_core.errors import ConfigError
from llava_core.train.metrics import read_metrics
from tests.hardware import backend_name, torch_settings_kept

RUN_MAIN = [sys.executable, "-c", "from llava_core.cli.main import main; main()"]


@dataclass(frozen=True)
class Finished:
    """A demo that ran to its end in `home`, by the command line, and what it printed."""

    home: Path
    printed: str

    @property
    def output(self) -> Path:
        return self.home / "runs" / "demo"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    home = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [*RUN_MAIN, "demo", "--backend", "cpu"], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Finished(home, done.stdout)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DigitData:
    folder = tmp_path_factory.mktemp("digits")
    write_data(folder, seed=0)
    return DigitData(folder)


def images_of(path: Path) -> list[str]:
    return [row["image"] for row in json.loads(path.read_text())]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def test_every_digit_is_written_once(data: DigitData) -> None:
    conversations, held_out = images_of(data.conversations), images_of(data.held_out)
    assert images_of(data.captions) == conversations
    assert (len(conversations), len(held_out)) == (NUM_TRAIN, 297)
    assert sorted(conversations + held_out) == sorted(path.name for path in data.images.iterdir())


def test_no_row_shows_a_held_out_digit_in_training(data: DigitData) -> None:
    assert not set(images_of(data.conversations)) & set(images_of(data.held_out))


def test_images_are_read_back_as_they_were_drawn_and_labelled(data: DigitData) -> None:
    images, labels = load_digits()
    order = np.random.default_rng(0).permutation(len(labels))
    rows = json.loads(data.conversations.read_text()) + json.loads(data.held_out.read_text())
    for row, index in list(zip(rows, order, strict=True))[::50]:
        with Image.open(data.images / row["image"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(picture(images[index])))
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        assert row["conversations"][1]["value"] == answer(question, int(labels[index]))


def test_rows_are_llava_rows(data: DigitData) -> None:
    for path in (data.captions, data.conversations, data.held_out):
        record = LlavaJsonReader(path).read(0)
        assert [turn.role for turn in record.turns] == ["human", "assistant"]
        assert (data.images / record.images[0]).is_file()


def test_another_seed_holds_out_other_digits(data: DigitData, tmp_path: Path) -> None:
    write_data(tmp_path, seed=1)
    assert (tmp_path / "held_out.json").read_bytes() != data.held_out.read_bytes()


def test_answers_are_true() -> None:
    assert [answer(question, 9) for question in (WHAT, PARITY, NEXT)] == [
        "The digit is nine.",
        "The digit nine is odd.",
        "After nine comes ten.",
    ]


def test_a_missing_scikit_learn_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'llava-core[demo]'")):
        digits.write_data(tmp_path / "data", seed=0)
    assert not (tmp_path / "data").exists()


def test_the_grid_shows_wrong_answers_first_but_not_alone() -> None:
    wrong = [Judged(Path(f"{i}.png"), WHAT, "The digit is one.", "The digit is two.") for i in range(20)]
    right = [Judged(Path(f"{i}.png"), WHAT, "The digit is one.", "The digit is one.") for i in range(90)]
    shown = choose([*right, *wrong])
    assert [one.right for one in shown] == [False] * MAX_WRONG + [True] * (ROWS * COLUMNS - MAX_WRONG)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no demo"):
        claim(tmp_path, {"seed": 0, "backend": "cpu"})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_demo_with_other_settings_is_left_alone(tmp_path: Path) -> None:
    claim(tmp_path / "demo", {"seed": 0, "backend": "cpu"})
    claim(tmp_path / "demo", {"seed": 0, "backend": "cpu"})
    with pytest.raises(ConfigError, match="another --output"):
        claim(tmp_path / "demo", {"seed": 1, "backend": "cpu"})


def test_importing_the_command_does_not_load_torch() -> None:
    code = "import sys, llava_core.cli.demo; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.device
def test_a_short_demo_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each training, on the backend under test; what it says then is beside the point."""
    for steps in ("VISION_STEPS", "LANGUAGE_STEPS"):
        monkeypatch.setattr(towers, steps, 2)
    for name in ("stage1", "stage2"):
        monkeypatch.setattr(stages, name, shortened(getattr(stages, name)))
    with torch_settings_kept():
        result = run_demo(tmp_path / "demo", backend_name(), 0, Console(quiet=True))
    assert (result.exit_code, len(result.judged)) == (0, 297)
    for stage in ("stage1", "stage2"):
        assert len(losses(tmp_path / "demo" / stage)) == 2
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "demo" / "hf")


def shortened(stage: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """The same stage in two steps."""

    def short(*arguments: Any) -> RunConfig:
        config = stage(*arguments)
        return config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 2})})

    return short


@pytest.mark.slow
def test_the_demo_answers_nine_of_ten(finished: Finished) -> None:
    answers = [json.loads(line) for line in (finished.output / "answers.jsonl").read_text().splitlines()]
    right = sum(row["answer"] == row["reference"] for row in answers)
    assert len(answers) == 297
    assert right >= 0.90 * len(answers)
    assert f"{right} of 297" in finished.printed
    assert {row["question"].removeprefix("<image>\n") for row in answers} == set(QUESTIONS)


@pytest.mark.slow
def test_the_demo_leaves_what_it_promises(finished: Finished) -> None:
    output = finished.output
    for stage in ("stage1", "stage2"):
        for name in ("config.yaml", "metrics.jsonl", "loss.png", "hf/config.json"):
            assert (output / stage / name).is_file(), name
        assert losses(output / stage)[-1] < 0.5 * losses(output / stage)[0]
    assert len(read_metrics(output)) == len(losses(output / "stage1")) + len(losses(output / "stage2"))
    for name in ("loss.png", "answers.png"):
        with Image.open(output / name) as image:
            assert image.width >= 1000
            assert image.height >= 400


@pytest.mark.slow
def test_transformers_loads_what_the_demo_made(finished: Finished) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(finished.output / "hf")
    processor = AutoProcessor.from_pretrained(finished.output / "hf")
    row = json.loads((finished.output / "answers.jsonl").read_text().splitlines()[0])
    with Image.open(finished.output / "data" / "images" / f"{row['id']}.png") as image:
        messages = [{"role": "user", "content": row["question"]}]
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == row["answer"]


@pytest.mark.slow
def test_the_printed_commands_run(finished: Finished) -> None:
    ask, train, tensorboard = [shlex.split(line) for line in finished.printed.splitlines()[-3:]]
    first = json.loads((finished.output / "answers.jsonl").read_text().splitlines()[0])
    said = run(ask, finished.home)
    assert said.strip() == first["answer"]
    run([*train, "train.max_steps=2"], finished.home)
    assert (finished.home / "runs" / "demo-again" / "hf" / "config.json").is_file()
    run([tensorboard[0], "--version"], finished.home)  # with --logdir it serves for ever


@pytest.mark.slow
def test_an_interrupted_demo_ends_with_the_same_numbers(finished: Finished, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "demo"
    output.mkdir(parents=True)
    shutil.copy(finished.output / "demo.json", output)
    for part in ("data", "clip", "llama"):
        shutil.copytree(finished.output / part, output / part)
    command = [*RUN_MAIN, "demo", "--backend", "cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and len(read_metrics(output / "stage1")) < 20:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED
    assert "interrupted after step" in printed
    run(command, tmp_path)
    for stage in ("stage1", "stage2"):
        assert losses(output / stage) == losses(finished.output / stage)
    assert (output / "answers.jsonl").read_bytes() == (finished.output / "answers.jsonl").read_bytes()


@pytest.mark.slow
def test_a_part_that_was_interrupted_is_not_taken_for_complete(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "demo"
    process = subprocess.Popen([*RUN_MAIN, "demo", "--backend", "cpu"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (output / "clip.partial").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED
    assert "the same command goes on from there" in printed
    assert (output / "data" / "captions.json").is_file()
    assert not (output / "clip").exists()


@pytest.mark.slow
def test_a_complete_demo_is_kept(finished: Finished) -> None:
    weights = finished.output / "stage2" / "hf" / "model.safetensors"
    before = weights.stat()
    again = run([*RUN_MAIN, "demo", "--backend", "cpu"], finished.home)
    assert os.stat(weights).st_mtime_ns == before.st_mtime_ns
    assert again.splitlines()[-6:] == finished.printed.splitlines()[-6:]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
