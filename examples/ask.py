"""Ask a trained model, or any Hugging Face LLaVA, about images.

    python examples/ask.py MODEL QUESTION IMAGE [IMAGE …]

MODEL is a Hugging Face folder, e.g. OUTPUT/hf of examples/sft.py.
"""

from __future__ import annotations

import sys

import llava_core


def main(model: str, question: str, *images: str) -> None:
    assistant = llava_core.load_assistant(model)
    for image in images:
        print(f"{image}: {assistant.ask(question, image)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
