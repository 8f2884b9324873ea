"""How a run is spread over its processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llava_core.config.section import PositiveInt, Section


class ParallelConfig(Section):
    """How a run is spread over its processes: what the other axes leave of them is data parallel."""

    pipeline: PositiveInt = Field(1, description="so many processes have some of the layers each, one after the other")
    stages: PositiveInt | None = Field(
        None,
        description="with pipeline above 1: so many stages, several a process, interleaved; null: one each",
    )
    stage_layers: tuple[PositiveInt, ...] | None = Field(
        None, description="with pipeline above 1: decoder layers of each stage; null balances their work"
    )
    tensor: PositiveInt = Field(1, description="so many processes share each matrix of the language model")
    sequence: bool = Field(True, description="with tensor above 1: its norms and residuals are split by tokens, too")
    context: PositiveInt = Field(
        1, description="so many processes share the tokens of each micro-batch, and weights as with `data`"
    )
    data: Literal["full", "grad", "replicate"] = Field(
        "full",
        description="what data-parallel processes share: weights, gradients and optimizer state; all but the weights "
        "between forward and backward; or nothing",
    )
    replicas: PositiveInt | None = Field(
        None, description="with full or grad: so many groups of processes that each share a whole copy (hybrid)"
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field("fp32", description="in which gradients are summed over processes")
    offload: bool = Field(
        False, description="keep weights, gradients and optimizer state in the host's memory, where the update runs"
    )

    @model_validator(mode="after")
    def _stages_of_a_pipeline(self) -> ParallelConfig:
        if self.pipeline == 1 and (self.stages or self.stage_layers):
            raise ValueError("stages and stage_layers divide a pipeline: leave them out, or set pipeline above 1")
        if self.num_stages % self.pipeline:
            raise ValueError(f"stages = {self.stages}: {self.pipeline} processes cannot have equally many each")
        if self.stage_layers is not None and len(self.stage_layers) != self.num_stages:
            raise ValueError(f"stage_layers has {len(self.stage_layers)} numbers, for {self.num_stages} stages")
        return self

    @property
    def num_stages(self) -> int:
        """Into how many the layers are divided."""
        return self.stages or self.pipeline

    @model_validator(mode="after")
    def _copies_are_groups(self) -> ParallelConfig:
        if self.replicas is not None and self.data == "replicate":
            raise ValueError("replicas groups processes that share a copy: leave it out with data = replicate")
        return self
