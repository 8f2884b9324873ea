"""Tiny InternLM2 folders as on the hub, written from a Hugging Face Llama by InternLM2's own rules.

The rules are those of its modeling_internlm2.py, head by head, and of its published config.json and
tokenizer_config.json; nothing of the code under test takes part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from llava_core.testing.models import tiny_model, tiny_text_config

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000000.0, "factor": 2.0}
VOCAB_SIZE = 400
CODE = "raise SystemExit('code of a model folder was run')\n"

CORPUS = ["A cat sits on a mat. What is this? It is a dog.", "user", "assistant", " 12  ünïcode 日本語\n"] * 20
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llama(kv_heads: int = 2, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """The reference: its config says the same as the folder's."""
    sizes = {"vocab_size": VOCAB_SIZE, "num_key_value_heads": kv_heads, "rope_parameters": DYNAMIC}
    model = tiny_model(tiny_text_config(**(sizes | changes)), seed)
    assert isinstance(model, LlamaForCausalLM)
    return model


def fused_rows(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int) -> Tensor:
    """wqkv row by row: for each key/value head, its query heads, its key, its value."""
    head_dim = len(q) // heads
    rows = []
    for group in range(kv_heads):
        for query in range(group * heads // kv_heads, (group + 1) * heads // kv_heads):
            rows += [q[query * head_dim + i] for i in range(head_dim)]
        rows += [k[group * head_dim + i] for i in range(head_dim)]
        rows += [v[group * head_dim + i] for i in range(head_dim)]
    return torch.stack(rows)


def internlm2_tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    config, inner = model.config, model.model
    tensors = {
        "model.tok_embeddings.weight": inner.embed_tokens.weight,
        "model.norm.weight": inner.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for number, layer in enumerate(inner.layers):
        attention, mlp = layer.self_attn, layer.mlp
        matrices = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        tensors |= {
            f"model.layers.{number}.{name}.weight": weight
            for name, weight in {
                "attention.wqkv": fused_rows(*matrices, config.num_attention_heads, config.num_key_value_heads),
                "attention.wo": attention.o_proj.weight,
                "feed_forward.w1": mlp.gate_proj.weight,
                "feed_forward.w3": mlp.up_proj.weight,
                "feed_forward.w2": mlp.down_proj.weight,
                "attention_norm": layer.input_layernorm.weight,
                "ffn_norm": layer.post_attention_layernorm.weight,
            }.items()
        }
    return {name: tensor.detach() for name, tensor in tensors.items()}


def internlm2_config(model: LlamaForCausalLM) -> dict[str, Any]:
    config = model.config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "internlm2",
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": 2,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.37.1",
        "use_cache": True,
        **{key: getattr(config, key) for key in sizes},
    }


def save_internlm2(model: LlamaForCausalLM, folder: Path, **config: Any) -> Path:
    """A whole folder; its code must not be run. `config` changes config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in internlm2_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(internlm2_config(model) | config))
    for module in ("configuration_internlm2", "modeling_internlm2", "tokenization_internlm2"):
        (folder / f"{module}.py").write_text(CODE)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, *, dummy_prefix: bool = False) -> sentencepiece.SentencePieceProcessor:
    """tokenizer.model, two of whose pieces tokenizer_config.json renames, as in InternLM2's folders."""
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=dummy_prefix,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            hard_vocab_limit=False,
            user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    marks = {"0": "<unk>", "1": "<s>", "2": "</s>", "3": "<|im_end|>", "4": "<|im_start|>"}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {index: {"content": content, **plain} for index, content in marks.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "</s>",
        "sp_model_kwargs": None,
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
