"""The kernels that Ascend NPUs can offer, and what each of them serves.

A chip is served where the vendor documents the op for it: torch_npu's own page of the op, or CANN's page of the aclnn
function under it. For all ops here these name Atlas A2, Atlas A3 and Ascend 950, and on older chips the references run.

Left out, with the reason:
- torch's scaled_dot_product_attention: torch_npu's own runs the same kernel as `fusion`, with a top-left causal mask
  and no window, and calls it past the dispatcher, so that the simulator cannot judge it.
- `npu_add_rms_norm` has no backward; no op of the catalogue adds a residual.
- `npu_fusion_attention_v3` and `npu_fused_infer_attention_score`: one for graph capture, the other for inference.

Determinism. CANN documents the forward pass of attention and the gradients of rotary, swiglu and cross-entropy as
deterministic, and the gradients of attention and RMSNorm as deterministic under ACL_OPT_DETERMINISTIC, which
`torch.use_deterministic_algorithms` sets (op-plugin, docs of set_deterministic_level). Its pages advise to set that
once in a process, before any kernel runs.

Nothing here has run on an NPU yet (tests/npu runs on the simulator), and no priority is measured: each stands with what
it was reasoned from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from llava_core.backend import KernelSpec, No, OpRequest, Yes
from llava_core.backend.kernels import Verdict, always
from llava_npu.devices import is_second_generation, soc_name

Limits: TypeAlias = Callable[[OpRequest, str], Verdict]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on_device(limits: Limits) -> Callable[[OpRequest], Verdict]:
    """`supports` for limits that depend on the chip. It is looked at when a model is built, not at import."""

    def supports(request: OpRequest) -> Verdict:
        soc = soc_name()
        return No("no NPU to ask for its name") if soc is None else limits(request, soc)

    return supports


def fused_limits(request: OpRequest, soc: str) -> Verdict:
    """What all of torch_npu's fused ops ask for.

    Of RMSNorm, torch_npu's page names the first generation as well, but CANN's page of aclnnRmsNormGrad excludes it.
    """
    if not is_second_generation(soc):
        return No(f"documented for Atlas A2, Atlas A3 and Ascend 950, not listed for {soc}")
    if request.dtype not in DTYPES:
        return No(f"computes in bf16, fp16 and fp32, not in {request.dtype}")
    return Yes()


def attention_limits(request: OpRequest, soc: str) -> Verdict:
    """npu_fusion_attention's limits. What `OpRequest.masks` can say, it can mask."""
    verdict = fused_limits(request, soc)
    if isinstance(verdict, No):
        return verdict
    head_dim, heads, groups = request.head_dim, request.num_heads, request.num_kv_heads
    if head_dim is None or not 1 <= head_dim <= 768:
        return No(f"needs a head dim up to 768, not {head_dim}")
    if request.dtype == torch.float32 and head_dim % 4:
        # Documented nowhere; torch_npu's own SDPA leaves such sizes to the plain formula.
        return No(f"needs a head dim that is a multiple of 4 in fp32, not {head_dim}")
    if heads is None or groups is None or heads > 256 or heads % groups:
        return No(f"needs up to 256 query heads, a multiple of the key heads, not {heads} and {groups}")
    if request.max_length is not None and request.max_length > 1 << 20:
        return No(f"needs sequences of up to {1 << 20} tokens, not {request.max_length}")
    return Yes()


def rotary_limits(request: OpRequest, soc: str) -> Verdict:
    """npu_rotary_mul's limits, where the request says the size (`jit_compile` is off, torch_npu's default on A2)."""
    if request.head_dim is not None and (request.head_dim % 2 or request.head_dim >= 896):
        return No(f"needs an even head dim below 896, not {request.head_dim}")
    if any(heads is not None and heads >= 1000 for heads in (request.num_heads, request.num_kv_heads)):
        return No(f"needs fewer than 1000 heads, not {request.num_heads} and {request.num_kv_heads}")
    return fused_limits(request, soc)


KERNELS = (
    # Neither scores nor, but for padded keys, masks in memory; packed samples and grouped heads in one call.
    KernelSpec(
        "attention",
        "fusion",
        "llava_npu.fusion_attention:attention",
        10,
        on_device(attention_limits),
        requires="torch_npu",
    ),
    # One launch each way for the reference's six and more. Rounds once where Llama rounds twice: a little more exact,
    # and not the reference's bits.
    KernelSpec("rms_norm", "npu", "llava_npu.fused_ops:rms_norm", 10, on_device(fused_limits), requires="torch_npu"),
    # One launch each way for the reference's five, and nothing kept but the tables, as there.
    KernelSpec("rotary", "npu", "llava_npu.fused_ops:rotary", 10, on_device(rotary_limits), requires="torch_npu"),
    # Putting both halves into one tensor copies them. It stands above the reference all the same: by count of what is
    # read and written the two are about even, but it keeps two activations for the backward pass instead of three.
    KernelSpec("swiglu", "npu", "llava_npu.fused_ops:swiglu", 10, on_device(fused_limits), requires="torch_npu"),
    # Without all logits at once, in plain torch, on every chip.
    KernelSpec("linear_cross_entropy", "chunked", "llava_core.backend.chunked_loss:linear_cross_entropy", 10, always),
    # Fewer launches for the price of all labels' logits (0.8 GiB in fp32 for 6k labels of 32k words): there to be
    # pinned where memory is no concern.
    KernelSpec(
        "linear_cross_entropy",
        "npu",
        "llava_npu.fused_ops:linear_cross_entropy",
        5,
        on_device(fused_limits),
        requires="torch_npu",
    ),
)
