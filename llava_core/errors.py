"""The project's exceptions. Each message states what was found, what was expected and what to do."""

from __future__ import annotations


class LlavaError(Exception):
    """Base of every error raised on purpose; the command line prints its message without a traceback."""


class ConfigError(LlavaError, ValueError):
    """A configuration that cannot be honoured."""


class DataError(LlavaError, ValueError):
    """A data set or a row of one that cannot be used."""


class BadRow(DataError):
    """One row that cannot be used; the loader sets it aside in `quarantine.jsonl` and goes on.

    Attributes:
        reason: a short machine-readable word, e.g. `missing_image`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class WeightsError(LlavaError, ValueError):
    """A weights folder that does not fit the model."""


class PluginError(LlavaError):
    """A plugin that cannot be loaded or that breaks its contract, or two that claim one name.

    Attributes:
        reason: what is wrong with whose plugin; listings show it alone.
        details: the traceback of the plugin's own code, if it raised; told to whoever asked for the plugin.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(f"{reason}\n{details}" if details else reason)
        self.reason = reason
        self.details = details


class BackendUnavailable(LlavaError):
    """The backend asked for cannot run on this machine."""


class KernelUnavailable(LlavaError):
    """No kernel can serve a request, or the pinned one cannot."""


class PatchRefused(LlavaError):
    """Another library is not what a patch was written for, so it is left as it is."""


class CheckpointError(LlavaError):
    """A state checkpoint that is missing, incomplete, damaged or not this run's."""


class TrainingError(LlavaError):
    """A run that must stop: a non-finite loss or gradient, too many bad rows."""
