"""Rows sorted by length within groups of several steps: less padding, and steps of one modality."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llava_core.data.readers.index import IntArray

MOST_STEPS = 50
FEWEST_GROUPS = 4


def usual_mega_batch_mult(num_rows: int, step_size: int) -> int:
    """Steps of a group where nothing is said: 50, or fewer so that an epoch has four groups; at least one."""
    return max(1, min(num_rows // (step_size * FEWEST_GROUPS), MOST_STEPS))


def length_grouped_order(lengths: Sequence[int] | IntArray, group_size: int, generator: torch.Generator) -> IntArray:
    """Groups of random rows of one modality, in random order, the rows of each from the longest to the shortest.

    The source's quirks are kept, for the same rows then meet in the same steps: the last group of each modality, full
    or not, goes into one mixed group at the end; where all rows are text, groups run from the shortest to the longest;
    and the longest of the groups' first rows changes places with the very first, so that what needs most memory comes
    at once.
    Source: InternLM/xtuner, xtuner/dataset/samplers/length_grouped.py, get_length_grouped_indices. NeMo's modality
    sampler, where one is added to it, groups alike.

    Args:
        lengths: of each row, negative for one without images, never 0.
        group_size: rows of a group.

    Returns:
        [N] int64.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.all(), "a length of zero has no modality"
    image, text = np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)
    if image.size and text.size:
        image_groups = _groups(image, lengths[image], group_size, generator)
        text_groups = _groups(text, -lengths[text], group_size, generator)
        whole = image_groups[:-1] + text_groups[:-1]
        last = np.concatenate([image_groups[-1], text_groups[-1]])
        groups = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        groups.append(last[np.argsort(-np.abs(lengths[last]), kind="stable")])
    else:
        groups = _groups(np.arange(lengths.size), lengths, group_size, generator)
    largest = groups[int(np.argmax([abs(lengths[group[0]]) for group in groups]))]
    groups[0][0], largest[0] = largest[0], groups[0][0]
    return np.concatenate(groups)


def _groups(rows: IntArray, lengths: IntArray, size: int, generator: torch.Generator) -> list[IntArray]:
    """The rows in random groups, each from the largest length to the smallest; equal ones as they were drawn."""
    drawn = torch.randperm(len(rows), generator=generator).numpy()
    by_length = np.lexsort((-lengths[drawn], np.arange(len(rows)) // size))
    return np.split(rows[drawn[by_length]], range(size, len(rows), size))
