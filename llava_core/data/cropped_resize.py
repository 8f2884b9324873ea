"""When Pillow can crop and resize at once and give the same bits."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4096)
def exact_columns(size: int, resized: int, left: int, crop: int) -> tuple[float, float] | None:
    """The columns of an image `size` wide to hand to `resize(box=…)`, to get columns `left` to `left + crop` of the
    image resized to `resized` wide, bit for bit; None where that is not certain.

    Certain is: (1) Pillow holds the box in float32, so both edges and their distance must be exact in it; a box that
    is off by 1e-5 of a pixel changes hundreds of levels. (2) Pillow computes where each output column lies by another
    sum, off by a few float64 roundings, before it rounds the weights to 22 bits: no weight may lie close to a tie.
    Only columns, because Pillow 13 chooses the order of its two passes by size: a box that cuts rows can change it.
    """
    edges = (Fraction(left * size, resized), Fraction((left + crop) * size, resized))
    if any(Fraction(float(np.float32(float(exact)))) != exact for exact in (*edges, edges[1] - edges[0])):
        return None
    scaled = np.abs(_bicubic_weights(size, resized, left, crop)) * 2**22
    # float64 errs by 1e-13 of a pixel here, 1e-6 of the rounding step.
    if np.any(np.abs(scaled % 1 - 0.5) < 1e-5):
        return None
    return float(edges[0]), float(edges[1])


def _bicubic_weights(size: int, resized: int, left: int, crop: int) -> np.ndarray:
    """[crop, taps] float64: the weights with which Pillow's bicubic filter (a = -1/2) sums input columns."""
    scale = size / resized
    stretch = max(scale, 1.0)
    centers = ((np.arange(left, left + crop) + 0.5) * scale)[:, None]
    columns = np.floor(centers - 2 * stretch) + np.arange(int(4 * stretch) + 3)
    x = np.abs(columns + 0.5 - centers) / stretch
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * ((columns >= 0) & (columns < size))
    return weights / weights.sum(axis=1, keepdims=True)
