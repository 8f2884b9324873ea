"""`llava-core demo`: a tiny LLaVA, trained while you watch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_core.cli.options import BackendOption

INTERRUPTED = 130


def demo(
    output: Annotated[Path, typer.Option(help="The folder for everything the demo makes.")] = Path("runs/demo"),
    backend: BackendOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split, the weights and the order.")] = 0,
) -> None:
    """Train a tiny LLaVA that reads handwritten digits. Interrupted, the same command goes on from there."""
    from rich.console import Console

    console = Console(highlight=False)
    try:
        from llava_core.demo.run import run_demo

        result = run_demo(output, backend, seed, console)
    except KeyboardInterrupt:
        console.print("\ninterrupted; what is complete is kept, and the same command goes on from there.")
        raise typer.Exit(INTERRUPTED) from None
    if result.exit_code:
        raise typer.Exit(result.exit_code)
    right, asked = result.num_right, len(result.judged)
    console.print(f"[bold green]{right} of {asked} held-out answers are right ({right / asked:.1%}).[/]")
    console.print(f"Look at {output}/answers.png and {output}/loss.png. Then try:\n", soft_wrap=True, markup=False)
    for line in next_commands(output, result.judged[0].image):
        console.print(f"  {line}", soft_wrap=True, markup=False)


def next_commands(output: Path, image: Path) -> list[str]:
    """Commands that work as they are pasted into a shell."""
    from shlex import join

    from llava_core.demo.texts import WHAT

    again = output.with_name(output.name + "-again")
    llava_core = program("llava-core")
    return [
        join([llava_core, "ask", str(output / "hf"), str(image), WHAT]),
        join([llava_core, "train", str(output / "stage2" / "config.yaml"), "--output", str(again), "train.seed=1"]),
        join([program("tensorboard"), "--logdir", str(output)]),
    ]


def program(name: str) -> str:
    """How a shell finds a program of this environment: by name if it is on the path, else by its file."""
    import os
    import shutil
    import sys

    own = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if found is not None and (not own.exists() or os.path.samefile(found, own)):
        return name
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)
