"""Resident memory while a LLaVA folder is loaded, beside transformers: python benchmarks/load_memory.py

Makes a random bf16 LLaVA, loads it in a fresh process each time, reads every parameter once (so that mapped pages
count), and prints the peak above the process before loading as a multiple of the folder's size. Exits with 1 where a
model that is not, or only in its projector, trained takes more than 1.1 times its folder. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from llava_core.backend import OpSet
from llava_core.testing.models import save_folder, tiny_llava_config, tiny_model, tiny_text_config, tiny_vision_config
from llava_core.weights.load import load_model
from llava_core.weights.source import from_folder

BOUND = 1.1
STATUS = Path("/proc/self/status")
WAYS: dict[str, tuple[str, Callable[[Path], torch.nn.Module]]] = {
    "ours-frozen": ("llava_core, all frozen", lambda folder: load_ours(folder)),
    "ours-stage1": ("llava_core, projector trained", lambda folder: load_ours(folder, "projector")),
    "ours-stage2": ("llava_core, projector and language trained", lambda f: load_ours(f, "projector", "language")),
    "transformers": ("transformers, bf16", lambda folder: load_transformers(folder, torch.bfloat16)),
    "transformers-fp32": ("transformers, fp32", lambda folder: load_transformers(folder, torch.float32)),
}
"""What each row is called and how it loads. Trained parts are fp32 copies, so stage 2 is to be held against fp32."""


def load_ours(folder: Path, *trainable: str) -> torch.nn.Module:
    """bf16 compute, the frozen parts mapped."""
    source, device = from_folder(folder), torch.device("cpu")
    parts = frozenset(trainable)
    return load_model(source, OpSet.of({}), compute_dtype=torch.bfloat16, device=device, trainable=parts)


def load_transformers(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """As its documentation does."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def write_folder(folder: Path) -> Path:
    """A LLaVA of about 400 MB in bf16."""
    text = tiny_text_config(
        vocab_size=16000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=16,
    )  # fmt: skip
    vision = tiny_vision_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    return save_folder(tiny_model(tiny_llava_config(text, vision)), folder, dtype=torch.bfloat16)


def resident_bytes(key: str) -> int:
    """A line of /proc/self/status: VmHWM, VmRSS, RssAnon."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def measure(way: str, folder: Path) -> dict[str, int]:
    """Bytes above those before loading: the peak, and what is the process's own (not mapped from a file) at the end."""
    torch.ones(1).sum()
    before, anonymous = resident_bytes("VmRSS"), resident_bytes("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts anew
    model = WAYS[way][1](folder)
    for parameter in model.parameters():
        parameter.detach().view(-1)[::512].sum()  # at least one element of each 4 KiB page
    return {"peak": resident_bytes("VmHWM") - before, "anonymous": resident_bytes("RssAnon") - anonymous}


def measure_in_child(way: str, folder: Path) -> dict[str, int]:
    """`measure` in a process that has done nothing else."""
    command = [sys.executable, __file__, "--child", way, str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare() -> bool:
    """Print the table; whether the bound is kept."""
    with tempfile.TemporaryDirectory(prefix="load_memory-") as temporary:
        folder = write_folder(Path(temporary) / "llava")
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"folder: {size / 1e6:.0f} MB of bf16 weights")
        print(f"{'':42s} {'peak':>8s} {'× folder':>9s} {'own (anonymous)':>16s} {'× folder':>9s}")
        kept = True
        for way, (label, _) in WAYS.items():
            used = measure_in_child(way, folder)
            peak, anonymous = used["peak"], used["anonymous"]
            multiples = peak / size, anonymous / size
            print(
                f"{label:42s} {peak / 1e6:5.0f} MB {multiples[0]:9.2f} {anonymous / 1e6:13.0f} MB {multiples[1]:9.2f}"
            )
            kept &= way not in ("ours-frozen", "ours-stage1") or peak <= BOUND * size
    print(f"bound for frozen models and stage 1: {BOUND} × folder: {'kept' if kept else 'BROKEN'}")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    child = parser.parse_args().child
    if child:
        print(json.dumps(measure(child[0], Path(child[1]))))
    else:
        sys.exit(0 if compare() else 1)


if __name__ == "__main__":
    main()
