"""LLaVA-1.5's second stage: projector and language model learn to follow visual instructions.

    python examples/sft.py MODEL DATA IMAGES OUTPUT [key=value …]

MODEL is the first stage's export, OUTPUT/hf of examples/pretrain.py.
"""

from __future__ import annotations

import sys

import llava_core


def main(model: str, data: str, images: str, output: str, *overrides: str) -> None:
    settings = [f"model.path={model}", f"data.path={data}", f"data.images={images}", f"output={output}"]
    result = llava_core.train_model(llava_core.load_config("llava15-7b-sft", [*settings, *overrides]))
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
