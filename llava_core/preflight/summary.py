"""The numbers of a checked data set, as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_core.data.readers.index import IntArray
from llava_core.preflight.epoch import Epoch
from llava_core.preflight.foresight import Foresight
from llava_core.preflight.measure import SampleFacts
from llava_core.preflight.tally import Tally

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def data_summary(tally: Tally, max_length: int, overlong: Collection[str]) -> dict[str, Any]:
    """Rows, samples, tokens and images. A share of nothing is null, as of a source of which no row was looked at.

    Args:
        overlong: what becomes of rows that are too long; more than one where data sets differ.
    """
    tokens, image_tokens, label_tokens, images = (int(total) for total in tally.samples.sum(axis=0))
    num_rows, num_bad = tally.num_samples_of_rows.size, tally.reasons.total()
    columns = {name: tally.samples[:, column] for column, name in enumerate(SampleFacts._fields)}
    return {
        "rows": {
            "total": num_rows,
            "usable": num_rows - num_bad,
            "bad": num_bad,
            "bad_fraction": num_bad / num_rows if num_rows else None,
            "reasons": _sorted(tally.reasons),
            **id_counts(tally.keys),
        },
        "lengths": distribution(tally.lengths),
        "overlong": {
            "sequences": int((tally.lengths > max_length).sum()),
            "rows_dropped": tally.num_dropped,
            "become": sorted(overlong),
        },
        "samples": {"total": len(tally.samples), "with_images": int((columns["images"] > 0).sum()), "images": images},
        "tokens": {
            "total": tokens,
            "text": tokens - image_tokens,
            "image": image_tokens,
            "label": label_tokens,
            "label_of_sample": distribution(columns["label_tokens"]),
        },
        "images": {
            "usable": len(tally.image_sizes),
            "bad": tally.image_reasons.total(),
            "reasons": _sorted(tally.image_reasons),
            "width": distribution(tally.image_sizes[:, 0]),
            "height": distribution(tally.image_sizes[:, 1]),
            "modes": _sorted(tally.image_modes),
            "formats": _sorted(tally.image_formats),
        },
    }


def epoch_summary(epoch: Epoch, num_shares: int) -> dict[str, Any]:
    """How full the micro-batches of the first epoch are. A share of nothing is null."""
    return {
        "data_parallel": num_shares,
        "steps": epoch.steps,
        "samples": epoch.samples,
        "tokens": epoch.num_tokens,
        "computed_tokens": epoch.num_positions,
        "real_share": epoch.num_tokens / epoch.num_positions if epoch.num_positions else None,
        "micro_batches": epoch.num_micro_batches,
        "filled_share": epoch.num_tokens / epoch.room if epoch.room else None,
    }


def foresight_summary(foresight: Foresight) -> dict[str, Any]:
    """Where bad rows would stop the run, if anywhere, and whether it was gone through to its end."""
    stop = foresight.stop
    return {"stops": None if stop is None else {"epoch": stop.epoch, "step": stop.step}, "whole": foresight.whole}


def id_counts(keys: NDArray[np.uint64]) -> dict[str, int]:
    """How many ids several rows have, and how many rows these are."""
    repeated = rows_of_repeated(keys)
    return {"repeated_ids": len(repeated), "rows_with_repeated_ids": sum(map(len, repeated))}


def rows_of_repeated(keys: NDArray[np.uint64]) -> list[IntArray]:
    """The rows of each id that several have, by their first row."""
    order = np.argsort(keys, kind="stable")
    order = order[keys[order] != 0]
    starts = np.flatnonzero(np.diff(keys[order], prepend=np.uint64(0)))
    ends = np.append(starts[1:], order.size)
    repeated = ends - starts > 1
    groups = [order[start:end] for start, end in zip(starts[repeated], ends[repeated], strict=True)]
    return sorted(groups, key=lambda group: int(group[0]))


def distribution(values: NDArray[np.int64]) -> dict[str, float] | None:
    """How many, smallest, percentiles, largest and mean; each percentile is a value that occurs. None of no values."""
    if not values.size:
        return None
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {
        "count": values.size,
        "min": int(values.min()),
        **{f"p{percent}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)},
        "max": int(values.max()),
        "mean": float(values.mean()),
    }


def _sorted(counts: Counter[str]) -> dict[str, int]:
    """The most frequent first, of equally many by name: the order of the rows leaves no trace."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
