"""The demo's pictures: both stages' losses, and what the model answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from llava_core.train.metrics import read_metrics
from llava_core.train.plots import smooth

ROWS, COLUMNS = 4, 6
MAX_WRONG = 8
RIGHT_COLOUR, WRONG_COLOUR = "#1a7f37", "#c62828"


@dataclass(frozen=True)
class Judged:
    """A held-out question with the model's answer and the right one."""

    image: Path
    question: str
    answer: str
    reference: str

    @property
    def right(self) -> bool:
        return self.answer == self.reference


def plot_losses(stages: Sequence[tuple[str, Path]], path: Path) -> None:
    """The losses of run folders side by side, each under its title."""
    figure, panels = plt.subplots(1, len(stages), figsize=(11, 4.2), layout="constrained", squeeze=False)
    for axes, (title, folder) in zip(panels[0], stages, strict=True):
        rows = read_metrics(folder)
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="each step")
        axes.plot(steps, smooth(losses), color="tab:blue", label="smoothed")
        axes.set(xlabel="optimizer step", ylabel="loss", title=title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_answers(judged: Sequence[Judged], path: Path) -> None:
    """A grid of held-out pictures with question and answer, the wrong ones first so that they are seen."""
    num_right = sum(one.right for one in judged)
    figure, panels = plt.subplots(
        ROWS, COLUMNS, figsize=(13, 10.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    shown = choose(judged)
    for axes in panels.flat:
        axes.axis("off")
    for axes, one in zip(panels.flat, shown, strict=False):
        _draw(axes, one)
    title = f"Digits the model was never trained on: {num_right} of {len(judged)} answers right"
    if num_wrong_shown := sum(not one.right for one in shown):
        title += f"\nof its {len(judged) - num_right} wrong answers, {num_wrong_shown} come first here"
    figure.suptitle(title, fontsize=13)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def choose(judged: Sequence[Judged]) -> list[Judged]:
    """As many as the grid holds: up to `MAX_WRONG` wrong ones, then right ones, each in their order."""
    wrong = [one for one in judged if not one.right][:MAX_WRONG]
    return wrong + [one for one in judged if one.right][: ROWS * COLUMNS - len(wrong)]


def _draw(axes: Axes, one: Judged) -> None:
    with Image.open(one.image) as image:
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set_title(one.question, fontsize=9, color="#444444")
    colour = RIGHT_COLOUR if one.right else WRONG_COLOUR
    below = f"{one.answer} ✓" if one.right else f"{one.answer} ✗\nright: {one.reference}"
    axes.text(0.5, -0.04, below, transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color=colour)
