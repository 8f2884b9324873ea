"""The histogram of a data set's lengths."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from llava_core.data.readers.index import IntArray
from llava_core.preflight.tally import Tally

NUM_BARS = 60
LOG_LENGTHS = 10
"""Lengths that differ by more than this factor are drawn on a logarithmic axis."""
LOG_COUNTS = 300
"""So high a bar hides a short one, unless both are drawn on a logarithmic axis."""


def plot_lengths(path: Path, tally: Tally, max_length: int) -> None:
    """How long sequences are before any is cut, and how many of each sample's tokens are learnt."""
    lengths, labels = tally.lengths, tally.samples[:, 2]
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6.5), layout="constrained")
    _histogram(upper, lengths, max_length, "tab:blue")
    upper.axvline(max_length, color="tab:red", linestyle="--", label=f"data.max_length = {max_length:,}")
    beyond = int((lengths > max_length).sum())
    share = f" ({beyond / lengths.size:.2%})" if lengths.size else ""
    upper.set(
        title=f"{lengths.size:,} sequences, {beyond:,} of them{share} longer than data.max_length",
        xlabel="length before cutting, text and visual tokens",
        ylabel="sequences",
    )
    upper.legend()
    _histogram(lower, labels, 0, "tab:green")
    tokens, learnt = int(tally.samples[:, 0].sum()), int(labels.sum())
    share = f" ({learnt / tokens:.2%})" if tokens else ""
    lower.set(
        title=f"{labels.size:,} samples; of their {tokens:,} tokens {learnt:,}{share} are supervised",
        xlabel="supervised tokens of a sample",
        ylabel="samples",
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _histogram(axes: plt.Axes, values: IntArray, shown: int, colour: str) -> None:
    """Bars over whole numbers; `shown`, if not 0, lies within the axis."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if not values.size:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center")
        return
    low, high = int(values.min()), max(int(values.max()), shown)
    is_log = low > 0 and high / low > LOG_LENGTHS
    if is_log:  # edges between whole numbers, so that no bar is empty only for where its edges lie
        edges = np.unique(np.floor(np.geomspace(low, high + 1, NUM_BARS + 1)))
        axes.set_xscale("log", base=2)
    else:
        width = -(-(high + 1 - low) // NUM_BARS)
        edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(values, edges)
    axes.stairs(counts, edges, fill=True, color=colour)
    if counts.max() > LOG_COUNTS:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)  # a bar of one is to be seen
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 10 else f"{value:,.0f}")
