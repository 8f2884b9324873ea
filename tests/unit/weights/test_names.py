"""Every spelling of a parameter's name, row by row."""

from __future__ import annotations

import pytest

from llava_core.weights.names import LANGUAGE, LLAVA, PROJECTOR, VISION, to_language_only

LAYER = "layers.3.self_attn.q_proj.weight"

SPELLINGS = [
    # a whole LLaVA as on the hub: these names are this library's own
    (LLAVA, "multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
    (LLAVA, "multi_modal_projector.linear_2.bias", "multi_modal_projector.linear_2.bias"),
    (LLAVA, f"vision_tower.vision_model.encoder.{LAYER}", f"vision_tower.vision_model.encoder.{LAYER}"),
    (LLAVA, f"language_model.model.{LAYER}", f"language_model.model.{LAYER}"),
    (LLAVA, "language_model.model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    (LLAVA, "language_model.lm_head.weight", "language_model.lm_head.weight"),
    # as transformers 5 names them at run time
    (LLAVA, "model.multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
    (LLAVA, f"model.vision_tower.encoder.{LAYER}", f"vision_tower.vision_model.encoder.{LAYER}"),
    (LLAVA, "model.vision_tower.pre_layrnorm.weight", "vision_tower.vision_model.pre_layrnorm.weight"),
    (LLAVA, f"model.language_model.{LAYER}", f"language_model.model.{LAYER}"),
    (LLAVA, "model.language_model.norm.weight", "language_model.model.norm.weight"),
    (LLAVA, "lm_head.weight", "language_model.lm_head.weight"),
    # as transformers 5 saves them
    (LLAVA, "vision_tower.embeddings.class_embedding", "vision_tower.vision_model.embeddings.class_embedding"),
    (LLAVA, f"vision_tower.encoder.{LAYER}", f"vision_tower.vision_model.encoder.{LAYER}"),
    # as transformers 4.52 names them at run time
    (LLAVA, f"model.vision_tower.vision_model.encoder.{LAYER}", f"vision_tower.vision_model.encoder.{LAYER}"),
    # a vision folder: the vision half alone, as transformers 5 saves it, or with its text half
    (VISION, f"vision_model.encoder.{LAYER}", f"vision_tower.vision_model.encoder.{LAYER}"),
    (VISION, f"encoder.{LAYER}", f"vision_tower.vision_model.encoder.{LAYER}"),
    (VISION, "embeddings.patch_embedding.bias", "vision_tower.vision_model.embeddings.patch_embedding.bias"),
    (VISION, f"vision_tower.vision_model.encoder.{LAYER}", f"vision_tower.vision_model.encoder.{LAYER}"),
    # a language model's folder
    (LANGUAGE, f"model.{LAYER}", f"language_model.model.{LAYER}"),
    (LANGUAGE, "model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    (LANGUAGE, "lm_head.weight", "language_model.lm_head.weight"),
    # a projector: the original's `mm_projector.bin`, with and without its prefix, and the linear one of LLaVA 1.0
    (PROJECTOR, "model.mm_projector.0.weight", "multi_modal_projector.linear_1.weight"),
    (PROJECTOR, "model.mm_projector.2.bias", "multi_modal_projector.linear_2.bias"),
    (PROJECTOR, "mm_projector.0.bias", "multi_modal_projector.linear_1.bias"),
    (PROJECTOR, "model.mm_projector.4.weight", "multi_modal_projector.linear_3.weight"),
    (PROJECTOR, "mm_projector.16.bias", "multi_modal_projector.linear_9.bias"),
    (PROJECTOR, "model.mm_projector.weight", "multi_modal_projector.linear_1.weight"),
    (PROJECTOR, "mm_projector.bias", "multi_modal_projector.linear_1.bias"),
    (PROJECTOR, "multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.weight"),
    (PROJECTOR, "model.multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.weight"),
]

UNUSED = [
    (LLAVA, f"language_model.model.{LAYER.replace('q_proj.weight', 'rotary_emb.inv_freq')}"),
    (LLAVA, "vision_tower.vision_model.embeddings.position_ids"),
    (LLAVA, "vision_tower.vision_model.head.probe"),
    (LLAVA, "model.vision_tower.head.mlp.fc1.weight"),
    (VISION, "vision_model.embeddings.position_ids"),
    (VISION, f"text_model.encoder.{LAYER}"),
    (VISION, "visual_projection.weight"),
    (VISION, "text_projection.weight"),
    (VISION, "logit_scale"),
    (VISION, "logit_bias"),
    (VISION, "vision_model.head.attention.in_proj_weight"),
    (VISION, "vision_model.head.layernorm.weight"),
    (VISION, "head.probe"),
    (LANGUAGE, "model.layers.0.self_attn.rotary_emb.inv_freq"),
    (PROJECTOR, f"model.language_model.{LAYER}"),
    (PROJECTOR, f"language_model.model.{LAYER}"),
    (PROJECTOR, f"vision_tower.vision_model.encoder.{LAYER}"),
    (PROJECTOR, "lm_head.weight"),
]


@pytest.mark.parametrize(("naming", "disk", "expected"), SPELLINGS, ids=[row[1] for row in SPELLINGS])
def test_canonical_name(naming, disk, expected):
    assert naming.canonical(disk) == expected


@pytest.mark.parametrize(("naming", "disk"), UNUSED, ids=[row[1] for row in UNUSED])
def test_unused_tensors_have_no_name(naming, disk):
    assert naming.canonical(disk) is None


def test_unknown_names_stay_so_that_they_are_reported():
    assert LLAVA.canonical("image_newlines") == "image_newlines"
    assert LANGUAGE.canonical("transformer.wte.weight") == "transformer.wte.weight"


def test_language_folders_have_no_prefix():
    assert to_language_only(f"language_model.model.{LAYER}") == f"model.{LAYER}"
    assert to_language_only("language_model.lm_head.weight") == "lm_head.weight"
