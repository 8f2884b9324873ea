"""Every setting of a run, typed and frozen. A key that does not exist is an error, and so is a wrong type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llava_core.config.data_sets import SourceConfig, ValidationConfig
from llava_core.config.lora import LoraConfig
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


class DataConfig(Section):
    """What is trained on, and how a row becomes tokens: `path` alone, or several `sources`."""

    path: Path | None = Field(None, description="a data file, e.g. LLaVA JSON or JSONL")
    images: Path | None = Field(None, description="the folder that image paths are relative to")
    reader: str | None = Field(None, description="a registered reader; by the file's suffix if not given")
    template: str | None = Field(
        None,
        description="a registered conversation template, a YAML file of one, or `tokenizer` for the tokenizer's own; "
        "v1 if not given, and text where there are no conversations",
    )
    split: str | None = Field(None, description="which part of the data set, for a reader that knows parts")
    sources: tuple[SourceConfig, ...] = Field((), description="several data sets in place of path")
    image_aspect: Literal["square", "pad", "tiles", "anyres"] = Field(
        "pad",
        description="crop to a square, pad to one, or divide: into tiles, or at a LLaVA-NeXT's image_grid_pinpoints",
    )
    min_tiles: PositiveInt | None = Field(None, description="with image_aspect tiles: at least so many; 1 if not given")
    max_tiles: PositiveInt | None = Field(
        None,
        description="with image_aspect tiles: at most so many, and the whole image as one more",
    )
    max_length: PositiveInt = Field(2048, description="tokens of a sample, its visual tokens included")
    overlong: Literal["truncate", "drop", "split"] | None = Field(
        None,
        description="what becomes of a longer one; if not given, conversations are truncated and documents split",
    )
    order: Literal["shuffled", "sequential", "modality_length", "length_grouped"] = Field(
        "shuffled",
        description="modality_length: the original LLaVA's grouping by modality and length; length_grouped: XTuner's, "
        "over groups of several steps",
    )
    mega_batch_mult: PositiveInt | None = Field(
        None,
        description="with order length_grouped: steps of a group; null: 50, or fewer so that an epoch has four groups",
    )
    num_workers: NonNegativeInt = Field(0, description="processes that decode; 0 decodes in the trainer")
    max_bad_fraction: Fraction = Field(0.01, description="the run stops when more rows than this are unusable")
    max_image_pixels: PositiveInt = Field(100_000_000, description="larger images are refused before decoding")

    @model_validator(mode="after")
    def _tiles_have_limits(self) -> DataConfig:
        if self.image_aspect != "tiles":
            if self.min_tiles is not None or self.max_tiles is not None:
                raise ValueError("min_tiles and max_tiles limit image_aspect tiles: leave them out, or set it")
        elif self.max_tiles is None:
            raise PydanticCustomError(NOT_GIVEN, "set max_tiles, the limit of image_aspect tiles")
        elif (self.min_tiles or 1) > self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} is above max_tiles {self.max_tiles}")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> DataConfig:
        if not self.sources:
            if self.path is None:
                raise PydanticCustomError(NOT_GIVEN, "set path (one data set), or sources (several)")
            return self
        clashing = [key for key in ("path", "split") if getattr(self, key) is not None]
        if clashing:
            raise ValueError(f"sources has several data sets, so {', '.join(clashing)} cannot be set beside it")
        weighted = [number for number, source in enumerate(self.sources) if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise ValueError(f"sources {weighted} have a weight and others have none: give each one, or none")
        return self

    @model_validator(mode="after")
    def _groups_of_length_grouped(self) -> DataConfig:
        if self.mega_batch_mult is not None and self.order != "length_grouped":
            raise ValueError(f"mega_batch_mult means nothing under order {self.order}: leave it out")
        return self

    @property
    def inputs(self) -> tuple[SourceConfig, ...]:
        """The data sets, in the one form that both ways to give them become; `template` is left to whoever reads."""
        if self.path is not None:
            return (SourceConfig(path=self.path, images=self.images, reader=self.reader, split=self.split),)
        return tuple(
            source.model_copy(update={"images": source.images or self.images, "reader": source.reader or self.reader})
            for source in self.sources
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
