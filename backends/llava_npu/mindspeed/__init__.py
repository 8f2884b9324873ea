"""The patches of MindSpeed's attention. Importing this imports neither MindSpeed nor megatron nor torch_npu.

MindSpeed adapts megatron-core by replacing its functions, and its attention makes up for masks that it takes to be
missing. Nothing of it is edited or copied: its last word, the `forward` of the attention's class, is wrapped once more.
Apply after MindSpeed's last change, for its own `repatch` drops the guard.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llava_core.backend import No, Patch, Yes
from llava_core.backend.kernels import Verdict
from llava_core.errors import PatchRefused
from llava_npu.mindspeed.mask import guard
from llava_npu.mindspeed.probe import build_local, build_te, check_behaviour
from llava_npu.mindspeed.recognition import Link, module_file, require_chain, require_sources

ADAPTOR = "mindspeed.megatron_adaptor"
MEGATRON = "megatron.core.package_info"
MEGATRON_VERSION = "0.12.1"


@dataclass(frozen=True)
class Attention:
    """A class of attention after MindSpeed has adapted megatron.

    Attributes:
        module, name: where megatron keeps it.
        chain: the functions that its forward then consists of, outermost first.
        build: given the class and megatron's mask types, what builds layers for the probe.
    """

    module: str
    name: str
    chain: tuple[Link, ...]
    build: Callable[[Any, Any], Callable[[str], Any]]


# The fingerprints are those of MindSpeed 26.0.0_core_r0.12.1, 26.1.0_core_r0.12.1 and master up to 028de58.
FLASH = "mindspeed.core.transformer.flash_attention"
LOCAL = Attention(
    "megatron.core.transformer.dot_product_attention",
    "DotProductAttention",
    (
        Link(f"{FLASH}.generate_mask.adaptor", "dot_product_attention_forward_wrapper.wrapper", "7d656ba36b5195c0"),
        Link(f"{FLASH}.flash_attention.adaptor", "dot_product_attention_forward_impl", "f581a12401d9a0eb"),
    ),
    build_local,
)
TE_ATTENTION = "mindspeed.te.pytorch.attention.dot_product_attention.dot_product_attention"
TE = Attention(
    "megatron.core.extensions.transformer_engine",
    "TEDotProductAttention",
    (Link(TE_ATTENTION, "MindSpeedTEDotProductAttention.forward", "6e24c3f5e8a81900"),),
    build_te,
)


def applies(attention: Attention) -> Verdict:
    """Whether MindSpeed and megatron-core are installed, from their source files alone.

    Raises:
        PatchRefused: they are, in versions that are not known.
    """
    for package, module in (("MindSpeed", ADAPTOR), ("megatron-core", MEGATRON)):
        if module_file(module) is None:
            return No(f"{package} is not installed")
    _require_megatron()
    require_sources(attention.chain)
    return Yes()


def load() -> None:
    """Lets MindSpeed adapt megatron. Replaces much of megatron and, through `transfer_to_npu`, torch.cuda, for good."""
    arguments = sys.argv
    # MindSpeed reads its options from the command line, and without this one attaches no fused attention.
    sys.argv = [*arguments[:1], "--use-flash-attn"]
    try:
        importlib.import_module(ADAPTOR)
    finally:
        sys.argv = arguments


def apply(attention: Attention) -> Callable[[], None]:
    """Put the guard around the attention's forward, and see that it then does what it is asked.

    Raises:
        PatchRefused: MindSpeed has not adapted megatron here, or not as expected, or the attention still does something
            else. It is then as it was.
    """
    if ADAPTOR not in sys.modules:
        raise PatchRefused(f"{ADAPTOR} is not imported in this process; expected MindSpeed to have adapted megatron")
    _require_megatron()
    owner, original = _find(attention)
    require_chain(original, attention.chain)
    with ExitStack() as on_failure:
        on_failure.callback(setattr, owner, "forward", original)
        owner.forward = guard(original)
        _check(owner, attention)
        on_failure.pop_all()
    return partial(setattr, owner, "forward", original)


def _find(attention: Attention) -> tuple[Any, Callable[..., Any]]:
    """The class, and the forward that it has of its own."""
    try:
        owner = getattr(importlib.import_module(attention.module), attention.name)
        return owner, vars(owner)["forward"]
    except (ImportError, AttributeError, TypeError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
        raise PatchRefused(f"expected a class {attention.module}:{attention.name} with a forward; {found}") from error


def _check(owner: Any, attention: Attention) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    try:
        build = attention.build(owner, AttnMaskType)
        check_behaviour(build, AttnMaskType, PackedSeqParams, torch.device("npu"))
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise PatchRefused(f"{attention.name} cannot be probed: {type(error).__name__}: {error}") from error


def _require_megatron() -> None:
    """That megatron-core is of the version that MindSpeed was written for, read from its source."""
    path = module_file(MEGATRON)
    tree = ast.parse("" if path is None else path.read_text(encoding="utf-8"))
    numbers = {
        target.id: str(node.value.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
    if found != MEGATRON_VERSION:
        raise PatchRefused(f"expected megatron-core {MEGATRON_VERSION}; found {found}")


def _patch(name: str, attention: Attention, why: str, files: str) -> Patch:
    return Patch(
        name=name,
        target=f"{attention.module}:{attention.name}.forward",
        why=f"mask None means causal or, with config.is_llava, full attention, without a word; {why}",
        source=f"MindSpeed 26.0.0_core_r0.12.1, 26.1.0_core_r0.12.1, master at 028de58; megatron-core 0.12.1; {files}",
        remove_when="MindSpeed passes on what the caller asks, and keeps no sparse mode from call to call",
        applies=partial(applies, attention),
        load=load,
        apply=partial(apply, attention),
    )


PATCHES = (
    _patch(
        "mindspeed-local-mask",
        LOCAL,
        "the sparse mode that MindSpeed sets for its own mask stays in the config for the next call, which has another",
        "core/transformer/flash_attention/{generate_mask,flash_attention}/adaptor.py",
    ),
    _patch(
        "mindspeed-te-mask",
        TE,
        "every mask is used in the mode of config.attention_mask_type, which is causal unless changed, so that one of "
        "the caller's is taken for MindSpeed's own; attention_bias is ignored",
        "te/pytorch/attention/dot_product_attention/dot_product_attention.py",
    ),
)
