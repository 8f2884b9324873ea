"""Finds plugins, loads each behind a guard, and hands out what they contribute."""

from __future__ import annotations

import difflib
import importlib
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pluggy

from llava_core.errors import PluginError
from llava_core.plugins import hookspecs
from llava_core.plugins.hookspecs import API_VERSION, GROUP, KINDS, Contribution


@dataclass(frozen=True)
class PluginFailure:
    """A plugin that could not be used, kept so that listings can name it.

    Attributes:
        address: its module, as the entry point names it.
        details: the traceback, if there is one.
    """

    plugin: str
    address: str
    distribution: str
    reason: str
    details: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} ({self.distribution}): {self.reason}"


@dataclass(frozen=True)
class Offer:
    """A contribution and the plugin that made it."""

    contribution: Contribution
    plugin: str
    distribution: str


class Registry:
    """What the installed plugins contribute, by kind (`backend`, `reader`, `template`, `tracker`) and name.

    A plugin that fails to load is recorded in `failures` and takes no other down; asking for it by name raises with
    its traceback. A name claimed twice raises when it is asked for, naming both plugins.
    """

    def __init__(self, entry_points: Iterable[metadata.EntryPoint]) -> None:
        self.failures: list[PluginFailure] = []
        self._offers: dict[str, dict[str, list[Offer]]] = {kind: {} for kind in KINDS}
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        for entry_point in sorted(entry_points, key=lambda e: e.name):
            self._load(entry_point)

    @classmethod
    def discover(cls) -> Registry:
        """The registry of everything installed in this environment."""
        return cls(metadata.entry_points(group=GROUP))

    def names(self, kind: str) -> list[str]:
        """The names on offer, sorted; names claimed twice are left out (`failures` lists them)."""
        return sorted(name for name, offers in self._offers[kind].items() if len(offers) == 1)

    def offers(self, kind: str) -> Mapping[str, Offer]:
        """Every usable offer of a kind."""
        return {name: self._offers[kind][name][0] for name in self.names(kind)}

    def load(self, kind: str, name: str) -> Any:
        """The object behind a name.

        Raises:
            PluginError: unknown name, name claimed twice, or code that cannot be imported.
        """
        offers = self._offers[kind].get(name, [])
        if len(offers) > 1:
            raise PluginError(_conflict_message(kind, name, offers))
        if not offers:
            raise self._unknown_error(kind, name)
        address = offers[0].contribution.load
        try:
            return resolve(address)
        except (Exception, SystemExit) as error:
            reason = f"{self.label(kind, name)} cannot be imported from {address}: {type(error).__name__}: {error}"
            raise PluginError(reason, traceback.format_exc()) from error

    def label(self, kind: str, name: str) -> str:
        """A usable offer as messages name it: what it is and whose."""
        offer = self.offers(kind)[name]
        return f"{kind} {name!r} of plugin {offer.plugin!r} ({offer.distribution})"

    def _load(self, entry_point: metadata.EntryPoint) -> None:
        distribution = _distribution_label(entry_point)
        label = f"{entry_point.name} = {entry_point.value}"
        try:
            module = entry_point.load()
            self._manager.register(module, name=label)
            self._check_hooks(module, entry_point.value)
            contributions = self._collect(module)
        except (Exception, SystemExit) as error:  # the plugin boundary: what a vendor's import does stays its own
            if self._manager.has_plugin(label):
                self._manager.unregister(name=label)
            if isinstance(error, PluginError):  # ours, and it says all
                self._record(entry_point, error.reason, error.details)
            else:
                self._record(entry_point, f"{type(error).__name__}: {error}", traceback.format_exc())
            return
        for kind, contribution in contributions:
            offers = self._offers[kind].setdefault(contribution.name, [])
            offers.append(Offer(contribution, entry_point.name, distribution))
            if len(offers) > 1:
                self._record(entry_point, _conflict_message(kind, contribution.name, offers), "")

    def _record(self, entry_point: metadata.EntryPoint, reason: str, details: str) -> None:
        distribution = _distribution_label(entry_point)
        self.failures.append(PluginFailure(entry_point.name, entry_point.value, distribution, reason, details))

    def _collect(self, module: Any) -> list[tuple[str, Contribution]]:
        collected = []
        for kind, hook_name in KINDS.items():
            hook = self._manager.subset_hook_caller(
                hook_name, [p for p in self._manager.get_plugins() if p is not module]
            )
            for contribution in _contributions(hook_name, hook()):
                if contribution.api_version != API_VERSION:
                    raise PluginError(
                        f"{kind} {contribution.name!r} was written for plugin API {contribution.api_version}; this "
                        f"llava-core speaks API {API_VERSION}. Install the plugin's release for this version."
                    )
                collected.append((kind, contribution))
        return collected

    def _check_hooks(self, module: Any, address: str) -> None:
        """Every hook that is marked exists, and one is: a plugin that would do nothing has been written by mistake."""
        known = [name for name in vars(hookspecs) if self._manager.parse_hookspec_opts(hookspecs, name) is not None]
        found = {name: self._manager.parse_hookimpl_opts(module, name) for name in dir(module)}
        marked = [options.get("specname") or name for name, options in found.items() if options is not None]
        if not marked:
            raise PluginError(f"{address} registers nothing: mark one of {', '.join(known)} with hookimpl")
        for name in marked:
            if name not in known:
                raise PluginError(_unknown("hook", name, known))

    def _unknown_error(self, kind: str, name: str) -> PluginError:
        # A plugin that did not load cannot say what it offers; its entry point usually has the name in it.
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])")
        suspects = [f for f in self.failures if word.search(f"{f.plugin} {f.address} {f.distribution}")]
        if suspects:
            reason = f"{kind} {name!r} is not usable: {'; '.join(map(str, suspects))}"
            return PluginError(reason, "\n".join(failure.details for failure in suspects))
        broken = "".join(f"\n  not loaded: {failure}" for failure in self.failures)
        return PluginError(_unknown(kind, name, self.names(kind)) + broken)


def resolve(address: str) -> Any:
    """The object at `package.module:attribute`."""
    module_name, _, attribute = address.partition(":")
    return getattr(importlib.import_module(module_name), attribute)


def _distribution_label(entry_point: metadata.EntryPoint) -> str:
    dist = entry_point.dist
    return f"{dist.name} {dist.version}" if dist is not None else "unknown distribution"


def _contributions(hook_name: str, results: Iterable[Any]) -> Iterator[Contribution]:
    for result in results:
        if not isinstance(result, Sequence) or not all(isinstance(c, Contribution) for c in result):
            raise PluginError(f"{hook_name} returned {result!r}; expected a list of llava_core.plugins.Contribution")
        yield from result


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}; there are: {', '.join(known) or 'none'}.{hint}"


def _conflict_message(kind: str, name: str, offers: list[Offer]) -> str:
    claims = " and ".join(f"plugin {o.plugin!r} ({o.distribution})" for o in offers)
    return f"{kind} {name!r} is claimed by {claims}; uninstall one of them."
