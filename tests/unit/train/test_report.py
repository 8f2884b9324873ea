"""What a person sees before and during a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from llava_core.plugins import Registry
from llava_core.testing.datasets import TinyParts
from llava_core.train import loop, report
from llava_core.train.interrupt import StopRequest
from tests.unit.train.support import tiny_run


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def test_the_plan_says_what_will_run(parts: TinyParts, tmp_path: Path) -> None:
    saving = ("train.recompute=full", "train.recompute_layers=1")
    run, to = tiny_run(parts, tmp_path / "run", "train.trainable=[projector]", *saving), console()
    report.print_plan(run, to)
    text = printed(to)
    sizes = {
        part: sum(p.numel() for n, p in run.engine.model.named_parameters() if n.startswith(prefix))
        for part, prefix in report.PARTS.items()
    }
    assert f"{sizes['projector']:,} parameters, trained" in text
    assert f"{sizes['language']:,} parameters, frozen" in text
    assert f"{sizes['vision']:,} parameters, frozen" in text
    assert "36 rows, template v1" in text
    assert "6 steps of 8 samples" in text
    assert "float32" in text
    assert "recompute full in the first 1 of 2 layers" in text


def test_the_kernel_table_gives_each_rejection_its_reason(parts: TinyParts, tmp_path: Path) -> None:
    run, to = tiny_run(parts, tmp_path / "run"), console()
    to.print(report.kernel_table(run.selections))
    assert "short_matmul: SDPA measures faster in torch.float32" in printed(to)


@pytest.mark.parametrize("kind", ["batch.micro_tokens=512", "batch.micro_size=2"])
def test_the_first_sample_is_shown_with_its_supervised_part_marked(kind: str, parts: TinyParts, tmp_path: Path) -> None:
    run, to = tiny_run(parts, tmp_path / "run", "batch.micro_tokens=null", kind, "data.order=sequential"), console()
    report.print_first_sample(run, next(iter(run.loader)), to)
    text = " ".join(printed(to).replace("│", " ").split())
    assert "first sample, row0" in text
    assert "[image ×9]" in text
    marked = text[text.index("ASSISTANT:") + len("ASSISTANT:") :]
    assert marked.startswith("⟦ It is ")
    assert marked[: marked.index("⟧")].endswith(".</s>")
    assert "first step: 8 samples in 4 micro-batches" in text


def test_without_a_terminal_a_line_comes_now_and_then(parts: TinyParts, tmp_path: Path) -> None:
    run, to = tiny_run(parts, tmp_path / "run", "train.max_steps=25", "batch.global_size=2"), console()
    loop.run_steps(run, 0, StopRequest(), Registry.discover(), to)
    shown = [line for line in printed(to).splitlines() if line.startswith("run: step")]
    assert [line.split()[2] for line in shown] == [f"{n}/25" for n in (3, 5, 8, 10, 13, 15, 18, 20, 23, 25)]
    assert all("loss" in line and "tok/s" in line for line in shown)
