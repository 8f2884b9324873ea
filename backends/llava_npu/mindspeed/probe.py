"""Whether a guarded attention does what it is asked: tiny inputs, compared with plain attention on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llava_core.errors import PatchRefused

S, B, N, H = 6, 2, 2, 16
BOUNDS = (0, 2, 6)

TOLERANCE = 0.02
"""In fp16, which every chip computes in: results of about 1 are rounded by 5e-4, a few times over; one wrong mask
moves one of them by more than 0.2."""


def check_behaviour(
    build: Callable[[str], nn.Module], mask_types: Any, packed_type: Callable[..., Any], device: torch.device
) -> None:
    """A mask of the caller, packed samples, another mask of the same shape, none, and no request, one after the other.

    Args:
        build: a layer of N heads of dim H, of the named mask type, on whose class the guard lies.
        mask_types, packed_type: megatron's `AttnMaskType` and `PackedSeqParams`.
        device: where the layer computes.

    Raises:
        PatchRefused: a result is not attention with the mask asked for, or something was left in the config.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, S, B, N, H, generator=generator).half()
    layer = build("causal")
    before = dict(vars(layer.config))

    def ask(
        layer: nn.Module, mask: Tensor | None, call_type: str, packed: Any = None, row: Any = slice(None)
    ) -> Tensor:
        inputs = (x[:, row].to(device) for x in (query, key, value))
        on_device = None if mask is None else mask.to(device)
        out: Tensor = layer(*inputs, on_device, mask_types[call_type], packed_seq_params=packed)
        return out.float().cpu()

    masks = [torch.rand(B, 1, S, S, generator=generator) < 0.5 for _ in range(2)]
    for mask in masks:
        mask.diagonal(dim1=-2, dim2=-1).fill_(False)  # each query sees some key
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    samples = packed_type(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    sample = torch.bucketize(torch.arange(S), bounds[1:], right=True)
    causal = (sample[:, None] != sample) | torch.ones(S, S, dtype=torch.bool).triu(1)
    with torch.no_grad():
        exact = [attend(query, key, value, mask) for mask in (masks[0], causal, masks[1], torch.zeros_like(masks[0]))]
        _compare("a mask of the caller's", ask(layer, masks[0], "causal"), exact[0])
        _compare("packed samples", ask(layer, None, "padding_causal", samples, 0), exact[1][:, 0])
        _compare("another mask of the same shape", ask(layer, masks[1], "causal"), exact[2])
        _compare("full attention", ask(build("no_mask"), None, "no_mask"), exact[3])
        _require_refusal(lambda: ask(layer, None, "causal"))
    if vars(layer.config) != before:
        raise PatchRefused(f"a call changed the config from {before} to {vars(layer.config)}")


def attend(query: Tensor, key: Tensor, value: Tensor, masked: Tensor) -> Tensor:
    """[S, B, N·H] fp32; `masked` is broadcast to [B, N, S, S]."""
    scores = torch.einsum("sbnh,tbnh->bnst", query.float(), key.float()) / math.sqrt(H)
    weights = scores.masked_fill(masked, -math.inf).softmax(-1)
    return torch.einsum("bnst,tbnh->sbnh", weights, value.float()).flatten(2)


def _compare(what: str, found: Tensor, exact: Tensor) -> None:
    error = (found.reshape(exact.shape) - exact).abs().max().item()
    if not error <= TOLERANCE:
        raise PatchRefused(f"{what}: differs from plain attention by {error:.3g}, where {TOLERANCE} is allowed")


def _require_refusal(call: Callable[[], object]) -> None:
    try:
        call()
    except ValueError:
        return
    raise PatchRefused("a call without a mask and without a request was served")


def build_local(owner: type[nn.Module], mask_types: Any) -> Callable[[str], nn.Module]:
    """Builds layers with what the recognised forward reads, for the constructor wants megatron's process groups."""

    def build(name: str) -> nn.Module:
        layer = owner.__new__(owner)
        nn.Module.__init__(layer)
        config = SimpleNamespace(sparse_mode=0, pre_tockens=65536, next_tockens=0, is_llava=True)
        read = {"attn_mask_type": mask_types[name], "attention_dropout": nn.Dropout(0.0), "config": config}
        for attribute, value in {**read, "softmax_scale": H**-0.5}.items():
            setattr(layer, attribute, value)
        return layer

    return build


def build_te(owner: type[nn.Module], mask_types: Any) -> Callable[[str], nn.Module]:
    """Builds layers through their constructor; N heads of each process, whether or not megatron's groups exist."""

    def build(name: str) -> nn.Module:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        size = 1 if group is None else group.size()
        config = SimpleNamespace(
            num_attention_heads=N * size,
            num_query_groups=N * size,
            kv_channels=H,
            tensor_model_parallel_size=size,
            context_parallel_size=1,
            multi_latent_attention=False,
            sequence_parallel=False,
            attention_dropout=0.0,
            attention_mask_type="causal",
            is_llava=True,
        )
        return owner(config, 1, mask_types[name], "self")

    return build
