"""A training step of ours against transformers' own LLaVA step, on the CPU.

    python benchmarks/train_step.py

One thread, CPU seconds (`time.process_time`), warm, both contenders taking turns in one run; the best of three rounds.
The model is LLaVA-1.5's shape in small: 577 visual positions, 576 visual tokens a picture; stage 1 trains the projector
on short captions, stage 2 projector and language model on longer conversations, some without a picture. The peer pads
its batches, computes every logit and runs every layer of the tower, as transformers' model does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_core.data.batch import Example
from llava_core.data.packing import build_batch
from llava_core.engine.hardware import Hardware, choose_backend
from llava_core.engine.opset import Use, build_ops
from llava_core.engine.torch_engine import OptimizerSettings, TorchEngine
from llava_core.plugins import Registry
from llava_core.testing.models import save_folder, tiny_llava_config, tiny_model, tiny_text_config, tiny_vision_config
from llava_core.weights.load import load_model
from llava_core.weights.source import from_folder

VISUAL_TOKENS, VOCAB_SIZE, SAMPLES, ROUNDS = 576, 8192, 8, 3
STAGES = {"stage 1": frozenset({"projector"}), "stage 2": frozenset({"projector", "language"})}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    torch.set_num_threads(1)
    table = Table(title=f"CPU seconds of a step of {SAMPLES} samples")
    for column in ("stage", "precision", "transformers", "ours", "ratio", "loss difference"):
        table.add_column(column)
    with TemporaryDirectory() as folder:
        save_folder(tiny_model(benchmark_config()), Path(folder))
        for stage, trainable in STAGES.items():
            samples = make_samples(stage)
            for precision, dtype in DTYPES.items():
                peer = peer_step(Path(folder), samples, trainable, dtype)
                ours = our_step(Path(folder), samples, trainable, dtype)
                theirs_first, ours_first = peer(), ours()
                seconds = best_of({"peer": peer, "ours": ours})
                ratio = f"{seconds['peer'] / seconds['ours']:.2f}"
                gap = f"{abs(theirs_first - ours_first):.1e}"
                table.add_row(stage, precision, f"{seconds['peer']:.2f}", f"{seconds['ours']:.2f}", ratio, gap)
    Console().print(table)


def benchmark_config() -> LlavaConfig:
    """Four tower layers of 256, six decoder layers of 512."""
    vision = tiny_vision_config(
        hidden_size=256, intermediate_size=1024, num_attention_heads=4, image_size=336, patch_size=14
    )
    text = tiny_text_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    return tiny_llava_config(text, vision, image_token_index=VOCAB_SIZE - 1, image_seq_length=VISUAL_TOKENS)


def make_samples(stage: str) -> list[Example]:
    """Caption lengths around 22 tokens, conversation lengths around 90 of which the second half is supervised."""
    generator = torch.Generator().manual_seed(1)
    spread, centre, shortest, longest = (0.45, 22, 8, 64) if stage == "stage 1" else (0.9, 90, 16, 448)
    samples = []
    for index in range(SAMPLES):
        drawn = math.exp(float(torch.randn(1, generator=generator)) * spread + math.log(centre))
        length = int(min(longest, max(shortest, drawn)))
        text = torch.randint(2, VOCAB_SIZE - 2, (length,), generator=generator)
        has_image = stage == "stage 1" or index % 8 != 7
        visual = VISUAL_TOKENS if has_image else 0
        first_label = visual if stage == "stage 1" else visual + length // 2
        tokens = torch.cat((torch.zeros(visual, dtype=torch.int64), text))
        pixels = torch.randn(1, 3, 336, 336, generator=generator) if has_image else None
        supervised = torch.arange(len(tokens)) >= first_label
        samples.append(Example(str(index), tokens, supervised, (0,) * has_image, pixels, (VISUAL_TOKENS,) * has_image))
    return samples


def our_step(
    folder: Path, samples: list[Example], trainable: frozenset[str], dtype: torch.dtype
) -> Callable[[], float]:
    """A step of the engine on one packed micro-batch."""
    backend = choose_backend("cpu", Registry.discover())
    source = from_folder(folder)
    ops, _ = build_ops(source.spec, backend, Use(dtype, trainable, 1024, deterministic=True))
    device = torch.device("cpu")
    model = load_model(source, ops, compute_dtype=dtype, device=device, trainable=trainable)
    settings = OptimizerSettings(dict.fromkeys(trainable, 1e-5), 0.0, (0.9, 0.999), 1e-8, 1.0)
    engine = TorchEngine(model, Hardware(backend, device), settings, "token_mean")
    batch = build_batch(samples, pad_id=0, image_size=336)
    return lambda: engine.step([batch], 1.0).loss


def peer_step(
    folder: Path, samples: list[Example], trainable: frozenset[str], dtype: torch.dtype
) -> Callable[[], float]:
    """The same with transformers' model: padded, under autocast in bf16, with fused AdamW and clipping."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").train()
    learns = {"projector": "multi_modal_projector", "language": ("language_model", "lm_head")}
    names = tuple(n for part in trainable for n in ([learns[part]] if part == "projector" else learns[part]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(learnt in name for learnt in names))
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    inputs = padded_inputs(samples, dtype)

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def padded_inputs(samples: list[Example], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What transformers' model takes, padded on the right."""
    longest = max(sample.length for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels, attended = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : sample.length] = sample.tokens
        for start, length in zip(sample.image_starts, sample.visual_tokens, strict=True):
            ids[row, start : start + length] = VOCAB_SIZE - 1
        labels[row, : sample.length] = sample.tokens.masked_fill(~sample.supervised, -100)
        attended[row, : sample.length] = 1
    pixels = torch.cat([sample.pixels for sample in samples if sample.pixels is not None]).to(dtype)
    return {"input_ids": ids, "labels": labels, "attention_mask": attended, "pixel_values": pixels}


def best_of(contenders: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The least CPU seconds of each, the contenders taking turns."""
    best = dict.fromkeys(contenders, math.inf)
    for _ in range(ROUNDS):
        for name, step in contenders.items():
            start = time.process_time()
            step()
            best[name] = min(best[name], time.process_time() - start)
    return best


if __name__ == "__main__":
    main()
