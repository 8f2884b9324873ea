"""Runs on images divided into tiles: their loss is transformers', and their export answers as the model here does."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_core.api import load_assistant
from llava_core.config import build_config
from llava_core.data.tiles import DynamicTiles
from llava_core.errors import ConfigError
from llava_core.inference.sampling import GenerationSettings
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts
from llava_core.train.loop import train_model
from tests.unit.train.pictures import (
    IMAGE_SIZES,
    LOSS_TOLERANCE,
    NEW_TOKENS,
    QUESTION,
    examples_of,
    generated,
    mean_loss,
    pictures,
    write_pictures,
)
from tests.unit.train.support import metrics_rows, quiet, tiny_run, tiny_settings

TILES = ("data.image_aspect=tiles", "data.max_tiles=4")


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, ...]:
    return write_pictures(tmp_path)


def test_a_run_on_tiles_trains_and_its_export_answers_as_transformers_does(
    parts: TinyParts, data: tuple[str, ...], tmp_path: Path
) -> None:
    config = build_config(tiny_settings(parts, tmp_path / "run", *TILES, *data, "train.max_steps=2"))
    result = train_model(config, Registry.discover(), quiet())
    assert result.export is not None
    tiling = DynamicTiles(1, 4)
    tiles = [tiling.visual_tokens(size, 24, 1) for size in IMAGE_SIZES]
    assert sorted(set(tiles)) == [1, 3, 4, 5]
    assert [row["image_tokens"] for row in metrics_rows(tmp_path / "run")] == [9 * sum(tiles)] * 2

    assistant = load_assistant(result.export, backend="cpu", precision="fp32")
    loaded = LlavaForConditionalGeneration.from_pretrained(result.export)
    processor = AutoProcessor.from_pretrained(result.export)
    stage = ("model.vision=null", "model.language=null", f"model.path={result.export}", *data)
    with pytest.raises(ConfigError, match="stretches an image.*set data.image_aspect to pad, or to tiles"):
        tiny_run(parts, tmp_path / "next", *stage, "data.image_aspect=square")
    assert tiny_run(parts, tmp_path / "next", *stage, "data.image_aspect=pad").processor is not None
    for picture in pictures(tmp_path):
        said = generated(loaded, processor, picture)
        assert assistant.ask(QUESTION, picture, GenerationSettings(max_new_tokens=NEW_TOKENS)) == said != ""


def test_the_loss_of_packed_tiles_is_transformers(parts: TinyParts, data: tuple[str, ...], tmp_path: Path) -> None:
    """A step that moves no weight; transformers gets each of its samples alone, from the export."""
    settings = (*TILES, *data, "train.max_steps=1", "optimizer.learning_rate=1e-30", "batch.micro_tokens=512")
    run = tiny_run(parts, tmp_path / "seen", *settings)
    examples = examples_of(run)
    config = build_config(tiny_settings(parts, tmp_path / "run", *settings))
    export = train_model(config, Registry.discover(), quiet()).export
    loaded = LlavaForConditionalGeneration.from_pretrained(export)
    expected = mean_loss(loaded, run, examples)
    (found,) = metrics_rows(tmp_path / "run")
    assert found["loss"] == pytest.approx(expected, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.image_aspect=tiles",), "max_tiles"),
        (("data.max_tiles=4",), "min_tiles and max_tiles limit image_aspect tiles"),
        (("data.image_aspect=pad", "data.min_tiles=2"), "min_tiles and max_tiles limit image_aspect tiles"),
        ((*TILES, "data.min_tiles=5"), "min_tiles 5 is above max_tiles 4"),
        ((*TILES, "model.vision_feature_select=full"), "vision_feature_select"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    parts: TinyParts, settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(parts, tmp_path / "run", *settings)
