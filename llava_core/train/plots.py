"""The picture of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from llava_core.train.metrics import read_metrics, read_validations

SMOOTHING = 0.9
"""Weight of the past in the smoothed curve; its first steps are corrected for starting at nothing."""


def plot_loss(folder: Path) -> Path:
    """`loss.png` of a run's folder: the losses and the learning rate over the steps, from its metrics."""
    rows = read_metrics(folder)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="loss")
    axes.plot(steps, smooth(losses), color="tab:blue", label="loss, smoothed")
    if validations := read_validations(folder):
        found = [row["step"] for row in validations], [row["validation_loss"] for row in validations]
        axes.plot(*found, color="tab:green", marker="o", markersize=4, label="validation loss")
    axes.set(xlabel="optimizer step", ylabel="loss", title=folder.name)
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [row["lr"] for row in rows], color="tab:orange", linestyle="--", label="learning rate")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    handles = [line for ax in (axes, rate) for line in ax.get_lines()]
    axes.legend(handles, [str(line.get_label()) for line in handles], loc="upper right")
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, bias-corrected."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smoothed.append(average / (1 - SMOOTHING**count))
    return smoothed
