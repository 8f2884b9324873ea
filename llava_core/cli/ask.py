"""`llava-core ask`: one question to a model."""

from __future__ import annotations

import os
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
    about: Annotated[
        list[str], typer.Argument(metavar="[IMAGE] QUESTION", help="An image file, or none, and the question.")
    ],
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
    """Ask a model a question, about an image or without one."""
    from llava_core.api import load_assistant
    from llava_core.inference.sampling import GenerationSettings

    image, question = image_and_question(about)
    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    assistant = load_assistant(model, backend=backend, precision=precision, template=template)
    typer.echo(assistant.ask(question, image, settings))


def image_and_question(arguments: list[str]) -> tuple[Path | None, str]:
    """What is asked, and about which image.

    Raises:
        ConfigError: more than an image and a question, or an image alone.
    """
    from llava_core.errors import ConfigError

    if len(arguments) > 2:
        raise ConfigError(
            f"expected a question, or an image and a question, found {len(arguments)} arguments: {arguments}. "
            "Put the question in quotes."
        )
    *images, question = arguments
    if not images and os.path.isfile(question):
        raise ConfigError(f"{question} is a file, and there is no question: give one after it.")
    return (Path(images[0]) if images else None), question
