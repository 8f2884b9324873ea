"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BackendOption = Annotated[
    str | None,
    typer.Option("--backend", help="A registered backend; by default an accelerator that is available, else the CPU."),
]
PrecisionOption = Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        help="A registered template or a YAML file, in place of the folder's own chat template (`tokenizer`)."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens of an answer at most.")]
Temperature = Annotated[float, typer.Option(help="Sample at this temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens that make up this probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample from so many most likely tokens.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 makes tokens that occurred already less likely.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face LLaVA folder, e.g. a run's `hf`.")]
