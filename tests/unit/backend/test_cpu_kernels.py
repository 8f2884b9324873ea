"""Every CPU kernel on every case of the catalogue, against a float64 reference."""

from __future__ import annotations

import pytest
import torch

from llava_core.backend import CATALOGUE, No, OpRequest
from llava_core.testing.kernels import max_errors
from llava_cpu.backend import CpuBackend

KERNELS = list(CpuBackend().kernels())
CASES = [
    pytest.param(kernel, case, dtype, id=f"{kernel.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for kernel in KERNELS
    for case in CATALOGUE[kernel.op].cases
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("kernel", "case", "dtype"), CASES)
def test_error_stays_within_the_references_own(kernel, case, dtype):
    request = OpRequest(kernel.op, "test", dtype, True, True, **case.describe)
    if isinstance(kernel.verdict(request), No):
        pytest.skip("the kernel refuses this request")
    op = CATALOGUE[kernel.op]
    for part in max_errors(kernel, case, dtype, torch.device("cpu")):
        assert part.kernel_error <= op.error_multiple * part.reference_error + part.floor, part
