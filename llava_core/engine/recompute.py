"""What layers keep of a forward pass for the backward pass: all of it, less, or in another place.

The model does not know: each layer's `forward` is replaced by one that does the same and keeps something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from llava_core.engine.kept import LayerMemory, Store
from llava_core.model.decoder import DecoderLayer, Mlp
from llava_core.model.layers import LayerNorm, Linear, RmsNorm
from llava_core.model.llava import Llava
from llava_core.model.vision import VisionMlp

Recompute = Literal["none", "selective", "full"]

COMPILER = "inductor"
"""torch.compile's own default."""


@dataclass(frozen=True)
class Keeping:
    """What layers keep.

    Attributes:
        recompute: `none`: all that PyTorch saves; `selective`: the results of matrix products and attention, while
            norms, activations and casts are done again; `full`: a layer's input, and the whole layer is done again.
        num_layers: so many of the decoder's first layers; None for all. The others keep all.
        store: where what is kept goes until the backward pass; None for nowhere.
        compiled: the decoder's layers are compiled.
    """

    recompute: Recompute = "none"
    num_layers: int | None = None
    store: Store | None = None
    compiled: bool = False

    def of_layer(self, index: int) -> Recompute:
        """How the decoder's layer of this index, of the whole model's, is recomputed."""
        return self.recompute if self.num_layers is None or index < self.num_layers else "none"


def arrange_layers(model: Llava, keeping: Keeping) -> None:
    """Have the decoder's layers, and those of a tower that learns, keep what they are told to, in place.

    After what replaces modules inside of layers, and before what gathers a layer's weights for its passes: then these
    are there, too, when a layer is done again.
    """
    for layer in model.language_model.model.layers.children():
        assert isinstance(layer, DecoderLayer)
        own = replace(keeping, recompute=keeping.of_layer(layer.self_attn.layer))
        if keeping.compiled:
            backend: Any = _compile_selective if own.recompute == "selective" else COMPILER
            layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)  # type: ignore[method-assign]
        _arrange(layer, own)
    for layer in _learning_tower_layers(model):
        _arrange(layer, replace(keeping, compiled=False))


def _compile_selective(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A compiler that keeps what `selective` keeps: what is made in a graph cannot be forgotten from outside of it.

    By itself torch's keeps more, where it takes computing again for slower. This is the one switch for that, and not
    public (torch 2.7 to 2.13); the tests compare what is kept.
    """
    with functorch_config.patch(aggressive_recomputation=True):
        compiled: Callable[..., Any] = lookup_backend(COMPILER)(graph, inputs)
        return compiled


def _learning_tower_layers(model: Llava) -> Iterator[nn.Module]:
    tower = model.vision_tower if hasattr(model, "vision_tower") else None
    if tower is not None and any(p.requires_grad for p in tower.parameters()):
        yield from tower.vision_model.encoder.layers


def _arrange(layer: nn.Module, keeping: Keeping) -> None:
    if keeping.recompute == "full":
        draws = any(isinstance(module, nn.Dropout) for module in layer.modules())
        layer.forward = _again(layer.forward, draws=draws)
    forgets = keeping.recompute == "selective" and not keeping.compiled
    if forgets or keeping.store is not None:
        memory = LayerMemory(keeping.store)
        if forgets:
            _forget_steps(layer, memory)
        layer.forward = _keeping(layer, memory)


def _again(forward: Callable[..., Tensor], *, draws: bool) -> Callable[..., Tensor]:
    """Keeps the arguments alone, and of a layer that draws random numbers their state."""

    @wraps(forward)
    def done_again(*arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        # Putting back the state of what draws numbers is work that most layers, which draw none, do without.
        result: Tensor = checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=draws)
        return result

    return done_again


def _keeping(layer: nn.Module, memory: LayerMemory) -> Callable[..., Tensor]:
    forward = layer.forward

    @wraps(forward)
    def kept(x: Tensor, *shared: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x, *shared)
        with memory.keeping([*layer.parameters(), *_tensors(shared)]):
            return forward(x, *shared)

    return kept


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _forget_steps(layer: nn.Module, memory: LayerMemory) -> None:
    """Norms, activations, and casts of weights: cheap beside matrix products, and as large as what these make."""
    for module in layer.modules():
        if isinstance(module, RmsNorm | LayerNorm):
            module.forward = memory.forgetting(module.forward)  # type: ignore[method-assign]
        elif isinstance(module, Linear):
            module.cast = memory.forgetting(module.cast)
        elif isinstance(module, Mlp):
            module.ops = replace(module.ops, swiglu=memory.forgetting(module.ops.swiglu))
        elif isinstance(module, VisionMlp):
            module.activation = memory.forgetting(module.activation)
