"""The peers of `loader.py`: what a user writes around transformers' processor and the formats' own libraries.

Each gives padded batches of ids, labels and pixels. Of pictures' texts they learn every token but padding and images,
where llava-core finds the answers; of chats they find the answers, too, by transformers' own means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaImageProcessorPil, LlavaProcessor

BATCH_SIZE = 8
IGNORED = -100
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Batch = dict[str, torch.Tensor]


class Rows(Dataset[Any]):
    """What a list holds, each made ready by a function."""

    def __init__(self, rows: Any, read: Any) -> None:
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.read(self.rows[index])


def batches_of(rows: Any, read: Any, collate: Any) -> Iterator[Batch]:
    return iter(DataLoader(Rows(rows, read), BATCH_SIZE, collate_fn=collate, num_workers=0))


class Pictures:
    """Pictures and conversations through transformers' LlavaProcessor, with its own PIL image processor."""

    def __init__(self, tokenizer: Any, *, pad: bool, captions: bool) -> None:
        crop = {"height": 336, "width": 336}
        image_processor = LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=crop, do_pad=pad)
        self.processor = LlavaProcessor(
            image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
        self.image_token = tokenizer.convert_tokens_to_ids("<image>")
        self.captions = captions

    def text(self, turns: list[dict[str, str]]) -> str:
        """As LLaVA-1.5 writes it in its first stage, or in its second."""
        if self.captions:
            return f"<image>{turns[1]['value']}\n"
        said = (f"USER: {q['value']} ASSISTANT: {a['value']}</s>" for q, a in zip(turns[::2], turns[1::2], strict=True))
        return f"{SYSTEM} {''.join(said)}"

    def collate(self, samples: list[tuple[Image.Image, str]]) -> Batch:
        images, texts = zip(*samples, strict=True)
        batch = self.processor(images=list(images), text=list(texts), padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = IGNORED
        labels[labels == self.image_token] = IGNORED
        return {**batch, "labels": labels}

    def json_rows(self, path: Path, folder: Path) -> Iterator[Batch]:
        def read(row: Any) -> tuple[Image.Image, str]:
            return Image.open(folder / row["image"]).convert("RGB"), self.text(row["conversations"])

        return batches_of(json.loads(path.read_text()), read, self.collate)

    def shards(self, folder: Path) -> Iterator[Batch]:
        import webdataset

        urls = [str(path) for path in sorted(folder.glob("*.tar"))]
        samples = webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb").to_tuple("jpg", "json")
        ready = samples.map_tuple(lambda image: image, self.text).batched(BATCH_SIZE, collation_fn=self.collate)
        return iter(webdataset.WebLoader(ready, batch_size=None, num_workers=0))

    def energon(self, folder: Path) -> Iterator[Batch]:
        from megatron.energon import DefaultTaskEncoder, SampleDecoder, WorkerConfig, get_loader, get_train_dataset

        pictures = self

        class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
            decoder = SampleDecoder(image_decode="pilrgb")

            def encode_sample(self, sample: Any) -> Any:
                turns = [{"value": sample.context}, {"value": sample.answers}]
                return sample.image, pictures.text(turns)

            def batch(self, samples: Any) -> Any:
                return pictures.collate(samples)

            def encode_batch(self, batch: Any) -> Any:
                return batch

        data = get_train_dataset(
            folder,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=BATCH_SIZE,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            task_encoder=Encoder(),
            repeat=False,
        )
        return iter(get_loader(data))


class Chats:
    """Conversations through the tokenizer's chat template, the answers found by its generation marks."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, messages: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor(found["input_ids"])
        return ids, ids.masked_fill(torch.tensor(found["assistant_masks"]) == 0, IGNORED)

    def collate(self, samples: list[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
        ids, labels = zip(*samples, strict=True)
        return padded(ids, labels, self.tokenizer.pad_token_id)

    def alpaca(self, path: Path) -> Iterator[Batch]:
        def read(row: Any) -> Any:
            question = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
            said = [("user", question), ("assistant", row["output"])]
            return self.encode([{"role": role, "content": content} for role, content in said])

        return batches_of(json.loads(path.read_text()), read, self.collate)

    def sharegpt(self, path: Path) -> Iterator[Batch]:
        return batches_of(json.loads(path.read_text()), lambda row: self.encode(row["messages"]), self.collate)

    def parquet(self, path: Path) -> Iterator[Batch]:
        from pyarrow import parquet

        for batch in parquet.ParquetFile(path).iter_batches(BATCH_SIZE, use_threads=False):
            yield self.collate([self.encode(row["messages"]) for row in batch.to_pylist()])

    def saved(self, folder: Path) -> Iterator[Batch]:
        from datasets import load_from_disk

        rows = load_from_disk(str(folder))
        return batches_of(rows, lambda row: self.encode(row["messages"]), self.collate)


def documents(prefix: Path, pad_id: int) -> Iterator[Batch]:
    """Megatron's documents, by megatron-core."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    def collate(samples: list[Any]) -> Batch:
        ids = [torch.tensor(sample, dtype=torch.int64) for sample in samples]
        return padded(ids, ids, pad_id)

    return batches_of(IndexedDataset(str(prefix)), lambda ids: ids, collate)


def padded(ids: Any, labels: Any, pad_id: int) -> Batch:
    lengths = torch.tensor([len(one) for one in ids])
    tokens = pad_sequence(list(ids), batch_first=True, padding_value=pad_id)
    return {
        "input_ids": tokens,
        "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORED),
        "attention_mask": (torch.arange(tokens.shape[1]) < lengths[:, None]).long(),
    }
