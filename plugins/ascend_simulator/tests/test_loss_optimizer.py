"""Cross entropy and AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from ascend_simulator.contract import ContractError
from compare import BF16_TOLERANCE, FP32_TOLERANCE, check_against_float64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

K, V = 7, 11
TARGETS = torch.arange(K) % V


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32_TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)])
def test_cross_entropy(reduction: str, dtype: torch.dtype, tolerance: float) -> None:
    def formula(logits: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, TARGETS, reduction=reduction)
        return loss if reduction == "none" else loss.view(1)

    check_against_float64(
        lambda logits: torch_npu.npu_cross_entropy_loss(logits, TARGETS.npu(), reduction=reduction)[0],
        formula,
        [torch.randn(K, V).to(dtype)],
        tolerance,
    )


def test_cross_entropy_ignores_a_class_that_is_not_negative() -> None:
    check_against_float64(
        lambda x: torch_npu.npu_cross_entropy_loss(x, TARGETS.npu(), reduction="sum", ignore_index=3)[0],
        lambda x: F.cross_entropy(x, TARGETS, reduction="sum", ignore_index=3).view(1),
        [torch.randn(K, V)],
        FP32_TOLERANCE,
    )


@pytest.mark.parametrize(
    ("targets", "arguments", "rule"),
    [
        (torch.where(TARGETS == 2, -100, TARGETS), {}, "negative ignore_index ignores nothing"),
        (TARGETS + V, {}, "targets lie in"),
        (TARGETS.int(), {}, "target is int64"),
        (TARGETS[:-1], {}, "target is \\[7\\]"),
        (TARGETS, {"ignore_index": V}, "ignore_index is below"),
        (TARGETS, {"reduction": "max"}, "reduction is"),
        (TARGETS, {"label_smoothing": 0.1}, "label smoothing"),
        (TARGETS, {"return_zloss": True}, "z-loss"),
    ],
)
def test_cross_entropy_refuses(targets: Tensor, arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ContractError, match=rule):
        torch_npu.npu_cross_entropy_loss(torch.randn(K, V).npu(), targets.npu(), **arguments)


def test_cross_entropy_with_a_gradient_allows_no_ignored_class_in_a_mean() -> None:
    logits = torch.randn(K, V).npu().requires_grad_()
    loss = torch_npu.npu_cross_entropy_loss(logits, TARGETS.npu(), ignore_index=3)[0]
    with pytest.raises(ContractError, match="reduction 'mean' allows only the defaults"):
        loss.backward()


def trained(device: str, build: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).to(device)
    optimizer = build(model.parameters())
    for step in range(4):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(device)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [x.detach().cpu() for x in model.parameters()]


@pytest.mark.parametrize("arguments", [{"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}])
def test_adamw_equals_the_hosts(arguments: dict[str, bool]) -> None:
    on_host = trained("cpu", lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1))
    on_device = trained("npu", lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, **arguments))
    torch.testing.assert_close(on_device, on_host, atol=1e-7, rtol=1e-6)


def test_torch_npus_own_adamw_equals_the_hosts() -> None:
    on_host = trained("cpu", lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1))
    on_device = trained("npu", lambda p: torch_npu.optim.NpuFusedAdamW(p, 1e-2, weight_decay=0.1))
    torch.testing.assert_close(on_device, on_host, atol=1e-7, rtol=1e-6)


class SeenOps(TorchDispatchMode):
    """Notes the name of each op."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op._schema.name)
        return op(*args, **(kwargs or {}))


def test_fused_adamw_is_one_op_for_all_parameters() -> None:
    parameters = [nn.Parameter(torch.ones(3, device="npu")) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones(3, device="npu")
    optimizer = torch.optim.AdamW(parameters, fused=True)
    with SeenOps() as seen:
        optimizer.step()
    assert seen.names.count("aten::_fused_adamw_") == 1


def test_adamw_refuses_float64() -> None:
    parameter = nn.Parameter(torch.ones(3).double().npu())
    parameter.grad = torch.ones(3).double().npu()
    with pytest.raises(ContractError, match="float64"):
        torch.optim.AdamW([parameter], fused=True).step()
