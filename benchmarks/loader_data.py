"""What `loader.py` reads: pictures and English on disk in each format, and the tokenizers that both contenders use."""

from __future__ import annotations

import io
import json
import random
import re
from contextlib import redirect_stdout
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import webdataset
from images import write_jpegs

from llava_core.testing.tokenizers import train_llama3_tokenizer, train_llama_tokenizer

Message = dict[str, str]

SIZES = ((640, 480), (640, 427), (480, 640), (500, 375))
"""The commonest of COCO's, of which most of LLaVA's pictures are."""

# The same form as Llama 3's, with the marks by which transformers finds the answers.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>{{ '\\n\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|eot_id|>{% endif %}{% endfor %}"
)


def prose() -> list[str]:
    """Paragraphs of Python's own reference: English that every Python has."""
    paragraphs = (" ".join(text.split()) for topic in topics.values() for text in re.split(r"\n\s*\n", topic))
    return [text for text in paragraphs if len(text) > 60 and "*" not in text]


class Writer:
    """Draws words for questions and answers, the same each time."""

    def __init__(self) -> None:
        self._words = " ".join(prose()).split()
        self._random = random.Random(0)

    def text(self, words: int) -> str:
        """About as many words, consecutive ones."""
        count = max(1, round(words * self._random.lognormvariate(0, 0.4)))
        start = self._random.randrange(len(self._words) - count)
        return " ".join(self._words[start : start + count])

    def rounds(self, count: int, question: int, answer: int) -> list[str]:
        """Questions and answers in turn."""
        return [self.text((question, answer)[turn % 2]) for turn in range(2 * count)]


def llava_turns(texts: list[str]) -> list[Message]:
    said = [f"<image>\n{texts[0]}", *texts[1:]]
    return [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(said)]


def train_tokenizers(folder: Path) -> tuple[Any, Any]:
    """Llama's kind, which knows `<image>`, and Llama 3's, which has a chat template."""
    llama = train_llama_tokenizer(folder / "llama", prose(), 8000, legacy=True)
    llama.add_special_tokens({"additional_special_tokens": ["<image>"]})
    llama3 = train_llama3_tokenizer(folder / "llama3", prose(), 8000)
    llama3.chat_template = CHAT_TEMPLATE
    return llama, llama3


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Any number of JPEG files, of some sizes in turn."""
    folder.mkdir()
    by_size = [write_jpegs(folder, *size) for size in SIZES]
    return [by_size[i % len(SIZES)][i // len(SIZES) % len(by_size[0])] for i in range(count)]


def write_llava(folder: Path, pictures: list[Path], writer: Writer) -> None:
    """`captions.json`, as stage 1 has them, and `talks.json`, as stage 2."""
    for name, rounds in (("captions", (1, 8, 12)), ("talks", (3, 12, 45))):
        rows = [
            {"id": str(i), "image": path.name, "conversations": llava_turns(writer.rounds(*rounds))}
            for i, path in enumerate(pictures)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))


def write_shards(folder: Path, pictures: list[Path], writer: Writer) -> None:
    """Shards of a question and an answer to each picture, and their description, where energon is there to make it."""
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "train-%d.tar"), maxcount=64, verbose=0) as shards:
        for i, path in enumerate(pictures):
            turns = json.dumps(llava_turns(writer.rounds(1, 12, 130)))
            shards.write({"__key__": f"{i:05d}", "jpg": path.read_bytes(), "json": turns.encode()})


def describe_shards(folder: Path) -> None:
    """`.nv-meta`, by `energon prepare`."""
    from megatron.energon.cli.main import main as energon

    fields = {"image": "jpg", "context": "json[0][value]", "answers": "json[1][value]"}
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "VQASample", "--num-workers", "1"]
    try:
        with redirect_stdout(io.StringIO()):
            energon(["prepare", str(folder), *options, "--field-map", json.dumps(fields)])
    except SystemExit as left:
        if left.code:
            raise


def write_texts(folder: Path, count: int, writer: Writer) -> None:
    """Instructions and conversations: `alpaca.json`, `sharegpt.json`, `talks.parquet`, and `talks` of datasets."""
    instructions = [writer.rounds(1, 20, 110) for _ in range(count)]
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in instructions]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    talks = [_messages(writer.rounds(3, 25, 160)) for _ in range(count)]
    (folder / "sharegpt.json").write_text(json.dumps([{"messages": talk} for talk in talks]))
    _write_columns(folder, talks)


def _messages(texts: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]


def _write_columns(folder: Path, talks: list[list[Message]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"messages": talks}), folder / "talks.parquet", row_group_size=128)
    try:
        from datasets import Dataset
    except ImportError:
        return
    Dataset.from_dict({"messages": talks}).save_to_disk(folder / "talks")


def write_documents(prefix: Path, tokenizer: Any, count: int, writer: Writer) -> None:
    """Megatron's pair of files, by its own builder."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(count):
        ids = tokenizer(writer.text(500))["input_ids"]
        builder.add_document(torch.tensor([*ids, tokenizer.eos_token_id]), [len(ids) + 1])
    builder.finalize(f"{prefix}.idx")
