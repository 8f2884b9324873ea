"""What a simulated device is, said to child processes through the environment."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Set to this simulator's version in every process that `ascend-sim run` starts.
MARKER = "ASCEND_SIMULATOR"
# Read by the C side.
DEVICES = "ASCEND_SIMULATOR_DEVICES"
SOC_NAME = "ASCEND_SIMULATOR_SOC_NAME"
MEMORY_BYTES = "ASCEND_SIMULATOR_MEMORY_BYTES"
SHARED_FOLDER = "ASCEND_SIMULATOR_SHARED"

# The chip that stands for each generation; the names are those that torch_npu knows.
SOCS: Mapping[str, str] = {
    "910A": "Ascend910A",
    "910B": "Ascend910B2",
    "910C": "Ascend910_9392",
    "950": "Ascend950PR_9579",
}
MAX_DEVICES = 16
# They say where a real CANN is, which torch_npu would then look into.
REAL_CANN = ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_AICPU_PATH")
GIB = 1 << 30

HOOK_FOLDER = Path(__file__).parent / "hook"


@dataclass(frozen=True)
class Machine:
    """What to simulate.

    Attributes:
        soc: a key of `SOCS`.
        memory_bytes: each device's memory, counted for each process by itself.
    """

    devices: int = 1
    soc: str = "910B"
    memory_bytes: int = 64 * GIB

    def __post_init__(self) -> None:
        if self.soc not in SOCS:
            raise ValueError(f"soc {self.soc!r} is unknown; known are {', '.join(SOCS)}")
        if not 1 <= self.devices <= MAX_DEVICES:
            raise ValueError(f"{self.devices} devices; from 1 to {MAX_DEVICES} can be simulated")
        if self.memory_bytes <= 0:
            raise ValueError(f"a device with {self.memory_bytes} bytes of memory; give it more than 0")

    def describe(self) -> str:
        """One line for people."""
        noun = "device" if self.devices == 1 else "devices"
        return f"{self.devices} {SOCS[self.soc]} {noun}, {self.memory_bytes / GIB:g} GiB each, in host memory"


def child_environment(
    machine: Machine, libraries: Path, shared: Path, version: str, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The environment in which a program finds the simulator in the place of CANN.

    Args:
        libraries: the folder of the built stand-ins.
        shared: where simulated HCCL leaves its messages.
    """
    own = {
        MARKER: version,
        DEVICES: str(machine.devices),
        SOC_NAME: SOCS[machine.soc],
        MEMORY_BYTES: str(machine.memory_bytes),
        SHARED_FOLDER: str(shared),
        # Programs find `torch.npu` as they would on a machine with an NPU: `import torch` loads torch_npu.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        # An operator that torch_npu lacks on the device must be noticed, not computed on the host.
        "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",
        "LD_LIBRARY_PATH": _prepend(str(libraries), inherited.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _prepend(str(HOOK_FOLDER), inherited.get("PYTHONPATH")),
        # `python` and `torchrun` are those of the environment that has torch_npu, activated or not.
        "PATH": _prepend(str(Path(sys.executable).parent), inherited.get("PATH")),
    }
    return {name: value for name, value in inherited.items() if name not in REAL_CANN} | own


def _prepend(first: str, rest: str | None) -> str:
    return f"{first}{os.pathsep}{rest}" if rest else first


def is_simulated() -> bool:
    """Whether this process's NPUs are simulated: asks the loaded library, or the environment where none is loaded."""
    try:
        library = ctypes.CDLL("libascendcl.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return MARKER in os.environ
    return hasattr(library, "ascend_simulator_abi")
