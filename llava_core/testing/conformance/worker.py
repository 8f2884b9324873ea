"""What the checks run in processes of their own. Its arguments are a task and JSON; it prints one line of JSON."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

MISSING = object()
HEAVY = ("torch", "transformers", "numpy")


def import_plugin(arguments: Mapping[str, Any]) -> list[str]:
    """The heavy packages that importing the plugin's module loads."""
    importlib.import_module(arguments["module"])
    return sorted(name for name in HEAVY if name in sys.modules)


def probe(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a probe answers, and whether the device has a context after it (None: PyTorch cannot tell)."""
    import torch

    from llava_core.plugins.registry import resolve

    kind = resolve(arguments["backend"])
    kind()
    found = kind.probe()
    return {"reason": found.reason, "devices": len(found.devices), "context": _has_context(torch, kind.device_type)}


def _has_context(torch: Any, device_type: str) -> bool | None:
    if device_type == "cpu":
        return False  # the host needs none
    known = getattr(torch.get_device_module(device_type), "is_initialized", None)
    return None if known is None else bool(known())


def collectives(arguments: Mapping[str, Any]) -> dict[str, str]:
    """By dtype, what a sum, a broadcast and a gather over every process got wrong; empty where nothing."""
    import torch
    from torch import distributed

    from llava_core.plugins.registry import resolve

    backend, rank, size = resolve(arguments["backend"])(), arguments["rank"], arguments["size"]
    device = backend.open(rank, threads=1, deterministic=True)
    store = distributed.FileStore(arguments["store"], size)
    # The peer may start much later on a busy machine; one that died is not waited for longer.
    wait = timedelta(seconds=120)
    distributed.init_process_group(backend.dist.process_group, store=store, rank=rank, world_size=size, timeout=wait)
    wrong = {}
    try:
        for dtype in sorted(backend.dist.reduce_dtypes, key=str):
            # Whole numbers small enough to be exact in every dtype, and different in every place and process.
            own = [torch.arange(1, 9, device=device, dtype=dtype) + 8 * r for r in range(size)]
            total, sent = own[rank].clone(), own[rank].clone()
            gathered = torch.empty(8 * size, device=device, dtype=dtype)
            distributed.all_reduce(total)
            distributed.broadcast(sent, src=size - 1)
            distributed.all_gather_into_tensor(gathered, own[rank])
            answers = {"sum": total, "broadcast": sent, "gather": gathered}
            right = {"sum": torch.stack(own).sum(0, dtype=dtype), "broadcast": own[-1], "gather": torch.cat(own)}
            bad = [name for name, found in answers.items() if not torch.equal(found, right[name])]
            wrong[str(dtype).removeprefix("torch.")] = ", ".join(bad)
    finally:
        distributed.destroy_process_group()
    return wrong


def patch(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Apply and undo a patch: why it was refused, whether its target changed, and what was not as before in the end."""
    from llava_core.errors import PatchRefused
    from llava_core.plugins.registry import resolve

    backend = resolve(arguments["backend"])()
    backend.open(0, threads=1, deterministic=True)
    (chosen,) = [patch for patch in backend.patches() if patch.name == arguments["patch"]]
    chosen.load()
    address, _, attribute = chosen.target.rpartition(".")
    owner = resolve(address)
    before, refused, changed = dict(vars(owner)), "", False
    try:
        undo = chosen.apply()
        changed = vars(owner).get(attribute) is not before.get(attribute)
        undo()
    except PatchRefused as reason:
        refused = str(reason)
    after = vars(owner)
    left = [name for name in before | after if before.get(name, MISSING) is not after.get(name, MISSING)]
    return {"refused": refused, "changed": changed, "left": sorted(left)}


TASKS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "import_plugin": import_plugin,
    "probe": probe,
    "collectives": collectives,
    "patch": patch,
}

if __name__ == "__main__":
    print("\n" + json.dumps(TASKS[sys.argv[1]](json.loads(sys.argv[2]))))
