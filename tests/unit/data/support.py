"""What the tests of several readers share."""

from __future__ import annotations

import numpy as np

from llava_core.data.documents import TEXT
from llava_core.data.examples import Built, ExampleBuilder, decoded
from llava_core.data.readers import Reader
from llava_core.data.sources import Source, Sources
from llava_core.testing.datasets import VOCAB_SIZE, TinyParts
from llava_core.weights.tokenizer import load_tokenizer


def assert_decodes_in_any_order(reader: Reader, parts: TinyParts, num_workers: int) -> None:
    """Row n of the reader is the document `Say n.`, read at random by workers, too."""
    builder = ExampleBuilder(
        sources=Sources([Source(reader, TEXT)]),
        tokenizer=load_tokenizer(parts.language),
        images=None,
        pad_id=0,
        vocab_size=VOCAB_SIZE,
        max_length=64,
        overlong=None,
    )
    rows = np.random.default_rng(0).permutation(len(reader))
    for row, built in zip(rows, decoded(builder, rows, num_workers), strict=True):
        assert isinstance(built, Built)
        assert builder.tokenizer.decode(built.examples[0].tokens, skip_special_tokens=True) == f"Say {row}."
