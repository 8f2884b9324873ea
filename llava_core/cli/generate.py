"""`llava-core generate`: a file of prompts to a file of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_core.cli.options import (
    BackendOption,
    MaxNewTokens,
    ModelArgument,
    PrecisionOption,
    RepetitionPenalty,
    Seed,
    Temperature,
    TemplateOption,
    TopK,
    TopP,
)


def generate(
    model: ModelArgument,
    prompts: Annotated[Path, typer.Argument(help="JSONL with `question` and `image`, or LLaVA rows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The answers file, JSONL.")],
    images: Annotated[Path | None, typer.Option(help="The folder that image paths are relative to.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that are generated together.")] = 8,
    backend: BackendOption = None,
    precision: PrecisionOption = "auto",
    template: TemplateOption = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
) -> None:
    """Answer every row of a prompts file; a row that cannot be answered has an `error` in its place."""
    from llava_core.api import load_assistant
    from llava_core.data.image_store import MAX_WORKING_PIXELS, ImageStore
    from llava_core.inference.prompts import check_answers_path, read_prompts, write_answers
    from llava_core.inference.sampling import GenerationSettings

    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    check_answers_path(output)
    store = ImageStore(images, MAX_WORKING_PIXELS) if images is not None else None
    rows = read_prompts(prompts)
    assistant = load_assistant(model, backend=backend, precision=precision, template=template)
    answers = assistant.generate(rows, settings, batch_size=batch_size, images=store)
    num_answers, num_errors = write_answers(output, answers)
    typer.echo(f"{num_answers} answers and {num_errors} errors in {output}")
    raise typer.Exit(1 if num_answers == 0 else 0)
