"""Plugins found by nothing but their entry points, and what becomes of the broken ones."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from llava_core.errors import PluginError
from llava_core.plugins import API_VERSION, Registry

Install = Callable[..., None]

GOOD = """
from llava_core.plugins import Contribution, hookimpl

class DummyBackend:
    pass

@hookimpl
def llava_register_backends():
    return [Contribution({name!r}, __name__ + ":DummyBackend", "for tests", api_version=1)]
"""


def reason(registry: Registry, plugin: str) -> str:
    (failure,) = (f for f in registry.failures if f.plugin == plugin)
    return failure.reason


def test_an_installed_backend_appears_and_loads(install: Install) -> None:
    install("acme", GOOD.format(name="acme"))
    registry = Registry.discover()
    assert "acme" in registry.names("backend")
    assert registry.load("backend", "acme") is sys.modules["dummy_acme_plugin"].DummyBackend
    offer = registry.offers("backend")["acme"]
    assert (offer.plugin, offer.distribution, offer.contribution.summary) == ("acme", "dummy-acme 1.0", "for tests")


def test_the_projects_own_backends_are_plugins_like_any_other() -> None:
    registry = Registry.discover()
    assert {"cpu", "cuda"} <= set(registry.names("backend"))
    assert registry.load("backend", "cpu").name == "cpu"


def test_a_plugin_that_cannot_be_imported_is_named_and_takes_no_other_down(install: Install) -> None:
    install("broken", "import no_such_library")
    install("acme", GOOD.format(name="acme"))
    registry = Registry.discover()
    (failure,) = registry.failures
    assert (failure.plugin, failure.distribution) == ("broken", "dummy-broken 1.0")
    assert "No module named 'no_such_library'" in failure.reason
    assert "dummy_broken_plugin.py" in failure.details
    assert {"acme", "cpu", "cuda"} <= set(registry.names("backend"))


def test_asking_for_the_broken_one_raises_with_its_traceback(install: Install) -> None:
    install("broken", "import no_such_library")
    registry = Registry.discover()
    with pytest.raises(PluginError, match=r"'broken' is not usable(.|\n)*Traceback(.|\n)*import no_such_library"):
        registry.load("backend", "broken")


def test_asking_by_a_name_that_its_module_has_raises_with_its_traceback(install: Install) -> None:
    install("acme", "import no_such_library")  # its module is dummy_acme_plugin
    with pytest.raises(PluginError, match=r"'dummy' is not usable(.|\n)*import no_such_library"):
        Registry.discover().load("backend", "dummy")


def test_a_hook_that_raises_is_a_failure(install: Install) -> None:
    source = GOOD.format(name="acme").replace("    return", "    1 / 0\n    return")
    install("acme", source)
    assert "ZeroDivisionError" in reason(Registry.discover(), "acme")


def test_another_api_version_is_refused_with_both_numbers(install: Install) -> None:
    install("future", GOOD.format(name="future").replace("api_version=1", f"api_version={API_VERSION + 1}"))
    registry = Registry.discover()
    assert "future" not in registry.names("backend")
    assert f"plugin API {API_VERSION + 1}" in reason(registry, "future")
    assert f"speaks API {API_VERSION}" in reason(registry, "future")
    with pytest.raises(PluginError, match="speaks API"):
        registry.load("backend", "future")


def test_a_hook_that_does_not_exist_is_refused_by_name(install: Install) -> None:
    install("typo", GOOD.format(name="typo").replace("llava_register_backends", "llava_register_backend"))
    install("zeta", GOOD.format(name="zeta"))  # loaded after it
    registry = Registry.discover()
    assert "llava_register_backend" in reason(registry, "typo")
    assert "zeta" in registry.names("backend")
    assert len(registry.failures) == 1


def test_a_name_claimed_twice_belongs_to_nobody_and_both_are_named(install: Install) -> None:
    install("one", GOOD.format(name="acme"))
    install("two", GOOD.format(name="acme"), version="2.5")
    registry = Registry.discover()
    assert "acme" not in registry.names("backend")
    assert "cpu" in registry.names("backend")
    with pytest.raises(PluginError, match=r"'acme' is claimed by .*dummy-one 1\.0.* and .*dummy-two 2\.5"):
        registry.load("backend", "acme")
    assert "dummy-one 1.0" in reason(registry, "two")


def test_code_that_cannot_be_imported_names_its_plugin(install: Install) -> None:
    install("acme", GOOD.format(name="acme").replace(":DummyBackend", ":NoSuchClass"))
    registry = Registry.discover()
    with pytest.raises(PluginError, match=r"'acme' of plugin 'acme' \(dummy-acme 1\.0\) cannot be imported") as caught:
        registry.load("backend", "acme")
    assert isinstance(caught.value.__cause__, AttributeError)
    assert "Traceback" in str(caught.value)


def test_an_unknown_name_suggests_the_nearest(install: Install) -> None:
    install("acme", GOOD.format(name="acme"))
    with pytest.raises(PluginError, match=r"unknown backend 'acne'; there are: .*acme.*\. Did you mean 'acme'\?"):
        Registry.discover().load("backend", "acne")


def test_an_unknown_name_lists_what_did_not_load(install: Install) -> None:
    install("broken", "import no_such_library")
    with pytest.raises(PluginError, match=r"unknown backend 'zzz'(.|\n)*not loaded: plugin 'broken'"):
        Registry.discover().load("backend", "zzz")
