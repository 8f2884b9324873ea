"""What the references are written against: a torch_npu that changes a schema, a default or an autograd kernel fails."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch_npu
from ascend_simulator.build import build
from ascend_simulator.contract import ContractError
from ascend_simulator.reference import REFERENCES
from torch._subclasses.fake_tensor import FakeTensorMode

# torch_npu 2.13.0. Each op's arguments and results, and whether torch_npu gives it a backward of its own.
CONTRACTS = {
    "npu_fusion_attention": (
        "Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
        "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
        "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
        "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
        'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, '
        "int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int",
        True,
    ),
    "npu_fusion_attention_grad": (
        "Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, str input_layout, *, Tensor? pse=None, "
        "Tensor? padding_mask=None, Tensor? atten_mask=None, Tensor? softmax_max=None, Tensor? softmax_sum=None, "
        "Tensor? softmax_in=None, Tensor? attention_in=None, float scale_value=1., float keep_prob=1., "
        "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int seed=0, int offset=0, "
        "int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, "
        'int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, str softmax_layout="", Tensor? sink=None) '
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor",
        False,
    ),
    "npu_format_cast": (
        "Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor",
        False,
    ),
    "npu_format_cast.Tensor": (
        "Tensor input, Tensor dst, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor",
        False,
    ),
    "npu_rms_norm": ("Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor", True),
    "npu_rms_norm_backward": ("Tensor dy, Tensor input, Tensor gamma, Tensor rstd) -> (Tensor, Tensor", False),
    # Has an autograd kernel, which raises in backward: test_norm_rotary_swiglu.py.
    "npu_add_rms_norm": (
        "Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor",
        True,
    ),
    "npu_rotary_mul": (
        'Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor',
        True,
    ),
    "npu_rotary_mul_backward": (
        'Tensor grad, Tensor input, Tensor r1, Tensor r2, str rotary_mode="half") -> (Tensor, Tensor, Tensor',
        False,
    ),
    "npu_swiglu": ("Tensor input, int dim=-1) -> Tensor", True),
    "npu_swiglu_backward": ("Tensor grad_output, Tensor input, int dim=-1) -> Tensor", False),
    "npu_cross_entropy_loss": (
        'Tensor input, Tensor target, Tensor? weight=None, str reduction="mean", int ignore_index=-100, '
        "float label_smoothing=0., float lse_square_scale_for_zloss=0., bool return_zloss=False) "
        "-> (Tensor, Tensor, Tensor, Tensor",
        True,
    ),
    "npu_cross_entropy_loss_backward": (
        "Tensor grad_loss, Tensor log_prob, Tensor target, Tensor? weight=None, Tensor? grad_zloss=None, "
        'Tensor? lse_for_zloss=None, str reduction="mean", int ignore_index=-100, float label_smoothing=0., '
        "float lse_square_scale_for_zloss=0.) -> Tensor",
        False,
    ),
    "npu_apply_adam_w.out": (
        "Scalar beta1_power, Scalar beta2_power, Scalar lr, Scalar weight_decay, Scalar beta1, Scalar beta2, "
        "Scalar epsilon, Tensor grad, Tensor? max_grad_norm, bool? amsgrad, bool? maximize, *, Tensor[] out) "
        "-> (Tensor, Tensor, Tensor",
        False,
    ),
}


def overload(name: str) -> torch._ops.OpOverload:
    base, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.npu, base), variant or "default")


def test_every_reference_has_a_contract() -> None:
    assert sorted(REFERENCES) == sorted(CONTRACTS)


@pytest.mark.parametrize("name", list(CONTRACTS))
def test_schema(name: str) -> None:
    found = str(overload(name)._schema).replace("9.9999999999999995e-07", "1e-06")
    found = found.removeprefix(f"npu::{name}(").removesuffix(")")
    assert found == CONTRACTS[name][0].removesuffix(")")


@pytest.mark.parametrize("name", list(CONTRACTS))
def test_autograd(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "AutogradPrivateUse1") is CONTRACTS[name][1]


def test_fused_adamw_has_a_kernel_that_takes_a_number_for_the_rate() -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("aten::_fused_adamw_", "PrivateUse1")
    assert not has_kernel("aten::_fused_adamw_.tensor_lr", "PrivateUse1")


CALLS = {
    "npu_fusion_attention": lambda x: torch_npu.npu_fusion_attention(x, x, x, 2, "BSND")[:3],
    "npu_fusion_attention, packed": lambda x: torch_npu.npu_fusion_attention(
        x[0], x[0], x[0], 2, "TND", actual_seq_qlen=[2, 6], actual_seq_kvlen=[2, 6]
    )[:3],
    "npu_rms_norm": lambda x: torch_npu.npu_rms_norm(x, x[0, 0, 0]),
    "npu_add_rms_norm": lambda x: torch_npu.npu_add_rms_norm(x, x, x[0, 0, 0]),
    "npu_rotary_mul": lambda x: torch_npu.npu_rotary_mul(x, x.clamp(-1, 1), x.clamp(-1, 1)),
    "npu_swiglu": torch_npu.npu_swiglu,
    "npu_cross_entropy_loss": lambda x: torch_npu.npu_cross_entropy_loss(
        x.flatten(0, 2), x.new_zeros(x.shape[:3].numel(), dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_have_the_shapes_and_dtypes_of_torch_npus_own_shape_functions(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(1, 6, 2, 8, dtype=dtype).npu()
    found = CALLS[name](x)
    with FakeTensorMode() as mode:
        expected = CALLS[name](mode.from_tensor(x))
    found, expected = (r if isinstance(r, tuple | list) else (r,) for r in (found, expected))
    assert [(r.shape, r.dtype) for r in found] == [(r.shape, r.dtype) for r in expected]


def undefined_symbols(library: Path) -> set[str]:
    return {line.split()[-1] for line in symbols(library, "--undefined-only")}


def defined_symbols(library: Path) -> set[str]:
    return {line.split()[-1].partition("@")[0] for line in symbols(library, "--defined-only")}


def symbols(library: Path, which: str) -> list[str]:
    command = ["nm", "-D", which, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_stand_ins_define_every_symbol_of_cann_that_torch_npu_links() -> None:
    # Graph mode (torchair) is loaded on demand, and out of scope.
    libraries = [path for path in Path(torch_npu.__file__).parent.rglob("*.so") if path.name != "_torchair.so"]
    own = set().union(*(defined_symbols(path) for path in libraries))
    wanted = set().union(*(undefined_symbols(path) for path in libraries)) - own
    from_cann = {name for name in wanted if re.match(r"acl|rt[A-Z]|Hccl|Msprof|_ZN3atb", name)}
    defined = set().union(*(defined_symbols(build() / f"lib{name}.so") for name in ("ascendcl", "hccl", "atb")))
    assert len(from_cann) > 90
    assert from_cann - defined == set()


def test_chips_of_the_first_generation_lack_the_fused_ops() -> None:
    from ascend_simulator.contract import check_chip

    check_chip("npu_swiglu", "Ascend910B2")
    check_chip("npu_rms_norm", "Ascend910A")
    with pytest.raises(ContractError, match="910B"):
        check_chip("npu_fusion_attention_grad", "Ascend910A")
