"""Pretrains the demo's two towers, in plain PyTorch on transformers' own classes.

They stand for what a real run downloads: a CLIP vision tower that has seen pictures with captions, and a Llama that has
only ever read text. Both are saved as ordinary Hugging Face folders.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_core.data.image_store import ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.readers.llava import LlavaJsonReader
from llava_core.data.tokens import encode
from llava_core.demo.digits import IMAGE_SIZE, DigitData
from llava_core.demo.texts import caption_text, chat_text, tokenizer_corpus
from llava_core.testing.tokenizers import train_llama_tokenizer
from llava_core.train.schedule import Schedule

WIDTH = 128
VOCAB_SIZE = 512
MAX_POSITIONS = 1024
VISION_STEPS, VISION_BATCH, VISION_RATE = 400, 64, 1.5e-3
LANGUAGE_STEPS, LANGUAGE_BATCH, LANGUAGE_RATE = 150, 32, 3e-3
WARMUP_STEPS = 10
MAX_SHIFT = 1
"""Pixels by which each picture is moved about while the tower learns, for 1,500 are few; 3 blur the digits apart."""

IGNORED = -100
"""A label that transformers' losses leave out."""

PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}

Track = Callable[[Iterable[int]], Iterable[int]]
"""Shows how far an iteration is."""


def pretrain_vision(folder: Path, data: DigitData, seed: int, track: Track) -> None:
    """A small CLIP vision tower, trained to tell which caption belongs to a picture; saved into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2), encoding="utf-8")
    pixels, caption_of, captions = read_captioned(data, ImageProcessor.from_folder(folder))
    with seeded(seed):
        tower = CLIPVisionModel(vision_config())
        # One embedding a caption is all the text tower that ten captions need.
        texts = nn.Embedding(len(captions), WIDTH)
        project = nn.Linear(WIDTH, WIDTH, bias=False)
        temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        parameters = [*tower.parameters(), *texts.parameters(), *project.parameters(), temperature]
        generator = torch.Generator().manual_seed(seed)

        def loss() -> Tensor:
            chosen = torch.randint(len(pixels), (VISION_BATCH,), generator=generator)
            features = patch_features(tower, moved(pixels[chosen], generator))
            return contrastive_loss(project(features.mean(1)), texts.weight, caption_of[chosen], temperature)

        descend(parameters, loss, VISION_STEPS, VISION_RATE, track)
    tower.save_pretrained(folder)


def pretrain_language(folder: Path, seed: int, track: Track) -> None:
    """A small Llama with its tokenizer, trained on text about digits; saved into `folder`."""
    tokenizer = train_llama_tokenizer(folder, tokenizer_corpus(), VOCAB_SIZE, legacy=False)
    rng = random.Random(seed)
    with seeded(seed):
        model = LlamaForCausalLM(language_config())
        descend(
            list(model.parameters()),
            lambda: model(**language_batch(rng, tokenizer)).loss,
            LANGUAGE_STEPS,
            LANGUAGE_RATE,
            track,
        )
    model.save_pretrained(folder)


def vision_config() -> CLIPVisionConfig:
    """Three layers; LLaVA takes the features of the second."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=WIDTH,
    )


def language_config() -> LlamaConfig:
    """Three layers; bos and eos are the tokenizer's."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def read_captioned(data: DigitData, processor: ImageProcessor) -> tuple[Tensor, Tensor, list[str]]:
    """Stage 1's pictures [N, 3, H, W], which caption each has [N], and the captions."""
    reader = LlavaJsonReader(data.captions)
    records = [reader.read(index) for index in range(len(reader))]
    store = ImageStore(data.images, IMAGE_SIZE**2)
    captions = sorted({record.turns[1].text for record in records})
    pixels = torch.stack([processor(store.open(record.images[0])) for record in records])
    caption_of = torch.tensor([captions.index(record.turns[1].text) for record in records])
    return pixels, caption_of, captions


def contrastive_loss(seen: Tensor, read: Tensor, target: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's loss from pictures [B, D] to captions [C, D]: each picture finds its own among all captions, once each.

    Source: arXiv:2103.00020, figure 3; a batch of pictures with ten captions has no other negatives.
    """
    similarity = F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T
    return F.cross_entropy(similarity * log_scale.exp(), target)


def patch_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """What LLaVA takes of a tower, [B, P, D]: the last layer but one, without the class token.

    The real CLIP matches its class token, and its patches learn by the way, given 400 million pictures. Here they are
    what is matched.
    """
    return tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture [B, 3, S, S] shifted by up to `MAX_SHIFT` in both directions; what comes in is black."""
    size = pixels.shape[-1]
    padded = F.pad(pixels, (MAX_SHIFT,) * 4, value=-1.0)
    starts = torch.randint(2 * MAX_SHIFT + 1, (len(pixels), 2), generator=generator).tolist()
    return torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, starts, strict=True)])


def language_batch(rng: random.Random, tokenizer: Any) -> dict[str, Tensor]:
    """Padded samples of one kind for transformers' own loss, which counts what follows from the text before it."""
    write = rng.choice((caption_text, chat_text))
    samples = [
        encode(write(rng), tokenizer, visual_tokens=(), pad_id=tokenizer.pad_token_id, max_length=MAX_POSITIONS)
        for _ in range(LANGUAGE_BATCH)
    ]
    ids = _padded([sample.tokens for sample in samples], tokenizer.pad_token_id)
    labels = _padded([sample.tokens.masked_fill(~sample.supervised, IGNORED) for sample in samples], IGNORED)
    attended = _padded([torch.ones_like(sample.tokens) for sample in samples], 0)
    return {"input_ids": ids, "attention_mask": attended, "labels": labels}


def descend(
    parameters: list[nn.Parameter], loss: Callable[[], Tensor], steps: int, learning_rate: float, track: Track
) -> None:
    """AdamW with warm-up and a cosine, on whatever `loss` draws at each step."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    shape = Schedule("cosine", steps, WARMUP_STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape.scale)
    for _ in track(range(steps)):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fresh weights and their training depend on `seed` alone; the caller's generator goes on undisturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
