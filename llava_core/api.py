"""What `import llava_core` offers beyond the parts themselves: a model that answers, opened in one call."""

from __future__ import annotations

from pathlib import Path

from llava_core.backend import OpSet
from llava_core.data.templates import Template, open_template
from llava_core.engine.hardware import compute_dtype, open_hardware
from llava_core.engine.opset import Use, build_ops
from llava_core.inference.assistant import Assistant
from llava_core.inference.chat_template import OWN_TEMPLATE
from llava_core.model.spec import ModelSpec
from llava_core.plugins import Registry


def load_assistant(
    folder: str | Path,
    *,
    backend: str | None = None,
    precision: str = "auto",
    threads: int | None = None,
    template: str | None = None,
    registry: Registry | None = None,
) -> Assistant:
    """A model that answers questions: a run's `hf` folder, any Hugging Face LLaVA, or a language model.

    Args:
        backend: a registered backend; None takes an accelerator that is available, else the CPU.
        precision: `auto`, `bf16`, `fp16` or `fp32`.
        threads: host threads for compute; None lets the backend choose.
        template: a registered template or a YAML file; None or `tokenizer` for the folder's own chat template.

    Raises:
        LlavaError: the backend, the precision or the folder cannot be used.
    """
    registry = registry or Registry.discover()
    given: Template | None = None
    if template is not None and template != OWN_TEMPLATE:
        given = open_template(template, registry)
    hardware = open_hardware(backend, registry, threads=threads)
    dtype = compute_dtype(precision, hardware.backend)

    def ops_for(spec: ModelSpec) -> OpSet:
        use = Use(dtype, frozenset(), spec.text.max_positions, deterministic=False)
        return build_ops(spec, hardware.backend, use)[0]

    return Assistant.load(Path(folder), ops_for, device=hardware.device, compute_dtype=dtype, template=given)
