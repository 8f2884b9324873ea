"""Runs on images divided into tiles: their loss is transformers', and their export answers as the model here does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_core.api import load_assistant
from llava_core.config import build_config
from llava_core.data.examples import Built
from llava_core.data.sources import Place
from llava_core.data.tiles import DynamicTiles
from llava_core.errors import ConfigError
from llava_core.inference.sampling import GenerationSettings
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts
from llava_core.train.loop import train_model
from llava_core.train.prepare import Run
from tests.unit.data.test_tiles import noise
from tests.unit.train.support import metrics_rows, quiet, tiny_run, tiny_settings

# A loss of about 6 in fp32: one unit in its last place is 5e-7; sums of at most a few hundred terms in another order.
LOSS_TOLERANCE = 5e-6
TILES = ("data.image_aspect=tiles", "data.max_tiles=4")
IMAGE_SIZES = ((24, 24), (24, 60), (70, 30), (50, 50), (20, 90))


@pytest.fixture
def data(parts: TinyParts, tmp_path: Path) -> tuple[str, ...]:
    """Questions about images of several sizes, and one without."""
    (tmp_path / "pictures").mkdir()
    rows: list[dict[str, Any]] = []
    for number, size in enumerate(IMAGE_SIZES):
        noise(*size).save(tmp_path / "pictures" / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nWhat colour is this?"}, {"from": "gpt", "value": "It is grey."}]
        rows.append({"id": f"image-{number}", "image": f"{number}.png", "conversations": said})
    said = [{"from": "human", "value": "Name the colour."}, {"from": "gpt", "value": "Blue."}]
    rows.append({"id": "text", "conversations": said})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return (f"data.path={tmp_path / 'rows.json'}", f"data.images={tmp_path / 'pictures'}", "batch.global_size=6")


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
    for number in (0, 2, 3):
        picture = Image.open(tmp_path / "pictures" / f"{number}.png")
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "What colour is this?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = loaded.generate(**inputs, max_new_tokens=12, do_sample=False)
        said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert assistant.ask("What colour is this?", picture, GenerationSettings(max_new_tokens=12)) == said != ""


def test_the_loss_of_packed_tiles_is_transformers(parts: TinyParts, data: tuple[str, ...], tmp_path: Path) -> None:
    """A step that moves no weight; transformers gets each of its samples alone, from the export."""
    settings = (*TILES, *data, "train.max_steps=1", "optimizer.learning_rate=1e-30", "batch.micro_tokens=512")
    run = tiny_run(parts, tmp_path / "seen", *settings)
    examples = [example for row in range(6) for example in build(run, row).examples]
    config = build_config(tiny_settings(parts, tmp_path / "run", *settings))
    export = train_model(config, Registry.discover(), quiet()).export
    loaded = LlavaForConditionalGeneration.from_pretrained(export)
    total = 0.0
    for example in examples:
        tokens = example.tokens.clone()
        for start, length in zip(example.image_starts, example.visual_tokens, strict=True):
            tokens[start : start + length] = loaded.config.image_token_id
        with torch.no_grad():
            logits = loaded(input_ids=tokens[None], pixel_values=example.pixels).logits[0, :-1]
        trained = example.supervised[1:]
        # The export has rows for <image>, which training does not know.
        logits, targets = logits[trained, : run.source.spec.text.vocab_size], tokens[1:][trained]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    (found,) = metrics_rows(tmp_path / "run")
    assert found["loss"] == pytest.approx(total / sum(example.num_labels for example in examples), abs=LOSS_TOLERANCE)


def build(run: Run, row: int) -> Built:
    builder = run.loader.builder
    return builder.build(Place(0, row), builder.sources.sources[0].reader.read(row))


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
