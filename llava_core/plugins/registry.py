"""Finds plugins, loads each behind a guard, and hands out what they contribute."""

from __future__ import annotations

import difflib
import importlib
import re
import traceback
from collections.abc import Iterable, Mapping
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
            raise PluginError(self._unknown_message(kind, name))
        offer = offers[0]
        try:
            return resolve(offer.contribution.load)
        except Exception as error:
            raise PluginError(
                f"{kind} {name!r} of plugin {offer.plugin!r} ({offer.distribution}) cannot be imported from "
                f"{offer.contribution.load}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
            ) from error

    def _load(self, entry_point: metadata.EntryPoint) -> None:
        distribution = _distribution_label(entry_point)
        label = f"{entry_point.name} = {entry_point.value}"
        try:
            module = entry_point.load()
            self._manager.register(module, name=label)
            self._manager.check_pending()
            contributions = self._collect(module)
        except Exception as error:  # the plugin boundary: whatever a vendor's import raises is reported, not spread
            if self._manager.has_plugin(label):
                self._manager.unregister(name=label)
            reason = f"{type(error).__name__}: {error}"
            self._record(entry_point, reason, traceback.format_exc())
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
            for contribution in (c for result in hook() for c in result):
                if contribution.api_version != API_VERSION:
                    raise PluginError(
                        f"{kind} {contribution.name!r} was written for plugin API {contribution.api_version}; this "
                        f"llava-core speaks API {API_VERSION}. Install the plugin's release for this version."
                    )
                collected.append((kind, contribution))
        return collected

    def _unknown_message(self, kind: str, name: str) -> str:
        # A plugin that did not load cannot say what it offers; its entry point usually has the name in it.
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])")
        suspects = [f for f in self.failures if f.details and word.search(f"{f.plugin} {f.address}")]
        if suspects:
            told = "\n".join(f"{failure}\n{failure.details}" for failure in suspects)
            return f"{kind} {name!r} is not usable: {told}"
        known = self.names(kind)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        broken = "".join(f"\n  not loaded: {failure}" for failure in self.failures)
        return f"unknown {kind} {name!r}; there are: {', '.join(known) or 'none'}.{hint}{broken}"


def resolve(address: str) -> Any:
    """The object at `package.module:attribute`."""
    module_name, _, attribute = address.partition(":")
    return getattr(importlib.import_module(module_name), attribute)


def _distribution_label(entry_point: metadata.EntryPoint) -> str:
    dist = entry_point.dist
    return f"{dist.name} {dist.version}" if dist is not None else "unknown distribution"


def _conflict_message(kind: str, name: str, offers: list[Offer]) -> str:
    claims = " and ".join(f"plugin {o.plugin!r} ({o.distribution})" for o in offers)
    return f"{kind} {name!r} is claimed by {claims}; uninstall one of them."
