"""Bad rows: listed in a file with the reason, counted, and too many of them stop the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_core.errors import ConfigError, DataError, TrainingError

# Fewer bad rows than this do not stop a run, however few were good: one row says nothing about a data set. A
# `max_fraction` of 0 asks for no bad row at all, and stops at the first.
MIN_BAD_ROWS = 10
REMEDY = "mend the images in place, or raise data.max_bad_fraction, and go on"


class Quarantine:
    """The list of bad rows in `path`, one JSON object a line, and the counts of good and bad rows.

    Each row is listed once in the file, however often it is met: in later epochs, and after a resume from a checkpoint
    older than its line. The counts are of meetings, and belong to the run's checkpoint. One process writes a file; the
    others count alone.

    Args:
        path: made with its folder when the first row is listed.
        max_fraction: of bad rows among all that were met.
        writes: whether this process is the one that writes.
        remedy: what to do about too many, for the message.
        rows: what it counts, for the message.

    Raises:
        ConfigError: `max_fraction` is not in 0…1.
    """

    def __init__(
        self, path: Path, max_fraction: float, *, writes: bool = True, remedy: str = REMEDY, rows: str = "rows"
    ) -> None:
        if not 0 <= max_fraction <= 1:
            raise ConfigError(f"the largest fraction of bad rows must lie in 0…1, not be {max_fraction}")
        self.path = path
        self.max_fraction = max_fraction
        self.num_good = 0
        self.reasons: Counter[str] = Counter()
        self.writes = writes
        self.remedy = remedy
        self.rows = rows
        self._listed = _read_listed(path) if writes else set()

    @property
    def num_bad(self) -> int:
        return self.reasons.total()

    def add_good(self, count: int = 1) -> None:
        """Counts rows that were used."""
        self.num_good += count

    def add(self, id: str, index: int, reason: str, message: str, source: int = 0) -> None:
        """Counts a bad row, and lists it unless it is listed already; the line has left the process on return.

        Args:
            index: of the row in its source, both counted from 0.
        """
        self.reasons[reason] += 1
        if not self.writes or (source, index, id) in self._listed:
            return
        line = json.dumps({"id": id, "index": index, "reason": reason, "message": message, "source": source})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._listed.add((source, index, id))

    def check(self, num_rows: int | None = None) -> None:
        """Stops a run whose data is too bad.

        Args:
            num_rows: how many will be met in the end, where that is known; None to judge those that were.

        Raises:
            TrainingError: the fraction of bad rows exceeds `max_fraction`, and they are at least MIN_BAD_ROWS.
        """
        bad, met = self.num_bad, self.num_bad + self.num_good if num_rows is None else num_rows
        if not too_many(bad, met, self.max_fraction):
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        raise TrainingError(
            f"{bad} of {met} {self.rows} ({bad / met:.1%}) cannot be used, the limit is {self.max_fraction:.1%}: "
            f"{reasons}. They are listed in {self.path}; {self.remedy}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The counts, as JSON values."""
        return {"num_good": self.num_good, "reasons": dict(self.reasons)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting from a checkpoint. What is listed in the file stays listed."""
        self.num_good = state["num_good"]
        self.reasons = Counter(state["reasons"])


def too_many(num_bad: int, num_met: int, max_fraction: float) -> bool:
    """Whether so many bad rows of all that were met stop a run."""
    return num_bad > max_fraction * num_met and (num_bad >= MIN_BAD_ROWS or max_fraction == 0)


def _read_listed(path: Path) -> set[tuple[int, int, str]]:
    """The rows that a file lists; a last line cut short by a crash is taken off, its row will be met again."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return set()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return {(row.get("source", 0), row["index"], row["id"]) for row in rows}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} holds a line that is no quarantined row ({error!r}): mend or remove it.") from error
