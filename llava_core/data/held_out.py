"""Which rows of a data set are held out of the training: the same ones in every run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from llava_core.data.readers.index import IntArray
from llava_core.data.sources import Sources
from llava_core.errors import ConfigError


def trained_on(sources: Sources, fraction: float) -> Sources:
    """The sources without the rows that are held out of each. Raises as `split_rows`."""
    return Sources([replace(one, rows=split_rows(len(one.reader), fraction)[0]) for one in sources.sources])


def held_out(sources: Sources, fraction: float) -> Sources:
    """These rows, of the whole sources or of what is trained on of them. Raises as `split_rows`."""
    return Sources([replace(one, rows=split_rows(len(one.reader), fraction)[1]) for one in sources.sources])


def split_rows(num_rows: int, fraction: float) -> tuple[IntArray, IntArray]:
    """The rows to train on and those held out, each in order.

    Chosen at random, as the rows of many files are sorted; by the number of rows alone, so that runs of any seed hold
    out the same ones, and a model that one run trained was not shown them before another judges it by them.

    Args:
        fraction: of the rows, rounded down, but at least one.

    Raises:
        ConfigError: no row would be left to train on.
    """
    num_held = max(1, int(num_rows * fraction))
    if num_held >= num_rows:
        raise ConfigError(
            f"validation.fraction = {fraction}: of a data set of {num_rows} rows none would be left to train on; give "
            "validation.path, or leave the data set out."
        )
    chosen = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0)).numpy()
    return np.sort(chosen[num_held:]), np.sort(chosen[:num_held])
