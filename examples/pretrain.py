"""LLaVA-1.5's first stage: teach a fresh projector to show images to a frozen language model.

    python examples/pretrain.py VISION LANGUAGE DATA IMAGES OUTPUT [key=value …]

VISION is a CLIP folder (clip-vit-large-patch14-336), LANGUAGE a Llama folder (vicuna-7b-v1.5), DATA the captions' JSON.
"""

from __future__ import annotations

import sys

import llava_core


def main(vision: str, language: str, data: str, images: str, output: str, *overrides: str) -> None:
    settings = [
        f"model.vision={vision}",
        f"model.language={language}",
        f"data.path={data}",
        f"data.images={images}",
        f"output={output}",
    ]
    result = llava_core.train_model(llava_core.load_config("llava15-7b-pretrain", [*settings, *overrides]))
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
