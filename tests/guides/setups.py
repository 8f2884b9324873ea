"""The guides' set-ups at toy size: model folders and data as each guide has them on disk, and its recipe's command.

What a tool of a guide makes was made by that tool (tests/golden/guides); plain JSON and pictures are made here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

import llava_core
from llava_core.testing.models import save_folder, tiny_model, tiny_text_config, tiny_vision_config
from llava_core.testing.tokenizers import train_llama3_tokenizer, train_llama_tokenizer
from tests.unit.weights.internlm2_folder import llama as internlm2_model
from tests.unit.weights.internlm2_folder import save_internlm2

GOLDEN = Path(__file__).parents[1] / "golden" / "guides"
VOCAB_SIZE = 320
MAX_POSITIONS = 4096
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}
SUMMARIZE = (
    "<image>\nGive a brief description of the image.",
    "Render a clear and concise summary of the photo.\n<image>",
)
ASK = "What colour is this?\nAnswer the question using a single word or phrase."
CORPUS = [*SUMMARIZE, ASK, "a red thing", "a green thing", "a blue thing", "USER: ", "ASSISTANT: "] * 9

FEW = ("batch.global_size=4", "optimizer.warmup_steps=1")
ONE_DEVICE = ("parallel.tensor=1", "parallel.pipeline=1")
QUIET = ("backend.name=cpu", "backend.threads=1", "log.trackers=[]", "checkpoint.keep=null")
"""What every run here has."""


@dataclass(frozen=True)
class Folders:
    """Models and data of all guides, below one root."""

    root: Path

    @property
    def clip(self) -> Path:
        """A CLIP tower of 24 pixels."""
        folder = self.root / "clip-vit-large-patch14-336"
        if not folder.exists():
            save_folder(tiny_model(tiny_vision_config(), 0), folder)
            size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
            processor = {"image_processor_type": "CLIPImageProcessor", **size}
            (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    def language(self, family: Literal["llama", "mistral"]) -> Path:
        """A Vicuna or a Mistral, with a sentencepiece tokenizer."""
        folder = self.root / family
        if not folder.exists():
            save_folder(tiny_model(text_config(family), 0), folder)
            train_llama_tokenizer(folder, CORPUS, VOCAB_SIZE, legacy=False)
        return folder

    @property
    def llama31(self) -> Path:
        """A Llama 3.1 with its byte-level tokenizer and chat template."""
        folder = self.root / "Meta-Llama-3.1-8B"
        if not folder.exists():
            save_folder(tiny_model(text_config("llama", num_key_value_heads=2), 0), folder)
            train_llama3_tokenizer(folder, CORPUS, VOCAB_SIZE - 10)
        return folder

    @property
    def internlm2(self) -> Path:
        """An InternLM2 folder as on the hub, with code that must not be run."""
        folder = self.root / "internlm2-chat-20b"
        if not folder.exists():
            save_internlm2(internlm2_model(max_position_embeddings=MAX_POSITIONS), folder)
        return folder

    @property
    def pretrain(self) -> tuple[str, str]:
        """LLaVA-Pretrain: captions, pictures in numbered folders."""
        folder = self.root / "LLaVA-Pretrain"
        rows = [captioned(number) for number in range(24)]
        return write_rows(folder, "blip_laion_cc_sbu_558k.json", rows)

    @property
    def stage1(self) -> Path:
        """What NeVA's first stage exports."""
        output = self.root / "neva-stage1"
        if not output.exists():
            given = (*composed(self, "llama"), *self.pretrain, *ONE_DEVICE, *FEW, *QUIET)
            changes = [*given, f"output={output}", "train.max_steps=1", "data.num_workers=0"]
            llava_core.train_model(llava_core.load_config("neva-7b-pretrain", changes))
        return output / "hf"

    @property
    def instructions(self) -> tuple[str, str]:
        """llava_v1_5_mix665k: pictures and talk of several rounds, and talk alone."""
        folder = self.root / "LLaVA-finetune"
        return write_rows(folder, "llava_v1_5_mix665k.json", [instructed(number) for number in range(24)])

    @property
    def alpaca(self) -> tuple[str, str]:
        """alpaca_zh: raw JSON lists."""
        files = [self.root / f"alpaca_zh-{part}-general.json" for part in ("train", "valid")]
        inputs = ("", "红色", "a cat")
        rows = [
            {"instruction": f"说出数字 {n}。", "input": inputs[n % 3], "output": f"好的, {'一二三'[n % 3]} {n}"}
            for n in range(24)
        ]
        for file, part in zip(files, (rows, rows[:5]), strict=True):
            file.write_text(json.dumps(part, ensure_ascii=False))
        return f"data.path={files[0]}", f"validation.path={files[1]}"


def text_config(family: Literal["llama", "mistral"], **changes: Any) -> Any:
    sizes = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_POSITIONS}
    return tiny_text_config(family, **sizes, bos_token_id=1, eos_token_id=2, **changes)


def captioned(number: int) -> dict[str, Any]:
    said = (SUMMARIZE[number % 2], f"a {list(COLOURS)[number % 3]} thing, number {number}")
    return {"id": f"{number:09}", "image": f"{number % 2:05}/{number:09}.jpg", "conversations": turns(*said)}


def instructed(number: int) -> dict[str, Any]:
    colour = list(COLOURS)[number % 3]
    if number % 4 == 3:
        return {"id": f"{number}", "conversations": turns(f"Say {colour}.", colour.capitalize() + ".")}
    said = (f"<image>\n{ASK}" if number % 2 else f"{ASK}\n<image>", colour, "Are you sure?", "Yes.")
    rounds = said if number % 3 else said[:2]
    return {"id": f"{number}", "image": f"coco/train2017/{number:012}.jpg", "conversations": turns(*rounds)}


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """A data set's file and pictures; what a command says of them."""
    for number, row in enumerate(rows):
        if "image" in row:
            path = folder / "images" / row["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12 + number, 30 - number % 20), list(COLOURS.values())[number % 3]).save(path, "JPEG")
    (folder / name).write_text(json.dumps(rows))
    return f"data.path={folder / name}", f"data.images={folder / 'images'}"


@dataclass(frozen=True)
class Setup:
    """One command of a guide.

    Attributes:
        given: what its recipe leaves open.
        toy: what is smaller here; all other settings are the recipe's.
    """

    recipe: str
    given: Callable[[Folders], tuple[str, ...]]
    toy: tuple[str, ...] = ()


def composed(folders: Folders, family: Literal["llama", "mistral"]) -> tuple[str, ...]:
    return f"model.vision={folders.clip}", f"model.language={folders.language(family)}"


SETUPS = {
    "Pai-Megatron-Patch, LLaVA": Setup(
        "llava-mistral-7b-pretrain",
        lambda folders: (
            *composed(folders, "mistral"),
            f"data.path={GOLDEN / 'wds'}",
            f"validation.path={GOLDEN / 'wds'}",
            "validation.split=val",
            "parallel.tensor=1",
        ),
        FEW,
    ),
    "MindSpeed-MM, LLaVA-1.5": Setup(
        "llava15-7b-pretrain", lambda folders: (*composed(folders, "llama"), *folders.pretrain), FEW[:1]
    ),
    "Pai-Megatron-Patch, Llama 3.1, documents": Setup(
        "llama31-8b-pretrain",
        lambda folders: (
            f"model.path={folders.llama31}",
            f"data.path={GOLDEN / 'wudao_llama3bpe_content_document'}",
            *ONE_DEVICE,
        ),
        ("train.max_tokens=1500", "optimizer.warmup_tokens=100"),
    ),
    "Pai-Megatron-Patch, Llama 3.1, packed instructions": Setup(
        "llama31-8b-sft",
        lambda folders: (
            f"model.path={folders.llama31}",
            f"data.path={GOLDEN / 'instructions'}",
            "data.reader=megatron_sft",
            "data.template=null",
            *ONE_DEVICE,
        ),
        FEW,
    ),
    "Pai-Megatron-Patch, Llama 3.1, raw instructions": Setup(
        "llama31-8b-sft",
        lambda folders: (f"model.path={folders.llama31}", *folders.alpaca, "data.reader=alpaca", *ONE_DEVICE),
        FEW,
    ),
    "NeMo, NeVA, stage 1": Setup(
        "neva-7b-pretrain",
        lambda folders: (*composed(folders, "llama"), *folders.pretrain, "parallel.tensor=1"),
        FEW,
    ),
    "NeMo, NeVA, stage 2": Setup(
        "neva-7b-sft",
        lambda folders: (f"model.path={folders.stage1}", *folders.instructions, "parallel.tensor=1"),
        FEW,
    ),
    "XTuner, LLaVA-InternLM2-20B": Setup(
        "llava-internlm2-20b-pretrain",
        lambda folders: (f"model.vision={folders.clip}", f"model.language={folders.internlm2}", *folders.pretrain),
        FEW[:1],
    ),
}
