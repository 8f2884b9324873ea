"""What all processes of a run do together: all succeed, or all raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llava_core.engine.processes import Processes
from llava_core.errors import CheckpointError

T = TypeVar("T")


def agree(processes: Processes, work: Callable[[], T]) -> list[T]:
    """What `work` gives in each process, by rank.

    Raises:
        CheckpointError: in every process, where `work` raised one in any; the message says in which.
        Exception: whatever else it raised here; the other processes get a CheckpointError.
    """
    outcome: tuple[Any, str | None]
    cause = None
    try:
        outcome = work(), None
    except CheckpointError as error:
        outcome, cause = (None, str(error)), error
    except Exception as error:
        processes.gather((None, f"{type(error).__name__}: {error}"))  # the others would wait for it
        raise
    outcomes: list[tuple[Any, str | None]] = processes.gather(outcome)
    reasons: dict[str, list[int]] = {}
    for rank, (_, reason) in enumerate(outcomes):
        if reason is not None:
            reasons.setdefault(reason, []).append(rank)
    if reasons:
        raise CheckpointError("; ".join(_told(*found, processes.size) for found in reasons.items())) from cause
    return [result for result, _ in outcomes]


def _told(reason: str, ranks: list[int], size: int) -> str:
    """A reason, and whose it is where it is not everyone's."""
    if len(ranks) == size:
        return reason
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {reason}"


def by_first(processes: Processes, work: Callable[[], T]) -> T:
    """What `work` gives in the first process, which alone does it. Raises as `agree`, in all of them."""
    results: list[Any] = agree(processes, work if processes.is_first else lambda: None)
    first: T = results[0]
    return first
