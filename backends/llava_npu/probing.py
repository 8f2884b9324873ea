"""Whether this machine can use Ascend NPUs, and why not. Nothing here opens a device."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

import torch

from llava_core.backend import DeviceInfo, Diagnosis

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
CANN_HOME = "ASCEND_HOME_PATH"
SIMULATOR = "ASCEND_SIMULATOR"
"""Set in every process that the Ascend simulator runs: whatever is reported must say so."""

DRIVER_FILE = Path("/usr/local/Ascend/driver/version.info")
CANN_VERSION_FILES = ("version.cfg", "ascend_toolkit_install.info", "version.info")
VERSION = re.compile(r"^\s*(?:\w*version)\s*=\s*\[?([^\s\]]+)", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """What there is of Ascend's software and hardware.

    Attributes:
        torch_version: torch's own version.
        torch_npu_version: of the installed distribution; None where it is not installed.
        import_error: why torch_npu cannot be imported; None where it can, or is not tried.
        cann: version of the CANN that ASCEND_HOME_PATH names; None where it names none.
        driver: version of the device driver; None where none is installed.
        visible: the value of ASCEND_RT_VISIBLE_DEVICES; None where it is not set.
        num_devices: devices that the runtime lists.
        simulator: version of the simulator that stands in for NPUs; None on hardware.
    """

    torch_version: str
    torch_npu_version: str | None
    import_error: str | None = None
    cann: str | None = None
    driver: str | None = None
    visible: str | None = None
    num_devices: int = 0
    simulator: str | None = None


def gather() -> Facts:
    """Looks at this machine. torch_npu is imported if its version fits; no device is opened."""
    environment = os.environ
    torch_version, torch_npu_version = str(torch.__version__), installed_version("torch_npu")
    import_error, num_devices = None, 0
    if torch_npu_version is not None and versions_fit(torch_version, torch_npu_version):
        try:
            import_module("torch_npu")
            num_devices = torch.get_device_module("npu").device_count()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            import_error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return Facts(
        torch_version,
        torch_npu_version,
        import_error,
        cann_version(environment.get(CANN_HOME)),
        file_version(DRIVER_FILE),
        environment.get(VISIBLE),
        num_devices,
        environment.get(SIMULATOR),
    )


def versions_fit(torch_version: str, torch_npu_version: str) -> bool:
    """torch_npu X.Y.Z, and each of its post releases, is built for torch X.Y.Z and no other."""
    return release(torch_version) == release(torch_npu_version)


def release(version: str) -> str:
    """The digits of a version: `2.7.1` of `2.7.1.post2` and `2.7.1+cpu`."""
    match = re.match(r"\d+(\.\d+)*", version)
    return match.group() if match else version


def reason_unavailable(facts: Facts) -> str | None:
    """Why NPUs cannot be used, with the remedy; None where they can."""
    wanted = release(facts.torch_version)
    if facts.torch_npu_version is None:
        return f"torch_npu is not installed: pip install torch-npu=={wanted}, beside CANN and the device's driver"
    if not versions_fit(facts.torch_version, facts.torch_npu_version):
        return (
            f"torch_npu {facts.torch_npu_version} needs torch {release(facts.torch_npu_version)}, and torch "
            f"{facts.torch_version} is installed: install the torch_npu of torch's version, {wanted}.*"
        )
    if facts.import_error is not None:
        remedy = "source CANN's set_env.sh" if facts.cann is None else f"look at CANN {facts.cann}'s release notes"
        return f"torch_npu {facts.torch_npu_version} cannot be imported ({facts.import_error}): {remedy}"
    if facts.num_devices:
        return None
    if facts.visible is not None:
        return f"{VISIBLE}={facts.visible!r} leaves no device: {describe_visible(facts.visible)}"
    if facts.driver is None:
        return "the Ascend driver is not installed: install it, or run where an NPU is"
    return f"driver {facts.driver} is installed but lists no device: run `npu-smi info` to see why"


def describe_visible(visible: str) -> str:
    """What is wrong with a value of ASCEND_RT_VISIBLE_DEVICES under which the runtime lists nothing."""
    numbers = visible_devices(visible)
    if numbers is None:
        return "it must be device numbers with commas between them, or not be set"
    if list(numbers) != sorted(set(numbers)):
        return f"its numbers must ascend, as in {','.join(map(str, sorted(set(numbers))))}"
    return "name devices that exist (`npu-smi info` lists them), or unset it"


def visible_devices(visible: str) -> tuple[int, ...] | None:
    """The numbers in a value of ASCEND_RT_VISIBLE_DEVICES; None if it is not a list of numbers."""
    parts = [part.strip() for part in visible.split(",")]
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else None


def list_devices(count: int) -> tuple[DeviceInfo, ...]:
    """The visible devices. Their memory would not be told without opening them."""
    module = torch.get_device_module("npu")
    simulated = f" (simulated by ascend-simulator {os.environ[SIMULATOR]})" if SIMULATOR in os.environ else ""
    return tuple(DeviceInfo(index, module.get_device_name(index) + simulated, None) for index in range(count))


def describe(facts: Facts) -> str:
    """One line about an environment that works."""
    if facts.simulator is not None:
        return f"SIMULATED, no NPU: {facts.num_devices} device(s) of ascend-simulator {facts.simulator}"
    software = f"CANN {facts.cann or 'of unknown version'}, driver {facts.driver or 'unknown'}"
    return f"{facts.num_devices} device(s), {software}, torch_npu {facts.torch_npu_version}"


def diagnose(facts: Facts) -> list[Diagnosis]:
    """The lines of `doctor` about torch_npu, CANN and the driver. Without any of them there is nothing to mend."""
    has_hardware = facts.driver is not None or facts.cann is not None
    reason = reason_unavailable(facts)
    extension = Diagnosis("npu torch_npu", True, facts.torch_npu_version or "not installed (optional)")
    if reason is not None and (facts.torch_npu_version is not None or has_hardware):
        extension = Diagnosis(extension.subject, False, extension.found, reason)
    cann = Diagnosis("npu CANN", True, facts.cann or f"none ({CANN_HOME} names none)")
    driver = Diagnosis("npu driver", True, facts.driver or "none")
    if facts.simulator is not None:
        driver = Diagnosis("npu driver", True, f"none: SIMULATED by ascend-simulator {facts.simulator}")
    return [extension, cann, driver]


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cann_version(home: str | None) -> str | None:
    """The version of the CANN in a folder."""
    if home is None:
        return None
    return next((v for name in CANN_VERSION_FILES if (v := file_version(Path(home) / name)) is not None), None)


def file_version(path: Path) -> str | None:
    """The version that a file of lines `name=value` tells."""
    try:
        match = VERSION.search(path.read_text(errors="replace"))
    except OSError:
        return None
    return match.group(1) if match else None
