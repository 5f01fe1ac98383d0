"""What `streamdit bench train` measures: a training step, with more and more blocks recomputed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from jobs.bench_rows import CEILING, Effort, Failures, Measured, Row, layer_shapes
from jobs.bench_subject import most_text_tokens, randomise
from jobs.console import progress
from jobs.measure import Timings, interleave, matmul_action, wait_for
from streamdit.errors import UserError
from streamdit.model import StreamDiT
from streamdit.text.base import TextStates
from training.config import TrainConfig
from training.data import Batch
from training.ema import ExponentialMovingAverage
from training.engine import World, build_engine, join_world
from training.failures import is_out_of_memory
from training.metrics import device_peak_flops, peak_memory_bytes, sample_cost
from training.objective import FlowMatching, stack_draws
from training.order import sample_generator

NONE_RECOMPUTED = "nothing recomputed"
COMPILED = "compiled blocks"
PARTS = 4
"""Tried are none, a quarter, half, three quarters and all of the blocks."""


class Setting(NamedTuple):
    """How a step is taken.

    Attributes:
        recomputed: blocks whose activations are recomputed, the first ones.
        compiled: whether blocks are compiled.
    """

    recomputed: int
    compiled: bool

    def name(self, depth: int) -> str:
        """As the table calls it."""
        some = f"{self.recomputed} of {depth} blocks recomputed"
        name = some if self.recomputed else NONE_RECOMPUTED
        return f"{name}, compiled" if self.compiled else name


class TrainingSubject:
    """The trainer's step on random latents: objective, DeepSpeed engine, averaged weights.

    Args:
        config: a training configuration whose whole global batch is one micro-batch.

    Raises:
        UserError: if there are several workers, adapters are to be trained, or model and optimizer
            do not fit into memory.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.world: World = join_world()
        if self.world.size > 1:
            raise UserError(
                "bench train measures one device; for several run "
                "`torchrun benchmarks/trainer_step.py`"
            )
        if config.lora is not None:
            raise UserError("bench train measures whole models; leave lora away")
        self.objective = FlowMatching(
            config.partition,
            config.model.buffer_frames,
            config.caption_dropout,
            self.world.device,
            config.loss_weighting,
        )
        with _out_of_memory_passes() as failed:
            self.batch = self._random_batch()
            self._build()
        if failed:
            raise _too_large(config)

    def _build(self) -> None:
        config = self.config
        # Drawn where it will be: billions of weights take a CPU minutes.
        with torch.device(self.world.device):
            module = StreamDiT(config.model)
        randomise(module, self.world.device)
        self.engine: Any = build_engine(module, config, self.world)
        self.average = ExponentialMovingAverage(self.engine, config.ema_decay)

    def rebuild(self) -> None:
        """A new engine, after one ran out of memory with gradients half done."""
        self.engine.destroy()  # its hooks would hold the weights
        del self.engine, self.average
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        self._build()

    def _random_batch(self) -> Batch:
        config, device = self.config, self.world.device
        bucket, clips = config.model.buckets[0], config.global_batch
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        def text(rows: int) -> TextStates:
            return TextStates(
                {
                    name: (random(rows, most_text_tokens(name), width), None)
                    for name, width in config.model.text.items()
                }
            )

        shape = (bucket.frames, config.model.latent_channels, bucket.height, bucket.width)
        draws = [
            self.objective.draw(torch.Size(shape), sample_generator(0, 0, index, "draws"), 0.0)
            for index in range(clips)
        ]
        batch = Batch(
            latents=random(clips, *shape),
            text=text(clips),
            null_text=text(1),
            clip_ids=[str(index) for index in range(clips)],
            sample_indices=list(range(clips)),
            draws=stack_draws(draws),
        )
        return batch.to(device)

    def step(self, setting: Setting) -> Callable[[], None]:
        """One optimizer step in this way."""

        def run() -> None:
            module = self.engine.module
            module.activation_checkpointing = setting.recomputed
            module.compile_blocks = setting.compiled
            loss, _ = self.objective(self.engine, self.batch, self.batch.draws)
            self.engine.backward(loss)
            self.engine.step()
            self.average.update()

        return run


def measure_training(subject: TrainingSubject, effort: Effort) -> Measured:
    """Time the steps that fit into memory; those that do not are named in a row without times.

    Operations are the model's: forward and backward count as three forward passes, what is
    recomputed does not count. The model FLOPs utilisation (MFU) is their rate by the device's
    dense bf16 peak, where that is known.
    """
    config, device = subject.config, subject.world.device
    depth = config.model.depth
    numbers = sorted({depth * part // PARTS for part in range(PARTS + 1)})
    failures = Failures()
    peaks = _try_each(subject, numbers, compiled=False)
    if effort.compiled:
        with failures.allowed(COMPILED):
            peaks |= _try_each(subject, numbers, compiled=True)
        if COMPILED in failures:
            subject.rebuild()
    fitting = [setting for setting, peak in peaks.items() if peak is not None]
    if not fitting:
        raise _too_large(config)
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    products, product_flops = matmul_action(
        layer_shapes(config.model, config.global_batch), device, dtype, repeats=3 * depth
    )
    actions: dict[str, Callable[[], object]] = {
        **{setting.name(depth): subject.step(setting) for setting in fitting},
        CEILING: products,
    }
    for action in actions.values():
        action()  # a new engine has no optimizer's state yet
    with progress("train", unit="rounds") as on_progress:
        timings = interleave(actions, device, on_progress=on_progress, **effort.bounds)
    ceiling = product_flops / timings[CEILING].percentile(50)
    bucket = config.model.buckets[0]
    lengths = {name: most_text_tokens(name) for name in config.model.text}
    cost = sample_cost(config.model, bucket.height, bucket.width, lengths)
    model_flops = 3 * config.global_batch * cost.flops
    peak = device_peak_flops(device) if config.precision == "bfloat16" else None
    lightest = timings[fitting[0].name(depth)]
    rows = []
    for setting, memory in peaks.items():
        name = setting.name(depth)
        if memory is None:
            rows.append(Row(name, None, None, None, None, verdict="does not fit"))
            continue
        rate = model_flops / timings[name].percentile(50)
        rows.append(
            Row(
                variant=name,
                p50_ms=timings[name].percentile(50),
                p95_ms=timings[name].percentile(95),
                versus_plain=lightest.ratio_to(timings[name]),
                fps=None,
                clips_per_second=1e3 * config.global_batch / timings[name].percentile(50),
                flops_per_second=1e3 * rate,
                share_of_ceiling=rate / ceiling,
                model_flops_utilisation=1e3 * rate / peak if peak else None,
                peak_bytes=memory if device.type == "cuda" else None,
            )
        )
    bare = timings[CEILING]
    rows += failures.rows()
    rows.append(
        Row(
            variant=CEILING,
            p50_ms=bare.percentile(50),
            p95_ms=bare.percentile(95),
            versus_plain=None,
            fps=None,
            flops_per_second=1e3 * ceiling,
        )
    )
    return Measured(rows, _ratios(timings, fitting, depth))


def _try_each(
    subject: TrainingSubject, numbers: Sequence[int], compiled: bool
) -> dict[Setting, int | None]:
    """Memory of a step for each number of recomputed blocks; None where it does not fit.

    The one that needs least goes first: whatever needs more than one that fails fails too. After
    one that fails the engine, whose gradients are half done, is made anew.
    """
    device = subject.world.device
    found: dict[Setting, int | None] = {Setting(blocks, compiled): None for blocks in numbers}
    with progress("prepare compiled" if compiled else "prepare", unit="variants") as on_progress:
        for done, setting in enumerate(reversed(found), 1):
            step = subject.step(setting)
            with _out_of_memory_passes() as failed:
                step()  # makes the optimizer's state too
                wait_for(device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                step()
                wait_for(device)
            if failed:
                _begin_again(subject)
                break
            found[setting] = peak_memory_bytes(device)
            on_progress(done, len(numbers), {})
    return found


def _begin_again(subject: TrainingSubject) -> None:
    """A new engine after one ran out of memory."""
    with _out_of_memory_passes() as failed:
        subject.rebuild()
    if failed:
        raise UserError(
            "the memory of a step that did not fit could not be had back; measure on a device that "
            "nothing else uses, or take a smaller --batch"
        )


@contextmanager
def _out_of_memory_passes() -> Iterator[list[str]]:
    """Collects that memory ran out inside, instead of raising it."""
    failed: list[str] = []
    try:
        yield failed
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed.append(str(error))


def _too_large(config: TrainConfig) -> UserError:
    return UserError(
        f"a batch of {config.global_batch} does not fit into the device's memory even with every "
        "block recomputed; lower --batch, set offload_optimizer=true, or take a smaller preset"
    )


def _ratios(
    timings: dict[str, Timings], fitting: Sequence[Setting], depth: int
) -> dict[str, float]:
    """What recomputing everything costs, and what compiling saves where least is recomputed."""
    eager, compiled = (
        [setting for setting in fitting if setting.compiled is mode] for mode in (False, True)
    )

    def ratio(one: Setting, other: Setting) -> dict[str, float]:
        mine, base = one.name(depth), other.name(depth)
        return {f"{mine} ÷ {base}": timings[mine].ratio_to(timings[base])}

    ratios = ratio(eager[-1], eager[0]) if len(eager) > 1 else {}
    return ratios | (ratio(compiled[0], eager[0]) if compiled and eager else {})
