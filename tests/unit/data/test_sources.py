"""Several sources in one loader: the same steps from any position on, for any number of workers and shares."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from llava_core.data.documents import TEXT
from llava_core.data.examples import ExampleBuilder
from llava_core.data.image_side import ImageSide
from llava_core.data.image_store import ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.loader import Batching, Step, StepLoader
from llava_core.data.mixing import Mixture
from llava_core.data.overlong import Overlong
from llava_core.data.quarantine import Quarantine
from llava_core.data.readers import Reader
from llava_core.data.readers.llava import LlavaJsonReader
from llava_core.data.readers.text import TextJsonReader, TextReader
from llava_core.data.sampler import epoch_order
from llava_core.data.share import Share
from llava_core.data.sources import Place, Source, Sources
from llava_core.data.templates import V1
from llava_core.errors import BadRow, DataError
from llava_core.testing.datasets import TinyParts
from llava_core.weights.tokenizer import load_tokenizer

SIZE = 8
MAX_LENGTH = 256
BATCHING = Batching(SIZE, 512, None, pad_id=0, image_size=24)
LONG = "red green blue " * 200


@dataclass(frozen=True)
class Mix:
    """Pictures with questions (36 rows), documents (one long, one empty), and lines of text."""

    parts: TinyParts
    folder: Path

    def sources(self) -> Sources:
        readers: list[Reader] = [
            LlavaJsonReader(self.parts.data),
            TextJsonReader(self.folder / "documents.jsonl"),
            TextReader(self.folder / "lines.txt"),
        ]
        images = ImageStore(self.parts.images, 10**6)
        templates = (V1, TEXT, TEXT)
        return Sources(
            [Source(reader, template, images) for reader, template in zip(readers, templates, strict=True)],
        )

    def loader(
        self,
        weights: tuple[float, float, float] | None = None,
        *,
        num_workers: int = 0,
        share: Share | None = None,
        overlong: Overlong = "split",
        output: str = "run",
    ) -> StepLoader:
        sources = self.sources()
        processor = ImageProcessor.from_folder(self.parts.vision, "pad")
        builder = ExampleBuilder(
            sources=sources,
            tokenizer=load_tokenizer(self.parts.language),
            images=ImageSide(processor, tile_tokens=9),
            pad_id=0,
            vocab_size=320,
            max_length=MAX_LENGTH,
            overlong=overlong,
        )
        mixture = Mixture(sources.lengths, weights, "shuffled", 5)

        def order(epoch: int) -> torch.Tensor:
            return mixture.rows(epoch)[epoch_order("shuffled", mixture.num_rows, 5, epoch)]

        quarantine = Quarantine(self.folder / output / "quarantine.jsonl", 1.0)
        return StepLoader(builder, order, mixture.num_rows, BATCHING, quarantine, num_workers, share or Share())  # type: ignore[arg-type]


@pytest.fixture
def mix(parts: TinyParts, tmp_path: Path) -> Mix:
    rows = [{"id": f"doc{i}", "text": f"Say {i}." if i else LONG} for i in range(9)] + [{"id": "void", "text": ""}]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "lines.txt").write_text("\n".join(f"line {i} is blue" for i in range(6)))
    return Mix(parts, tmp_path)


def contents(steps: list[Step]) -> list[list[tuple[str, list[int], list[int]]]]:
    """Each step's samples by id, tokens and targets, sorted: shares pack them in another order."""
    found = []
    for step in steps:
        samples = []
        for batch in step.batches:
            targets = batch.targets.split(list(batch.labels_per_sample)) if batch.ids else ()
            for i, (id, target) in enumerate(zip(batch.ids, targets, strict=True)):
                start, end = batch.cu_seqlens_host[i : i + 2]
                samples.append((id, batch.tokens[start:end].tolist(), target.tolist()))
        found.append(sorted(samples))
    return found


def take(loader: StepLoader, count: int) -> list[Step]:
    return list(islice(loader, count))


WEIGHTS = (1.0, 2.0, 1.0)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_state_saved_after_any_step_continues_identically(
    mix: Mix, weights: tuple[float, float, float] | None
) -> None:
    expected = contents(take(mix.loader(weights), 16))  # 52 rows: 7 steps an epoch
    saving = mix.loader(weights)
    for done, _ in enumerate(islice(saving, 14), 1):
        state = json.loads(json.dumps(saving.state_dict()))
        fresh = mix.loader(weights)
        fresh.load_state_dict(state)
        assert contents(take(fresh, 2)) == expected[done : done + 2]


def test_workers_and_their_number_change_nothing(mix: Mix) -> None:
    expected = contents(take(mix.loader(WEIGHTS), 9))
    first = mix.loader(WEIGHTS, num_workers=1, output="workers")
    assert contents(take(first, 3)) == expected[:3]
    fresh = mix.loader(WEIGHTS, num_workers=2, output="workers")
    fresh.load_state_dict(first.state_dict())
    assert contents(take(fresh, 6)) == expected[3:]
    listed = [(mix.folder / output / "quarantine.jsonl").read_text() for output in ("run", "workers")]
    assert listed[0] == listed[1]


@pytest.mark.parametrize("count", [2, 3])
def test_shares_together_are_the_whole(mix: Mix, count: int) -> None:
    whole = contents(take(mix.loader(WEIGHTS), 7))
    parts = [contents(take(mix.loader(WEIGHTS, share=Share(index, count, _told_alone)), 7)) for index in range(count)]
    assert [sorted(chain.from_iterable(step)) for step in zip(*parts, strict=True)] == whole


def _told_alone(news: object) -> list[object]:
    return [news]


def test_an_epoch_has_every_row_once_and_a_long_document_in_pieces(mix: Mix) -> None:
    steps = take(mix.loader(), 7)
    ids = Counter(id for step in contents(steps) for id, _, _ in step)
    assert ids.pop("doc0") > 3
    expected = [f"row{i}" for i in range(36)] + [f"doc{i}" for i in range(1, 9)] + [f"row-{i}" for i in range(6)]
    assert ids == Counter(expected)
    assert [step.num_overlong for step in steps].count(1) == 1
    assert sum(step.num_overlong for step in steps) == 1


def test_a_bad_row_is_listed_with_its_source(mix: Mix) -> None:
    take(mix.loader(), 14)
    (listed,) = map(json.loads, (mix.folder / "run" / "quarantine.jsonl").read_text().splitlines())
    assert (listed["source"], listed["index"], listed["reason"]) == (1, 9, "empty_document")


def test_long_rows_are_dropped_or_cut_on_demand(mix: Mix) -> None:
    dropped, cut = take(mix.loader(overlong="drop"), 7), take(mix.loader(overlong="truncate"), 7)
    assert not [id for step in contents(dropped) for id, _, _ in step if id == "doc0"]
    (piece,) = [tokens for step in contents(cut) for id, tokens, _ in step if id == "doc0"]
    assert len(piece) == MAX_LENGTH
    assert sum(step.num_overlong for step in dropped) == sum(step.num_overlong for step in cut) == 1
    loader = mix.loader(overlong="drop")
    take(loader, 7)
    assert (loader.quarantine.num_good, loader.quarantine.num_bad) == (51, 1), "what is dropped is not bad"


def test_a_documents_tokens_are_transformers_own_with_eos_and_all_are_learnt(mix: Mix) -> None:
    tokenizer = load_tokenizer(mix.parts.language)
    samples = {id: (tokens, targets) for step in contents(take(mix.loader(), 7)) for id, tokens, targets in step}
    for i in range(1, 9):
        expected = [*tokenizer(f"Say {i}.")["input_ids"], tokenizer.eos_token_id]
        assert samples[f"doc{i}"] == (expected, expected[1:])


def test_sources_that_changed_or_moved_about_are_refused(mix: Mix) -> None:
    state = mix.loader().state_dict()
    (mix.folder / "lines.txt").write_text("one more line")
    with pytest.raises(DataError, match="the order of samples cannot be continued"):
        mix.loader().load_state_dict(state)


def test_an_image_mark_is_a_word_in_a_document_without_images(parts: TinyParts, tmp_path: Path) -> None:
    text, image = "Write <image> for a picture.", json.loads(parts.data.read_text())[0]["image"]
    rows = [{"text": text}, {"text": text, "image": image}, {"text": text, "image": [image, image]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    reader, tokenizer = TextJsonReader(tmp_path / "a.json"), load_tokenizer(parts.language)
    builder = ExampleBuilder(
        sources=Sources([Source(reader, TEXT, ImageStore(parts.images, 10**6))]),
        tokenizer=tokenizer,
        images=ImageSide(ImageProcessor.from_folder(parts.vision, "pad"), tile_tokens=9),
        pad_id=0,
        vocab_size=320,
        max_length=MAX_LENGTH,
        overlong=None,
    )
    (plain,) = builder.build(Place(0, 0), reader.read(0)).examples
    assert plain.tokens.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert plain.pixels is None
    (seen,) = builder.build(Place(0, 1), reader.read(1)).examples
    assert len(seen.image_starts) == 1
    assert seen.pixels is not None
    with pytest.raises(BadRow, match="image_count"):
        builder.build(Place(0, 2), reader.read(2))


def test_a_source_without_rows_is_named(tmp_path: Path) -> None:
    class Empty(TextReader):
        def __len__(self) -> int:
            return 0

    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"source 0 of the data, .*a\.txt, has no rows; check"):
        Sources([Source(Empty(tmp_path / "a.txt"), TEXT)])
    with pytest.raises(DataError, match="source 0 of the validation data, "):
        Sources([Source(Empty(tmp_path / "a.txt"), TEXT)], "the validation data")
