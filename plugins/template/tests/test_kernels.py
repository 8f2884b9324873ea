"""What no certificate can know: which requests ought to be served, and by what call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from llava_template.attention import lower
from llava_template.kernels import KERNELS

from llava_core.backend import MaskFacts, MaskSpec, OpRequest, reference_kernels, select

HOST = torch.device("cpu")
TRAINING = OpRequest(
    op="attention",
    site="attention",
    dtype=torch.bfloat16,
    needs_grad=True,
    deterministic=True,
    head_dim=128,
    num_heads=32,
    num_kv_heads=8,
    masks=(MaskFacts(packed=True, causal=True),),
    max_length=2048,
)


def test_packed_training_gets_the_fused_kernel() -> None:
    assert select([*KERNELS, *reference_kernels()], TRAINING).kernel.name == "fused"


# VENDOR: one line for each limit of yours, with the word that its reason must have.
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"head_dim": 512}, "head dim up to 256"),
        ({"masks": (MaskFacts(packed=False, causal=True, key_padding=True),)}, "padded keys"),
    ],
)
def test_what_it_cannot_do_it_refuses_with_a_reason(change: dict[str, Any], reason: str) -> None:
    selection = select([*KERNELS, *reference_kernels()], replace(TRAINING, **change))
    assert selection.kernel.name == "sdpa"
    (name, told) = selection.rejected[0]
    assert name == "fused"
    assert reason in told


def test_masks_are_lowered_as_the_library_wants_them() -> None:
    assert lower(MaskSpec.dense(causal=False), 3, 3, HOST) == {"is_causal": False}
    assert lower(MaskSpec.dense(causal=True), 3, 3, HOST) == {"is_causal": True}
    told = lower(MaskSpec.dense(causal=True, window=2), 2, 3, HOST)
    assert told["attn_mask"].tolist() == [[True, True, False], [False, True, True]]
