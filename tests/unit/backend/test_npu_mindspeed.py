"""The guard of MindSpeed's attention, its probe, and what it recognises, tested without MindSpeed."""

from __future__ import annotations

import ast
import enum
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_core.backend import No
from llava_core.errors import PatchRefused
from llava_npu.mindspeed import LOCAL, PATCHES, applies, apply
from llava_npu.mindspeed.mask import (
    FULL,
    OWN,
    PACKED_CAUSAL,
    Mode,
    check_mask,
    choose_mode,
    guard,
    sample_ends,
    settings,
)
from llava_npu.mindspeed.probe import B, H, S, check_behaviour
from llava_npu.mindspeed.recognition import Link, fingerprint, require_chain, require_sources

CPU = torch.device("cpu")

# ---- what a call asks for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has_mask", "packed", "call_type", "mode"),
    [
        (True, False, "causal", OWN),
        (True, False, "arbitrary", OWN),
        (True, False, "padding", OWN),
        (False, True, "causal", PACKED_CAUSAL),
        (False, True, "padding_causal", PACKED_CAUSAL),
    ],
)
def test_a_mask_and_packed_samples_are_served(has_mask: bool, packed: bool, call_type: str, mode: Mode) -> None:
    assert choose_mode(has_mask, packed, call_type, "causal") is mode


def test_full_attention_is_served_where_call_and_layer_ask_for_it() -> None:
    assert choose_mode(False, False, "no_mask", "no_mask") is FULL


@pytest.mark.parametrize(
    ("has_mask", "packed", "call_type", "layer_type"),
    [
        (False, False, "causal", "causal"),  # None for causal
        (False, False, "arbitrary", "arbitrary"),
        (False, False, "no_mask", "causal"),  # MindSpeed would make up a causal one
        (True, False, "no_mask", "causal"),
        (True, True, "padding_causal", "causal"),
        (False, True, "padding", "causal"),  # packed, and not causal
        (False, True, "no_mask", "no_mask"),
    ],
)
def test_a_call_that_asks_for_nothing_or_for_two_things_is_refused(
    has_mask: bool, packed: bool, call_type: str, layer_type: str
) -> None:
    with pytest.raises(ValueError, match=f"attn_mask_type {call_type} in a layer of type {layer_type}"):
        choose_mode(has_mask, packed, call_type, layer_type)


@pytest.mark.parametrize("shape", [(4, 6), (1, 1, 4, 6), (2, 1, 4, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_a_whole_mask_is_accepted(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_mask(torch.zeros(shape, dtype=dtype), 4, 6)


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(4, 6), torch.zeros(2, 4, 6).bool(), torch.zeros(2048, 2048).bool(), torch.zeros(2, 1, 1, 6).bool()],
    ids=["additive", "three dims", "compressed", "padding only"],
)
def test_another_mask_is_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"last two are \(4, 6\)"):
        check_mask(mask, 4, 6)


@dataclass
class Packed:
    """The fields of megatron-core 0.12.1's PackedSeqParams that matter."""

    qkv_format: str
    cu_seqlens_q: Any
    cu_seqlens_kv: Any
    cu_seqlens_q_padded: Any = None
    cu_seqlens_kv_padded: Any = None


def packed(*bounds: int, **changes: Any) -> Packed:
    offsets = torch.tensor(bounds, dtype=torch.int32)
    return Packed(**{"qkv_format": "thd", "cu_seqlens_q": offsets, "cu_seqlens_kv": offsets, **changes})


@pytest.mark.parametrize(("bounds", "ends"), [((0, 6), [6]), ((0, 2, 6), [2, 6]), ((0, 0, 2, 2, 6), [2, 6])])
def test_samples_end_where_their_bounds_say_and_empty_ones_are_left_out(
    bounds: tuple[int, ...], ends: list[int]
) -> None:
    assert sample_ends(packed(*bounds), 6).tolist() == ends


@pytest.mark.parametrize(
    "params",
    [
        packed(2, 6),
        packed(0, 2, 5),
        packed(0, 4, 2, 6),
        packed(0, 2, 6, cu_seqlens_kv=torch.tensor([0, 3, 6])),
        packed(0, 6, qkv_format="sbhd"),
        packed(0, 2, 6, cu_seqlens_q_padded=torch.tensor([0, 4, 8])),
    ],
    ids=["no leading 0", "not to the end", "backwards", "other keys", "not thd", "padded"],
)
def test_bounds_that_mindspeed_would_misread_are_refused(params: Packed) -> None:
    with pytest.raises(ValueError, match="packed_seq_params has"):
        sample_ends(params, 6)


def test_more_samples_than_the_kernel_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="1025 packed samples; the kernel takes at most 1024"):
        sample_ends(packed(*range(1026)), 1025)


def test_the_config_is_set_for_the_call_and_restored() -> None:
    config = SimpleNamespace(sparse_mode=7, attention_mask_type="causal")
    with settings(config, OWN):
        assert (config.sparse_mode, config.attention_mask_type) == (1, "general")
    assert vars(config) == {"sparse_mode": 7, "attention_mask_type": "causal"}


def test_the_config_is_restored_after_an_error() -> None:
    config = SimpleNamespace(sparse_mode=7)
    with pytest.raises(RuntimeError), settings(config, OWN):
        raise RuntimeError("out of memory")
    assert vars(config) == {"sparse_mode": 7}  # and what it did not have, it does not have now


# ---- the guard and its probe, around attention that behaves as MindSpeed's does -----------------------------------


class MaskType(enum.Enum):
    """The names of megatron-core's AttnMaskType."""

    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4


class Attention(nn.Module):
    """MindSpeed's rules, over PyTorch's own attention: what it makes up for None, and what each sparse mode means."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.attn_mask_type = MaskType[name]
        self.config = SimpleNamespace(sparse_mode=0, is_llava=True)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if attention_mask is None and self.attn_mask_type is MaskType.causal and not self.config.is_llava:
            self.config.sparse_mode = 2
            attention_mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        if packed_seq_params is None:
            return self.attend(query, key, value, attention_mask)
        lengths = packed_seq_params.cu_seqlens_q.diff(prepend=torch.tensor([0])).tolist()
        samples = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self.attend(*(x[:, None] for x in sample), attention_mask)[:, 0] for sample in samples])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and self.config.sparse_mode == 2:
            mask = mask[: len(query), : len(key)]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = functional.scaled_dot_product_attention(q, k, v, None if mask is None else self.allowed(mask))
        return out.permute(2, 0, 1, 3).flatten(2)

    def allowed(self, masked: Tensor) -> Tensor:
        return ~masked.bool()


class Guarded(Attention):
    forward = guard(Attention.forward)


class Inverted(Guarded):
    def allowed(self, masked: Tensor) -> Tensor:
        return masked.bool()


class Remembering(Guarded):
    """Keeps the first mask of each shape."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: dict[Any, Tensor] = {}

    def allowed(self, masked: Tensor) -> Tensor:
        return self.kept.setdefault(masked.shape, ~masked.bool())


class AlwaysCausal(Guarded):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return super().attend(query, key, value, torch.ones(len(query), len(key), dtype=torch.bool).triu(1))


class Marking(Guarded):
    """Writes to the config what no call asked for."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        self.config.called = True
        return super().attend(query, key, value, mask)


def probe(build: Callable[[str], nn.Module]) -> None:
    check_behaviour(build, MaskType, Packed, CPU)


def test_behind_the_guard_the_probe_passes() -> None:
    probe(Guarded)


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (Attention, "packed samples: differs"),  # without the guard None is full attention
        (Inverted, "a mask of the caller's: differs"),
        (Remembering, "another mask of the same shape: differs"),
        (AlwaysCausal, "a mask of the caller's: differs"),
        (Marking, "a call changed the config"),
    ],
    ids=["unguarded", "inverted", "remembering", "always causal", "marking"],
)
def test_the_probe_refuses_attention_that_does_something_else(build: Callable[[str], nn.Module], found: str) -> None:
    with pytest.raises(PatchRefused, match=found):
        probe(build)


def inputs() -> list[Tensor]:
    return [torch.randn(S, B, 2, H) for _ in range(3)]


def test_a_call_without_a_request_is_refused_whatever_the_config_says() -> None:
    layer = Guarded("causal")
    for layer.config.is_llava in (True, False):
        with pytest.raises(ValueError, match="None never means causal here"):
            layer(*inputs(), None)


def test_a_mask_is_served_whole_after_a_call_that_left_another_mode() -> None:
    layer, unguarded, masked = Guarded("causal"), Attention("causal"), torch.rand(B, 1, S, S) < 0.3
    layer.config = unguarded.config
    layer.config.is_llava = False
    tensors = inputs()
    unguarded(*tensors, None)
    assert layer.config.sparse_mode == 2
    exact = functional.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in tensors), ~masked)
    assert torch.equal(layer(*tensors, masked), exact.permute(2, 0, 1, 3).flatten(2))


def test_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_bias"):
        Guarded("causal")(*inputs(), torch.zeros(S, S).bool(), attention_bias=torch.zeros(1))


def test_context_parallel_attention_is_refused() -> None:
    layer = Guarded("causal")
    layer.config.context_parallel_size = 2
    with pytest.raises(ValueError, match="context_parallel_size"):
        layer(*inputs(), torch.zeros(S, S).bool())


# ---- recognition -------------------------------------------------------------------------------------------------

ADAPTOR = """
from functools import wraps

def outer(fn):
    @wraps(fn)
    def wrapper(x):
        return fn(x + 1)
    return wrapper

def inner(x):
    return 2 * x

forward = outer(inner)
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `vendorlib` with a module `adaptor`."""
    (tmp_path / "vendorlib").mkdir()
    (tmp_path / "vendorlib/__init__.py").write_text("raise ImportError('imported')")
    (tmp_path / "vendorlib/adaptor.py").write_text(ADAPTOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "vendorlib/adaptor.py"


def links(source: str = ADAPTOR) -> list[Link]:
    outer, inner = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    wrapper = Link("vendorlib.adaptor", "outer.wrapper", fingerprint(outer.body[0]))
    return [wrapper, Link("vendorlib.adaptor", "inner", fingerprint(inner))]


def load(path: Path) -> dict[str, Any]:
    """The module's names; not imported, for its package cannot be."""
    names: dict[str, Any] = {"__name__": "vendorlib.adaptor"}
    exec(compile(path.read_text(), path, "exec"), names)
    return names


def test_comments_docstrings_and_layout_do_not_change_a_fingerprint() -> None:
    other = ADAPTOR.replace("return 2 * x", '"""Doubles."""\n    # Twice.\n    return (2 *\n        x)')
    assert links(other) == links()


@pytest.mark.parametrize(
    ("old", "new"), [("x + 1", "x + 2"), ("@wraps(fn)\n    ", ""), ("wrapper(x)", "wrapper(x=None)")]
)
def test_code_changes_a_fingerprint(old: str, new: str) -> None:
    assert links(ADAPTOR.replace(old, new))[0] != links()[0]


def test_a_chain_is_recognised_by_where_its_functions_are_and_what_they_are(library: Path) -> None:
    require_chain(load(library)["forward"], links())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * x", "3 * x"),
        ("x + 1", "x"),
        ("forward = outer(inner)", "forward = inner"),
        ("forward = outer(inner)", "forward = outer(outer(inner))"),
        ("forward = outer(inner)", "forward = len"),
    ],
    ids=["inner changed", "wrapper changed", "not wrapped", "wrapped twice", "no function"],
)
def test_another_chain_is_refused_with_what_was_expected_and_found(library: Path, old: str, new: str) -> None:
    library.write_text(ADAPTOR.replace(old, new))
    expected = r"expected vendorlib.adaptor:wrapper \(\w{16}\) around vendorlib.adaptor:inner \(\w{16}\); found "
    with pytest.raises(PatchRefused, match=expected):
        require_chain(load(library)["forward"], links())


def test_sources_are_recognised_without_importing_their_package(library: Path) -> None:
    require_sources(links())
    assert "vendorlib" not in sys.modules


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (ADAPTOR.replace("x + 1", "x"), "found vendorlib.adaptor:wrapper"),
        (ADAPTOR.replace("def wrapper", "def guard"), r"vendorlib.adaptor:wrapper \(no wrapper\)"),
        (None, r"vendorlib.adaptor:wrapper \(no such module\)"),
    ],
    ids=["changed", "renamed", "gone"],
)
def test_other_sources_are_refused(library: Path, source: str | None, found: str) -> None:
    if source is None:
        library.unlink()
    else:
        library.write_text(source)
    with pytest.raises(PatchRefused, match=found):
        require_sources(links())


# ---- the patches -------------------------------------------------------------------------------------------------


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, megatron: tuple[int, int, int] | None) -> None:
    """Files where MindSpeed's and megatron-core's would be."""
    files = {"mindspeed/__init__.py": "", "mindspeed/megatron_adaptor.py": ""}
    if megatron is not None:
        lines = [f"{part} = {number}" for part, number in zip(("MAJOR", "MINOR", "PATCH"), megatron, strict=True)]
        files["megatron/core/package_info.py"] = "\n".join(lines)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.setattr(sys, "path_importer_cache", {})


def test_without_mindspeed_a_patch_does_not_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert applies(LOCAL) == No("MindSpeed is not installed")


def test_without_megatron_a_patch_does_not_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, None)
    assert applies(LOCAL) == No("megatron-core is not installed")


def test_another_megatron_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, (0, 16, 1))
    with pytest.raises(PatchRefused, match="expected megatron-core 0.12.1; found 0.16.1"):
        applies(LOCAL)


def test_another_mindspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, (0, 12, 1))
    with pytest.raises(PatchRefused, match="generate_mask.adaptor:wrapper .no such module."):
        applies(LOCAL)


def test_a_patch_is_refused_where_mindspeed_was_not_loaded() -> None:
    with pytest.raises(PatchRefused, match="mindspeed.megatron_adaptor is not imported in this process"):
        apply(LOCAL)


def test_patches_have_names_and_targets_of_their_own() -> None:
    assert len({patch.name for patch in PATCHES}) == len({patch.target for patch in PATCHES}) == len(PATCHES)


def test_importing_the_patches_loads_no_vendor_library() -> None:
    program = (
        "import sys, llava_npu.mindspeed; print(sorted({'mindspeed', 'megatron', 'torch_npu'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "[]"
