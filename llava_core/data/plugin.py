"""The readers and templates that come with llava-core, registered as any plugin registers its own."""

from __future__ import annotations

from llava_core.plugins import Contribution, hookimpl


@hookimpl
def llava_register_readers() -> list[Contribution]:
    return [
        Contribution(
            "llava_json",
            "llava_core.data.readers.llava:LlavaJsonReader",
            "LLaVA JSON: one array of rows",
            api_version=1,
        ),
        Contribution(
            "llava_jsonl",
            "llava_core.data.readers.llava:LlavaJsonlReader",
            "LLaVA JSONL: one row a line",
            api_version=1,
        ),
    ]


@hookimpl
def llava_register_templates() -> list[Contribution]:
    module = "llava_core.data.templates"
    return [
        Contribution("plain", f"{module}:PLAIN", "an image and its caption: LLaVA-1.5's first stage", api_version=1),
        Contribution("v1", f"{module}:V1", "Vicuna v1: LLaVA-1.5's second stage", api_version=1),
        Contribution("llama_2", f"{module}:LLAMA_2", "Llama 2 chat", api_version=1),
        Contribution("llama_3", f"{module}:LLAMA_3", "Llama 3 instruct, as LLaVA-NeXT trains it", api_version=1),
        Contribution("mistral", f"{module}:MISTRAL", "Mistral instruct", api_version=1),
        Contribution("chatml", f"{module}:CHATML", "ChatML, as LLaVA-1.6 34B", api_version=1),
    ]
