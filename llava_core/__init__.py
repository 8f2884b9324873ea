"""Train LLaVA models with one script and the same numbers on every accelerator.

    import llava_core

    config = llava_core.load_config("llava15-7b-sft", ["model.path=…", "data.path=…", "data.images=…"])
    result = llava_core.train_model(config)
    print(llava_core.load_assistant(result.export).ask("What is this?", "photo.jpg"))

Importing this package loads neither torch nor any other library: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_core.api import load_assistant
    from llava_core.config import RunConfig, build_config, load_config
    from llava_core.errors import LlavaError
    from llava_core.inference.assistant import Assistant
    from llava_core.inference.sampling import GenerationSettings
    from llava_core.plugins import Registry
    from llava_core.train.loop import RunResult, train_model

_HOMES = {
    "Assistant": "llava_core.inference.assistant",
    "GenerationSettings": "llava_core.inference.sampling",
    "LlavaError": "llava_core.errors",
    "Registry": "llava_core.plugins",
    "RunConfig": "llava_core.config",
    "RunResult": "llava_core.train.loop",
    "build_config": "llava_core.config",
    "load_assistant": "llava_core.api",
    "load_config": "llava_core.config",
    "train_model": "llava_core.train.loop",
}

__all__ = [
    "Assistant",
    "GenerationSettings",
    "LlavaError",
    "Registry",
    "RunConfig",
    "RunResult",
    "build_config",
    "load_assistant",
    "load_config",
    "train_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
