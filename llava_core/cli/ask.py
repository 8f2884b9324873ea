"""`llava-core ask`: one question to a model."""

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


def ask(
    model: ModelArgument,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="The question about it.")],
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
    """Ask a model a question about an image."""
    from llava_core.api import load_assistant
    from llava_core.inference.sampling import GenerationSettings
    from llava_core.plugins import Registry

    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    registry = Registry.discover()
    own = registry.load("template", template) if template is not None else None
    assistant = load_assistant(model, backend=backend, precision=precision, template=own, registry=registry)
    typer.echo(assistant.ask(question, image, settings))
