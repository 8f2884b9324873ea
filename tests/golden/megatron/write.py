"""Writes the files beside it with megatron-core's own builder: `python tests/golden/megatron/write.py`.

Needs megatron-core (written with 0.12.1), which no test needs. Those in `preprocessed` are of Megatron-LM's own tool,
of the same version, in its folder:

    python tools/preprocess_data.py --input …/preprocessed/documents.jsonl --output-prefix …/preprocessed/documents \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model …/preprocessed/tokenizer --append-eod --workers 1
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

HERE = Path(__file__).parent
PAD, IGNORED = 0, -100

DOCUMENTS = [[1, 17, 300, 5, 2], [1, 9, 2], [1, *range(100, 140), 2]]
SENTENCES = [[[1, 8], [9, 10, 2]], [[1, 5, 2]]]
WIDE = [[1, 128000, 70000, 2], [1, 3, 128255, 2]]
# Questions and answers, packed in samples of 16 tokens.
PACKED = [[([1, 5, 6], [7, 2]), ([1, 8], [9, 10, 11, 2])], [([1, 12, 13, 14], [15, 2])]]


def write(name: str, dtype: type[np.number], documents: list[list[list[int]]]) -> None:
    """Each document of one or more sequences."""
    builder = IndexedDatasetBuilder(str(HERE / f"{name}.bin"), dtype=dtype)
    for document in documents:
        flat = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(flat), [len(sequence) for sequence in document])
    builder.finalize(str(HERE / f"{name}.idx"))


def packed(samples: list[tuple[list[int], list[int]]], length: int = 16) -> list[int]:
    """As Pai-Megatron-Patch's build_idxmap_sft_dataset.py: ids, then labels shifted by one; the last id of each sample
    is kept as −1 − id."""
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in samples:
        whole = question + answer
        ids += [*whole[:-1], -1 - whole[-1]]
        labels += [IGNORED] * (len(question) - 1) + answer + [IGNORED]
    padding = length - len(ids)
    return ids + [PAD] * padding + labels + [IGNORED] * padding


if __name__ == "__main__":
    write("documents", np.uint16, [[document] for document in DOCUMENTS])
    write("sentences", np.int32, SENTENCES)
    write("wide", np.int32, [[document] for document in WIDE])
    write("packed", np.int32, [[packed(samples)] for samples in PACKED])
    expected = {"documents": DOCUMENTS, "sentences": SENTENCES, "wide": WIDE, "packed": PACKED}
    (HERE / "expected.json").write_text(json.dumps(expected) + "\n")
