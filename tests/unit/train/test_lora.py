"""Runs with adapters: what learns, what is saved, and what is left at the end."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from llava_core.api import load_assistant
from llava_core.config import build_config
from llava_core.engine import recompute
from llava_core.errors import ConfigError, WeightsError
from llava_core.inference.sampling import GenerationSettings
from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts
from llava_core.train import loop, report
from llava_core.weights.convert import convert
from tests.unit.train.support import (
    assert_bit_equal,
    before_step,
    engine_tensors,
    metrics_rows,
    quiet,
    run_to_end,
    tiny_run,
    tiny_settings,
)

LANGUAGE = ("lora.language.rank=4", "lora.language.alpha=8")
VISION = ("lora.vision.rank=2", "lora.vision.alpha=4", "train.trainable=[projector,language,vision]")


@pytest.fixture(scope="module")
def llava(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole LLaVA in a folder, as a first stage leaves it."""
    return trained(parts, tmp_path_factory.mktemp("llava") / "run", "train.max_steps=1") / "hf"


def trained(parts: TinyParts, output: Path, *overrides: str) -> Path:
    loop.train_model(build_config(tiny_settings(parts, output, *overrides)), Registry.discover(), quiet())
    return output


def of(folder: Path) -> tuple[str, ...]:
    return (f"model.path={folder}", "model.vision=null", "model.language=null")


def ask_transformers(model: Any, processor: Any) -> torch.Tensor:
    from PIL import Image

    picture = Image.new("RGB", (30, 40), (200, 30, 30))
    inputs = processor(text="USER: <image>\nWhat colour is this? ASSISTANT:", images=picture, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0]


@pytest.mark.parametrize(
    "extra",
    [LANGUAGE, (*LANGUAGE, "lora.dora=true"), ()],
    ids=["lora", "dora", "language_learns_whole"],
)
def test_the_export_is_the_base_with_the_adapter(
    extra: tuple[str, ...], parts: TinyParts, llava: Path, tmp_path: Path
) -> None:
    """In transformers: the folder `hf` alone says what the first stage's folder says with `adapter` on it."""
    output = trained(parts, tmp_path / "run", *of(llava), *VISION, *extra)
    base, merged = (LlavaForConditionalGeneration.from_pretrained(folder) for folder in (llava, output / "hf"))
    processor = AutoProcessor.from_pretrained(output / "hf")
    plain = ask_transformers(base, processor)
    adapted = ask_transformers(PeftModel.from_pretrained(base, output / "adapter"), processor)
    assert (adapted - plain).abs().max() > 1e-3  # it has learnt something
    # fp32, unit-scale logits: a product less on one side.
    torch.testing.assert_close(ask_transformers(merged, processor), adapted, rtol=0, atol=2e-5)
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(llava)
    settings = GenerationSettings(max_new_tokens=2)
    assert isinstance(load_assistant(output / "hf", backend="cpu").ask("Say red.", settings=settings), str)


def test_only_adapters_and_the_projector_learn(parts: TinyParts, tmp_path: Path) -> None:
    run = tiny_run(parts, tmp_path / "run", *LANGUAGE, *VISION, "train.precision=bf16")
    learning = {name for name in run.engine.trained if ".lora_" not in name}
    assert learning == {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    dtypes = {(p.requires_grad, p.dtype) for p in run.engine.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    before = {n: p.detach().clone() for n, p in run.engine.model.named_parameters()}
    run_to_end(run)
    changed = {n for n, p in run.engine.model.named_parameters() if not torch.equal(before[n], p)}
    assert changed == set(run.engine.trained)
    saved = {n.removeprefix("model.") for n in run.engine.state()[0] if n.startswith("model.")}
    assert saved == set(run.engine.trained)
    rates = {group["name"] for group in run.engine.optimizer.param_groups}
    assert rates == {"vision", "projector", "language"}


@pytest.mark.parametrize(
    "changes",
    [("lora.dropout=0.3", "train.recompute=full"), ("lora.dora=true",)],
    ids=["dropout", "dora"],
)
def test_a_resumed_run_ends_with_the_same_bits(changes: tuple[str, ...], parts: TinyParts, tmp_path: Path) -> None:
    settings = (*LANGUAGE, *VISION, *changes, "checkpoint.every_steps=2")
    whole = tiny_run(parts, tmp_path / "whole", *settings)
    run_to_end(whole)
    stopped = tiny_run(parts, tmp_path / "stopped", *settings)
    before_step(stopped, lambda number: (_ for _ in ()).throw(KeyboardInterrupt) if number == 4 else None)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(stopped)
    resumed = tiny_run(parts, tmp_path / "stopped", *settings)
    assert len(run_to_end(resumed)) == 4
    learnt = {k: v for k, v in engine_tensors(resumed).items() if not k.startswith("rng.")}
    assert_bit_equal(learnt, {k: v for k, v in engine_tensors(whole).items() if not k.startswith("rng.")})


def test_dropout_is_recomputed_as_it_was(parts: TinyParts, tmp_path: Path) -> None:
    settings = (*LANGUAGE, *VISION, "lora.dropout=0.4", "train.max_steps=3")
    ends = []
    for how in ("none", "full", "selective"):
        run = tiny_run(parts, tmp_path / how, *settings, f"train.recompute={how}")
        run_to_end(run)
        ends.append({k: v for k, v in engine_tensors(run).items() if not k.startswith("rng.")})
    assert_bit_equal(ends[1], ends[0])
    assert_bit_equal(ends[2], ends[0])
    dropless = tiny_run(parts, tmp_path / "dropless", *LANGUAGE, *VISION, "train.max_steps=3")
    run_to_end(dropless)
    assert metrics_rows(tmp_path / "dropless")[0]["loss"] == metrics_rows(tmp_path / "none")[0]["loss"]  # B is zero
    assert metrics_rows(tmp_path / "dropless")[2]["loss"] != metrics_rows(tmp_path / "none")[2]["loss"]


def test_nothing_is_dropped_where_nothing_learns(parts: TinyParts, tmp_path: Path) -> None:
    run = tiny_run(parts, tmp_path / "run", *LANGUAGE, "lora.dropout=0.4")
    run_to_end(run)
    step = next(iter(run.loader))
    assert run.engine.evaluate(step.batches) == run.engine.evaluate(step.batches)


def test_the_plan_says_which_parts_have_adapters(parts: TinyParts, tmp_path: Path) -> None:
    run, to = tiny_run(parts, tmp_path / "run", *LANGUAGE), Console(file=io.StringIO(), width=200)
    report.print_plan(run, to)
    # Of each decoder layer: a matrix of 4 rows for each input and one of 4 columns for each output, of 7 layers whose
    # keys and values are half as wide as the rest.
    added = 2 * 4 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 80))
    assert f"frozen; {added:,} of LoRA, rank 4, alpha 8, trained" in to.file.getvalue()


def test_an_internlm2_alone_gets_the_adapter_of_the_llama_that_it_is(parts: TinyParts, tmp_path: Path) -> None:
    """Its fused matrices are written with the adapters merged into the parts of them that have any."""
    folder, text = convert(parts.language, tmp_path / "internlm2", "internlm2"), tmp_path / "text.txt"
    text.write_text("It is red.\nSay green.\n" * 20)
    changes = (f"data.path={text}", "data.images=null", "train.trainable=[language]", *LANGUAGE)
    output = trained(parts, tmp_path / "run", *of(folder), *changes, "lora.language.targets=[k_proj,up_proj]")
    llama = convert(output / "hf", tmp_path / "llama", "llama")
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (parts.language, llama))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = merged(ids).logits
        assert (expected - base(ids).logits).abs().max() > 1e-3
        adapted = PeftModel.from_pretrained(base, output / "adapter")(ids).logits
    torch.testing.assert_close(adapted, expected, rtol=0, atol=2e-5)


def test_a_run_goes_on_from_an_adapter(parts: TinyParts, llava: Path, tmp_path: Path) -> None:
    """It starts where the other ended, the projector that learnt beside it included."""
    first = trained(parts, tmp_path / "first", *of(llava), *LANGUAGE)
    second = tiny_run(parts, tmp_path / "second", *of(llava), *LANGUAGE, f"lora.path={first / 'adapter'}")
    written = load_file(first / "adapter" / "adapter_model.safetensors")
    start = {name: p.detach() for name, p in second.engine.trained.items()}
    assert len(start) == len(written) > 4
    found = {name.replace(".default.", "."): p for name, p in start.items()}
    for name, value in written.items():
        name = name.removeprefix("base_model.model.")
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "model.multi_modal", "multi_modal"
        )
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("lora.language.rank=5",), "r: 4 there, 5 in the config"),
        (("lora.dora=true",), "use_dora: False there, True in the config"),
        (("lora.language.targets=[q_proj]",), r"has no layer: 24, e.g. base_model\.model\.model\.language_model"),
        (("lora.language.targets=[q_proj]",), r"tensors that it lacks: 0$"),
        (
            ("train.trainable=[language]",),
            r"4: multi_modal_projector.*Add projector to train.trainable, or take a model",
        ),
    ],
)
def test_an_adapter_of_other_settings_is_refused(
    changes: tuple[str, ...], message: str, parts: TinyParts, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        tiny_run(parts, tmp_path / "run", *LANGUAGE, f"lora.path={adapter}", *changes)


def test_an_adapter_that_changed_the_weights_beside_it_is_refused(
    parts: TinyParts, llava: Path, tmp_path: Path
) -> None:
    """peft's PiSSA takes its start out of the base weights, which no folder then holds."""
    targets = r".*language_model.*\.q_proj"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="pissa")
    theirs = get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), config)
    theirs.save_pretrained(str(tmp_path / "pissa"))
    settings = (*LANGUAGE, "lora.language.targets=[q_proj]", f"lora.path={tmp_path / 'pissa'}")
    with pytest.raises(WeightsError, match="init_lora_weights is 'pissa'"):
        tiny_run(parts, tmp_path / "run", *of(llava), *settings)


def test_a_finished_run_writes_an_adapter_that_was_removed(parts: TinyParts, tmp_path: Path) -> None:
    settings = (*LANGUAGE, "train.max_steps=1", "checkpoint.every_steps=1")
    file = trained(parts, tmp_path / "run", *settings) / "adapter" / "adapter_model.safetensors"
    written = file.read_bytes()
    shutil.rmtree(file.parent)
    trained(parts, tmp_path / "run", *settings)
    assert file.read_bytes() == written
    assert len(metrics_rows(tmp_path / "run")) == 1


@torch._dynamo.config.patch(recompile_limit=1000)  # beyond it nothing is compiled
def test_compiled_layers_have_adapters(parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()  # captures graphs and runs them as they are: the C++ compiler would take a minute
    monkeypatch.setattr(recompute, "COMPILER", counter)
    torch._dynamo.reset()
    settings = (*LANGUAGE, "train.max_steps=2")
    run_to_end(tiny_run(parts, tmp_path / "plain", *settings))
    run_to_end(tiny_run(parts, tmp_path / "compiled", *settings, "train.compile=true"))
    assert counter.frame_count > 0
    losses = [[row["loss"] for row in metrics_rows(tmp_path / name)] for name in ("plain", "compiled")]
    # The graphs are run as they are, in fp32; measured equal.
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def adapter(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(parts, tmp_path_factory.mktemp("adapter") / "run", *LANGUAGE, "train.max_steps=1") / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("lora.language.rank=4",), "lora.language.alpha"),
        (
            (*LANGUAGE, "train.trainable=[projector]"),
            "lora.language is set, and train.trainable = ['projector'] freezes",
        ),
        (("lora.dropout=0.1",), "set language or vision, or both"),
        ((*LANGUAGE, "lora.language.targets=[q_proj,q_proj]"), "each once"),
        ((*LANGUAGE, "lora.language.targets=[fc1]"), "lora.language.targets"),
        ((*LANGUAGE, "lora.path=nowhere"), "lora.path = nowhere: no such file or folder"),
        ((*LANGUAGE, "parallel.tensor=2"), "adapters are not divided"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    changes: tuple[str, ...], message: str, parts: TinyParts, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refusal:
        tiny_run(parts, tmp_path / "run", *changes)
    assert message in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_adapter_is_left_alone(parts: TinyParts, tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(WeightsError, match="holds notes.txt, so it is not replaced"):
        tiny_run(parts, tmp_path / "run", *LANGUAGE)
