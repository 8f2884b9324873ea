"""Parameter names as folders on disk spell them, and as this library does.

This library's names are Hugging Face's classic ones: `vision_tower.vision_model.…`, `multi_modal_projector.linear_1.…`,
`language_model.model.…`, `language_model.lm_head.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

CANONICAL_VISION = "vision_tower.vision_model."
NEWLINE, NEWLINE_ON_DISK = "multi_modal_projector.image_newline", "image_newline"
"""LLaVA-NeXT's newline, which is the projector's here: it is trained, frozen and gathered with it."""


@dataclass(frozen=True)
class Naming:
    """How one kind of folder spells its names.

    Attributes:
        rename: (pattern, replacement), the first that matches a name's start is applied.
        unused: patterns of tensors that such folders hold and LLaVA does not use.
    """

    rename: Sequence[tuple[str, str]]
    unused: Sequence[str] = ()

    def canonical(self, name: str) -> str | None:
        """This library's name for a tensor on disk; None where LLaVA does not use it."""
        if any(re.search(pattern, name) for pattern in (*self.unused, *NEVER_WEIGHTS)):
            return None
        for pattern, replacement in self.rename:
            renamed, matches = re.subn("^" + pattern, replacement, name)
            if matches:
                return renamed
        return name


NEVER_WEIGHTS = (r"\.rotary_emb\.inv_freq$", r"\.position_ids$")
"""Constants that older releases saved as tensors."""

SIGLIP_POOLING = r"(^|\.)head\.(probe|attention|layernorm|mlp)"
"""SigLIP's pooling head: it follows the last layer, and LLaVA's features come before."""

LLAVA = Naming(
    rename=(
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
        (r"(?:model\.)?multi_modal_projector\.", "multi_modal_projector."),
        (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", CANONICAL_VISION),
        (rf"(?:model\.)?{NEWLINE_ON_DISK}$", NEWLINE),
    ),
    unused=(SIGLIP_POOLING,),
)
"""`LlavaForConditionalGeneration`: as on the hub, as transformers 5 writes it, and as it names them at run time."""

VISION = Naming(
    rename=((r"(?:vision_tower\.)?(?:vision_model\.)?", CANONICAL_VISION),),
    unused=(r"^text_model\.", r"^(text|visual)_projection\.", r"^logit_(scale|bias)$", SIGLIP_POOLING),
)
"""A CLIP or SigLIP folder, the vision half alone or with its text half."""

LANGUAGE = Naming(rename=((r"model\.", "language_model.model."), (r"lm_head\.", "language_model.lm_head.")))
"""A causal language model's folder."""

INTERNLM2_LAYER = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""InternLM2's names within a layer, and Llama's."""

INTERNLM2_OUTSIDE = {
    "model.tok_embeddings.": "model.embed_tokens.",
    "model.norm.": "model.norm.",
    "output.": "lm_head.",
}
"""The same outside of the layers."""

FUSED = "attention.wqkv.weight"
SEPARATE = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")

INTERNLM2 = Naming(
    rename=(
        *(
            (rf"model\.layers\.(\d+)\.{re.escape(own)}\.", rf"language_model.model.layers.\1.{llama}.")
            for own, llama in INTERNLM2_LAYER.items()
        ),
        *((re.escape(own), f"language_model.{llama}") for own, llama in INTERNLM2_OUTSIDE.items()),
        (r"model\.", "language_model.model."),
    )
)
"""An InternLM2 folder; its fused matrices keep their name, which `internlm2.split_fused` divides."""

PROJECTOR = Naming(
    rename=(
        # mlpNx_gelu counts the activations between its layers, too.
        *((rf"(?:model\.)?mm_projector\.{2 * i}\.", f"multi_modal_projector.linear_{i + 1}.") for i in range(9)),
        (r"(?:model\.)?mm_projector\.(?=weight|bias)", "multi_modal_projector.linear_1."),
        (r"(?:model\.)?multi_modal_projector\.", "multi_modal_projector."),
        (rf"(?:model\.)?{NEWLINE_ON_DISK}$", NEWLINE),
        *((rf"model\.{2 * i}\.", f"multi_modal_projector.linear_{i + 1}.") for i in range(9)),  # XTuner's folder
    ),
    unused=(r"(^|\.)(vision_tower|language_model|lm_head)\.",),
)
"""A projector alone (`mm_projector.bin` of the original LLaVA and XTuner's folder too), or that of a whole LLaVA."""


def to_llava(name: str) -> str:
    """The name in a whole LLaVA's folder."""
    return NEWLINE_ON_DISK if name == NEWLINE else name


def to_language_only(name: str) -> str:
    """The name in a language model's own folder."""
    return name.removeprefix("language_model.")


def to_internlm2(name: str) -> str:
    """InternLM2's name for a name in a Llama's own folder; that of the fused matrix for each of its parts."""
    layer = re.match(r"model\.layers\.\d+\.", name)
    if layer is None:
        return next(name.replace(llama, own, 1) for own, llama in INTERNLM2_OUTSIDE.items() if name.startswith(llama))
    inside = name.removeprefix(layer.group())
    if inside in SEPARATE:
        return layer.group() + FUSED
    own = next(inside.replace(llama, own) for own, llama in INTERNLM2_LAYER.items() if inside.startswith(f"{llama}."))
    return layer.group() + own
