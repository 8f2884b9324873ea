"""The hooks a plugin may implement. Importing this module loads neither torch nor a vendor library.

A plugin is a module named by an entry point of the group `llava_core`. It marks functions with `hookimpl`; each returns
`Contribution`s, which name code by address so that nothing is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pluggy

GROUP = "llava_core"
API_VERSION = 1

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@dataclass(frozen=True)
class Contribution:
    """One thing that a plugin offers.

    Attributes:
        name: what a user writes to choose it, e.g. `--backend NAME`.
        load: the object's address, `package.module:attribute`.
        summary: one line for listings.
        api_version: the `API_VERSION` that the plugin was written for, as a number: a plugin that names the constant
            would always fit.
    """

    name: str
    load: str
    summary: str
    api_version: int


@hookspec
def llava_register_backends() -> Sequence[Contribution]:  # type: ignore[empty-body]
    """Hardware backends. `load` names a subclass of `llava_core.backend.Backend`."""


@hookspec
def llava_register_readers() -> Sequence[Contribution]:  # type: ignore[empty-body]
    """Data-set readers. `load` names a `llava_core.data.readers.ReaderFactory`: at its simplest `(path) -> Reader`."""


@hookspec
def llava_register_templates() -> Sequence[Contribution]:  # type: ignore[empty-body]
    """Conversation templates. `load` names an instance of `llava_core.data.templates.Template`."""


@hookspec
def llava_register_trackers() -> Sequence[Contribution]:  # type: ignore[empty-body]
    """Metric trackers. `load` names a callable `(run_folder) -> llava_core.train.metrics.Tracker`."""


KINDS = {
    "backend": "llava_register_backends",
    "reader": "llava_register_readers",
    "template": "llava_register_templates",
    "tracker": "llava_register_trackers",
}
