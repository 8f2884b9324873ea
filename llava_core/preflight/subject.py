"""What a check looks at: the data of a config, as its run would build it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_core.config import RunConfig
from llava_core.data.loader import StepLoader
from llava_core.data.share import Share
from llava_core.engine.layout import Layout
from llava_core.engine.processes import Processes
from llava_core.plugins import Registry
from llava_core.train.checks import check_data_settings, check_paths, check_shares
from llava_core.train.chosen_model import open_folders
from llava_core.train.run_data import build_data
from llava_core.train.schedule import Schedule, build_schedule


@dataclass(frozen=True)
class Subject:
    """The data of a run.

    Attributes:
        loader: of what the run trains on, its own; it writes nothing.
        validation: of what it validates on, if anything.
        num_shares: data-parallel processes.
        schedule: of the run, which says when it ends.
    """

    config: RunConfig
    tokenizer: Any
    loader: StepLoader
    validation: StepLoader | None
    num_shares: int
    schedule: Schedule

    @property
    def num_rows(self) -> int:
        """How many rows are to be checked."""
        num_validated = 0 if self.validation is None else self.validation.num_rows
        return len(self.loader.builder.sources) + num_validated

    def is_over(self, steps: int, tokens: int) -> bool:
        """Whether the run ends after so many steps, which had so many tokens."""
        return (steps if self.schedule.unit == "steps" else tokens) >= self.schedule.total

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
        data = build_data(config, registry, Processes(), model, Share(writes=False))
        validation = data.validation.loader if data.validation else None
        schedule = build_schedule(config, data.loader.steps_per_epoch)
        return cls(config, data.tokenizer, data.loader, validation, layout.data, schedule)
