"""The Backend interface and what it is made of: facts, masks, the op catalogue, kernel selection."""

from llava_core.backend.facts import ConfigProblem, DeviceInfo, Diagnosis, DistSpec, PrecisionCaps, Probe, World
from llava_core.backend.interface import Backend, Memory, Rng
from llava_core.backend.kernels import KernelSpec, No, OpRequest, Selection, Yes, select, select_all
from llava_core.backend.masks import MaskFacts, MaskSpec
from llava_core.backend.ops import CATALOGUE, Op, OpSet, reference_kernels
from llava_core.backend.patches import Patch

__all__ = [
    "CATALOGUE",
    "Backend",
    "ConfigProblem",
    "DeviceInfo",
    "Diagnosis",
    "DistSpec",
    "KernelSpec",
    "MaskFacts",
    "MaskSpec",
    "Memory",
    "No",
    "Op",
    "OpRequest",
    "OpSet",
    "Patch",
    "PrecisionCaps",
    "Probe",
    "Rng",
    "Selection",
    "World",
    "Yes",
    "reference_kernels",
    "select",
    "select_all",
]
