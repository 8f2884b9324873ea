"""A run's data, checked before the run: every row is made ready as for training, and no model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_core.config import RunConfig
from llava_core.config.schema import DataConfig
from llava_core.data.batch import Example
from llava_core.data.examples import Built, build_or_reject, in_workers, naming_killed_workers
from llava_core.data.loader import StepLoader
from llava_core.data.quarantine import Quarantine
from llava_core.data.records import Row
from llava_core.data.share import Share
from llava_core.engine.layout import Layout
from llava_core.engine.processes import Processes
from llava_core.errors import ConfigError
from llava_core.plugins import Registry
from llava_core.preflight.epoch import Epoch, EpochReplay
from llava_core.preflight.measure import RowMeasurer
from llava_core.preflight.picture import plot_lengths
from llava_core.preflight.summary import data_summary, epoch_summary, rows_of_repeated
from llava_core.preflight.tally import Tally
from llava_core.train.checks import check_data_settings, check_output, check_paths, check_shares, check_vocabulary
from llava_core.train.data import build_loader, find_processor, largest_micro_batch, open_readers
from llava_core.train.prepare import open_folders
from llava_core.train.templates import find_templates
from llava_core.weights.tokenizer import load_tokenizer

CHECK_FOLDER = "check"
"""Where in a run's folder its data's check is written; a run reads nothing there."""

REPORT, BAD_ROWS, PICTURE = "check.json", "quarantine.jsonl", "lengths.png"
OF_A_RUN = ("config.yaml", "checkpoints")
MAX_LISTED = 20
"""Ids of several rows, and rows of such an id, that the report names."""

REMEDY = "If memory ran out, give fewer --workers."


@dataclass(frozen=True)
class Subject:
    """The data of a run.

    Attributes:
        loader: the run's own; it writes nothing.
        num_shares: data-parallel processes.
    """

    config: RunConfig
    tokenizer: Any
    loader: StepLoader
    num_shares: int

    @classmethod
    def of(cls, config: RunConfig, registry: Registry, world_size: int) -> Subject:
        """The config's data, of so many processes.

        Raises:
            LlavaError: what a run would refuse of its data, too.
        """
        check_paths(config)
        layout = Layout.of(config.parallel, world_size)
        check_shares(config, layout)
        model = open_folders(config.model)
        check_data_settings(config, model.spec)
        tokenizer = load_tokenizer(model.tokenizer)
        check_vocabulary(tokenizer, model.spec)
        readers = open_readers(config, registry, Processes())
        templates = find_templates(config.data, readers, registry, tokenizer, model)
        processor = find_processor(config.data, model)
        loader = build_loader(config, readers, templates, model.spec, tokenizer, processor, Share(writes=False))
        return cls(config, tokenizer, loader, layout.data)


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        report: what `check.json` holds.
        problems: what would keep a run from training on this data, as sentences.
        examples: of each source its first sample, if it has any.
        folder: where all of it was written.
    """

    report: dict[str, Any]
    problems: tuple[str, ...]
    examples: tuple[Example | None, ...]
    folder: Path

    @property
    def num_bad(self) -> int:
        """Rows that cannot be used."""
        num_bad: int = self.report["rows"]["bad"]
        return num_bad


def check_data(subject: Subject, folder: Path, num_workers: int, on_row: Callable[[], None]) -> Checked:
    """Measure every row and write `check.json`, `quarantine.jsonl` and `lengths.png` into the folder.

    The files are the same for any number of workers.

    Args:
        on_row: called after each row.

    Raises:
        ConfigError: the folder is a run's own, or cannot be written to.
        DataError: the data changed meanwhile.
        TrainingError: a worker was killed.
    """
    config, loader = subject.config, subject.loader
    listed = _fresh_folder(folder, config.data.max_bad_fraction)
    tallies = _measured(loader, listed, num_workers, on_row)
    whole = Tally.joined(tallies)
    epoch = _first_epoch(subject, whole, listed)
    overlong = [loader.builder.overlong or source.reader.usual_overlong for source in loader.builder.sources.sources]
    summary = data_summary(whole, config.data.max_length, set(overlong))
    problems = tuple(_problems(summary, epoch, config.data))
    report = {
        "problems": list(problems),
        "settings": _settings(subject),
        **summary,
        "epoch": epoch_summary(epoch, subject.num_shares),
        "repeated_ids": _repeated_ids(loader, whole),
        "sources": [
            {**_named_source(subject, number), **data_summary(tally, config.data.max_length, {overlong[number]})}
            for number, tally in enumerate(tallies)
        ],
    }
    (folder / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plot_lengths(folder / PICTURE, whole, config.data.max_length)
    return Checked(report, problems, tuple(_first_example(loader, n, t) for n, t in enumerate(tallies)), folder)


def _fresh_folder(folder: Path, max_bad_fraction: float) -> Quarantine:
    """The list of bad rows in a folder that holds no older check."""
    if any((folder / name).exists() for name in OF_A_RUN):
        raise ConfigError(f"--output {folder} is a run's own folder, whose files a check would replace: name another.")
    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (REPORT, BAD_ROWS, PICTURE):
        (folder / name).unlink(missing_ok=True)
    return Quarantine(folder / BAD_ROWS, max_bad_fraction)


def _measured(loader: StepLoader, listed: Quarantine, num_workers: int, on_row: Callable[[], None]) -> list[Tally]:
    """What each source's rows are; the bad ones are listed."""
    sources = loader.builder.sources
    tallies = [Tally() for _ in sources.sources]
    measure = RowMeasurer(loader.builder).measure
    with naming_killed_workers(REMEDY):
        for facts in in_workers(measure, np.arange(len(sources)), num_workers):
            tallies[facts.source].add(facts)
            if bad := facts.rejected:
                listed.add(bad.id, bad.index, bad.reason, bad.message, bad.source)
            on_row()
    return tallies


def _first_epoch(subject: Subject, whole: Tally, listed: Quarantine) -> Epoch:
    config, loader = subject.config, subject.loader
    tokens = whole.samples[:, 0]
    most = largest_micro_batch(config)
    replay = EpochReplay(whole.num_samples_of_rows, tokens, loader.batching, subject.num_shares, most)
    return replay.run(loader.order(0), Quarantine(listed.path, listed.max_fraction, writes=False))


def _problems(summary: dict[str, Any], epoch: Epoch, data: DataConfig) -> list[str]:
    rows, found = summary["rows"], []
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rows["reasons"].items())
    if epoch.stopped is not None:
        found.append(
            f"{rows['bad']:,} of {rows['total']:,} rows cannot be used ({reasons}), and data.max_bad_fraction is "
            f"{data.max_bad_fraction:g}: a run would stop in step {epoch.stopped:,} of its first epoch. Mend or remove "
            "the rows, or raise the limit."
        )
    if not epoch.samples:
        dropped = summary["overlong"]["rows_dropped"]
        why = [reasons] * bool(reasons) + [f"{dropped:,} dropped for their length"] * bool(dropped)
        found.append(f"no row becomes a sample to train on: {', '.join(why)}.")
    return found


def _settings(subject: Subject) -> dict[str, Any]:
    """What of the config the numbers depend on most."""
    data, batch = subject.config.data, subject.config.batch
    return {
        "max_length": data.max_length,
        "max_bad_fraction": data.max_bad_fraction,
        "max_image_pixels": data.max_image_pixels,
        "global_size": batch.global_size,
        "micro_tokens": batch.micro_tokens,
        "micro_size": batch.micro_size,
    }


def _named_source(subject: Subject, number: int) -> dict[str, Any]:
    source = subject.loader.builder.sources.sources[number]
    return {
        "path": str(subject.config.data.inputs[number].path),
        "template": source.template.name if source.template else None,
    }


def _repeated_ids(loader: StepLoader, whole: Tally) -> list[dict[str, Any]]:
    """The first ids that several rows have, and the first of these rows."""
    sources, listed = loader.builder.sources, []
    for rows in rows_of_repeated(whole.keys)[:MAX_LISTED]:
        places = [sources.find(int(row)) for row in rows[:MAX_LISTED]]
        row_id = sources.sources[places[0].source].reader.read(places[0].row).id
        listed.append({"id": row_id, "rows": [{"source": place.source, "index": place.row} for place in places]})
    return listed


def _first_example(loader: StepLoader, number: int, tally: Tally) -> Example | None:
    """Of the first row of a source that became a sample, the first one."""
    usable = np.flatnonzero(tally.num_samples_of_rows > 0)
    if not usable.size:
        return None
    builder = loader.builder
    index = sum(builder.sources.lengths[:number]) + int(usable[0])
    place = builder.sources.find(index)
    row: Row = builder.sources.sources[number].reader.read(place.row)
    built = build_or_reject(builder, place, row)
    assert isinstance(built, Built)  # it was, a moment ago
    return built.examples[0]
