"""What is kept on the host for a device: the numbers of a run without, less of the device's memory, and checkpoints
that know nothing of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from llava_core.config import build_config
from llava_core.engine.offload import on_host
from llava_core.engine.recompute import Keeping, arrange_layers
from llava_core.testing.datasets import TinyParts, tiny_parts
from llava_core.testing.models import tiny_text_config
from llava_core.train.loop import train_model
from llava_npu.backend import NpuBackend
from tests.hardware import hardware, torch_settings_kept
from tests.unit.engine.support import batches, engine, examples, hf_model
from tests.unit.train.support import metrics_rows, tiny_settings

pytestmark = pytest.mark.npu


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


def train(parts: TinyParts, output: Path, *overrides: str) -> list[dict[str, Any]]:
    """The steps' metrics of a run on the NPU."""
    with torch_settings_kept():
        settings = tiny_settings(parts, output, "backend.name=npu", *overrides)
        assert train_model(build_config(settings), console=Console(quiet=True)).exit_code == 0
    return metrics_rows(output)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in (output / "hf").glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def plain(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("plain") / "run"
    return output, train(parts, output)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.offload_activations=true",),
        ("train.offload_activations=true", "train.recompute=selective"),
        ("parallel.offload=true",),
        ("parallel.offload=true", "train.offload_activations=true", "train.recompute=full"),
    ],
    ids=["activations", "selective", "weights", "everything"],
)
def test_a_run_ends_with_the_same_bits(
    overrides: tuple[str, ...], plain: tuple[Path, list[dict[str, Any]]], parts: TinyParts, tmp_path: Path
) -> None:
    output, rows = plain
    assert train(parts, tmp_path / "run", *overrides) == rows
    found, expected = weights(tmp_path / "run"), weights(output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("first", ["true", "false"], ids=["from_the_host", "to_the_host"])
def test_a_checkpoint_goes_on_the_other_way(
    first: str, plain: tuple[Path, list[dict[str, Any]]], parts: TinyParts, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    train(parts, output, f"parallel.offload={first}", "checkpoint.every_steps=3", "checkpoint.keep=null")
    shutil.rmtree(output / "hf")
    shutil.rmtree(output / "checkpoints" / "step-00000006")
    second = {"true": "false", "false": "true"}[first]
    assert train(parts, output, f"parallel.offload={second}") == plain[1]


def device_bytes(keeping: Keeping) -> tuple[int, int]:
    """Above what was there: bytes that the device holds between the passes of a step, and at the step's peak."""
    model, spec = hf_model(text=tiny_text_config(hidden_size=128, intermediate_size=352, num_hidden_layers=4))
    trained = engine(model, spec, trainable=("projector", "language"))
    arrange_layers(trained.model, keeping)
    batch = batches(examples(spec, 32), [32])[0].to(hardware().device)
    share = torch.full((batch.counts.label_tokens,), 1 / batch.counts.label_tokens, device=hardware().device)
    trained.model(batch, share).backward()  # gradients are there from now on
    memory = hardware().backend.memory
    memory.reset_peak()
    before = torch.npu.memory_allocated()
    loss = trained.model(batch, share)
    kept = torch.npu.memory_allocated() - before
    loss.backward()
    return kept, memory.peak_bytes() - before


def test_activations_leave_the_device(device: torch.device) -> None:
    kept, peak = device_bytes(Keeping())
    moved_kept, moved_peak = device_bytes(Keeping(store=on_host(hardware())))
    # The loss keeps its gradients; of each layer remain the statistics of rows.
    assert moved_kept < 0.15 * kept
    assert moved_peak < 0.5 * peak


def test_copies_go_through_pinned_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    x = torch.randn(1000, device=device)
    back = on_host(hardware())(x)
    assert NpuBackend().pins_memory
    assert any(y.is_pinned() and y.shape == x.shape for y in made)
    assert torch.equal(back().cpu(), x.cpu())
