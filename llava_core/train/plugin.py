"""The trackers that come with llava-core, registered as any plugin registers its own."""

from __future__ import annotations

from llava_core.plugins import Contribution, hookimpl


@hookimpl
def llava_register_trackers() -> list[Contribution]:
    return [
        Contribution(
            "tensorboard", "llava_core.train.trackers:TensorboardTracker", "TensorBoard event files", api_version=1
        )
    ]
