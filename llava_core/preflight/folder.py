"""The folder of a check: its files take the place of an older check's all together, and nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_core.errors import ConfigError
from llava_core.train.checks import check_output
from llava_core.train.validation import QUARANTINE_FILE

CHECK_FOLDER = "check"
"""Where in a run's folder its data's check is written; a run reads nothing there."""

REPORT, BAD_ROWS, BAD_VALIDATION_ROWS, PICTURE = "check.json", "quarantine.jsonl", QUARANTINE_FILE, "lengths.png"
FILES = (BAD_ROWS, BAD_VALIDATION_ROWS, PICTURE, REPORT)
OF_A_RUN = ("config.yaml", "checkpoints")
PARTIAL = ".data-check.partial"

SECTIONS = frozenset({"problems", "settings", "sources", "repeated_ids"})
"""What every check's report has, by which it is known."""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write the files of a check to; they are moved to `folder` if nothing raises, and removed otherwise.

    Raises:
        ConfigError: the folder holds files that a check would replace and no check wrote, or cannot be made.
    """
    _refuse_foreign(folder)
    partial = folder / PARTIAL
    try:
        if partial.exists():  # of a check that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: it cannot be written to ({error.strerror}); name another.") from error
    try:
        yield partial
        # The report goes first and comes last, so that one that is there is of the files beside it.
        for name in reversed(FILES):
            (folder / name).unlink(missing_ok=True)
        for name in FILES:
            if (partial / name).exists():
                (partial / name).replace(folder / name)
    finally:
        shutil.rmtree(partial)


def _refuse_foreign(folder: Path) -> None:
    """Raises ConfigError."""
    check_output(folder, "--output")
    if any(os.path.lexists(folder / name) for name in OF_A_RUN):
        raise ConfigError(f"--output {folder} is a run's own folder, whose files a check would replace: name another.")
    found = [name for name in FILES if os.path.lexists(folder / name)]
    if found and not _is_report(folder / REPORT):
        raise ConfigError(
            f"--output {folder} holds {', '.join(found)}, which a check would replace, and no {REPORT} of a check: "
            "name another folder, or move what is there."
        )


def _is_report(path: Path) -> bool:
    """Whether a check wrote this file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= SECTIONS
