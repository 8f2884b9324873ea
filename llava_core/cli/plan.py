"""`llava-core plan`: what a run would need, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llava_core.cli.options import BackendOption


def plan(
    config: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, e.g. parallel.tensor=8.")
    ] = None,
    backend: BackendOption = None,
    world_size: Annotated[
        int, typer.Option("--world-size", "--nproc", metavar="N", min=1, help="Processes in all.")
    ] = 1,
    rank: Annotated[int, typer.Option(metavar="N", help="Which of them to look at, from 0.")] = 0,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="A device's memory, e.g. 64GiB: finds the largest micro-batch that fits."),
    ] = None,
    sample_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Tokens of a typical sample. [default: data.max_length]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the rank's part of every parameter, too.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all of it as JSON.")
    ] = None,
) -> None:
    """Show parameters, memory, FLOPs and exchanges of one process of a run; no weights, data or devices are needed."""
    from rich.console import Console

    from llava_core.plan.planning import make_plan
    from llava_core.plan.report import print_plan
    from llava_core.plan.subject import Subject, memory_bytes, planned_config
    from llava_core.plugins import Registry

    given = memory_bytes(memory) if memory is not None else None
    options = {} if backend is None else {"backend.name": backend}
    subject = Subject.of(planned_config(config, overrides or [], options), Registry.discover())
    known = given if given is not None or dry_run else subject.device_memory(world_size)
    found = make_plan(subject, world_size, rank, sample_tokens=sample_tokens, memory=known)
    print_plan(found, Console(), parameters=dry_run)
    if json_file is not None:
        json_file.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
