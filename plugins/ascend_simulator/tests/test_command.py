"""`ascend-sim`: exit statuses, options, and what the program it runs finds."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ascend_simulator.build import BuildError, build
from ascend_simulator.cli import main
from ascend_simulator.environment import Machine, is_simulated

needs_torch_npu = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None, reason="needs torch_npu: see plugins/ascend_simulator/README.md"
)


def ascend_sim(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ascend_simulator.cli", *arguments]
    # These tests themselves may run under the simulator, and what they start must not inherit from it.
    own = {name: value for name, value in os.environ.items() if not name.startswith("ASCEND_SIMULATOR")}
    own |= {"OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": "", "PYTHONPATH": ""} | (environment or {})
    return subprocess.run(command, capture_output=True, text=True, env=own, check=False, timeout=120)


def run_python(code: str, *options: str, **arguments: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return ascend_sim("run", *options, "--", sys.executable, "-c", code, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--soc", "910X", "--", "true"], "invalid choice: '910X'"),
        (["run", "--devices", "0", "--", "true"], "0 devices; from 1 to 16"),
        (["run", "--devices", "17", "--", "true"], "17 devices; from 1 to 16"),
        (["run", "--devices", "two", "--", "true"], "invalid int value: 'two'"),
        (["run", "--memory-gb", "0", "--", "true"], "0 bytes of memory"),
        (["run", "--memory", "1", "--fast", "--", "true"], "--fast"),
        (["run"], "no program given"),
        (["run", "--"], "no program given"),
        ([], "required"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_machine_of_an_unknown_chip_is_refused() -> None:
    with pytest.raises(ValueError, match="known are 910A, 910B, 910C, 950"):
        Machine(soc="910X")


def test_the_libraries_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_SIMULATOR_CACHE", str(tmp_path))
    folder = build()
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {"libascendcl.so", "libhccl.so", "libatb.so", "libge_runner.so"} <= set(times)
    assert build() == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_the_sources_compile_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_SIMULATOR_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "cc -Werror")
    assert build().is_dir()


def test_a_compiler_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_SIMULATOR_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BuildError, match="false .* failed with status 1"):
        build()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_simulated_without_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    if "libascendcl" in Path("/proc/self/maps").read_text(encoding="utf-8"):
        pytest.skip("this process itself is simulated")
    monkeypatch.delenv("ASCEND_SIMULATOR", raising=False)
    assert not is_simulated()


@needs_torch_npu
@pytest.mark.parametrize("status", [0, 1, 7])
def test_the_programs_exit_status_is_passed_on(status: int) -> None:
    done = run_python(f"raise SystemExit({status})")
    assert done.returncode == status
    assert done.stdout == ""
    assert "SIMULATED, no NPU: 1 Ascend910B2 device, 64 GiB each" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@needs_torch_npu
def test_a_signal_that_ends_the_program_is_passed_on() -> None:
    assert run_python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == 128 + signal.SIGKILL


@needs_torch_npu
def test_a_termination_reaches_the_program(tmp_path: Path) -> None:
    code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'started')!r}).touch(); time.sleep(60)"
    command = [sys.executable, "-m", "ascend_simulator.cli", "run", "--", sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM


@needs_torch_npu
def test_nothing_is_left_in_shared_memory() -> None:
    done = run_python(
        "import os, pathlib; f = pathlib.Path(os.environ['ASCEND_SIMULATOR_SHARED']); (f / 'a').touch(); print(f)"
    )
    assert done.stdout.strip().rpartition("/")[2].startswith("ascend-simulator-")
    assert not Path(done.stdout.strip()).exists()


@needs_torch_npu
def test_a_program_that_is_not_there() -> None:
    done = ascend_sim("run", "--", "no-such-program")
    assert done.returncode == 127
    assert "no-such-program: no such program" in done.stderr


@needs_torch_npu
@pytest.mark.parametrize("first", ["torch", "torch_npu", "transformers"])
def test_whatever_is_imported_first_the_kernels_are_in_place(first: str) -> None:
    code = f"""
import importlib.util
importlib.util.find_spec("torch_npu")
import {first}
import torch, torch_npu
assert not torch.npu.is_initialized()
print(torch_npu.npu_swiglu(torch.ones(2, 4).npu()).shape)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 2])" in done.stdout


@needs_torch_npu
def test_kernels_are_in_place_where_torch_does_not_load_its_backends_itself() -> None:
    # ASCEND_HOME_PATH: what is left of a real CANN does not matter.
    code = (
        "import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\n"
        "import torch; assert not hasattr(torch, 'npu')\nimport torch_npu; print((torch.ones(2).npu() * 2).sum())"
    )
    done = run_python(code, environment={"ASCEND_HOME_PATH": "/nowhere"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tensor(4., device='npu:0')\n"


@needs_torch_npu
def test_the_environments_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; print(os.environ.get('ASCEND_SIMULATOR'))", encoding="utf-8")
    # Once for ascend-sim itself, once for the program.
    assert run_python("pass", environment={"PYTHONPATH": str(tmp_path)}).stdout == "None\n0.1.0\n"


DESCRIBE = """
import torch, torch_npu
npu = torch.npu
print(npu.device_count(), npu.get_device_name(0), npu.mem_get_info()[1], npu.is_bf16_supported())
x = torch.ones(2, 2).npu()
print((x @ x).sum().item(), torch_npu.npu_rms_norm(x, x[0])[0].shape)
"""


@needs_torch_npu
@pytest.mark.parametrize("soc", ["910A", "910B", "950"])
def test_softmax_passes_the_dispatcher_on_every_chip(soc: str) -> None:
    """On Ascend 950 torch_npu's own composition of it takes aclnn or nothing."""
    code = (
        "x = torch.randn(3, 5, device='npu', requires_grad=True)\n"
        "y = x.softmax(-1)\n"
        "y[:, 0].sum().backward()\n"
        "p = y.detach().cpu()\n"
        "expected = p[:, :1] * (torch.eye(5)[:1] - p)\n"
        "assert torch.allclose(x.grad.cpu(), expected, atol=1e-6)\n"
        "assert x.half().softmax(-1, dtype=torch.float32).dtype == torch.float32\n"
        "print('done')"
    )
    done = run_python("import torch\n" + code, "--soc", soc)
    assert done.stdout.split() == ["done"], done.stderr


@needs_torch_npu
@pytest.mark.parametrize(
    ("soc", "name", "has_bf16"),
    [("910A", "Ascend910A", False), ("910C", "Ascend910_9392", True), ("950", "Ascend950PR_9579", True)],
)
def test_chips(soc: str, name: str, has_bf16: bool) -> None:
    done = run_python(DESCRIBE, "--soc", soc, "--devices", "3", "--memory-gb", "0.5")
    assert done.returncode == 0, done.stderr
    assert f"3 {name} {1 << 29} {has_bf16}\n8.0 torch.Size([2, 2])" in done.stdout


@needs_torch_npu
def test_910a_does_not_compute_in_bf16() -> None:
    code = "import torch; x = torch.ones(2, 2).npu(); (x @ x).cpu(); x.bfloat16() @ x.bfloat16()"
    done = run_python(code, "--soc", "910A")
    assert done.returncode != 0
    assert "Ascend910A has no bfloat16" in done.stderr


@needs_torch_npu
@pytest.mark.parametrize("allocator", ["", "expandable_segments:True"])
def test_the_memory_limit_holds_for_what_is_reserved(allocator: str) -> None:
    code = """
import torch
held = [torch.empty(20 << 20, dtype=torch.uint8, device="npu") for _ in range(4)]
held[0][:100].fill_(7)
try:
    torch.empty(30 << 20, dtype=torch.uint8, device="npu")
except torch.OutOfMemoryError as error:
    print("refused", held[0][:100].sum().item())
del held
torch.empty(90 << 20, dtype=torch.uint8, device="npu")[-1].fill_(1)
"""
    environment = {"PYTORCH_NPU_ALLOC_CONF": allocator} if allocator else {}
    done = run_python(code, "--memory-gb", "0.1", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "refused 700" in done.stdout


@needs_torch_npu
def test_devices_have_memory_of_their_own() -> None:
    code = """
import torch
a, b = (torch.empty(30 << 20, dtype=torch.uint8, device=f"npu:{i}") for i in range(2))
print(torch.npu.memory_allocated(0) == torch.npu.memory_allocated(1) > 0)
print((torch.ones(2, device="npu:0").to("npu:1") * 3).device)
"""
    done = run_python(code, "--devices", "2", "--memory-gb", "0.05")
    assert done.returncode == 0, done.stderr
    assert "True\nnpu:1" in done.stdout
