"""`llava-core plan`: what it shows, what it writes, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

from llava_core.testing.models import tiny_llava_config
from tests.unit.cli.support import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a config."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llava_config().save_pretrained(folder)
    return folder


def arguments(model: Path, *more: object) -> tuple[object, ...]:
    small = ("data.max_length=64", "batch.micro_tokens=128", "batch.global_size=8", "train.precision=fp32")
    return "plan", "llava15-7b-sft", f"model.path={model}", *small, "--backend", "cpu", *more


def test_a_plan_needs_a_config_alone(capsys, model: Path, tmp_path: Path) -> None:
    done = run(capsys, *arguments(model, "--json", tmp_path / "plan.json", "--memory", "1MiB"))
    assert done.code == 0, done.err
    assert "not even one sample" in done.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    with torch.device("meta"):
        theirs = LlavaForConditionalGeneration(AutoConfig.from_pretrained(model))
    assert sum(part["parameters"] for part in plan["parts"]) == sum(p.numel() for p in theirs.parameters())
    assert plan["memory"]["peak"] == sum(plan["memory"]["at_peak"].values()) > 2**20
    assert plan["step"]["tokens"] == 8 * 64
    assert plan["largest_micro_batch"]["samples"] == 0


def test_of_a_stage_the_whole_model_is_told_too(capsys, model: Path, tmp_path: Path) -> None:
    parts, flops = [], []
    for more in ((), ("parallel.pipeline=2", "--nproc", "2", "--rank", "1")):
        done = run(capsys, *arguments(model, "--json", tmp_path / "plan.json", *more))
        assert done.code == 0, done.err
        plan = json.loads((tmp_path / "plan.json").read_text())
        parts.append(plan["parts"])
        flops.append(plan["step"]["flops"])
    whole, of_last = parts
    assert flops[0] == flops[1]
    assert [part["parameters"] for part in of_last] == [part["parameters"] for part in whole]
    vision, projector, language = of_last
    assert (vision["parameters_here"], projector["parameters_here"]) == (0, 0)
    assert 0 < language["parameters_here"] < language["parameters"]


def test_the_largest_micro_batch(capsys, model: Path, tmp_path: Path) -> None:
    def plan(*more: object) -> dict[str, dict[str, int]]:
        done = run(capsys, *arguments(model, "batch.global_size=64", "--json", tmp_path / "plan.json", *more))
        assert done.code == 0, done.err
        return json.loads((tmp_path / "plan.json").read_text())

    found = plan("--memory", "8MiB")["largest_micro_batch"]
    assert 1 < found["samples"] < 64
    for more, fits in ((0, True), (1, False)):
        peak = plan(f"batch.micro_tokens={64 * (found['samples'] + more)}", "--memory", "64GiB")["memory"]["peak"]
        assert (peak <= 8 * 2**20) == fits


def test_a_dry_run_lists_a_rank_of_many(capsys, model: Path, tmp_path: Path) -> None:
    more = ("parallel.tensor=2", "--world-size", "8", "--rank", "5", "--dry-run", "--json", tmp_path / "plan.json")
    done = run(capsys, *arguments(model, *more))
    assert done.code == 0, done.err
    assert "parameters of rank 5" in done.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["rank"], plan["layout"]["shard"], plan["layout"]["tensor"]) == (5, 4, 2)
    head = next(p for p in plan["parameters"] if p["name"] == "language_model.lm_head.weight")
    assert (head["shape"], head["local_shape"]) == ([96, 64], [12, 64])  # divided by two, and that by four
    assert {(c["kind"], c["axis"], c["processes"]) for c in plan["collectives"]} >= {
        ("all-gather", "dp_shard", 4),
        ("all-gather", "tp", 2),
        ("all-reduce", "all", 8),
    }


def test_a_backend_that_is_not_here_is_planned_with_fused_kernels(capsys, model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is here")
    given = [*arguments(model), "--backend", "cuda"]
    assert "attention fused" in run(capsys, *given).out
    refused = run(capsys, *given, "train.precision=auto")
    assert (refused.code, "name one of bf16, fp16, fp32" in refused.err.replace("\n", " ")) == (2, True)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--world-size", "2", "--rank", "2"), "rank 2 of 2 processes: expected one from 0 to 1"),
        (("--memory", "64"), "memory '64': expected a number and one of MB, GB"),
        (("--sample-tokens", "65"), "data.max_length = 64"),
        (("--world-size", "3", "parallel.tensor=2"), "parallel.tensor = 2: 3 processes do not divide by it"),
        (("--world-size", "16"), "16 data-parallel processes cannot share"),
        (("parallel.tensor=8", "--world-size", "8"), "tensor parallelism over 8 processes"),
        (("parallel.offload=true",), "parallel.offload: a plan cannot count"),
        (("model.path=nowhere",), "nowhere has no config.json"),
        (("train.trainable=[language,projectr]",), "train.trainable"),
    ],
)
def test_what_cannot_be_planned(capsys, model: Path, more: tuple[str, ...], expected: str) -> None:
    done = run(capsys, *arguments(model, *more))
    assert done.code == 2
    assert expected in done.err
