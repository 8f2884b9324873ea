"""`llava-core data`: what is done to a data set before a run. Each command has a file of its own."""

from __future__ import annotations

import typer

from llava_core.cli.data_check import check
from llava_core.cli.data_prepare import prepare

data = typer.Typer(name="data", no_args_is_help=True)


@data.callback()
def group() -> None:
    """Work on a data set before a run."""


for command in (check, prepare):
    data.command()(command)
