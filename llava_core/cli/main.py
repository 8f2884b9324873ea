"""The `llava-core` command. Each subcommand has a file of its own and imports what it needs when it runs.

Exit codes: 0 done; 1 a run failed; 2 the request cannot be honoured (config, data, weights, backend); 130 and 143
interrupted by SIGINT and SIGTERM, the state saved.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from llava_core.cli.ask import ask
from llava_core.cli.backends import backends
from llava_core.cli.certify import certify
from llava_core.cli.convert import convert
from llava_core.cli.data import data
from llava_core.cli.demo import demo
from llava_core.cli.doctor import doctor
from llava_core.cli.generate import generate
from llava_core.cli.plan import plan
from llava_core.cli.train import train
from llava_core.errors import CheckpointError, LlavaError, TrainingError
from llava_core.launch.reports import report_error

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    from importlib.metadata import version

    if wanted:
        typer.echo(f"llava-core {version('llava-core')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train LLaVA models with one script and the same numbers on every accelerator."""


for command in (demo, train, plan, ask, generate, convert, backends, doctor, certify):
    app.command()(command)
app.add_typer(data)


def main() -> None:
    """The entry point of the console script."""
    try:
        app()
    except LlavaError as error:
        _fail(str(error), 1 if isinstance(error, TrainingError | CheckpointError) else 2)
    except OSError as error:  # a disk that is full, a folder that is closed
        _fail(f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error), 1)
    except Exception as error:
        if report_error(traceback.format_exc(), os.environ):
            raise SystemExit(1) from error
        raise


def _fail(message: str, code: int) -> NoReturn:
    """End with the message, printed by this process or, of many, by their launcher: once."""
    if report_error(f"error: {message}", os.environ):
        sys.exit(code)
    Console(stderr=True, highlight=False).print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)
