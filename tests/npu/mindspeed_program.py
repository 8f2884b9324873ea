"""What test_mindspeed.py asks of the real MindSpeed, in a process of its own. Prints one line of JSON.

MindSpeed was loaded before, so that all of megatron is imported as it is then. It replaces functions of torch and
megatron for good, so nothing else may run beside it.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch_npu
from megatron.core import parallel_state, tensor_parallel
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from llava_core.errors import PatchRefused
from llava_npu import mindspeed
from llava_npu.mindspeed.probe import B, H, N, S, attend, build_local, check_behaviour

CLASSES = {"local": DotProductAttention, "te": TEDotProductAttention}
ATTENTIONS = {"local": mindspeed.LOCAL, "te": mindspeed.TE}
NPU = torch.device("npu")


def error_of(call: Callable[[], object], kind: type[Exception] = PatchRefused) -> str:
    """What it says when it refuses; empty if it does not."""
    try:
        call()
    except kind as reason:
        return f"{type(reason).__name__}: {reason}"
    return ""


@contextmanager
def patched(name: str) -> Iterator[None]:
    undo = mindspeed.apply(ATTENTIONS[name])
    try:
        yield
    finally:
        undo()


def tensors() -> list[Tensor]:
    """Query, key and value [S, B, N, H] in fp16, on the host."""
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(3, S, B, N, H, generator=generator).half())


def silent_full_attention() -> float:
    """How far MindSpeed's answer to no mask, with `is_llava`, is from attention that sees everything."""
    layer = build_local(DotProductAttention, AttnMaskType)("causal")
    found = layer(*(x.to(NPU) for x in tensors()), None, AttnMaskType.causal)
    return (found.float().cpu() - attend(*tensors(), torch.zeros(S, S).bool())).abs().max().item()


def mode_left_behind() -> int:
    """The sparse mode in the config after a call without a mask."""
    layer = build_local(DotProductAttention, AttnMaskType)("causal")
    layer.config.is_llava, layer.config.use_flash_attn = False, True
    layer(*(x.to(NPU) for x in tensors()), None, AttnMaskType.causal)
    return layer.config.sparse_mode


def refusals(name: str) -> dict[str, Any]:
    """What applying the patch says to an attention that is not the one expected, and whether that stays as it is."""
    owner = CLASSES[name]
    original = owner.forward
    foreign = functools.wraps(original)(lambda *arguments, **named: original(*arguments, **named))
    owner.forward = foreign
    another = error_of(lambda: mindspeed.apply(ATTENTIONS[name]))
    untouched = owner.forward is foreign
    owner.forward = original
    with patched(name):
        twice = error_of(lambda: mindspeed.apply(ATTENTIONS[name]))
    return {"another": another, "untouched": untouched, "twice": twice}


def failed_probe(name: str) -> dict[str, Any]:
    """What applying says where the kernel does something else, and whether the class is then as it was."""
    before, kernel = vars(CLASSES[name])["forward"], torch_npu.npu_fusion_attention
    torch_npu.npu_fusion_attention = lambda *arguments, scale, **others: kernel(*arguments, scale=scale)  # sees all
    said = error_of(lambda: mindspeed.apply(ATTENTIONS[name]))
    torch_npu.npu_fusion_attention = kernel
    return {"said": said, "untouched": vars(CLASSES[name])["forward"] is before}


def training(name: str, config: TransformerConfig) -> dict[str, Any]:
    """A layer from megatron's own constructor with a mask: its errors, output and gradients, and what it leaves behind,
    a call that raises among it."""
    layer = CLASSES[name](config, 1, AttnMaskType.causal, "self").to(NPU)
    masked = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(2)) < 0.5
    masked.diagonal(dim1=-2, dim2=-1).fill_(False)
    before = dict(vars(config))
    on_device = [x.to(NPU).requires_grad_() for x in tensors()]
    on_host = [x.float().requires_grad_() for x in tensors()]
    out, exact = layer(*on_device, masked.to(NPU), AttnMaskType.causal), attend(*on_host, masked)
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3))
    out.backward(upstream.half().to(NPU))
    exact.backward(upstream)
    pairs = [(out, exact), *((a.grad, b.grad) for a, b in zip(on_device, on_host, strict=True))]
    errors = [(a.detach().float().cpu() - b.detach()).abs().max().item() for a, b in pairs]
    mixed = [on_device[0], *(x.float() for x in on_device[1:])]
    raised = error_of(lambda: layer(*mixed, masked.to(NPU), AttnMaskType.causal), Exception)
    return {"errors": errors, "raised": raised, "config_unchanged": vars(config) == before}


def self_attention(name: str, config: TransformerConfig) -> dict[str, Any]:
    """megatron's whole attention block: a causal mask, one packed sample, which is the same, another mask, and none."""
    parts = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=CLASSES[name], linear_proj=RowParallelLinear
    )
    block = SelfAttention(config, parts, layer_number=1, attn_mask_type=AttnMaskType.causal).to(NPU)
    hidden = torch.randn(S, 1, N * H, generator=torch.Generator().manual_seed(4)).half().to(NPU)
    bounds = torch.tensor([0, S], dtype=torch.int32, device=NPU)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    causal = torch.ones(1, 1, S, S).triu(1).bool().to(NPU)
    own = block(hidden, causal)[0]
    same = block(hidden, None, packed_seq_params=packed)[0]
    other = block(hidden, torch.zeros_like(causal))[0]
    return {
        "packed": (own - same).abs().max().item(),
        "full": (own - other).abs().max().item(),
        "scale": own.abs().max().item(),
        "nothing": error_of(lambda: block(hidden, None), ValueError),
    }


def facts(name: str, config: TransformerConfig) -> dict[str, Any]:
    owner = CLASSES[name]
    before, build = vars(owner)["forward"], ATTENTIONS[name].build(owner, AttnMaskType)
    found = {
        "unpatched": error_of(lambda: check_behaviour(build, AttnMaskType, PackedSeqParams, NPU), Exception),
        "refusals": refusals(name),
        "failed_probe": failed_probe(name),
    }
    with patched(name):
        found["changed"] = vars(owner)["forward"] is not before
        found["training"] = training(name, config)
        found["self_attention"] = self_attention(name, config)
    return found | {"undone": vars(owner)["forward"] is before}


def main() -> dict[str, Any]:
    torch.npu.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(str(Path(folder) / "store"), 1)
        torch.distributed.init_process_group("hccl", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=N * H,
            num_attention_heads=N,
            params_dtype=torch.float16,
            fp16=True,
            attention_dropout=0.0,
            add_bias_linear=False,
        )
        found: dict[str, Any] = {name: facts(name, config) for name in CLASSES}
        found |= {"full_attention_error": silent_full_attention(), "mode_left_behind": mode_left_behind()}
        torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    print("\n" + json.dumps(main()))
