"""LLaVA-NeXT from its parts to a run, an export, transformers and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaNextForConditionalGeneration, LlavaNextProcessor

from llava_core.api import load_assistant
from llava_core.backend import OpSet
from llava_core.config import build_config
from llava_core.data.tiles import Anyres
from llava_core.errors import ConfigError, LlavaError
from llava_core.inference.sampling import GenerationSettings
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts
from llava_core.testing.models import TINY_PINPOINTS
from llava_core.train.loop import train_model
from llava_core.weights.load import load_model
from llava_core.weights.names import NEWLINE
from llava_core.weights.source import from_folder
from tests.unit.train.pictures import (
    IMAGE_SIZES,
    LOSS_TOLERANCE,
    NEW_TOKENS,
    QUESTION,
    examples_of,
    generated,
    inputs_of,
    mean_loss,
    pictures,
    write_pictures,
)
from tests.unit.train.support import metrics_rows, quiet, tiny_run, tiny_settings

COMPOSED = ("data.image_aspect=anyres", f"model.image_grid_pinpoints={[list(point) for point in TINY_PINPOINTS]}")
# Of fp32 logits, whose sums of some hundred terms are in another order where an adapter is merged.
LOGITS_TOLERANCE = 2e-5
STILL = ("train.max_steps=1", "optimizer.learning_rate=1e-30")  # moves no weight


def whole(folder: Path) -> tuple[str, ...]:
    return ("data.image_aspect=anyres", "model.vision=null", "model.language=null", f"model.path={folder}")


def run(parts: TinyParts, output: Path, *settings: str) -> Path:
    """Trains, and returns the export."""
    export = train_model(build_config(tiny_settings(parts, output, *settings)), Registry.discover(), quiet()).export
    assert export is not None
    return export


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, ...]:
    return write_pictures(tmp_path)


def test_its_export_answers_as_transformers_does(parts: TinyParts, data: tuple[str, ...], tmp_path: Path) -> None:
    export = run(parts, tmp_path / "run", *COMPOSED, *data, "train.max_steps=2")
    loaded, info = LlavaNextForConditionalGeneration.from_pretrained(export, output_loading_info=True)
    assert not any(info.values()), info
    processor: Any = AutoProcessor.from_pretrained(export)
    assert isinstance(processor, LlavaNextProcessor)
    assistant = load_assistant(export, backend="cpu", precision="fp32")
    num_tokens = 0
    for picture in pictures(tmp_path):
        said = generated(loaded, processor, picture)
        assert assistant.ask(QUESTION, picture, GenerationSettings(max_new_tokens=NEW_TOKENS)) == said != ""
        num_tokens += int((inputs_of(processor, picture)["input_ids"] == processor.image_token_id).sum())
    assert [row["image_tokens"] for row in metrics_rows(tmp_path / "run")] == [num_tokens] * 2


def test_the_loss_of_a_packed_step_is_transformers(parts: TinyParts, data: tuple[str, ...], tmp_path: Path) -> None:
    seen = tiny_run(parts, tmp_path / "seen", *COMPOSED, *data, *STILL)
    examples = examples_of(seen)
    tiling = Anyres(TINY_PINPOINTS)
    counts = [tiling.visual_tokens(size, 24, 9) for size in IMAGE_SIZES]
    assert [example.visual_tokens for example in examples] == [*((count,) for count in counts), ()]
    loaded = LlavaNextForConditionalGeneration.from_pretrained(
        run(parts, tmp_path / "run", *COMPOSED, *data, *STILL, "batch.micro_tokens=512")
    )
    (found,) = metrics_rows(tmp_path / "run")
    assert found["loss"] == pytest.approx(mean_loss(loaded, seen, examples, sizes=True), abs=LOSS_TOLERANCE)


def test_a_folder_of_transformers_comes_back_with_the_same_bits(
    parts: TinyParts, data: tuple[str, ...], tmp_path: Path
) -> None:
    first = run(parts, tmp_path / "first", *COMPOSED, *data, *STILL)
    theirs = tmp_path / "theirs"
    LlavaNextForConditionalGeneration.from_pretrained(first).save_pretrained(theirs)
    AutoProcessor.from_pretrained(first).save_pretrained(theirs)
    weights = load_file(first / "model.safetensors")
    assert "image_newline" in weights
    read = {name: load()[(slice(None),)] for name, load in from_folder(theirs).tensors.items() if name == NEWLINE}
    assert torch.equal(read[NEWLINE], weights["image_newline"])

    again = load_file(run(parts, tmp_path / "second", *whole(theirs), *data, *STILL) / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_projector_without_a_newline_gets_a_fresh_one(
    parts: TinyParts, data: tuple[str, ...], tmp_path: Path
) -> None:
    plain = run(parts, tmp_path / "plain", *data, *STILL)
    settings = (*COMPOSED, f"model.projector={plain}", *data, *STILL)
    source = tiny_run(parts, tmp_path / "next", *settings).source
    assert (source.fresh_projector, source.fresh_newline) == (False, True)
    cpu = torch.device("cpu")
    load = partial(load_model, source, OpSet.of({}), compute_dtype=torch.float32, device=cpu)
    one, other, another = (dict(load(seed=seed).named_parameters()) for seed in (0, 0, 1))
    assert torch.equal(one[NEWLINE], other[NEWLINE])
    assert not torch.equal(one[NEWLINE], another[NEWLINE])
    trained = load_file(plain / "model.safetensors")["multi_modal_projector.linear_1.weight"]
    assert torch.equal(another["multi_modal_projector.linear_1.weight"], trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.image_aspect=anyres",), "this model has no image_grid_pinpoints"),
        ((COMPOSED[1],), "data.image_aspect = pad: this model is a LLaVA-NeXT"),
        ((*COMPOSED, "model.vision_feature_select=full"), "class token"),
        ((COMPOSED[0], "model.image_grid_pinpoints=[[24, 50]]"), "multiples of the tower's 24 pixels"),
        ((*COMPOSED, "data.max_tiles=3"), "min_tiles and max_tiles"),
    ],
)
def test_what_does_not_fit_is_refused(
    parts: TinyParts, settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LlavaError, match=message):
        tiny_run(parts, tmp_path / "run", *settings)


def test_pinpoints_that_differ_in_model_and_processor_are_refused(
    parts: TinyParts, data: tuple[str, ...], tmp_path: Path
) -> None:
    export = run(parts, tmp_path / "run", *COMPOSED, *data, *STILL)
    file = export / "preprocessor_config.json"
    text = file.read_text()
    file.write_text(text.replace("72", "48"))
    assert file.read_text() != text
    with pytest.raises(ConfigError, match="in its image processor and"):
        tiny_run(parts, tmp_path / "again", *whole(export), *data)


def test_an_adapter_brings_the_newline_that_learnt_beside_it(
    parts: TinyParts, data: tuple[str, ...], tmp_path: Path
) -> None:
    """peft puts the adapter on the model that it was trained from; the export has both in one."""
    base = run(parts, tmp_path / "base", *COMPOSED, *data, *STILL)
    lora = ("lora.language.rank=4", "lora.language.alpha=8", "train.max_steps=3")
    export = run(parts, tmp_path / "run", *whole(base), *data, *lora)
    load = LlavaNextForConditionalGeneration.from_pretrained
    adapter = tmp_path / "run" / "adapter"
    adapted, merged, before = PeftModel.from_pretrained(load(base), adapter), load(export), load(base)
    newline = adapted.get_base_model().model.image_newline
    assert torch.equal(newline, merged.model.image_newline)
    assert not torch.equal(newline, before.model.image_newline)
    inputs = inputs_of(AutoProcessor.from_pretrained(export), next(pictures(tmp_path)))
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, merged(**inputs).logits, rtol=0, atol=LOGITS_TOLERANCE)

    going_on = tiny_run(parts, tmp_path / "second", *whole(base), *data, *lora, f"lora.path={adapter}")
    assert torch.equal(dict(going_on.engine.model.named_parameters())[NEWLINE].detach(), newline)
