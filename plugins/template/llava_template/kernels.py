"""The kernels that this hardware offers, and which requests each of them serves.

A kernel is a `KernelSpec`: the op, a name to pin it by, its address (imported only if it is chosen), a priority (the
highest that serves a request is taken; the references have 0), and `supports`. `supports` is asked once, when the model
is built, and believed: what it accepts must come out right, and `No` costs nothing but speed.
"""

from __future__ import annotations

import torch

from llava_core.backend import KernelSpec, No, OpRequest, Yes
from llava_core.backend.kernels import Verdict, always

COMPUTED = (torch.float32, torch.bfloat16)  # VENDOR: what your kernels compute in
MAX_HEAD_DIM = 256  # VENDOR: your attention's limit


def attention_limits(request: OpRequest) -> Verdict:
    """What `attention.py` serves. `masks` are all kinds that the place in the model will pass; each must be served."""
    # VENDOR: your library's limits, one reason each.
    if request.dtype not in COMPUTED:
        return No(f"computes in fp32 and bf16, not in {request.dtype}")
    if request.head_dim is None or request.head_dim > MAX_HEAD_DIM:
        return No(f"needs a head dim up to {MAX_HEAD_DIM}, not {request.head_dim}")
    if any(mask.key_padding for mask in request.masks):
        return No("takes no padded keys: what a query that sees nothing yields is not documented")
    return Yes()


def computed(request: OpRequest) -> Verdict:
    """Kernels that are limited by dtype alone."""
    return Yes() if request.dtype in COMPUTED else No(f"computes in fp32 and bf16, not in {request.dtype}")


KERNELS = (
    # VENDOR: `requires` names the module that must be installed; leave it out where nothing must be.
    # VENDOR: `deterministic=False` for a kernel whose bits differ between runs.
    KernelSpec("attention", "fused", "llava_template.attention:attention", 20, attention_limits, requires="torch"),
    # What the fused one refuses. PyTorch's own, for every device that has scaled_dot_product_attention.
    KernelSpec("attention", "sdpa", "llava_core.backend.sdpa:attention", 10, always),
    KernelSpec("rms_norm", "fused", "llava_template.norm:rms_norm", 10, computed),
    KernelSpec("swiglu", "fused", "llava_template.activation:swiglu", 10, computed),
    # VENDOR: an op without a kernel of yours runs the reference. This one saves memory on every device.
    KernelSpec("linear_cross_entropy", "chunked", "llava_core.backend.chunked_loss:linear_cross_entropy", 10, always),
)
