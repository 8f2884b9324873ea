"""The readers and templates that come with llava-core, registered as any plugin registers its own."""

from __future__ import annotations

from llava_core.plugins import Contribution, hookimpl

TEMPLATES = {
    "plain": "image and caption only: LLaVA's first stage",
    "v1": "Vicuna v1.1: LLaVA-1.5's second stage",
    "llama_2": "Llama-2 chat",
    "llama_3": "Llama-3 instruct",
    "mistral": "Mistral instruct",
    "chatml": "ChatML",
}


@hookimpl
def llava_register_readers() -> list[Contribution]:
    return [
        Contribution("llava_json", "llava_core.data.readers.llava:LlavaJsonReader", "LLaVA JSON: one array of rows"),
        Contribution("llava_jsonl", "llava_core.data.readers.llava:LlavaJsonlReader", "LLaVA JSONL: one row a line"),
    ]


@hookimpl
def llava_register_templates() -> list[Contribution]:
    address = "llava_core.data.templates:{}"
    return [Contribution(name, address.format(name.upper()), summary) for name, summary in TEMPLATES.items()]
