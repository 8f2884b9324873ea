"""Images divided into tiles: pixels, counts and the features' order are transformers' own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, GotOcr2ImageProcessorPil, LlavaNextImageProcessorPil, LlavaNextProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from llava_core.data.batch import NEWLINE
from llava_core.data.image_side import ImageSide
from llava_core.data.images import ImageProcessor
from llava_core.data.tiles import Anyres, DynamicTiles
from llava_core.errors import BadRow, ConfigError

NEXT_GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

sizes = st.tuples(st.integers(1, 300), st.integers(1, 300)).filter(lambda size: max(size) <= 100 * min(size))
grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5)


def noise(height: int, width: int) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def llava_next(tile: int, pinpoints: Any, **changes: Any) -> LlavaNextImageProcessorPil:
    edges: dict[str, Any] = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    return LlavaNextImageProcessorPil(**edges, image_grid_pinpoints=[list(point) for point in pinpoints], **changes)


def ours(theirs: Any) -> ImageProcessor:
    return ImageProcessor.from_config(json.loads(theirs.to_json_string()))


@settings(max_examples=60, deadline=None)
@given(sizes, grids, st.sampled_from([8, 15, 24]), st.sampled_from([0, 1, 2, 3]))
@example((300, 3), [(1, 2), (2, 1)], 24, 3)
def test_anyres_pixels_are_bit_equal_to_transformers(
    size: tuple[int, int], grid: list[tuple[int, int]], tile: int, resample: int
) -> None:
    theirs = llava_next(tile, [(rows * tile, columns * tile) for rows, columns in grid], resample=resample)
    expected = theirs(noise(*size), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ours(theirs).tiles(noise(*size)), expected)


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (336, 336), (1200, 300), (50, 40), (7, 700)])
def test_llava_next_as_it_is_on_the_hub(size: tuple[int, int]) -> None:
    theirs = llava_next(336, NEXT_GRID)
    assert ours(theirs).tiling == Anyres(NEXT_GRID)
    assert torch.equal(ours(theirs).tiles(noise(*size)), theirs(noise(*size), return_tensors="pt")["pixel_values"][0])


@settings(max_examples=300, deadline=None)
@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 27), grids)
@example((1, 5000), 24, [(1, 2), (2, 1)])
@example((5000, 1), 27, [(1, 2), (2, 1)])
def test_anyres_features_are_merged_as_by_transformers(
    size: tuple[int, int], side: int, grid: list[tuple[int, int]]
) -> None:
    """transformers is given features that are their own numbers."""
    tile, tile_tokens = 14 * side, side**2
    pinpoints = [[rows * tile, columns * tile] for rows, columns in grid]
    tiling = Anyres(tuple((height, width) for height, width in pinpoints))
    height, width = tiling.resolution(size)
    num_tiles = 1 + (height // tile) * (width // tile)
    numbers = torch.arange(num_tiles * tile_tokens, dtype=torch.float64).view(num_tiles, tile_tokens, 1)
    vision = SimpleNamespace(image_size=tile, patch_size=14)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    newline = torch.full((1,), NEWLINE, dtype=torch.float64)
    ((expected,), _) = LlavaNextModel.pack_image_features(model, [numbers], [size], "default", newline)

    merge = tiling.merge(size, tile, tile_tokens)
    assert merge.rows.tolist() == expected[:, 0].long().tolist()
    assert merge.num_features == num_tiles * tile_tokens
    assert tiling.visual_tokens(size, tile, tile_tokens) == len(expected) == in_processor(size, tile, pinpoints)
    largest = max(tiling.divisions(tile, tile_tokens), key=lambda division: division.visual_tokens)
    assert len(expected) <= largest.visual_tokens


def in_processor(size: tuple[int, int], tile: int, pinpoints: list[list[int]]) -> int:
    """As LlavaNextProcessor counts visual tokens, with which it fills the text."""
    counter: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints), patch_size=14, num_additional_image_tokens=0
    )
    counter._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(counter)
    return LlavaNextProcessor._get_number_of_features(counter, *size, tile, tile)


def test_the_largest_anyres_image_is_one_of_its_resolutions() -> None:
    tiling = Anyres(NEXT_GRID)
    for size, division in zip(NEXT_GRID, tiling.divisions(336, 576), strict=True):
        merge = tiling.merge(size, 336, 576)
        assert division == (merge.num_features // 576, len(merge.rows), int((merge.rows == NEWLINE).sum()))


def got_ocr2(tile: int, least: int, most: int, **changes: Any) -> GotOcr2ImageProcessorPil:
    return GotOcr2ImageProcessorPil(
        size={"height": tile, "width": tile}, crop_to_patches=True, min_patches=least, max_patches=most, **changes
    )


limits = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(sorted)


@settings(max_examples=80, deadline=None)
@given(sizes, limits, st.sampled_from([8, 15, 24]), st.sampled_from([0, 2, 3]))
def test_dynamic_tiles_are_bit_equal_to_transformers(
    size: tuple[int, int], limit: list[int], tile: int, resample: int
) -> None:
    assume(limit[1] > 1)  # at one, transformers does not divide
    theirs = got_ocr2(tile, *limit, resample=resample)
    found = ours(theirs)
    assert found.tiling == DynamicTiles(*limit)
    assert torch.equal(found.tiles(noise(*size)), theirs(noise(*size), return_tensors="pt")["pixel_values"])


@settings(max_examples=300, deadline=None)
@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), limits, st.integers(1, 600))
@example((448, 896), [1, 12], 448)
@example((100, 200), [1, 12], 448)
def test_dynamic_tiles_are_counted_as_by_transformers(size: tuple[int, int], limit: list[int], tile: int) -> None:
    tiling = DynamicTiles(*limit)
    expected = got_ocr2(tile, *limit).get_number_of_image_patches(*size)
    if limit == [1, 1]:
        assert expected == 1
    assert tiling.visual_tokens(size, tile, 7) == 7 * expected
    rows, columns = tiling.grid(size, tile)
    assert expected == rows * columns + (rows * columns > 1)
    assert expected in {division.tiles for division in tiling.divisions(tile, 7)}


PROCESSORS = [
    ImageProcessor(24, (24, 24), tiling=Anyres(((24, 48), (48, 24)))),
    ImageProcessor((24, 24), None, resample=2, tiling=DynamicTiles(2, 5)),
]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_export_is_read_back_by_transformers_and_by_us(processor: ImageProcessor, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_config()))
    assert ImageProcessor.from_folder(tmp_path) == processor
    assert ImageProcessor.from_folder(tmp_path, "square").tiling is None
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = theirs(noise(30, 70), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.tiles(noise(30, 70)), pixels[0] if pixels.ndim == 5 else pixels)
    theirs.save_pretrained(tmp_path / "again")
    assert ImageProcessor.from_folder(tmp_path / "again") == processor


@pytest.mark.parametrize("processor", PROCESSORS)
def test_several_images_follow_one_another(processor: ImageProcessor) -> None:
    side = ImageSide(processor, tile_tokens=9)
    images = [noise(30, 70), noise(70, 30), noise(40, 40)]
    tokens = [side.visual_tokens(lambda image=image: (image.height, image.width)) for image in images]  # type: ignore[misc]
    tiles, merge = side.tiles(images, tokens)
    assert torch.equal(tiles, torch.cat([processor.tiles(image) for image in images]))
    alone = [side.tiles([image], [count]) for image, count in zip(images, tokens, strict=True)]
    if merge is None:
        assert sum(tokens) == 9 * len(tiles)
        return
    rows, start = [], 0
    for own_tiles, own in alone:
        assert own is not None
        rows += [row if row == NEWLINE else start + row for row in own.rows.tolist()]
        start += 9 * len(own_tiles)
    assert merge.rows.tolist() == rows
    assert merge.num_features == start


def test_an_image_that_changed_since_it_was_counted_is_refused() -> None:
    side = ImageSide(PROCESSORS[1], tile_tokens=9)
    with pytest.raises(BadRow, match="broken_image: an image changed"):
        side.tiles([noise(30, 70)], [9])


def test_the_size_of_an_undivided_image_is_not_asked_for() -> None:
    assert ImageSide(ImageProcessor(24, (24, 24)), tile_tokens=9).visual_tokens(lambda: math.nan) == 9  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("limits", [(0, 3), (4, 3)])
def test_limits_that_leave_nothing_are_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="expected 1 ≤ min ≤ max"):
        DynamicTiles(*limits)
