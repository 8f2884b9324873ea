"""A run's data, checked before the run: every row is made ready as for training, and no model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_core.config import RunConfig
from llava_core.config.data import DataConfig
from llava_core.data.batch import Example
from llava_core.data.examples import Built, build_or_reject, in_workers, naming_killed_workers
from llava_core.data.loader import StepLoader
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers.index import IntArray
from llava_core.data.records import Row
from llava_core.preflight.epoch import Epoch, EpochReplay
from llava_core.preflight.folder import BAD_ROWS, BAD_VALIDATION_ROWS, PICTURE, REPORT, replacing
from llava_core.preflight.foresight import Foresight, Rows, foresee
from llava_core.preflight.measure import RowMeasurer
from llava_core.preflight.picture import plot_lengths
from llava_core.preflight.subject import Subject
from llava_core.preflight.summary import data_summary, epoch_summary, foresight_summary, rows_of_repeated
from llava_core.preflight.tally import Tally
from llava_core.train.data import largest_micro_batch

MAX_LISTED = 20
"""Ids of several rows, and rows of such an id, that the report names."""

REMEDY = "If memory ran out, give fewer --workers."


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
        parts = [self.report, self.report["validation"] or {"rows": {"bad": 0}}]
        return sum(part["rows"]["bad"] for part in parts)


def check_data(subject: Subject, folder: Path, num_workers: int, on_row: Callable[[], None]) -> Checked:
    """Measure every row and write `check.json`, `quarantine.jsonl` and `lengths.png` into the folder, and of bad rows
    that are validated on `validation-quarantine.jsonl`. What an older check wrote there is replaced in the end.

    The files are the same for any number of workers.

    Args:
        on_row: called after each row.

    Raises:
        ConfigError: the folder is a run's own, holds such files of another origin, or cannot be written to.
        DataError: the data changed meanwhile.
        TrainingError: a worker was killed.
    """
    config, loader = subject.config, subject.loader
    with replacing(folder) as files:
        rows = np.arange(len(loader.builder.sources))
        tallies = _measured(loader, rows, _listed(config, files / BAD_ROWS), num_workers, on_row)
        whole = Tally.joined(tallies)
        problems, report = _training(subject, tallies, whole)
        validated_on = None
        if subject.validation is not None:
            listed = _listed(config, files / BAD_VALIDATION_ROWS)
            more, validated_on = _validation(subject, subject.validation, listed, num_workers, on_row)
            problems += [f"validation: {problem}" for problem in more]
        report = {"problems": problems, "settings": _settings(config), **report, "validation": validated_on}
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (files / REPORT).write_text(text, encoding="utf-8")
        plot_lengths(files / PICTURE, whole, config.data.max_length)
        examples = tuple(_first_example(loader, number, tally) for number, tally in enumerate(tallies))
    return Checked(report, tuple(problems), examples, folder)


def _training(subject: Subject, tallies: Sequence[Tally], whole: Tally) -> tuple[list[str], dict[str, Any]]:
    """What would stop the run, and what its rows are."""
    config, loader = subject.config, subject.loader
    described = _described(loader, tallies, whole)
    epoch = _replayed(subject, loader, whole, loader.order(0))
    foresight = _foreseen(loader, whole, loader.order, config, subject.is_over)
    stop, where = foresight.stop, None
    if stop is not None:
        where = f"step {stop.step:,}, in epoch {stop.epoch}"
    report = {
        **described,
        "epoch": epoch_summary(epoch, subject.num_shares),
        "run": foresight_summary(foresight),
        "repeated_ids": _repeated_ids(loader, whole),
    }
    return _problems(described, epoch, config.data, where), report


def _validation(
    subject: Subject, loader: StepLoader, listed: Quarantine, num_workers: int, on_row: Callable[[], None]
) -> tuple[list[str], dict[str, Any]]:
    """What of the rows that are validated on would stop the run, and what they are; they may be some of their data."""
    config, rows = subject.config, loader.order(0)
    tallies = _measured(loader, rows, listed, num_workers, on_row)
    whole, in_order = Tally.joined(tallies), np.arange(len(rows))  # of the rows that were measured
    described = _described(loader, tallies, whole)
    replayed = _replayed(subject, loader, whole, in_order)
    stop = _foreseen(loader, whole, lambda _: in_order, config, lambda steps, _: steps >= replayed.steps).stop
    where = f"step {stop.step:,} of the validation" if stop is not None else None
    return _problems(described, replayed, config.data, where), described


def _listed(config: RunConfig, path: Path) -> Quarantine:
    return Quarantine(path, config.data.max_bad_fraction)


def _measured(
    loader: StepLoader, rows: IntArray, listed: Quarantine, num_workers: int, on_row: Callable[[], None]
) -> list[Tally]:
    """What these rows of each source are; the bad ones are listed."""
    tallies = [Tally() for _ in loader.builder.sources.sources]
    measure = RowMeasurer(loader.builder).measure
    with naming_killed_workers(REMEDY):
        for facts in in_workers(measure, rows, num_workers):
            tallies[facts.source].add(facts)
            if bad := facts.rejected:
                listed.add(bad.id, bad.index, bad.reason, bad.message, bad.source)
            on_row()
    return tallies


def _replayed(subject: Subject, loader: StepLoader, whole: Tally, rows: IntArray) -> Epoch:
    """How the loader goes through these of the rows that were measured."""
    most = largest_micro_batch(subject.config)
    lengths = whole.samples[:, 0]
    replay = EpochReplay(whole.num_samples_of_rows, lengths, loader.batching, subject.num_shares, most)
    return replay.run(rows)


def _foreseen(
    loader: StepLoader,
    whole: Tally,
    order: Callable[[int], IntArray],
    config: RunConfig,
    is_over: Callable[[int, int], bool],
) -> Foresight:
    """Where the run's steps, of these of the rows that were measured, would stop for bad ones."""
    rows = Rows.of(whole.num_samples_of_rows, whole.samples[:, 0])
    return foresee(rows, order, loader.batching.global_size, config.data.max_bad_fraction, is_over)


def _described(loader: StepLoader, tallies: Sequence[Tally], whole: Tally) -> dict[str, Any]:
    """The numbers of all rows, and those of each source."""
    builder = loader.builder
    sources = builder.sources.sources
    overlong = [builder.overlong or source.reader.usual_overlong for source in sources]
    return {
        **data_summary(whole, builder.max_length, set(overlong)),
        "sources": [
            {
                "path": str(source.reader.fingerprint.get("path", "")),
                "template": source.template.name if source.template else None,
                **data_summary(tally, builder.max_length, {becomes}),
            }
            for source, tally, becomes in zip(sources, tallies, overlong, strict=True)
        ],
    }


def _problems(summary: dict[str, Any], epoch: Epoch, data: DataConfig, stops_in: str | None) -> list[str]:
    """What would keep a run from going through these rows; `stops_in` is where its bad ones stop it, if they do."""
    rows, found = summary["rows"], []
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rows["reasons"].items())
    if stops_in is not None:
        found.append(
            f"{rows['bad']:,} of {rows['total']:,} rows cannot be used ({reasons}), and data.max_bad_fraction is "
            f"{data.max_bad_fraction:g}: a run would stop in {stops_in}. Mend or remove the rows, or raise the "
            "limit."
        )
    if not epoch.samples:
        dropped = summary["overlong"]["rows_dropped"]
        why = [reasons] * bool(reasons) + [f"{dropped:,} dropped for their length"] * bool(dropped)
        found.append(f"no row becomes a sample: {', '.join(why)}.")
    return found


def _settings(config: RunConfig) -> dict[str, Any]:
    """What of the config the numbers depend on most."""
    data, batch = config.data, config.batch
    return {
        "max_length": data.max_length,
        "max_bad_fraction": data.max_bad_fraction,
        "max_image_pixels": data.max_image_pixels,
        "global_size": batch.global_size,
        "micro_tokens": batch.micro_tokens,
        "micro_size": batch.micro_size,
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
