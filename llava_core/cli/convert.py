"""`llava-core convert`: a language model under other names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer


def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder of a language model.")],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="llama, which transformers loads, or internlm2.")],
) -> None:
    """Write an InternLM2 as a Llama, or a Llama as an InternLM2, with the same weights."""
    from llava_core.errors import ConfigError
    from llava_core.weights.convert import Target
    from llava_core.weights.convert import convert as convert_folder

    if to not in get_args(Target):
        raise ConfigError(f"--to {to}: expected one of {', '.join(get_args(Target))}.")
    typer.echo(convert_folder(model, output, to))  # type: ignore[arg-type]
