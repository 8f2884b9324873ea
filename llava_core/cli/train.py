"""`llava-core train`: run a recipe or a config file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_core.cli.options import BackendOption


def train(
    config: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, e.g. optimizer.learning_rate=2e-5.")
    ] = None,
    backend: BackendOption = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder; short for output=…")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting and stop.")] = False,
) -> None:
    """Train a model. The same command goes on from the newest checkpoint if the run was interrupted."""
    from llava_core.config import load_config

    settings = list(overrides or [])
    settings += [f"backend.name={backend}"] if backend is not None else []
    settings += [f"output={output}"] if output is not None else []
    if print_config:
        typer.echo(describe_config(config, settings), nl=False)
        return
    checked = load_config(config, settings)
    from llava_core.train.loop import train_model

    raise typer.Exit(train_model(checked).exit_code)


def describe_config(source: str, overrides: list[str]) -> str:
    """Every setting as YAML; where some are still to be given, those that are set and then a comment on the rest."""
    from llava_core.config import build_config, merge, to_yaml
    from llava_core.config.load import settings_to_yaml
    from llava_core.errors import ConfigError

    settings = merge(source, overrides)
    try:
        return to_yaml(build_config(settings))
    except ConfigError as error:
        return settings_to_yaml(settings) + "".join(f"# {line}\n" for line in str(error).splitlines())
