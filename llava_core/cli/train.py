"""`llava-core train`: run a recipe or a config file."""

from __future__ import annotations

from typing import Annotated

import typer

from llava_core.cli.options import BackendOption


def train(
    config: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, e.g. optimizer.learning_rate=2e-5.")
    ] = None,
    backend: BackendOption = None,
    output: Annotated[str | None, typer.Option(metavar="FOLDER", help="The run's folder; short for output=…")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting and stop.")] = False,
    nproc: Annotated[
        str | None, typer.Option(metavar="N|auto", help="Processes on this machine; auto: one per device. [default: 1]")
    ] = None,
    nnodes: Annotated[int | None, typer.Option(metavar="N", help="Machines; start this on each. [default: 1]")] = None,
    node_rank: Annotated[int | None, typer.Option(metavar="N", help="Which of them this is, from 0.")] = None,
    master_addr: Annotated[str | None, typer.Option(metavar="HOST", help="Machine 0, as the others reach it.")] = None,
    master_port: Annotated[
        int | None, typer.Option(metavar="PORT", help="A free port of machine 0. [default: 29500]")
    ] = None,
    stop_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Asked to stop, several processes may save for so long.")
    ] = 600,
) -> None:
    """Train a model. The same command goes on from the newest checkpoint if the run was interrupted."""
    from llava_core.config import load_config

    given = {"backend.name": backend, "output": output}
    options = {key: text for key, text in given.items() if text is not None}
    if print_config:
        show_config(config, overrides or [], options)
        return
    checked = load_config(config, overrides or [], options=options)
    from llava_core.launch.plan import Flags
    from llava_core.launch.start import start

    flags = Flags(nproc, nnodes, node_rank, master_addr, master_port)
    again = ["train", config, *(overrides or [])]
    for option, text in (("--backend", backend), ("--output", output)):
        again += [option, text] if text is not None else []
    raise typer.Exit(start(checked, flags, again, stop_seconds=stop_timeout))


def show_config(source: str, overrides: list[str], options: dict[str, str]) -> None:
    """Print every setting as YAML; where some are still to be given, those that are set and then a comment on the rest.

    Raises:
        ConfigError: settings that cannot be used; they are printed all the same.
    """
    from llava_core.config import build_config, merge, to_yaml
    from llava_core.config.load import IncompleteConfig, settings_to_yaml
    from llava_core.errors import ConfigError

    settings = merge(source, overrides, options=options)
    try:
        text = to_yaml(build_config(settings))
    except IncompleteConfig as error:
        text = settings_to_yaml(settings) + "".join(f"# {line}\n" for line in str(error).splitlines())
    except ConfigError:
        typer.echo(settings_to_yaml(settings), nl=False)
        raise
    typer.echo(text, nl=False)
