"""How anything plugs in: hook specifications and the registry of what is installed."""

from llava_core.plugins.hookspecs import API_VERSION, Contribution, hookimpl
from llava_core.plugins.registry import PluginFailure, Registry

__all__ = ["API_VERSION", "Contribution", "PluginFailure", "Registry", "hookimpl"]
