"""Micro-batches of one rank, read and drawn for ahead while the model computes.

That is done by a thread, or by processes where it is too slow for the model; both give the same
batches, since every step is read by itself.
"""

from __future__ import annotations

import resource
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

import torch
from torch.utils.data import DataLoader, Dataset

from streamdit.errors import UserError
from streamdit.text.base import TextStates
from training.config import DataConfig
from training.data import Batch, LatentDataset
from training.objective import Draw, Draws, stack_draws
from training.order import BatchOrder, sample_generator


class BatchLoader(Dataset[list[Batch] | UserError]):
    """Micro-batches of one rank, a list per step; as a map from step to that list, picklable.

    Args:
        dataset: clips to read.
        order: which clips a step takes.
        frames: latent frames of the model's buffer.
        rank: this worker.
        world_size: number of workers; rank r takes the r-th slice of every global batch.
        micro_batch: clips per micro-batch.
        config: how to read ahead.
        draw: makes each clip's draws for the objective; default: batches have none.
        run_steps: steps of the whole run, which the progress that is drawn for is a share of.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        order: BatchOrder,
        frames: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        config: DataConfig | None = None,
        draw: Draw | None = None,
        run_steps: int = 1,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.frames = frames
        self.micro_batch = micro_batch
        self.config = config or DataConfig()
        self.draw = draw
        self.run_steps = run_steps
        share = order.global_batch // world_size
        self._slice = range(rank * share, (rank + 1) * share)
        self._null_text = dataset.null_text()

    def steps(
        self, first: int, last: int, device: torch.device | None = None
    ) -> Iterator[list[Batch]]:
        """Micro-batches of steps `first` ... `last - 1`, on `device` (default: the CPU)."""
        cuda = device is not None and device.type == "cuda"
        if self.config.processes:
            steps = self._by_processes(range(first, last), pin=cuda)
        else:
            steps = self._by_thread(range(first, last), pin=cuda)
        return _copied_ahead(steps, device) if device is not None and cuda else steps

    def __getitem__(self, step: int) -> list[Batch] | UserError:
        """Micro-batches of a step; a mistake in the data is handed on, not raised.

        (A loader process would wrap what it raises into a traceback.)
        """
        try:
            return self.load(step)
        except UserError as error:
            return error

    def load(self, step: int) -> list[Batch]:
        """Micro-batches of a step."""
        clips = self.order.batch(step)
        return [
            self.collate(clips, list(self._slice[start : start + self.micro_batch]), step)
            for start in range(0, len(self._slice), self.micro_batch)
        ]

    def collate(self, clips: Sequence[int], indices: list[int], step: int) -> Batch:
        """The clips of a global batch at `indices`, as one micro-batch."""
        samples = [
            self.dataset.sample(
                int(clips[index]),
                self.frames,
                sample_generator(self.order.seed, step, index, "window"),
            )
            for index in indices
        ]
        latents = torch.stack([sample["latents"] for sample in samples])
        return Batch(
            latents,
            TextStates.collate([sample["text"] for sample in samples]),
            self._null_text,
            [sample["clip_id"] for sample in samples],
            indices,
            self._draws(latents.shape[1:], indices, step),
        )

    def _draws(self, latent_shape: torch.Size, indices: list[int], step: int) -> Draws:
        """Draws of the clips at `indices`; a pure function of (seed, step, index)."""
        if self.draw is None:
            return {}
        generators = (sample_generator(self.order.seed, step, index, "draws") for index in indices)
        progress = step / self.run_steps
        return stack_draws([self.draw(latent_shape, each, progress) for each in generators])

    def _by_thread(self, steps: range, pin: bool) -> Iterator[list[Batch]]:
        def load(step: int) -> list[Batch]:
            batches = self.load(step)
            return [batch.pin_memory() for batch in batches] if pin else batches

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
            pending: deque[Future[list[Batch]]] = deque()
            for position in range(len(steps)):
                for step in steps[position + len(pending) : position + 1 + self.config.ahead]:
                    pending.append(pool.submit(load, step))
                yield pending.popleft().result()

    def _by_processes(self, steps: range, pin: bool) -> Iterator[list[Batch]]:
        if not steps:  # as in a run that has only to export; PyTorch refuses to start no process
            return
        loader: DataLoader[list[Batch] | UserError] = DataLoader(
            self,
            sampler=steps,
            batch_size=None,
            num_workers=min(self.config.processes, len(steps)),
            prefetch_factor=self.config.ahead,
            pin_memory=pin,
            # A fork would copy threads and accelerator contexts in whatever state they are.
            multiprocessing_context="forkserver",
            worker_init_fn=_prepare_process,
        )
        with _sigterm_held_back():
            loaded = iter(loader)
        for process in loaded._workers:
            # How Python ends them as it exits itself; what they do not hear it would wait for.
            process._popen.terminate = process._popen.kill
        for batches in loaded:
            if isinstance(batches, UserError):
                raise batches
            yield batches


def _prepare_process(worker: int) -> None:
    """Leave Ctrl-C to the trainer, which ends its loader processes itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    allow_open_files()


@contextmanager
def _sigterm_held_back() -> Iterator[None]:
    """Processes that start meanwhile never get SIGTERM.

    torchrun sends it to all processes of a worker's group, and the trainer needs its loaders up to
    the step at which it stops.
    """
    # First: it ignores SIGTERM by itself, and its start ends by letting the signal through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def allow_open_files() -> None:
    """As many as the machine lets a process have: every tensor from a loader process is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS names a limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _copied_ahead(steps: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Copy each step's batches to a GPU on a stream of its own, one step ahead of their use."""
    stream = torch.cuda.Stream(device)
    ready: tuple[list[Batch], torch.cuda.Event] | None = None
    for batches in steps:
        with torch.cuda.stream(stream):
            copied = [batch.to(device) for batch in batches]
            done = stream.record_event()
        if ready is not None:
            yield _taken_over(*ready, device)
        ready = copied, done
    if ready is not None:
        yield _taken_over(*ready, device)


def _taken_over(batches: list[Batch], done: torch.cuda.Event, device: torch.device) -> list[Batch]:
    """Let the current stream use what the copying stream made."""
    current = torch.cuda.current_stream(device)
    current.wait_event(done)
    return [batch.used_by(current) for batch in batches]
