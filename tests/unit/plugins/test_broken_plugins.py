"""What a user sees of a broken plugin: `backends` and `doctor` name it, asking for it fails, and nothing else does."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from llava_core.engine.hardware import choose_backend
from llava_core.errors import PluginError
from llava_core.plugins import API_VERSION, Registry
from tests.unit.cli.support import run

Install = Callable[..., None]

HOOK = """
from llava_core.plugins import Contribution, hookimpl

@hookimpl
def llava_register_backends():
    return [Contribution({name!r}, __name__ + ":Broken", "for tests", api_version=1)]
"""

BACKEND = """
from llava_core.backend import DistSpec, PrecisionCaps, Probe
from llava_core.backend import Backend, Memory, Rng
import torch

class Broken(Backend):
    name = {name!r}
    device_type = "cpu"
    dist, peak_flops = DistSpec("gloo", frozenset()), {{}}
    precision = PrecisionCaps(frozenset({{torch.float32}}), torch.float32, "for tests")

    def __init__(self):
        self.memory = self.rng = object()

    @classmethod
    def probe(cls):
        return Probe(True, "here")

    def open(self, local_rank, *, threads, deterministic):
        return torch.device("cpu")

    def synchronize(self):
        pass

    def kernels(self):
        return []
"""


@dataclass(frozen=True)
class Broken:
    """One way to be broken.

    Attributes:
        source: its module, installed as `dummy-NAME 1.0`.
        listed: what `backends` and `doctor` say of it, beside its distribution.
        told: what its own code raised, from the traceback; empty where it raised nothing.
    """

    source: str
    listed: str
    told: str = ""


def changed(name: str, old: str, new: str) -> str:
    """A whole plugin with one change."""
    source = (HOOK + BACKEND).format(name=name)
    assert old in source
    return source.replace(old, new)


BROKEN = {
    "missinglib": Broken("import no_such_library", "No module named 'no_such_library'", "import no_such_library"),
    "quits": Broken("raise SystemExit('no driver')", "SystemExit: no driver", "raise SystemExit"),
    "future": Broken(
        HOOK.format(name="future").replace("api_version=1", f"api_version={API_VERSION + 1}"),
        f"was written for plugin API {API_VERSION + 1}; this llava-core speaks API {API_VERSION}",
    ),
    "typo": Broken(
        HOOK.format(name="typo").replace("llava_register_backends", "llava_register_backend"),
        "unknown hook 'llava_register_backend'; there are: llava_register_backends",
    ),
    "unmarked": Broken(HOOK.format(name="unmarked").replace("@hookimpl", ""), "registers nothing"),
    "unversioned": Broken(
        HOOK.format(name="unversioned").replace(", api_version=1", ""),
        "missing 1 required positional argument: 'api_version'",
        "return [Contribution('unversioned'",
    ),
    "bare": Broken(
        HOOK.format(name="bare").replace("[Contribution(", "Contribution(").replace(")]", ")"), "expected a list of"
    ),
    "nowhere": Broken(
        HOOK.format(name="nowhere"),
        "cannot be imported from dummy_nowhere_plugin:Broken: AttributeError",
        "has no attribute 'Broken'",
    ),
    "notabackend": Broken(
        HOOK.format(name="notabackend") + "class Broken: pass",
        "expected a subclass of llava_core.backend.Backend",
    ),
    "incomplete": Broken(
        changed("incomplete", "def kernels", "def colonels").replace("def probe", "def prove"),
        "dummy_incomplete_plugin:Broken lacks kernels, probe",
    ),
    "othername": Broken(
        changed("othername", "name = 'othername'", "name = 'mine'"),
        "has the name 'mine'; expected the one that it is registered under, 'othername'",
    ),
    "badprobe": Broken(
        changed("badprobe", 'Probe(True, "here")', "1 / 0"),
        "probe() raised ZeroDivisionError: division by zero",
        "1 / 0",
    ),
    "oddprobe": Broken(changed("oddprobe", 'Probe(True, "here")', "True"), "probe() returned True; expected a Probe"),
    "badinit": Broken(
        changed("badinit", "self.memory = self.rng = object()", "raise OSError('libmine.so')"),
        "its constructor raised OSError: libmine.so",
        "raise OSError('libmine.so')",
    ),
    "noparts": Broken(
        changed("noparts", "self.memory = self.rng = object()", "pass"), "its constructor sets no memory and no rng"
    ),
}


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # tables would break the messages up


def line_with(text: str, word: str) -> str:
    (line,) = (line for line in text.splitlines() if word in line)
    return line


@pytest.mark.parametrize("name", BROKEN)
def test_it_is_listed_with_its_distribution_and_the_reason(capsys, install: Install, name: str) -> None:
    install(name, BROKEN[name].source)
    done = run(capsys, "backends")
    assert done.code == 0, done.err
    line = line_with(done.out, f"dummy-{name} 1.0")
    assert BROKEN[name].listed in line
    assert "Traceback" not in done.out
    assert "short_matmul" in done.out  # the cpu backend's row is whole


@pytest.mark.parametrize("name", BROKEN)
def test_asking_for_it_ends_with_2_and_the_traceback_of_its_own_code(capsys, install: Install, name: str) -> None:
    install(name, BROKEN[name].source)
    done = run(capsys, "certify", "--backend", name)
    assert done.code == 2, done.err
    assert f"dummy-{name} 1.0" in done.err
    assert BROKEN[name].listed in done.err
    assert ("Traceback" in done.err) == bool(BROKEN[name].told)
    assert BROKEN[name].told in done.err


def test_doctor_names_each_with_what_to_do_and_goes_on(capsys, install: Install) -> None:
    for name, broken in BROKEN.items():
        install(name, broken.source)
    done = run(capsys, "doctor")
    assert done.code == 1
    for name, broken in BROKEN.items():
        if name not in ("badinit", "noparts"):  # doctor asks the class alone
            line = line_with(done.out, f"update or uninstall dummy-{name} 1.0")
            assert broken.listed in line
            assert "!!" in line
    assert "backend cpu" in done.out


def test_diagnostics_that_raise_are_a_finding(capsys, install: Install) -> None:
    install("sick", HOOK.format(name="sick") + BACKEND.format(name="sick") + "    diagnostics = None\n")
    done = run(capsys, "doctor")
    assert done.code == 1
    line = line_with(done.out, "dummy-sick 1.0")
    assert "diagnostics() raised TypeError" in line
    assert "update or uninstall dummy-sick 1.0" in line


def test_kernels_that_raise_are_named_in_the_listing(capsys, install: Install) -> None:
    install("badlist", changed("badlist", "return []", "raise OSError('libmine.so')"))
    done = run(capsys, "backends")
    assert done.code == 0
    assert "dummy-badlist 1.0" in done.out
    assert "listing its kernels raised OSError: libmine.so" in done.out
    assert run(capsys, "backends", "badlist").code == 2


def test_two_distributions_of_one_name_are_both_named_and_neither_is_taken(capsys, install: Install) -> None:
    whole = (HOOK + BACKEND).format(name="acme")
    install("one", whole)
    install("two", whole, version="2.5")
    listing = run(capsys, "backends")
    claim = "backend 'acme' is claimed by plugin 'one' (dummy-one 1.0) and plugin 'two' (dummy-two 2.5)"
    assert listing.code == 0
    assert claim in listing.out
    asked = run(capsys, "certify", "--backend", "acme")
    assert (asked.code, claim in asked.err) == (2, True), asked.err


def test_all_broken_ones_together_leave_the_host_to_be_chosen(install: Install) -> None:
    for name, broken in BROKEN.items():
        if name not in ("badinit", "noparts"):  # these say that they are available
            install(name, broken.source)
    assert choose_backend(None, Registry.discover()).name == "cpu"


def test_without_a_name_no_other_backend_of_the_host_is_taken(install: Install) -> None:
    install("acme", (HOOK + BACKEND).format(name="acme"))
    registry = Registry.discover()
    assert choose_backend("acme", registry).name == "acme"
    assert choose_backend(None, registry).name == "cpu"


def test_the_error_keeps_its_cause(install: Install) -> None:
    install("badprobe", BROKEN["badprobe"].source)
    with pytest.raises(PluginError) as caught:
        choose_backend("badprobe", Registry.discover())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "".join(traceback.format_tb(caught.value.__cause__.__traceback__)[-1:]) in caught.value.details
