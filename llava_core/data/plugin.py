"""The readers and templates that come with llava-core, registered as any plugin registers its own."""

from __future__ import annotations

from llava_core.plugins import Contribution, hookimpl


@hookimpl
def llava_register_readers() -> list[Contribution]:
    module = "llava_core.data.readers"
    return [
        Contribution("llava_json", f"{module}.llava:LlavaJsonReader", "LLaVA JSON: one array of rows", api_version=1),
        Contribution("llava_jsonl", f"{module}.llava:LlavaJsonlReader", "LLaVA JSONL: one row a line", api_version=1),
        Contribution(
            "alpaca",
            f"{module}.instructions:AlpacaReader",
            "Alpaca JSON or JSONL: instruction, input, output",
            api_version=1,
        ),
        Contribution(
            "sharegpt",
            f"{module}.instructions:ShareGptReader",
            "ShareGPT or chat messages, JSON or JSONL",
            api_version=1,
        ),
        Contribution("text", f"{module}.text:TextReader", "plain text: one document a line", api_version=1),
        Contribution(
            "webdataset", f"{module}.webdataset:WebdatasetReader", "webdataset: images and JSON in .tar", api_version=1
        ),
        Contribution(
            "energon", f"{module}.energon:EnergonReader", "webdataset that energon prepare described", api_version=1
        ),
        Contribution("parquet", f"{module}.parquet:ParquetReader", "parquet, by its columns", api_version=1),
        Contribution(
            "datasets",
            f"{module}.saved_datasets:SavedDatasetReader",
            "Hugging Face datasets saved to disk, by their columns",
            api_version=1,
        ),
        Contribution("megatron", f"{module}.megatron:MegatronReader", "Megatron .bin/.idx: documents", api_version=1),
        Contribution(
            "megatron_sft",
            f"{module}.megatron:MegatronSftReader",
            "Megatron .bin/.idx: conversations packed by Pai-Megatron-Patch",
            api_version=1,
        ),
        Contribution(
            "tokens", f"{module}.tokens:TokensReader", "rows that `data prepare --to tokens` tokenised", api_version=1
        ),
        Contribution("text_json", f"{module}.text:TextJsonReader", "JSON or JSONL documents: text", api_version=1),
    ]


@hookimpl
def llava_register_templates() -> list[Contribution]:
    module = "llava_core.data.templates"
    summaries = {
        "plain": "an image and its caption: LLaVA-1.5's first stage",
        "v1": "Vicuna v1: LLaVA-1.5's second stage",
        "llava_v1": "v1 with the system text of the first LLaVA",
        "llama_2": "Llama 2 chat",
        "llama_3": "Llama 3 instruct, as LLaVA-NeXT trains it",
        "mistral": "Mistral instruct",
        "chatml": "ChatML, as LLaVA-1.6 34B",
        "internlm2": "InternLM2 chat, as XTuner trains it",
        "xtuner_vicuna": "Vicuna without a system text, as XTuner trains it",
        "nvgpt": "NeMo's nvgpt, with the line that grades an answer",
        "nv_dpo": "NeMo's nv_dpo",
    }
    offered = [
        Contribution(name, f"{module}:{name.upper()}", summary, api_version=1) for name, summary in summaries.items()
    ]
    document = "a document as it stands, all of it learnt"
    return [
        *offered,
        Contribution("vicuna", f"{module}:V1", "another name of v1", api_version=1),
        Contribution("text", "llava_core.data.documents:TEXT", document, api_version=1),
    ]
