"""Every setting of a run, typed and frozen. A key that does not exist is an error, and so is a wrong type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llava_core.config.data import DataConfig, ValidationConfig
from llava_core.config.lora import LoraConfig
from llava_core.config.parallel import ParallelConfig
from llava_core.config.section import (
    NOT_GIVEN,
    Beta,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Section,
)

Part = Literal["vision", "projector", "language"]


class ModelConfig(Section):
    """Where the model comes from: `path` alone, or `vision` and `language` (and a `projector`)."""

    path: Path | None = Field(None, description="a Hugging Face LLaVA or language-model folder")
    vision: Path | None = Field(None, description="a CLIP or SigLIP folder")
    language: Path | None = Field(None, description="a Llama, Mistral or InternLM2 folder")
    projector: Path | None = Field(
        None, description="projector weights: a LLaVA folder, mm_projector.bin or XTuner's; else fresh"
    )
    projector_type: str = Field("mlp2x_gelu", description="linear, identity or mlpNx_gelu, for a composed model")
    vision_feature_layer: Annotated[int, Number] = Field(
        -2, description="which hidden state of the tower, for a composed model"
    )
    vision_feature_select: Literal["default", "full"] = Field("default", description="without or with the class token")
    image_grid_pinpoints: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        (), description="for a composed LLaVA-NeXT: the (height, width) at which images are divided"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.path is not None:
            fields = type(self).model_fields
            clashing = sorted(k for k in COMPOSED_ONLY if getattr(self, k) != fields[k].default)
            if clashing:
                raise ValueError(f"path names a whole model, so {', '.join(clashing)} cannot be set beside it")
        elif self.vision is None or self.language is None:
            raise PydanticCustomError(NOT_GIVEN, "set path (a whole model), or vision and language (to compose one)")
        return self


COMPOSED_ONLY = (
    "vision",
    "language",
    "projector",
    "projector_type",
    "vision_feature_layer",
    "vision_feature_select",
    "image_grid_pinpoints",
)


class BatchConfig(Section):
    """How an optimizer step is made up: of `global_size` samples, in micro-batches of one of two kinds."""

    global_size: PositiveInt = Field(description="samples of one optimizer step")
    micro_tokens: PositiveInt | None = Field(None, description="packed micro-batches of at most so many tokens")
    micro_size: PositiveInt | None = Field(None, description="padded micro-batches of so many samples")

    @model_validator(mode="after")
    def _one_kind(self) -> BatchConfig:
        if (self.micro_tokens is None) == (self.micro_size is None):
            message = "set exactly one of micro_tokens (packed) and micro_size (padded)"
            raise PydanticCustomError(NOT_GIVEN, message) if self.micro_size is None else ValueError(message)
        if self.micro_size is not None and self.global_size % self.micro_size:
            raise ValueError(f"global_size {self.global_size} is not a multiple of micro_size {self.micro_size}")
        return self


class LearningRates(Section):
    """A learning rate for each part that has its own; the others take `optimizer.learning_rate`."""

    vision: PositiveFloat | None = None
    projector: PositiveFloat | None = None
    language: PositiveFloat | None = None


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = Field(description="the peak, for every part without one of its own")
    part_learning_rates: LearningRates = LearningRates()
    weight_decay: NonNegativeFloat = Field(0.0, description="not applied to biases and norms")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat | None = Field(1.0, description="largest global gradient norm; null for no limit")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction | None = Field(None, description="linear warm-up over this share of the run")
    warmup_steps: NonNegativeInt | None = Field(None, description="linear warm-up over so many steps")
    warmup_tokens: NonNegativeInt | None = Field(None, description="the same in tokens, for train.max_tokens")
    final_fraction: Fraction = Field(0.0, description="the learning rate at the end, as a share of the peak")

    @model_validator(mode="after")
    def _one_warmup(self) -> OptimizerConfig:
        if sum(given is not None for given in (self.warmup_fraction, self.warmup_steps, self.warmup_tokens)) > 1:
            raise ValueError("set at most one of warmup_fraction, warmup_steps and warmup_tokens")
        if self.schedule == "constant" and self.final_fraction != 0.0:
            raise ValueError("final_fraction means nothing under schedule constant: leave it out")
        return self


class TrainConfig(Section):
    """The loop."""

    trainable: tuple[Part, ...] = Field(description="which parts learn; the others are frozen")
    epochs: PositiveInt | None = Field(None, description="passes over the data")
    max_steps: PositiveInt | None = Field(
        None, description="optimizer steps; stops earlier than epochs if both are set"
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="text and image tokens to train on, padding not counted: the run ends with the step that reaches "
        "them, and its learning rate follows them; in place of epochs and max_steps",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: what the hardware does best")
    loss: Literal["token_mean", "micro_batch_mean", "sequence_mean"] = Field(
        "token_mean",
        description="mean over the step's tokens; of micro-batch means (the original's); of sequence means",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="what the backward pass computes again, to save memory: nothing; what is cheap (norms, "
        "activations, casts); or whole layers",
    )
    recompute_layers: PositiveInt | None = Field(
        None, description="so many of the decoder's first layers, the others keep all; null recomputes in each"
    )
    offload_activations: bool = Field(
        False, description="keep in the host's memory what layers keep from the forward to the backward pass"
    )
    compile: bool = Field(False, description="torch.compile each decoder layer")
    deterministic: bool = Field(True, description="only kernels that give the same bits for the same input")
    seed: Annotated[int, Number, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainConfig:
        if self.epochs is None and self.max_steps is None and self.max_tokens is None:
            raise PydanticCustomError(NOT_GIVEN, "set epochs, max_steps or max_tokens: a run needs an end")
        clashing = [key for key in ("epochs", "max_steps") if getattr(self, key) is not None]
        if self.max_tokens is not None and clashing:
            raise ValueError(
                f"max_tokens says when the run ends, and the learning rate follows it: set {' and '.join(clashing)} to "
                "null, or leave it out"
            )
        if not self.trainable or len(set(self.trainable)) != len(self.trainable):
            raise ValueError(f"trainable = {list(self.trainable)}: name at least one part, each once")
        if self.recompute_layers is not None and self.recompute == "none":
            raise ValueError("recompute_layers counts layers that recompute: set recompute to selective or full, too")
        return self


class CheckpointConfig(Section):
    """State checkpoints, from which a run resumes exactly."""

    every_steps: PositiveInt | None = Field(None, description="save at these intervals; null: only when interrupted")
    asynchronous: bool = Field(
        False, description="train on while the state is written; takes host memory for a copy of what is saved"
    )
    keep: PositiveInt | None = Field(2, description="how many to keep; null keeps all")
    resume: bool = Field(True, description="go on from the newest complete checkpoint in the output folder")

    @model_validator(mode="after")
    def _saves_while_training(self) -> CheckpointConfig:
        if self.asynchronous and self.every_steps is None:
            raise ValueError("asynchronous saves during the training: set every_steps, too, or leave it out")
        return self


class LogConfig(Section):
    """What a run shows and writes."""

    every_steps: PositiveInt = 1
    trackers: tuple[str, ...] = Field(("tensorboard",), description="registered trackers, beside metrics.jsonl")
    profile_steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="the first and the last step to record for a trace viewer"
    )

    @model_validator(mode="after")
    def _steps_in_order(self) -> LogConfig:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps = {list(self.profile_steps)}: the first comes after the last")
        return self


class BackendConfig(Section):
    """The hardware."""

    name: str | None = Field(
        None, description="a registered backend; null takes an accelerator that is available, else the CPU"
    )
    threads: PositiveInt | None = Field(None, description="host threads for compute; null lets the backend choose")
    kernels: dict[str, str] = Field(default_factory=dict, description="a kernel for a place in the model, by name")


class RunConfig(Section):
    """One training run."""

    output: Path = Field(description="the run's folder: metrics, checkpoints, plots and the export, in `hf`")
    model: ModelConfig
    data: DataConfig
    validation: ValidationConfig | None = None
    batch: BatchConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    lora: LoraConfig | None = Field(None, description="adapters that learn in place of a part's weights")
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    backend: BackendConfig = BackendConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.batch.micro_tokens is not None and self.batch.micro_tokens < self.data.max_length:
            raise ValueError(
                f"batch.micro_tokens {self.batch.micro_tokens} is below data.max_length {self.data.max_length}: "
                "the longest samples would fit no micro-batch"
            )
        by_tokens, warmup = self.train.max_tokens is not None, self.optimizer
        if by_tokens and warmup.warmup_steps is not None:
            raise ValueError(
                "optimizer.warmup_steps counts steps, and train.max_tokens makes the learning rate follow tokens: give "
                "warmup_tokens or warmup_fraction"
            )
        if not by_tokens and warmup.warmup_tokens is not None:
            raise ValueError(
                "optimizer.warmup_tokens counts tokens, and the run's length is given in steps: give warmup_steps or "
                "warmup_fraction, or train.max_tokens"
            )
        return self
