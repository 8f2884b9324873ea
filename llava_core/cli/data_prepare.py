"""`llava-core data prepare`: a data set in another form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

if TYPE_CHECKING:
    from llava_core.data.prepare.parts import Target
    from llava_core.data.prepared import Prepared
    from llava_core.data.readers import Reader
    from llava_core.data.templates import Template
    from llava_core.plugins import Registry

Kind = Literal["webdataset", "megatron", "megatron_sft", "tokens"]

OPTIONS: dict[str, tuple[Kind, ...]] = {
    "--images": ("webdataset",),
    "--tokenizer": ("megatron", "megatron_sft", "tokens"),
    "--template": ("megatron_sft", "tokens"),
    "--max-length": ("megatron_sft",),
}
"""What means something to which of them."""

USUAL_LENGTH = 2048


def prepare(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A data file or folder, as data.path is.")],
    to: Annotated[
        str,
        typer.Option(
            help="webdataset: conversations and images in tar files; tokens: what a run needs not tokenise again; "
            "megatron, megatron_sft: documents, conversations in .bin and .idx."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")],
    images: Annotated[Path | None, typer.Option(help="The folder that image paths are relative to.")] = None,
    reader: Annotated[str | None, typer.Option(help="A registered reader, as data.reader.")] = None,
    split: Annotated[str | None, typer.Option(help="A part of the data set, as data.split.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A model's folder.")] = None,
    template: Annotated[str | None, typer.Option(help="As data.template. [default: v1]")] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Tokens of a packed row. [default: 2048]")
    ] = None,
    shard_size: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of a file.")] = 10_000,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes that prepare rows.")] = 1,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Stop when more rows than this cannot be used.")
    ] = 0.01,
) -> None:
    """Write a data set in another form. Interrupted, the same command goes on from there."""
    from llava_core.config.data import SourceConfig
    from llava_core.data.prepare.run import Preparation
    from llava_core.plugins import Registry
    from llava_core.train.data import open_source

    given = {"--images": images, "--tokenizer": tokenizer, "--template": template, "--max-length": max_length}
    kind = checked_kind(to, {option for option, value in given.items() if value is not None})
    registry = Registry.discover()
    opened = open_source(SourceConfig(path=source, reader=reader, split=split), registry, None)
    if kind == "webdataset":
        target = webdataset_target(source, images)
    else:
        assert tokenizer is not None  # checked above
        target = token_target(kind, source, opened, tokenizer, template, max_length or USUAL_LENGTH, registry)
    preparation = Preparation(kind, source, opened, target, output, shard_size, workers, max_bad_fraction)
    try:
        with Bar() as bar:
            prepared = preparation.run(bar)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on with what is finished", err=True)
        raise typer.Exit(130) from None
    typer.echo(summary(kind, prepared, output))


def checked_kind(to: str, given: set[str]) -> Kind:
    """What to write, for which all that is given means something. Raises ConfigError."""
    from llava_core.errors import ConfigError

    kinds: tuple[Kind, ...] = get_args(Kind)
    kind = next((kind for kind in kinds if kind == to), None)
    if kind is None:
        raise ConfigError(f"--to {to}: expected one of {', '.join(kinds)}.")
    idle = sorted(option for option in given if kind not in OPTIONS[option])
    if idle:
        raise ConfigError(f"{idle[0]} means nothing to --to {kind}: leave it out.")
    if kind in OPTIONS["--tokenizer"] and "--tokenizer" not in given:
        raise ConfigError(f"--to {kind} needs --tokenizer: the folder of the model that will be trained.")
    return kind


def webdataset_target(source: Path, images: Path | None) -> Target:
    """Shards of the rows with their images."""
    from llava_core.config.data import DataConfig
    from llava_core.data.image_store import ImageStore
    from llava_core.data.prepare.webdataset import WebdatasetTarget

    max_pixels = DataConfig.model_fields["max_image_pixels"].default
    return WebdatasetTarget(data_name(source), ImageStore(images, max_pixels))


def token_target(
    kind: Kind,
    source: Path,
    reader: Reader,
    folder: Path,
    template: str | None,
    max_length: int,
    registry: Registry,
) -> Target:
    """Rows as the ids of the folder's tokenizer."""
    from llava_core.data.piece_template import template_file
    from llava_core.data.prepare.megatron import ConversationsTarget, DocumentsTarget
    from llava_core.data.prepare.tokens import TokensTarget
    from llava_core.weights.tokenizer import load_tokenizer, pad_token_id

    tokenizer = load_tokenizer(folder)
    name, opened = chosen_template(template, reader, tokenizer, folder, registry)
    if kind == "megatron":
        return DocumentsTarget(TokensTarget(tokenizer, opened, name, takes_images=False), data_name(source))
    if kind == "megatron_sft":
        rows = TokensTarget(tokenizer, opened, name, takes_images=False, max_length=max_length)
        return ConversationsTarget(rows, data_name(source), max_length, pad_token_id(tokenizer, len(tokenizer)))
    file = template_file(name)
    return TokensTarget(tokenizer, opened, name, None if file is None else file.read_text(encoding="utf-8"))


def data_name(source: Path) -> str:
    """What a data set is called, for the names of files. Raises ConfigError where it has no name."""
    from llava_core.errors import ConfigError

    name = Path(os.path.abspath(source)).stem  # "." has none before
    if not name:
        raise ConfigError(f"SOURCE = {source} has no name to call files by: name a file or a folder.")
    return name


def chosen_template(
    name: str | None, reader: Reader, tokenizer: Any, folder: Path, registry: Registry
) -> tuple[str, Template]:
    """The template of the rows, and its name. Raises ConfigError."""
    from llava_core.data.documents import TEXT
    from llava_core.data.templates import open_template
    from llava_core.errors import ConfigError
    from llava_core.inference.chat_template import OWN_TEMPLATE, folder_template
    from llava_core.train.templates import USUAL_TEMPLATE
    from llava_core.weights.source import folder_spec

    if reader.content == "texts":
        if name not in (None, TEXT.name):
            raise ConfigError(f"--template {name}: this data set holds documents, which take none; leave it out.")
        return TEXT.name, TEXT
    name = name or USUAL_TEMPLATE
    if name == TEXT.name:
        raise ConfigError(f"--template {name} is for documents, and this data set holds {reader.content}.")
    if name == OWN_TEMPLATE:
        multimodal = (folder / "config.json").is_file() and folder_spec(folder).vision is not None
        return name, folder_template(folder, tokenizer, multimodal=multimodal)
    return name, open_template(name, registry)


def summary(kind: Kind, prepared: Prepared, output: Path) -> str:
    """What there is now, and how a run takes it."""
    num_bytes = sum(digest.size for digest in prepared.files.values())
    files = f"{len(prepared.files)} file{'s' * (len(prepared.files) > 1)}"
    lines = [f"{prepared.num_rows:,} rows: {files} of {num_bytes:,} bytes in {output}"]
    if prepared.num_bad:
        lines.append(f"{prepared.num_bad:,} of them cannot be used: {output / 'quarantine.jsonl'} says why")
    path = output
    if kind in ("megatron", "megatron_sft"):
        path = output / next(iter(prepared.files)).rpartition(".")[0]
    lines.append(f"train on it with data.path={path}" + " data.reader=megatron_sft" * (kind == "megatron_sft"))
    return "\n".join(lines)


class Bar:
    """How far it is, on a terminal; elsewhere nothing is shown. See `Watch`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, total: int, done: int) -> None:
        self._task = self._progress.add_task("rows", total=total, completed=done)
        self._progress.start()

    def advance(self, count: int) -> None:
        self._progress.advance(self._task, count)
