"""The demo from its first file to its last line.

Everything lies in one output folder, and each part of it gets its name only when it is complete. So the same command
after an interruption goes on from there, in a stage of training from the step where it stopped, and ends with the same
numbers. What is complete is never made again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console

from llava_core.api import load_assistant
from llava_core.config import RunConfig
from llava_core.data.image_store import ImageStore
from llava_core.demo import stages
from llava_core.demo.digits import IMAGE_SIZE, NUM_TRAIN, DigitData, load_digits, write_data
from llava_core.demo.pictures import Judged, plot_answers, plot_losses
from llava_core.demo.progress import tracker
from llava_core.demo.towers import pretrain_language, pretrain_vision
from llava_core.engine.hardware import choose_backend
from llava_core.errors import ConfigError
from llava_core.inference.prompts import read_prompts, write_answers
from llava_core.inference.sampling import GenerationSettings
from llava_core.plugins import Registry
from llava_core.train.loop import train_model
from llava_core.train.metrics import METRICS_FILE, read_metrics
from llava_core.train.prepare import EXPORT_FOLDER

SETTINGS_FILE = "demo.json"
PARTIAL = ".partial"
ANSWERS_FILE = "answers.jsonl"
DONE_BEFORE = "done before, and kept"
ANSWER_TOKENS = 16
ANSWER_BATCH = 64


@dataclass(frozen=True)
class DemoResult:
    """How the demo ended.

    Attributes:
        judged: the held-out answers; empty where it was interrupted.
        exit_code: 0, or that of the stage that a signal interrupted.
    """

    judged: tuple[Judged, ...]
    exit_code: int

    @property
    def num_right(self) -> int:
        """Held-out answers that are right, word for word."""
        return sum(one.right for one in self.judged)


def run_demo(output: Path, backend: str | None, seed: int, console: Console) -> DemoResult:
    """Make data and towers, train both stages, answer the held-out questions, draw the pictures.

    Raises:
        ConfigError: scikit-learn is missing, or `output` holds something else or a demo of other settings.
        LlavaError: whatever else stops a stage; what is complete stays.
    """
    load_digits()  # before anything is written: this is what may be missing
    console.print("A LLaVA is a vision tower, a language model, and a projector that joins them. Here is a tiny one.")
    registry = Registry.discover()
    backend = choose_backend(backend, registry).name
    claim(output, {"seed": seed, "backend": backend})
    make_parts(output, seed, console)
    for number, (title, config) in enumerate(training_stages(output, backend, seed).items(), start=4):
        console.print(f"\n[bold]{number}/6 {title}")
        if (config.output / EXPORT_FOLDER).exists():
            console.print(DONE_BEFORE)
            continue
        result = train_model(config, registry, console, brief=True)
        if result.export is None:
            return DemoResult((), result.exit_code)
    judged = answer_held_out(output, backend, registry, console)
    collect(output, judged)
    return DemoResult(judged, 0)


def claim(output: Path, settings: dict[str, int | str]) -> None:
    """Take a folder that is new or empty, or one that a demo with the same settings began.

    Raises:
        ConfigError: it is neither.
    """
    path = output / SETTINGS_FILE
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != settings:
            raise ConfigError(
                f"{output} holds a demo made with {found}, and this one has {settings}: name another --output, "
                "or remove the folder."
            )
        return
    partial = path.with_name(path.name + PARTIAL)
    if output.exists() and (not output.is_dir() or set(output.iterdir()) - {partial}):
        raise ConfigError(f"{output} exists and holds no demo: name another --output.")
    output.mkdir(parents=True, exist_ok=True)
    _write_whole(path, json.dumps(settings) + "\n")


def make_parts(output: Path, seed: int, console: Console) -> None:
    """The data set and the two pretrained towers."""
    # Two threads on a busy machine are slower than one by far, and sums would depend on their number.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    data = DigitData(output / "data")
    parts: list[tuple[str, str, str, Callable[[Path], None]]] = [
        (
            "data",
            f"Data: {NUM_TRAIN:,} handwritten digits, as PNG files and LLaVA's JSON",
            "297 more are held out, to be asked about at the end",
            lambda folder: write_data(folder, seed),
        ),
        (
            "clip",
            "Vision tower: a small CLIP learns which caption fits which picture",
            "in a real run you download this part, e.g. openai/clip-vit-large-patch14-336",
            lambda folder: pretrain_vision(folder, data, seed, tracker(console, "clip")),
        ),
        (
            "llama",
            "Language model: a small Llama learns to talk about digits, from text alone",
            "in a real run you download this part, e.g. lmsys/vicuna-7b-v1.5",
            lambda folder: pretrain_language(folder, seed, tracker(console, "llama")),
        ),
    ]
    for number, (name, title, note, make) in enumerate(parts, start=1):
        console.print(f"\n[bold]{number}/6 {title}[/]\n{note}", soft_wrap=True)
        if (output / name).exists():
            console.print(DONE_BEFORE)
            continue
        start = time.perf_counter()
        _make_whole(output / name, make)
        console.print(f"done in {time.perf_counter() - start:.0f} s: {output / name}", soft_wrap=True, markup=False)


def training_stages(output: Path, backend: str, seed: int) -> dict[str, RunConfig]:
    """The configs of stages 1 and 2, by what the reader is told of them."""
    return {
        "Stage 1: the projector between the two learns, from captions": stages.stage1(output, backend, seed),
        "Stage 2: projector and Llama learn to answer questions": stages.stage2(output, backend, seed),
    }


def answer_held_out(output: Path, backend: str, registry: Registry, console: Console) -> tuple[Judged, ...]:
    """Ask the trained model about every held-out digit; `answers.jsonl` has what it said."""
    console.print("\n[bold]6/6 Questions about the digits that were held out")
    data, path = DigitData(output / "data"), output / ANSWERS_FILE
    rows = list(read_prompts(data.held_out))
    if path.exists():
        console.print(DONE_BEFORE)
    else:
        final = output / "stage2" / EXPORT_FOLDER
        assistant = load_assistant(final, backend=backend, precision="fp32", threads=1, registry=registry)
        settings = GenerationSettings(max_new_tokens=ANSWER_TOKENS)
        store = ImageStore(data.images, IMAGE_SIZE**2)
        write_answers(path, assistant.generate(rows, settings, batch_size=ANSWER_BATCH, images=store))
    images = {row["id"]: row["image"] for row in json.loads(data.held_out.read_text(encoding="utf-8"))}
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(
        Judged(data.images / images[a["id"]], a["question"].removeprefix("<image>\n"), a["answer"], a["reference"])
        for a in answers
    )


def collect(output: Path, judged: tuple[Judged, ...]) -> None:
    """What a newcomer looks for first, at the top of the folder."""
    folders = [output / "stage1", output / "stage2"]
    rows = [row | {"stage": number} for number, folder in enumerate(folders, 1) for row in read_metrics(folder)]
    _write_whole(output / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    titles = ("stage 1: captions, the projector learns", "stage 2: questions, projector and Llama learn")
    plot_losses(list(zip(titles, folders, strict=True)), output / "loss.png")
    plot_answers(judged, output / "answers.png")
    link = output / EXPORT_FOLDER
    if not link.exists():
        link.unlink(missing_ok=True)  # one that leads nowhere
        link.symlink_to(Path("stage2") / EXPORT_FOLDER)


def _make_whole(folder: Path, make: Callable[[Path], None]) -> None:
    """The folder appears when `make` has filled it."""
    partial = folder.with_name(folder.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    make(partial)
    os.rename(partial, folder)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
