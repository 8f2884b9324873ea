"""`llava-core data check`: what is in a run's data, and what of it cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from llava_core.preflight.check import Checked
    from llava_core.preflight.subject import Subject


def check(
    config: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file: what `train` will be given.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, e.g. data.path=data.json.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Processes that decode. [default: one for each CPU]")
    ] = None,
    world_size: Annotated[
        int, typer.Option("--world-size", "--nproc", metavar="N", min=1, help="Processes that will train.")
    ] = 1,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write. [default: `check` in the run's folder]")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with 2 for any bad row.")] = False,
) -> None:
    """Make every row ready as `train` would, and say what is in the data and what cannot be used; no weights are read.

    Ends with 2 where a run would stop for its data.
    """
    from rich.console import Console

    from llava_core.backend.host import available_cores
    from llava_core.config import load_config
    from llava_core.plugins import Registry
    from llava_core.preflight.folder import CHECK_FOLDER
    from llava_core.preflight.report import print_checked
    from llava_core.preflight.subject import Subject

    console = Console()
    checked = load_config(config, overrides or [], options={})
    subject = Subject.of(checked, Registry.discover(), world_size)
    folder = checked.output / CHECK_FOLDER if output is None else output
    num_workers = available_cores() if workers is None else workers
    found = check_or_leave(subject, folder, num_workers, console)
    print_checked(found, subject, console)
    if strict and found.num_bad:
        console.print(f"--strict: {found.num_bad:,} bad rows", style="red")
    if found.problems or (strict and found.num_bad):
        raise typer.Exit(2)


def check_or_leave(subject: Subject, folder: Path, num_workers: int, console: Console) -> Checked:
    """What a check finds, showing how far it is. Raises typer.Exit where a signal ends it, having said so."""
    from llava_core.preflight.check import check_data
    from llava_core.preflight.report import progress_of_rows
    from llava_core.train.interrupt import Interrupted, raising_on_signals

    with raising_on_signals(), progress_of_rows(console, subject.num_rows) as on_row:
        try:
            return check_data(subject, folder, num_workers, on_row)
        except Interrupted as signal:
            done = f"{on_row.done:,} of {subject.num_rows:,} rows"
            typer.echo(f"interrupted after {done}; no report was written", err=True)
            raise typer.Exit(signal.exit_code) from None
