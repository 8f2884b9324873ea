"""The micro-batches of each optimizer step, in an order that a resumed run repeats exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llava_core.data.batch import Batch, Counts, Example, Labelled
from llava_core.data.examples import Built, ExampleBuilder, Rejected, decoded
from llava_core.data.packing import build_batch, filler_batch, lengthened, pack_evenly, pack_samples, pad_samples
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers.index import IntArray
from llava_core.data.share import WHOLE, News, Share, exchange
from llava_core.data.sources import Place
from llava_core.errors import DataError


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on: nothing, where every one of its rows was set aside.

    Attributes:
        batches: this process's micro-batches, as many as each other's: where it has fewer, fillers without labels.
        counts, labelled: over all processes, without fillers.
        num_overlong: rows, over all processes, that were longer than a sample may be.
    """

    batches: tuple[Batch, ...]
    counts: Counts
    labelled: Labelled
    num_overlong: int


def as_many(count: int) -> int:
    """A step's micro-batches may be as many as its samples fill."""
    return count


@dataclass(frozen=True)
class Batching:
    """How a step's samples become micro-batches; exactly one of the two sizes is set.

    Attributes:
        one_size: whether a process's micro-batches of a step are equally long, fillers included.
        num_batches: how many a step must have, from how many its samples fill.
    """

    global_size: int
    micro_tokens: int | None
    micro_size: int | None
    pad_id: int
    image_size: int
    one_size: bool = False
    num_batches: Callable[[int], int] = as_many

    @property
    def chunk(self) -> int:
        """Samples that go to one process together: a padded micro-batch. Packed ones are formed of what it has."""
        return self.micro_size or 1

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which samples of these lengths share a micro-batch: as few as they fill."""
        if self.micro_tokens is not None:
            return pack_samples(lengths, self.micro_tokens)
        assert self.micro_size is not None
        return pad_samples(len(lengths), self.micro_size)

    def even_groups(self, lengths: Sequence[int], most_filled: int) -> list[list[int]]:
        """As `groups`, but packed ones about equally long.

        Args:
            most_filled: micro-batches that the samples of any process fill in this step.
        """
        if self.micro_tokens is None:
            return self.groups(lengths)
        return pack_evenly(lengths, self.micro_tokens, self.num_batches(most_filled))

    def groups_of_all(self, lengths: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Of a step, by process: the groups that each would form that hears of the others."""
        groups = [self.groups(own) for own in lengths]
        most_filled = max(map(len, groups))
        if not (self.one_size and most_filled):
            return groups
        return [self.even_groups(own, most_filled) for own in lengths]

    def build(self, examples: Sequence[Example], groups: Sequence[Sequence[int]]) -> tuple[Batch, ...]:
        """The micro-batches of examples that are so grouped."""
        batches = tuple(
            build_batch(
                [examples[i] for i in group],
                pad_id=self.pad_id,
                image_size=self.image_size,
                padded=self.micro_size is not None,
            )
            for group in groups
        )
        if not self.one_size:
            return batches
        longest = max((batch.num_tokens for batch in batches), default=0)
        return tuple(lengthened(batch, longest, self.pad_id) for batch in batches)

    def fillers(self, count: int, beside: Sequence[Batch]) -> tuple[Batch, ...]:
        """Micro-batches without samples, so that every process has equally many, beside those that have some."""
        filler = filler_batch(self.pad_id, self.image_size)
        if self.one_size and beside:
            filler = lengthened(filler, beside[0].num_tokens, self.pad_id)
        return (filler,) * count

    def num_positions(self, groups: Sequence[Sequence[int]], num_batches: int) -> int:
        """How many tokens a process computes in a step, padding included.

        Args:
            groups: the lengths of each micro-batch's samples.
            num_batches: those and the fillers.
        """
        sizes = [sum(lengths) if self.micro_size is None else len(lengths) * max(lengths) for lengths in groups]
        if self.one_size:
            return max(sizes, default=1) * num_batches
        return sum(sizes) + num_batches - len(sizes)


class StepLoader:
    """Steps of an endless series of epochs, from any position on.

    A step takes the next `global_size` rows of the epoch, the last step of an epoch what is left. Micro-batches never
    reach across a step, so the position is the whole state: there is nothing half-packed to carry over. An unusable row
    is listed in the quarantine and leaves its step one sample smaller; no other row takes its place. A row that is
    split or dropped for its length makes its step larger or smaller alike.

    Attributes:
        epoch, position: how many epochs were handed out, and how many rows of the next one.
        tokens: of text and images in all steps that were handed out, of all processes, without padding.

    Args:
        order: the rows' indices of an epoch, by its number; as many for each.
        num_rows: of an epoch.
        num_workers: processes that decode; the steps are the same for any number.
        share: of each step's rows, for this process.
    """

    def __init__(
        self,
        builder: ExampleBuilder,
        order: Callable[[int], IntArray],
        num_rows: int,
        batching: Batching,
        quarantine: Quarantine,
        num_workers: int,
        share: Share = WHOLE,
    ) -> None:
        self.builder = builder
        self.order = order
        self.num_rows = num_rows
        self.batching = batching
        self.quarantine = quarantine
        self.num_workers = num_workers
        self.share = share
        self.epoch = 0
        self.position = 0
        self.tokens = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the last of which may be smaller."""
        return -(-self.num_rows // self.batching.global_size)

    def __iter__(self) -> Iterator[Step]:
        """Steps from the current position on.

        Raises:
            TrainingError: too many rows are unusable.
            DataError: every row of an epoch is.
        """
        while True:
            any_usable = self.position > 0
            for step in self._epoch():
                any_usable |= bool(step.batches)
                yield step
            if not any_usable:
                raise DataError(
                    "no row of the data set can be used: all were dropped for their length (data.overlong), or are in "
                    f"{self.quarantine.path} with their reasons."
                )
            self.epoch, self.position = self.epoch + 1, 0

    def from_start(self) -> Iterator[Step]:
        """The steps of the first epoch, once; bad rows are counted anew."""
        self.epoch, self.position, self.tokens = 0, 0, 0
        self.quarantine.load_state_dict({"num_good": 0, "reasons": {}})
        return self._epoch()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that was handed out, as JSON values."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "tokens": self.tokens,
            "data": self.builder.sources.fingerprint,
            "quarantine": self.quarantine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            DataError: the data set is another one.
        """
        then, now = list(state["data"]), self.builder.sources.fingerprint
        # A data set may be moved, not changed.
        if [{**one, "path": ""} for one in then] != [{**one, "path": ""} for one in now]:
            raise DataError(
                f"the checkpoint was made on {then}, this data is {now}: the order of samples cannot be continued. "
                "Restore the file (images may be mended in place), or start afresh with another output folder."
            )
        self.epoch, self.position, self.tokens = state["epoch"], state["position"], state["tokens"]
        self.quarantine.load_state_dict(state["quarantine"])

    def _epoch(self) -> Iterator[Step]:
        size, rows = self.batching.global_size, self.order(self.epoch)[self.position :]
        own = self.share.of(len(rows), size, self.batching.chunk)
        results = decoded(self.builder, rows[own], self.num_workers)
        for start in range(0, len(rows), size):
            num_own = int(own[start : start + size].sum())
            yield self._step(rows[start : start + size], list(islice(results, num_own)))

    def _step(self, rows: IntArray, results: Sequence[Built | Rejected]) -> Step:
        """The step of these rows, of which `results` are this process's."""
        built = [result for result in results if isinstance(result, Built)]
        examples = [example for one in built for example in one.examples]
        lengths = [example.length for example in examples]
        groups = self.batching.groups(lengths)
        if self.batching.one_size:
            groups = self.batching.even_groups(lengths, max(1, *self.share.gather(len(groups))))
        batches = self.batching.build(examples, groups)
        own = News(
            index=self.share.index,
            counts=sum((batch.counts for batch in batches), Counts()),
            labelled=Labelled.of(batches),
            num_batches=len(batches),
            num_good=len(built),
            num_overlong=sum(one.overlong for one in built),
            rejected=tuple(result for result in results if isinstance(result, Rejected)),
        )
        every = exchange(self.share, own)
        self.position += len(rows)
        self._count_rows(sum(news.num_good for news in every), [bad for news in every for bad in news.rejected], rows)
        most = max(news.num_batches for news in every)
        fillers = self.batching.fillers(self.batching.num_batches(most) - len(batches), batches) if most else ()
        counts = sum((news.counts for news in every), Counts())
        self.tokens += counts.tokens
        return Step(
            batches=(*batches, *fillers),
            counts=counts,
            labelled=sum((news.labelled for news in every), Labelled()),
            num_overlong=sum(news.num_overlong for news in every),
        )

    def _count_rows(self, num_good: int, rejected: Sequence[Rejected], rows: IntArray) -> None:
        """Every process counts the rows of all, so that all stop at the same step; one of them lists the bad ones."""
        order = {self.builder.sources.find(int(row)): position for position, row in enumerate(rows)}
        self.quarantine.add_good(num_good)
        for bad in sorted(rejected, key=lambda bad: order[Place(bad.source, bad.index)]):
            self.quarantine.add(bad.id, bad.index, bad.reason, bad.message, bad.source)
        self.quarantine.check()
