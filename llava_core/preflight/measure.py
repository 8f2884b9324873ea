"""What one row of a data set is found to be: it is read, rendered, tokenised and decoded as for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

from PIL import Image

from llava_core.data.examples import Built, ExampleBuilder, Rejected, build_or_reject, read_or_reject
from llava_core.data.image_store import ImageStore
from llava_core.data.records import EmbeddedImage, Row, TokenRow
from llava_core.data.sources import Sources
from llava_core.errors import BadRow


class ImageFacts(NamedTuple):
    """An image that could be decoded, as it is in its file."""

    width: int
    height: int
    mode: str
    format: str


class SampleFacts(NamedTuple):
    """A sample: how many tokens it has, how many of them are images' and how many are learnt."""

    tokens: int
    image_tokens: int
    label_tokens: int
    images: int


@dataclass(frozen=True)
class RowFacts:
    """What a row was found to be.

    Attributes:
        source: which data set it is of.
        key: 64 bits of its id; 0 where it has none of its own.
        rejected: why it cannot be used; None where it can.
        lengths: in tokens, of each of its sequences, before any was cut.
        samples: what it became; none of a row that is dropped for its length or cannot be used.
        images: of each of its images what it is, or the reason why it cannot be used.
    """

    source: int
    key: int
    rejected: Rejected | None
    lengths: tuple[int, ...] = ()
    samples: tuple[SampleFacts, ...] = ()
    images: tuple[ImageFacts | str, ...] = ()


class NotingStore(ImageStore):
    """An image store that notes of each image that it opens what it is, or why it cannot be used."""

    def __init__(self, store: ImageStore) -> None:
        super().__init__(store.root, store.max_pixels)
        self.noted: list[tuple[str | EmbeddedImage, ImageFacts | str]] = []
        self._header: ImageFacts | None = None

    def open(self, image: str | EmbeddedImage) -> Image.Image:
        try:
            pixels = super().open(image)
        except BadRow as bad:
            self.noted.append((image, bad.reason))
            raise
        assert self._header is not None  # `to_rgb` was called
        self.noted.append((image, self._header))
        return pixels

    def to_rgb(self, image: Image.Image) -> Image.Image:
        self._header = ImageFacts(image.width, image.height, image.mode, str(image.format))
        return super().to_rgb(image)

    def note_all(self, images: Sequence[str | EmbeddedImage]) -> tuple[ImageFacts | str, ...]:
        """What each of these images is, without opening again what was; the notes are empty afterwards."""
        for image in images:
            if not any(image is seen for seen, _ in self.noted):
                try:
                    self.open(image)
                except BadRow:
                    continue  # it is noted
        noted, self.noted = self.noted, []
        return tuple(facts for _, facts in noted)


class RowMeasurer:
    """Measures the rows of a run's data, one by one. A row's facts do not depend on the rows before it.

    Args:
        builder: the run's own.
    """

    def __init__(self, builder: ExampleBuilder) -> None:
        self._stores = [NotingStore(s.images) if s.images else None for s in builder.sources.sources]
        sources = zip(builder.sources.sources, self._stores, strict=True)
        self._builder = replace(builder, sources=Sources([replace(source, images=store) for source, store in sources]))

    def measure(self, index: int) -> RowFacts:
        """The row with this index."""
        builder = self._builder
        place = builder.sources.find(index)
        row = read_or_reject(builder.sources, place)
        if isinstance(row, Rejected):
            return RowFacts(place.source, 0, row)
        built = build_or_reject(builder, place, row)
        store = self._stores[place.source]
        images = store.note_all(row.images) if store and not isinstance(row, TokenRow) else ()
        if isinstance(built, Rejected):
            return RowFacts(place.source, _key(row), built, images=images)
        return RowFacts(place.source, _key(row), None, built.lengths, _samples(built), images)


def _samples(built: Built) -> tuple[SampleFacts, ...]:
    return tuple(
        SampleFacts(example.length, example.image_tokens, example.num_labels, len(example.image_starts))
        for example in built.examples
    )


def _key(row: Row) -> int:
    if row.id == f"row-{row.index}":
        return 0
    return int.from_bytes(blake2b(row.id.encode("utf-8"), digest_size=8).digest(), "little")
