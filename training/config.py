"""Typed configuration of a training run; presets are `configs/train/*.yaml`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from streamdit.config import DiTConfig, PartitionConfig, SamplingConfig, StrictModel
from streamdit.errors import UserError
from streamdit.partition import PartitionMixture, PartitionScheme
from streamdit.schemes import cold_start_problem
from training.weighting import LossWeighting


class OptimizerConfig(StrictModel):
    """AdamW and its learning rate."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's moments."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise from 0 to the peak."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall along a cosine to `final_share` of the peak."""
    final_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak that the cosine ends at."""
    fused: bool | None = Field(default=None, exclude_if=lambda fused: fused is None)
    """AdamW as one kernel, which reads and writes everything once and takes no memory of its own;
    default: on CUDA. The numbers are the same up to rounding."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 leaves gradients as they are."""


class CheckpointConfig(StrictModel):
    """When to save the state of a run, and how many saved states to keep."""

    every: int = Field(default=500, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(default=2, gt=0)
    """Newest checkpoints that stay on disk."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints whose step is a multiple of this stay for good; 0 keeps none for good."""


class AdapterConfig(StrictModel):
    """Low-rank adapters: only they are trained, the model that they start from stays as it is."""

    rank: int = Field(default=16, gt=0)
    """Rank of the matrices that an adapter multiplies."""
    alpha: float | None = Field(default=None, gt=0)
    """An adapter's output is scaled by alpha / rank; default: the rank, for a scale of 1."""
    targets: tuple[str, ...] = Field(
        default=(
            "attention.qkv",
            "attention.output",
            "text_attention.to_query",
            "text_attention.to_key_value",
            "text_attention.output",
            "ffn.0",
            "ffn.2",
        ),
        min_length=1,
    )
    """Linear layers of every block that get an adapter, by the end of their names."""


class LaunchConfig(StrictModel):
    """How many worker processes Ray Train starts (torchrun and Slurm decide for themselves)."""

    workers: int = Field(default=1, gt=0)
    """Data-parallel worker processes."""
    use_gpu: bool = False
    """One GPU per worker, NCCL; otherwise gloo on CPUs."""
    cpus_per_worker: int = Field(default=1, gt=0)
    """CPUs reserved for, and threads used by, a worker (under any launcher)."""
    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """How Ray places the workers: on as few nodes as can be, on as many, or each on a node of its
    own."""
    max_failures: int = Field(default=0, ge=0)
    """How often Ray restarts the workers after a crash or SIGTERM, from the newest checkpoint."""


class TrackingConfig(StrictModel):
    """Where the run is recorded in MLflow."""

    uri: str | None = None
    """Tracking server. Default: the environment's MLFLOW_TRACKING_URI, else an embedded store
    (SQLite file and artifact folder) in `directory`."""
    directory: str = "runs/mlflow"
    """Folder of the embedded store."""
    experiment: str = "streamdit"
    """MLflow experiment."""
    system_every_s: float = Field(default=10.0, ge=0)
    """Seconds between samples of each machine's load; 0 takes none."""


class ValidationConfig(StrictModel):
    """Loss on held-out clips, with the same draws every time."""

    every: int = Field(default=500, gt=0)
    """Steps between validations; the last step is always validated."""
    samples: int = Field(default=64, ge=0)
    """Held-out clips per validation (fewer if the data set has fewer); 0 switches it off."""
    videos: int = Field(default=0, ge=0)
    """Videos streamed for held-out captions per validation, into the MLflow run."""


class DataConfig(StrictModel):
    """Reading of the data set, beside the model's work."""

    processes: int = Field(default=0, ge=0)
    """Loader processes per worker; 0 reads in a thread. More help when `data wait` is not near 0%,
    and each takes a CPU and its own cache of shards."""
    ahead: int = Field(default=2, gt=0)
    """Steps that the thread, or each process, reads ahead."""
    cache_mb: float = Field(default=1024.0, gt=0)
    """Megabytes of shards that the thread, or each process, keeps; they are read more than once an
    epoch if that is less than 1.5 times `shuffle_mb` for every bucket."""


class RunConfig(StrictModel):
    """What every run of the trainer has, whatever its objective."""

    free_parts: ClassVar[dict[str, Any]] = {}
    """Of the settings that an objective adds, those that may change between parts of a run, with
    what stands for them in the run's identity."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    global_batch: int = Field(gt=0)
    """Clips per optimizer step, over all workers."""
    micro_batch: int | None = Field(default=None, gt=0)
    """Most clips per worker and forward pass; default: what the worker gets, all at once."""
    autoencoder: Literal["causal", "wan"] | None = None
    """Kind of autoencoder that the data set must have been encoded with; default: any that fits."""
    seed: int = Field(default=0, ge=0)
    """Seed of initial weights, data order and every draw."""
    shuffle_mb: float = Field(default=512.0, gt=0)
    """Megabytes of shards that clips are shuffled among at a time; smaller data sets are shuffled
    as a whole. More needs more memory (`data.cache_mb`)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning rate."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights that are exported; 0 exports the last weights."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations; master weights and moments are float32."""
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage: shards optimizer state (1), gradients (2), parameters (3)."""
    offload_optimizer: bool = False
    """Keep float32 weights and moments in the memory of the host, and update them there."""
    activation_checkpointing: bool | Annotated[int, Field(ge=0)] = False
    """Recompute activations in the backward pass to save memory: of all blocks, or of the first so
    many; `streamdit describe` tells how many it takes."""
    compile_blocks: bool = Field(default=False, exclude_if=lambda on: not on)
    """Compile the transformer's blocks with `torch.compile`, forward and backward; the first steps
    take minutes, and `streamdit bench train --compile` tells whether it pays. Not with
    `zero_stage: 3`, nor with adapters."""
    skip_limit: int = Field(default=10, gt=0)
    """Steps in a row that may be skipped for a loss or gradient that is not finite; then the run
    stops."""
    lora: AdapterConfig | None = None
    """Train adapters on the model to start from instead of all its weights; default: all."""
    log_every: int = Field(default=10, gt=0)
    """Steps between log lines."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saved states."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out loss."""
    data: DataConfig = DataConfig()
    """Reading."""
    launch: LaunchConfig = LaunchConfig()
    """Worker processes."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""

    @model_validator(mode="after")
    def _check_compiled(self) -> RunConfig:
        if self.compile_blocks and self.zero_stage == 3:
            raise ValueError(
                "compile_blocks needs whole weights, which zero_stage: 3 gathers layer by layer; "
                "set zero_stage: 2, or compile_blocks: false"
            )
        if self.compile_blocks and self.lora is not None:
            raise ValueError(
                "compile_blocks does not go with adapters (lora); set compile_blocks: false"
            )
        return self

    def accumulation(self, world_size: int) -> tuple[int, int]:
        """Micro-batch size and accumulation steps on `world_size` workers.

        The micro-batch is the largest that divides a worker's share and is at most `micro_batch`.

        Raises:
            UserError: if the workers cannot have equal shares of the global batch.
        """
        share, rest = divmod(self.global_batch, world_size)
        if rest or not share:
            raise UserError(
                f"global_batch {self.global_batch} is not divisible by {world_size} workers; "
                "change global_batch or the number of workers"
            )
        largest = min(self.micro_batch or share, share)
        micro = next(size for size in range(largest, 0, -1) if share % size == 0)
        return micro, share // micro


class TrainConfig(RunConfig):
    """One stage of training with buffered flow matching."""

    model: DiTConfig
    """Shape of the transformer; that of the parent when starting from a model directory."""
    partition: PartitionConfig
    """Mix of partitions and noise schedule."""
    sampling: SamplingConfig
    """How the trained model is sampled by default."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose caption is replaced by the empty one, for guidance."""
    loss_weighting: LossWeighting = Field(default="uniform", exclude_if=lambda w: w == "uniform")
    """How the loss of a frame counts by its noise level: all alike, or weighted by a density that
    favours the middle of the path, `logit-normal` or `cosmap` (arXiv:2403.03206), over what γ
    draws. Losses per chunk size and noise segment are logged without it."""

    @model_validator(mode="after")
    def _check_schemes(self) -> TrainConfig:
        frames = self.model.buffer_frames
        mixture = PartitionMixture(self.partition, frames)
        scheme = PartitionScheme.from_sampling(frames, self.sampling)
        if not mixture.serves(scheme):
            raise ValueError(
                f"sampling with K={scheme.K} c={scheme.c} is not in the training mix "
                f"({mixture.describe()}); add it to partition.entries or change sampling"
            )
        problem = cold_start_problem(self.partition, frames, self.sampling)
        if problem:
            raise ValueError(f"the model could not start a stream: {problem}")
        return self
