"""Trackers that come with the library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

TRAIN, VALIDATION = "train/", "validation/"


class TensorboardTracker:
    """Event files in `tensorboard/` of the run's folder. A resumed run's steps replace those it takes again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        tags = {name: _tag(name) for name in metrics}
        if self._writer is None:
            # The step itself stays where a resumed run begins with its validation.
            takes_step = any(tag.startswith(TRAIN) for tag in tags.values())
            self._writer = SummaryWriter(str(self._folder), purge_step=step if takes_step else step + 1)
        for name, value in metrics.items():
            self._writer.add_scalar(tags[name], value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _tag(name: str) -> str:
    own = name.removeprefix("validation_")
    return f"{TRAIN if own == name else VALIDATION}{own}"
