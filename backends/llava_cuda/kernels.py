"""The kernels that CUDA can offer, and what each of them serves.

Left out, with the reason:
- Transformer Engine's DotProductAttention chooses among kernels of its own by NVTE_* variables, and falls back to an
  unfused one without saying so; what it would add, cuDNN and flash-attn, is offered here by name.
- Transformer Engine's RMSNorm is a module that owns its weight; the functions under it are private and change between
  releases. Its rotary embedding takes angles, ours cosines and sines.
- Liger's fused linear cross-entropy knows per-label weights only as `reduction="none"`, where it computes the logits
  twice and reads a count back to the host each time; releases before that was added scale the gradient wrongly without
  an error. `chunked` saves the same memory.

Nothing here has run on a GPU yet (tests/cuda is there to be run on one), and no priority is measured: each stands with
what it was reasoned from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from llava_core.backend import KernelSpec, No, OpRequest, Yes
from llava_core.backend.kernels import Verdict, always
from llava_cuda.devices import AMPERE, VOLTA, Capability, capability

Limits: TypeAlias = Callable[[OpRequest, Capability], Verdict]

HALF = (torch.bfloat16, torch.float16)


def on_device(limits: Limits) -> Callable[[OpRequest], Verdict]:
    """`supports` for limits that depend on the device. It is looked at when a model is built, not at import."""

    def supports(request: OpRequest) -> Verdict:
        found = capability()
        return No("no CUDA device to ask for its compute capability") if found is None else limits(request, found)

    return supports


def flash_limits(request: OpRequest, device: Capability) -> Verdict:
    """What flash-attention 2 computes (flash_api.cpp: `mha_fwd`, `mha_varlen_fwd` and their backward passes)."""
    if device < AMPERE:
        return No(f"needs compute capability 8.0, the device has {device[0]}.{device[1]}")
    if request.dtype not in HALF:
        return No(f"computes in bf16 and fp16, not in {request.dtype}")
    if request.head_dim is None or request.head_dim % 8 or request.head_dim > 256:
        return No(f"needs a head dim that is a multiple of 8 up to 256, not {request.head_dim}")
    return Yes()


def flash_attn_limits(request: OpRequest, device: Capability) -> Verdict:
    """flash-attn, where it does what SDPA cannot do without a loop or a mask tensor."""
    verdict = flash_limits(request, device)
    if isinstance(verdict, No):
        return verdict
    if not any(m.packed or ((m.window is not None or m.unequal_lengths) and not m.key_padding) for m in request.masks):
        return No("brings nothing to rows of equal length: SDPA runs the same kernel, or cuDNN's faster one")
    return Yes()


def torch_varlen_limits(request: OpRequest, device: Capability) -> Verdict:
    """torch's build of flash-attention 2; see `check_requires_grad_and_head_dim_gt192_…` in torch's sdp_utils.cpp."""
    verdict = flash_limits(request, device)
    if isinstance(verdict, No):
        return verdict
    if not any(mask.packed for mask in request.masks):
        return No("only packed samples gain from it")
    small_memory = (8, 6) <= device <= (8, 9) or device >= (12, 0)
    if request.needs_grad and small_memory and 192 < (request.head_dim or 0) <= 224:
        return No(f"its backward pass has no head dim {request.head_dim} on {device[0]}.{device[1]}")
    return Yes()


def cudnn_limits(request: OpRequest, device: Capability) -> Verdict:
    """cuDNN through SDPA (`check_cudnn_tensor_shapes`). Up to 256 on some devices, which SDPA finds out itself."""
    if device < AMPERE:
        return No(f"needs compute capability 8.0, the device has {device[0]}.{device[1]}")
    if request.dtype not in HALF:
        return No(f"computes in bf16 and fp16, not in {request.dtype}")
    if request.head_dim is None or request.head_dim % 8 or request.head_dim > 128:
        return No(f"needs a head dim that is a multiple of 8 up to 128, not {request.head_dim}")
    if any(m.window is not None or m.key_padding or m.unequal_lengths for m in request.masks):
        return No("windows, padded keys and unequal lengths would need a mask tensor")
    return Yes()


def half_or_single(request: OpRequest) -> Verdict:
    """What apex and the Triton kernels compute in."""
    if request.dtype in (*HALF, torch.float32):
        return Yes()
    return No(f"computes in bf16, fp16 and fp32, not in {request.dtype}")


def triton_limits(request: OpRequest, device: Capability) -> Verdict:
    """What Triton compiles for."""
    if device < VOLTA:
        return No(f"Triton needs compute capability 7.0, the device has {device[0]}.{device[1]}")
    return half_or_single(request)


def flash_rotary_limits(request: OpRequest, device: Capability) -> Verdict:
    """flash-attn's rotary kernel (`apply_rotary`)."""
    if (request.head_dim or 0) > 256:
        return No(f"needs a head dim up to 256, not {request.head_dim}")
    return triton_limits(request, device)


KERNELS = (
    # One call for all packed samples, windows and bottom-right causal masks without a mask tensor. Deterministic: it,
    # SDPA and torch_varlen all choose their deterministic backward by torch.use_deterministic_algorithms.
    KernelSpec(
        "attention",
        "flash_attn",
        "llava_cuda.flash_attention:attention",
        30,
        on_device(flash_attn_limits),
        requires="flash_attn",
    ),
    # The same kernel as flash-attn's, built into torch, for packed samples alone.
    KernelSpec(
        "attention",
        "torch_varlen",
        "llava_cuda.torch_varlen:attention",
        20,
        on_device(torch_varlen_limits),
        requires="torch.nn.attention.varlen",
    ),
    KernelSpec("attention", "sdpa", "llava_core.backend.sdpa:attention", 10, always),
    # Below SDPA, which takes cuDNN itself on the devices where torch's maintainers measured it to be faster
    # (`check_prefer_cudnn_attention`): this one is there to be pinned.
    KernelSpec(
        "attention",
        "sdpa_cudnn",
        "llava_cuda.torch_cudnn:attention",
        5,
        on_device(cudnn_limits),
        deterministic=False,  # torch refuses it under use_deterministic_algorithms
    ),
    # Llama's own order of casts, forward and backward in one launch each.
    KernelSpec("rms_norm", "liger", "llava_cuda.liger:rms_norm", 30, on_device(triton_limits), requires="liger_kernel"),
    # As fused, but rounds once where Llama rounds twice: a little more exact, and not the reference's bits.
    KernelSpec("rms_norm", "apex", "llava_cuda.apex_norm:rms_norm", 20, half_or_single, requires="apex"),
    KernelSpec("rms_norm", "torch", "llava_cuda.torch_norm:rms_norm", 10, always),
    # Writes new tensors; Liger's writes over its inputs and so costs a copy more.
    KernelSpec(
        "rotary",
        "flash_attn",
        "llava_cuda.flash_rotary:rotary",
        20,
        on_device(flash_rotary_limits),
        requires="flash_attn",
    ),
    KernelSpec("rotary", "liger", "llava_cuda.liger:rotary", 10, on_device(triton_limits), requires="liger_kernel"),
    # Keeps two activations for the backward pass instead of three.
    KernelSpec("swiglu", "liger", "llava_cuda.liger:swiglu", 10, on_device(triton_limits), requires="liger_kernel"),
    # The same matmuls as the reference's, without all logits at once (0.8 GiB in fp32 for 6k labels of 32k words).
    KernelSpec("linear_cross_entropy", "chunked", "llava_core.backend.chunked_loss:linear_cross_entropy", 10, always),
)
