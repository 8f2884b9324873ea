"""What can be said about CUDA on this machine without opening a device, and why it cannot be used."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from llava_core.backend import DeviceInfo, Diagnosis

DRIVER_FILE = Path("/proc/driver/nvidia/version")
SMI_TIMEOUT_SECONDS = 20

OPTIONAL_LIBRARIES = (
    # (distribution, module): a distribution may be installed whose module cannot be imported, and the reverse.
    ("flash-attn", "flash_attn"),
    ("transformer-engine", "transformer_engine"),
    ("apex", "apex"),
    ("liger-kernel", "liger_kernel"),
    ("triton", "triton"),
)


@dataclass(frozen=True)
class Facts:
    """What was found, without a device context.

    Attributes:
        torch_version: torch's own version string.
        built_for: the CUDA version that torch was built for; None for other builds.
        driver: NVIDIA's driver version; None where there is none.
        visible: the value of CUDA_VISIBLE_DEVICES; None where it is not set.
        num_listed: devices that the driver's management library lists, after CUDA_VISIBLE_DEVICES.
        usable: whether CUDA's runtime starts with them.
        complaint: what the runtime said.
    """

    torch_version: str
    built_for: str | None
    driver: str | None
    visible: str | None
    num_listed: int = 0
    usable: bool = False
    complaint: str = ""


def gather() -> Facts:
    """Looks at this machine. Initialises the driver's library at most; creates no context."""
    driver, visible = driver_version(), os.environ.get("CUDA_VISIBLE_DEVICES")
    built_for = None if torch.version.hip else torch.version.cuda
    if built_for is None:
        return Facts(torch.__version__, None, driver, visible)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable, num_listed = torch.cuda.is_available(), torch.cuda.device_count()
    complaint = " ".join(str(w.message).splitlines()[0] for w in caught)
    return Facts(torch.__version__, built_for, driver, visible, num_listed, usable, complaint)


def reason_unavailable(facts: Facts) -> str | None:
    """Why CUDA cannot be used, with the remedy; None where it can."""
    if facts.built_for is None:
        return f"torch {facts.torch_version} is built without CUDA: install a CUDA build of torch"
    if facts.usable and facts.num_listed:
        return None
    said = f" ({facts.complaint})" if facts.complaint else ""
    if facts.driver is None and not facts.num_listed:
        return f"no NVIDIA driver is loaded: install one, or run where a GPU is{said}"
    if "too old" in facts.complaint or facts.num_listed:
        return (
            f"driver {facts.driver} lists {facts.num_listed} device(s), but CUDA {facts.built_for}, for which torch "
            f"{facts.torch_version} is built, cannot start on it: update the driver, or install a torch built for an "
            f"older CUDA{said}"
        )
    if facts.visible is not None:
        return f"CUDA_VISIBLE_DEVICES={facts.visible!r} leaves no device to use: unset it, or name one that exists"
    return f"driver {facts.driver} is loaded but lists no device: run `nvidia-smi` to see why{said}"


def describe_devices(count: int) -> tuple[DeviceInfo, ...]:
    """The visible devices; named only where nvidia-smi leaves no doubt which is which."""
    name, memory_bytes = parse_smi(_query_smi()) or ("NVIDIA GPU (name unknown until opened)", None)
    return tuple(DeviceInfo(index, name, memory_bytes) for index in range(count))


def parse_smi(text: str) -> tuple[str, int | None] | None:
    """Name and memory in bytes, from lines of `name, memory in MiB, MIG mode`.

    None unless all devices are of one kind: CUDA and nvidia-smi may number a mixed machine differently. None, too,
    where a device is cut into MIG slices, whose memory is not the device's.
    """
    rows = {tuple(cell.strip() for cell in row) for row in csv.reader(text.splitlines()) if row}
    if len(rows) != 1:
        return None
    (row,) = rows
    if len(row) != 3 or not row[0] or row[2] == "Enabled":
        return None
    return row[0], int(row[1]) * 2**20 if row[1].isdecimal() else None


def _query_smi() -> str:
    """nvidia-smi's answer; empty where there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=name,memory.total,mig.mode.current", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""  # the devices stay unnamed, which is what this function says
    return done.stdout if done.returncode == 0 else ""


def driver_version(path: Path = DRIVER_FILE) -> str | None:
    """The version of the loaded NVIDIA driver; None where none is loaded (or it is not Linux)."""
    try:
        first = path.read_text().partition("\n")[0]
    except OSError:
        return None
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", first)
    return match.group() if match else "of unknown version"


def library_state(distribution: str, module: str) -> str:
    """Whether an optional library is here, and its version. Imports nothing."""
    try:
        present = find_spec(module) is not None
    except (ImportError, ValueError):
        present = False
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "installed, version unknown" if present else "not installed (optional)"
    return f"installed {version}" if present else f"installed {version}, but its module {module} cannot be found"


def diagnose(facts: Facts) -> list[Diagnosis]:
    """The lines of `doctor` about torch, the driver and the optional libraries."""
    reason = reason_unavailable(facts)
    gpu_unused = facts.driver is not None and reason is not None
    build = f"built for CUDA {facts.built_for}" if facts.built_for else "built without CUDA"
    torch_line = Diagnosis(
        "cuda torch", facts.built_for is not None or facts.driver is None, f"{facts.torch_version}, {build}"
    )
    if not torch_line.ok:
        fix = "this machine has an NVIDIA driver: install a CUDA build of torch to use its GPU"
        torch_line = Diagnosis(torch_line.subject, False, torch_line.found, fix)
    driver = f"{facts.driver}, {facts.num_listed} device(s) visible" if facts.driver else "none"
    driver_fix = (reason or "") if gpu_unused and torch_line.ok else ""
    lines = [torch_line, Diagnosis("cuda driver", not driver_fix, driver, driver_fix)]
    for distribution, module in OPTIONAL_LIBRARIES:
        state = library_state(distribution, module)
        broken = "cannot be found" in state
        lines.append(
            Diagnosis(f"cuda {distribution}", not broken, state, f"reinstall {distribution}" if broken else "")
        )
    return lines
