"""Data parallel by FSDP2: which modules are gathered and freed together, in which dtype, and what is summed when."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from llava_core.backend import Backend
from llava_core.config.parallel import ParallelConfig
from llava_core.engine.mesh import Mesh
from llava_core.engine.parts import Region, laid_out_like, local_part
from llava_core.model.llava import Llava
from llava_core.weights.rows import Sliceable

REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sharding:
    """How data-parallel processes share a model.

    Attributes:
        keep_weights: each process keeps whole weights between forward and backward; gradients and optimizer state stay
            sharded.
        reduce_dtype: in which gradients are summed.
        offload: parameters, their gradients and the optimizer's state are kept on the host.
    """

    keep_weights: bool
    reduce_dtype: torch.dtype
    offload: OffloadPolicy = field(default_factory=OffloadPolicy)

    @classmethod
    def of(cls, config: ParallelConfig, backend: Backend) -> Sharding:
        """From the config's words. A replica is sharded over one process, so that there is one way for all."""
        offload = CPUOffloadPolicy(pin_memory=backend.pins_memory) if config.offload else OffloadPolicy()
        return cls(config.data != "full", REDUCE_DTYPES[config.reduce_dtype], offload)


def shard_data(model: Llava, mesh: Mesh, sharding: Sharding) -> None:
    """Make every parameter a DTensor over the mesh's data axes; on the meta device or with weights.

    A layer is a unit, and so are the rest of the tower, the projector and, as the root, what is left: the embedding,
    the last norm and the head. A unit is of one part of the model, so all of it learns or none of it.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype, reduce_dtype=sharding.reduce_dtype, cast_forward_inputs=False
    )
    # It warns of in-place changes to what a unit returns, where that is a view; no module here changes its input.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    axes = mesh.weights
    # For the root, which is used first and last, torch's own choice is to keep the weights.
    free = False if sharding.keep_weights else None
    for unit in (*units(model), model):
        sharded = fully_shard(
            unit, mesh=axes, mp_policy=precision, offload_policy=sharding.offload, reshard_after_forward=free
        )
        # The sum: the weights of the labels divide by the labels of all processes already.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # else torch asks for a scaled sum, which few libraries have
    register_fsdp_forward_method(model, "hidden_states")


def part_of(parameter: nn.Parameter, tensor: Sliceable) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """This process's part of a parameter's whole tensor, and what lays such a part out as the parameter is."""
    region = local_part(parameter).region
    return tensor[region.within(Region.whole(tensor.shape))], partial(laid_out_like, parameter)


def units(model: Llava) -> Iterator[nn.Module]:
    """The modules whose weights are gathered together, children before parents; without the root.

    Each of them is run: in a pipeline torch ends the backward pass of every unit, which fails on one that was never
    gathered. The tower's layers above the chosen features are gathered with the rest of it.
    """
    if hasattr(model, "vision_tower"):
        transformer = model.vision_tower.vision_model
        yield from transformer.encoder.layers[: transformer.spec.num_layers_run]
        yield model.vision_tower
        if any(True for _ in model.multi_modal_projector.parameters()):
            yield model.multi_modal_projector
    yield from model.language_model.model.layers.values()


def sum_gradients_now(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass also sums over replicas; shards are summed in each, for no process keeps whole
    gradients."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(now)
        model.set_is_last_backward(now)


def free_gathered(model: nn.Module) -> None:
    """Frees weights that a forward pass gathered and no backward pass will free."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
