"""Rows with images of several sizes, and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from llava_core.data.batch import Example
from llava_core.data.sources import Place
from llava_core.train.prepare import Run
from tests.unit.data.test_tiles import noise

IMAGE_SIZES = ((24, 24), (24, 60), (70, 30), (50, 50), (20, 90))
QUESTION = "What colour is this?"
NEW_TOKENS = 12
# A loss of about 6 in fp32: one unit in its last place is 5e-7; sums of at most a few hundred terms in another order.
LOSS_TOLERANCE = 5e-6


def write_pictures(folder: Path) -> tuple[str, ...]:
    """Questions about images, and one without; the settings of a run on them."""
    (folder / "pictures").mkdir()
    rows: list[dict[str, Any]] = []
    for number, size in enumerate(IMAGE_SIZES):
        noise(*size).save(folder / "pictures" / f"{number}.png")
        said = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "It is grey."}]
        rows.append({"id": f"image-{number}", "image": f"{number}.png", "conversations": said})
    said = [{"from": "human", "value": "Name the colour."}, {"from": "gpt", "value": "Blue."}]
    rows.append({"id": "text", "conversations": said})
    (folder / "rows.json").write_text(json.dumps(rows))
    return (f"data.path={folder / 'rows.json'}", f"data.images={folder / 'pictures'}", "batch.global_size=6")


def pictures(folder: Path) -> Iterator[Image.Image]:
    for number in range(len(IMAGE_SIZES)):
        yield Image.open(folder / "pictures" / f"{number}.png")


def examples_of(run: Run) -> list[Example]:
    """Every row as it is trained on."""
    builder = run.loader.builder
    reader = builder.sources.sources[0].reader
    return [
        example for row in range(len(reader)) for example in builder.build(Place(0, row), reader.read(row)).examples
    ]


def inputs_of(processor: Any, picture: Image.Image) -> Any:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def generated(model: PreTrainedModel, processor: Any, picture: Image.Image) -> str:
    """transformers' greedy answer."""
    inputs = inputs_of(processor, picture)
    out: Any = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def mean_loss(model: PreTrainedModel, run: Run, examples: Sequence[Example], sizes: bool = False) -> float:
    """transformers' loss over all labels; it gets each sample alone.

    Args:
        sizes: whether it is told the images' own.
    """
    total = 0.0
    for example, size in zip(examples, (*IMAGE_SIZES, None), strict=True):
        tokens = example.tokens.clone()
        for start, length in zip(example.image_starts, example.visual_tokens, strict=True):
            tokens[start : start + length] = model.config.image_token_id
        more = {"image_sizes": torch.tensor([size])} if sizes and size is not None else {}
        with torch.no_grad():
            logits = model(input_ids=tokens[None], pixel_values=example.pixels, **more).logits[0, :-1]
        trained = example.supervised[1:]
        # The export has rows for <image>, which training does not know.
        logits, targets = logits[trained, : run.source.spec.text.vocab_size], tokens[1:][trained]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total / sum(example.num_labels for example in examples)
