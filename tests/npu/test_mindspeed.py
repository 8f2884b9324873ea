"""The patches of MindSpeed's attention, on the real MindSpeed and megatron-core; docs/backends.md says how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_core.backend import Yes
from llava_core.backend.kernels import is_installed
from llava_core.testing.conformance import Status, Subject, all_checks
from llava_core.testing.conformance.check import run_check
from llava_cpu.backend import CpuBackend
from llava_npu.backend import NpuBackend
from llava_npu.mindspeed import PATCHES

HERE = Path(__file__).parent
WITHOUT_GRAPH_MODE = str(HERE / "without_graph_mode")
"""Comes last on the path: the simulator's own sitecustomize runs that of this folder."""
SIMULATED = "ASCEND_SIMULATOR" in os.environ

PROGRAM = f"""
import runpy
from llava_npu import mindspeed
mindspeed.load()
runpy.run_path({str(HERE / "mindspeed_program.py")!r}, run_name="__main__")
"""

MISSING = [module for module in ("mindspeed", "megatron.training", "einops") if not is_installed(module)]

pytestmark = [
    pytest.mark.npu,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; see docs/backends.md"),
]

FP16_ERROR = 0.005
"""Largest values are about 4, and fp16 rounds those by 0.002; measured: 0.0016."""


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """What mindspeed_program.py finds."""
    environment = dict(os.environ)
    if SIMULATED:
        environment["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], WITHOUT_GRAPH_MODE])
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_without_the_patch_no_mask_is_silently_full_attention(facts: dict[str, Any]) -> None:
    assert facts["full_attention_error"] < FP16_ERROR


def test_without_the_patch_a_sparse_mode_is_left_behind(facts: dict[str, Any]) -> None:
    assert facts["mode_left_behind"] == 2


@pytest.fixture(params=["local", "te"])
def attention(request: pytest.FixtureRequest, facts: dict[str, Any]) -> dict[str, Any]:
    """What was found of one of the two attentions."""
    return facts[request.param]


def test_without_the_patch_the_probe_fails(attention: dict[str, Any]) -> None:
    assert attention["unpatched"]


def test_the_patch_changes_its_target_and_is_undone(attention: dict[str, Any]) -> None:
    assert (attention["changed"], attention["undone"]) == (True, True)


def test_an_attention_that_someone_else_wrapped_is_refused_and_left_alone(attention: dict[str, Any]) -> None:
    refusal = attention["refusals"]
    assert "expected mindspeed." in refusal["another"]
    assert "found __main__:<lambda>" in refusal["another"]
    assert refusal["untouched"]


def test_the_patch_is_not_applied_twice(attention: dict[str, Any]) -> None:
    assert "found llava_npu.mindspeed.mask:guarded" in attention["refusals"]["twice"]


def test_a_kernel_that_ignores_masks_fails_the_probe_which_undoes_the_patch(attention: dict[str, Any]) -> None:
    assert "a mask of the caller's: differs from plain attention" in attention["failed_probe"]["said"]
    assert attention["failed_probe"]["untouched"]


def test_outputs_and_gradients_with_a_mask_are_those_of_plain_attention(attention: dict[str, Any]) -> None:
    assert max(attention["training"]["errors"]) < FP16_ERROR


def test_neither_a_call_nor_one_that_raises_changes_the_config(attention: dict[str, Any]) -> None:
    assert attention["training"]["raised"]
    assert attention["training"]["config_unchanged"]


def test_in_megatrons_block_one_packed_sample_is_a_causal_mask(attention: dict[str, Any]) -> None:
    found = attention["self_attention"]
    assert found["packed"] < 0.01 * found["scale"]
    assert found["full"] > 0.1 * found["scale"]  # so the comparison would see another mask


def test_in_megatrons_block_no_mask_is_refused(attention: dict[str, Any]) -> None:
    assert "None never means causal here" in attention["self_attention"]["nothing"]


@pytest.mark.parametrize("patch", PATCHES, ids=[patch.name for patch in PATCHES])
def test_the_ledger_recognises_the_installed_sources(patch: Any) -> None:
    assert patch.applies() == Yes()


@pytest.mark.parametrize("name", [patch.name for patch in PATCHES])
def test_the_patch_conforms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if SIMULATED:
        monkeypatch.setattr(sys, "path", [*sys.path, WITHOUT_GRAPH_MODE])
    checks = all_checks(Subject(NpuBackend(), CpuBackend()))
    (chosen,) = [check for check in checks if check.id == f"patches.apply_and_undo[{name}]"]
    result = run_check(chosen)
    assert result.status is Status.PASSED, result.message
