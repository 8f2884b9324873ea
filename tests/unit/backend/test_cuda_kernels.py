"""What the cuda backend's kernels accept and how their arguments are lowered, tested without a GPU."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_core.backend import CATALOGUE, KernelSpec, MaskFacts, MaskSpec, No, OpRequest, Yes, reference_kernels, select
from llava_core.backend.reference import attend_mask
from llava_core.errors import KernelUnavailable
from llava_core.testing.kernels import max_errors
from llava_cuda import devices, kernels, lowering, probing, torch_varlen

CPU = torch.device("cpu")
USABLE = probing.Facts("2.13.0", "13.0", "580.65.06", None, num_listed=8, usable=True)
HOPPER, AMPERE, ADA, VOLTA = (9, 0), (8, 0), (8, 9), (7, 0)
PACKED = MaskFacts(packed=True, causal=True)
DENSE = MaskFacts(packed=False, causal=True)
DECODE = MaskFacts(packed=False, causal=True, unequal_lengths=True)
PADDED = MaskFacts(packed=False, causal=True, key_padding=True, unequal_lengths=True)
WINDOW = MaskFacts(packed=False, causal=True, window=4096)

without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")


def attention_request(*masks: MaskFacts, **changes: Any) -> OpRequest:
    """The language model of a 7B LLaVA."""
    request = OpRequest("attention", "attention", torch.bfloat16, True, False, 128, 32, 32, masks or (PACKED,), 2048)
    return replace(request, **changes)


def offer(op: str, name: str) -> KernelSpec:
    return next(k for k in kernels.KERNELS if (k.op, k.name) == (op, name))


# ---- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "device", "changes", "masks", "reason"),
    [
        (kernels.flash_attn_limits, AMPERE, {}, (PACKED,), None),
        (kernels.flash_attn_limits, AMPERE, {}, (WINDOW,), None),
        (kernels.flash_attn_limits, AMPERE, {}, (DECODE,), None),
        (kernels.flash_attn_limits, AMPERE, {}, (PACKED, PADDED), None),
        (kernels.flash_attn_limits, AMPERE, {}, (PADDED,), "brings nothing"),
        (kernels.flash_attn_limits, HOPPER, {}, (DENSE,), "brings nothing"),
        (kernels.flash_attn_limits, VOLTA, {}, (PACKED,), "needs compute capability 8.0, the device has 7.0"),
        (kernels.flash_attn_limits, AMPERE, {"dtype": torch.float32}, (PACKED,), "not in torch.float32"),
        (kernels.flash_attn_limits, AMPERE, {"head_dim": 100}, (PACKED,), "not 100"),
        (kernels.flash_attn_limits, AMPERE, {"head_dim": 264}, (PACKED,), "not 264"),
        (kernels.flash_attn_limits, AMPERE, {"head_dim": 72}, (PACKED,), None),
        (kernels.torch_varlen_limits, HOPPER, {}, (PACKED, PADDED), None),
        (kernels.torch_varlen_limits, HOPPER, {}, (DENSE,), "only packed samples"),
        (kernels.torch_varlen_limits, ADA, {"head_dim": 208}, (PACKED,), "no head dim 208 on 8.9"),
        (kernels.torch_varlen_limits, ADA, {"head_dim": 208, "needs_grad": False}, (PACKED,), None),
        (kernels.torch_varlen_limits, HOPPER, {"head_dim": 208}, (PACKED,), None),
        (kernels.cudnn_limits, HOPPER, {}, (DENSE, PACKED), None),
        (kernels.cudnn_limits, HOPPER, {}, (DENSE, DECODE), "mask tensor"),
        (kernels.cudnn_limits, HOPPER, {}, (WINDOW,), "mask tensor"),
        (kernels.cudnn_limits, HOPPER, {"head_dim": 192}, (DENSE,), "not 192"),
        (kernels.cudnn_limits, VOLTA, {"dtype": torch.float16}, (DENSE,), "8.0"),
    ],
)
def test_attention_verdicts(limits, device, changes, masks, reason) -> None:
    verdict = limits(attention_request(*masks, **changes), device)
    if reason is None:
        assert verdict == Yes()
    else:
        assert isinstance(verdict, No)
        assert reason in verdict.reason


def test_a_kernel_that_needs_a_device_says_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "capability", lambda: None)
    assert isinstance(offer("attention", "torch_varlen").verdict(attention_request()), No)


@pytest.mark.parametrize(
    ("dtype", "device", "head_dim", "reason"),
    [
        (torch.float32, VOLTA, 128, None),
        (torch.float64, VOLTA, 128, "not in torch.float64"),
        (torch.float16, (6, 1), 128, "Triton needs compute capability 7.0, the device has 6.1"),
        (torch.bfloat16, HOPPER, 288, "head dim up to 256"),
    ],
)
def test_triton_verdicts(dtype: torch.dtype, device: devices.Capability, head_dim: int, reason: str | None) -> None:
    verdict = kernels.flash_rotary_limits(OpRequest("rotary", "rotary", dtype, True, False, head_dim), device)
    if reason is None:
        assert verdict == Yes()
    else:
        assert isinstance(verdict, No)
        assert reason in verdict.reason


def test_priorities_of_an_op_differ_and_names_are_unique() -> None:
    for op in CATALOGUE:
        offers = [k for k in (*kernels.KERNELS, *reference_kernels()) if k.op == op]
        assert len({k.name for k in offers}) == len(offers) == len({k.priority for k in offers})


# ---- selection ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """The offers as an H100 would see them, with no vendor library."""
    monkeypatch.setattr(kernels, "capability", lambda: HOPPER)
    vendors = ("flash_attn", "liger_kernel", "apex")
    present = [name for name in vendors if find_spec(name) is not None]
    if present:
        pytest.skip(f"{', '.join(present)} installed here")
    return [*kernels.KERNELS, *reference_kernels()]


def test_packed_training_of_7b_falls_to_torchs_own_flash_kernel(hopper: list[KernelSpec]) -> None:
    selection = select(hopper, attention_request(PACKED, PADDED))
    assert selection.kernel.name == "torch_varlen"
    assert selection.function is torch_varlen.attention
    assert selection.rejected == (("flash_attn", "flash_attn is not installed"),)


def test_the_vision_tower_falls_to_sdpa(hopper: list[KernelSpec]) -> None:
    full = MaskFacts(packed=False, causal=False)
    selection = select(hopper, attention_request(full, site="vision_attention", head_dim=64, num_heads=16))
    assert selection.kernel.name == "sdpa"
    assert dict(selection.rejected) == {
        "flash_attn": "flash_attn is not installed",
        "torch_varlen": "only packed samples gain from it",
    }


def test_fp32_training_falls_to_sdpa_with_each_reason(hopper: list[KernelSpec]) -> None:
    selection = select(hopper, attention_request(dtype=torch.float32))
    assert selection.kernel.name == "sdpa"
    assert dict(selection.rejected)["torch_varlen"] == "computes in bf16 and fp16, not in torch.float32"


@pytest.mark.parametrize(
    ("op", "chosen", "missing"),
    [
        ("rms_norm", "torch", {"liger", "apex"}),
        ("rotary", "reference", {"flash_attn", "liger"}),
        ("swiglu", "reference", {"liger"}),
        ("linear_cross_entropy", "chunked", set()),
    ],
)
def test_the_other_ops_of_7b_without_vendor_libraries(
    hopper: list[KernelSpec], op: str, chosen: str, missing: set[str]
) -> None:
    selection = select(hopper, OpRequest(op, op, torch.bfloat16, True, False))
    assert selection.kernel.name == chosen
    assert {name for name, _ in selection.rejected} == missing
    assert all(reason.endswith("is not installed") for _, reason in selection.rejected)


@pytest.mark.skipif(torch.backends.cudnn.is_available(), reason="this torch has cuDNN")
def test_pinned_cudnn_is_refused_by_a_torch_without_it(hopper: list[KernelSpec]) -> None:
    with pytest.raises(KernelUnavailable, match=r"sdpa_cudnn: cannot be imported: .* has no cuDNN 9"):
        select(hopper, attention_request(DENSE), pin="sdpa_cudnn")


def test_pinned_cudnn_is_refused_where_bits_must_repeat(hopper: list[KernelSpec]) -> None:
    with pytest.raises(KernelUnavailable, match="sdpa_cudnn: not deterministic"):
        select(hopper, attention_request(DENSE, deterministic=True), pin="sdpa_cudnn")


# ---- lowering ----------------------------------------------------------------------------------------------------


def packed(*lengths: int, causal: bool = True, window: int | None = None) -> MaskSpec:
    host = (0, *accumulate(lengths))
    return MaskSpec.packed(torch.tensor(host, dtype=torch.int32), host, causal=causal, window=window)


def flash_allowed(num_queries: int, num_keys: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """flash-attn's documented rule: query i sees keys i + Tk − Tq − left to i + Tk − Tq + right; −1 is no bound."""
    position = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys)[None, :]
    left, right = window
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if left >= 0:
        allowed &= key >= position - left
    if right >= 0:
        allowed &= key <= position + right
    return allowed & (key <= position) if causal else allowed


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (3, 7), (7, 3)])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 1), (True, 3), (True, 50)])
def test_window_size_masks_what_the_spec_masks(queries: int, keys: int, causal: bool, window: int | None) -> None:
    mask = MaskSpec.dense(causal=causal, window=window)
    expected = attend_mask(mask, queries, keys, CPU)
    lowered = flash_allowed(queries, keys, causal, lowering.window_size(mask))
    assert torch.equal(lowered, torch.ones_like(lowered) if expected is None else expected)


def test_max_length_is_the_longest_sample() -> None:
    assert lowering.max_length(packed(3, 0, 9, 4)) == 9


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "expected"),
    [
        (MaskSpec.dense(causal=True), 5, 5, False),
        (MaskSpec.dense(causal=True), 2, 5, True),
        (MaskSpec.dense(causal=False), 2, 5, False),
        (MaskSpec.dense(causal=True, window=3), 5, 5, True),
        (MaskSpec.dense(causal=True, window=3, key_valid=torch.ones(1, 5, dtype=torch.bool)), 2, 5, False),
    ],
)
def test_what_sdpa_would_need_a_mask_tensor_for(mask: MaskSpec, queries: int, keys: int, expected: bool) -> None:
    assert lowering.needs_lowering(mask, queries, keys) is expected


# ---- wrappers, over stand-ins that do what the libraries' documentation says ---------------------------------------


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """flash-attn 2.8.3's signature and contract."""
    assert softmax_scale is not None
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("binh,bjnh->bnij", q, k).to(torch.promote_types(q.dtype, torch.float32)) * softmax_scale
    allowed = flash_allowed(q.shape[1], k.shape[1], causal, window_size)
    weights = torch.softmax(scores.masked_fill(~allowed, -1e30), -1) * allowed
    return torch.einsum("bnij,bjnh->binh", weights.to(v.dtype), v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    assert q.dim() == 3
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert (max_seqlen_q, max_seqlen_k) == (max(lengths), max(cu_seqlens_k.diff().tolist()))
    samples = zip(*(x.unsqueeze(0).split(lengths, 1) for x in (q, k, v)), strict=True)
    return torch.cat([flash_attn_func(*sample, **options) for sample in samples], dim=1).squeeze(0)


def varlen_attn(*args: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
    """torch 2.13's: causal is what `window_size` says."""
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
    return flash_attn_varlen_func(*args, softmax_scale=scale, causal=window_size == (-1, 0), window_size=window_size)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("flash_attn")
    library.__dict__.update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    monkeypatch.delitem(sys.modules, "llava_cuda.flash_attention", raising=False)
    wrapper = importlib.import_module("llava_cuda.flash_attention")
    monkeypatch.setitem(sys.modules, "llava_cuda.flash_attention", wrapper)  # so that it leaves with the stand-in
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
@pytest.mark.parametrize("case", CATALOGUE["attention"].cases, ids=lambda case: case.name)
def test_wrappers_pass_what_the_libraries_ask_for(name: str, case: Any) -> None:
    for part in max_errors(offer("attention", name), case, torch.float32, CPU):
        assert part.kernel_error <= 3.0 * part.reference_error + part.floor, part


def test_torchs_varlen_attention_takes_our_arguments() -> None:
    """Its own checks and shapes, through its fake kernel."""
    mask = packed(3, 5, window=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = torch.empty(1, 8, 4, 64, dtype=torch.bfloat16), torch.empty(1, 8, 2, 64, dtype=torch.bfloat16)
        assert torch_varlen.attention(q, k, k, mask, 0.125).shape == q.shape


# ---- kernels in plain PyTorch, which run anywhere ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torchs_rms_norm_is_close_enough_to_llamas(dtype: torch.dtype) -> None:
    (case,) = CATALOGUE["rms_norm"].cases
    for part in max_errors(offer("rms_norm", "torch"), case, dtype, CPU):
        assert part.kernel_error <= 3.0 * part.reference_error + part.floor, part


def test_the_stand_ins_have_the_real_signatures_where_the_real_ones_are_here() -> None:
    real = inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters
    assert {"scale", "window_size", "enable_gqa"} <= set(real)
    assert list(real)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
