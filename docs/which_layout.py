"""Writes the table of layouts in distributed.md: what `llava-core plan` says of each of its rows.

python docs/which_layout.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_core.plan.memory import GRADIENTS, OPTIMIZER, WEIGHTS
from llava_core.plan.planning import Plan, make_plan
from llava_core.plan.subject import Subject, planned_config
from llava_core.plugins import Registry

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "distributed.md"
MODELS = ROOT / "tests" / "models"
"""Configs with the sizes of the models that the folders are named after."""

BEGIN, END = "<!-- from docs/which_layout.py -->", "<!-- to here -->"
HEADINGS = (
    "language model",
    "stage",
    "devices",
    "settings",
    "weights, gradients, optimizer",
    "largest micro-batch",
    "with it",
)
USABLE = 0.9
"""The share of a device's memory that a plan may fill: the rest is for what it does not see."""

GB = 10**9


@dataclass(frozen=True)
class Row:
    """A model on some devices.

    Attributes:
        language: a folder of MODELS.
        memory: bytes of a device.
    """

    language: str
    recipe: str
    devices: int
    memory: int
    settings: tuple[str, ...] = ()

    @property
    def stage(self) -> int:
        return 1 if self.recipe.endswith("pretrain") else 2

    def plan(self) -> Plan:
        """Of its first rank, with fused kernels."""
        folders = (f"model.vision={MODELS / 'clip-vit-large-patch14-336'}", f"model.language={MODELS / self.language}")
        fixed = (*folders, "backend.name=cuda", "train.precision=bf16", "batch.micro_tokens=8192")
        # Enough samples that the devices' memory sets the limit, not a process's share of a step.
        samples = f"batch.global_size={32 * self.devices}"
        config = planned_config(self.recipe, (*fixed, samples, *self.settings), {})
        subject = Subject.of(config, Registry.discover())
        return make_plan(subject, self.devices, 0, memory=int(USABLE * self.memory))

    def subject_cells(self) -> tuple[str, str, str, str]:
        """What is planned, as the table shows it."""
        settings = " ".join(f"`{setting}`" for setting in self.settings)
        return self.language, str(self.stage), f"{self.devices} × {self.memory // GB} GB", settings

    def cells(self, plan: Plan) -> tuple[str, ...]:
        """As the table shows them."""
        assert plan.fit is not None
        largest, tokens = plan.estimate.largest, plan.fit.samples * plan.estimate.step.sample_tokens
        standing = sum(largest[kind] for kind in (WEIGHTS, GRADIENTS, OPTIMIZER))
        more = " or more" if plan.fit.is_limit else ""
        fits = f"{tokens:,} tokens{more}" if tokens else "none"
        return *self.subject_cells(), gigabytes(standing), fits, gigabytes(plan.fit.peak)


STAGE_1, STAGE_2 = "llava15-7b-pretrain", "llava15-7b-sft"
TENSOR = ("parallel.tensor=8", "train.recompute=selective")

ROWS = (
    Row("vicuna-7b-v1.5", STAGE_1, 1, 80 * GB),
    Row("vicuna-7b-v1.5", STAGE_2, 1, 80 * GB),
    Row("vicuna-7b-v1.5", STAGE_2, 8, 64 * GB),
    Row("vicuna-7b-v1.5", STAGE_2, 8, 64 * GB, ("train.recompute=selective",)),
    Row("internlm2-chat-20b", STAGE_1, 8, 64 * GB),
    Row("internlm2-chat-20b", STAGE_2, 8, 64 * GB, ("train.recompute=full",)),
    Row("internlm2-chat-20b", STAGE_2, 32, 64 * GB, ("train.recompute=selective",)),
    Row("llama-3.1-70b", STAGE_2, 64, 64 * GB, TENSOR),
    Row("llama-3.1-70b", STAGE_2, 512, 64 * GB, TENSOR),
)


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / GB:,.1f} GB"


def table(rows: list[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def with_table(page: str, text: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


if __name__ == "__main__":
    cells = []
    for row in ROWS:
        cells.append(row.cells(row.plan()))
        print(" | ".join(cells[-1]), flush=True)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table(cells)), encoding="utf-8")
