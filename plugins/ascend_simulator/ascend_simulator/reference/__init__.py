"""Strict references of torch_npu's fused ops: what the documentation promises, and an error on everything else.

Sources: torch_npu 2.13.0, `torch_npu/_op_plugin_docs.py` for the contracts, `torch_npu/op_plugin/meta` for shapes and
dtypes of results. Sums are kept in fp32; results are rounded to the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ascend_simulator.reference.attention import fusion_attention, fusion_attention_grad
from ascend_simulator.reference.formats import format_cast
from ascend_simulator.reference.loss import cross_entropy_loss, cross_entropy_loss_backward
from ascend_simulator.reference.norm import add_rms_norm, rms_norm, rms_norm_backward
from ascend_simulator.reference.optimizer import apply_adam_w
from ascend_simulator.reference.rotary import rotary_mul, rotary_mul_backward
from ascend_simulator.reference.swiglu import swiglu, swiglu_backward

# The name of each op in torch's namespace `npu`, and what stands for its kernel.
REFERENCES: Mapping[str, Callable[..., Any]] = {
    "npu_add_rms_norm": add_rms_norm,
    "npu_apply_adam_w.out": apply_adam_w,
    "npu_cross_entropy_loss": cross_entropy_loss,
    "npu_cross_entropy_loss_backward": cross_entropy_loss_backward,
    "npu_format_cast": format_cast,
    "npu_format_cast.Tensor": format_cast,
    "npu_fusion_attention": fusion_attention,
    "npu_fusion_attention_grad": fusion_attention_grad,
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_rotary_mul_backward": rotary_mul_backward,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
}
