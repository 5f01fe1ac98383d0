"""Start a training job on Ray Train, or join one that torchrun or Slurm started."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.console import console, progress, say
from jobs.errors import Stopped, find_cause
from jobs.runtime import ray_runtime
from pipeline.lock import writing
from streamdit.errors import UserError
from training.config import LaunchConfig, RunConfig
from training.engine import join_world
from training.job import TrainJob
from training.loop import train_loop
from training.metrics import format_line
from training.network import use_interface_with
from training.records import send_left
from training.stop import Interrupted
from training.tracking import pinned

POLL_S = 0.5
WARNINGS_FILE = "warnings.log"
"""In a run's directory: what its workers on Ray warned of."""
OUR_LOGGERS = ("streamdit", "pipeline", "training", "distillation")


def launch(job: TrainJob, address: str | None = None) -> Path:
    """Run `job` to its end and return the model directory.

    Under torchrun or Slurm this process is one of the workers already; otherwise Ray Train starts
    them. A job whose model directory is finished is not run again.

    Raises:
        UserError: if something does not fit, or Ray cannot be reached.
    """
    job = replace(job, config=_with_pinned_store(job.config))
    job.config.accumulation(number_of_workers(job.config))
    if finished(job):
        say_once(f"{job.run_name}: {job.model_directory} is finished already")
        catch_up(job)
        return job.model_directory
    with _alone(job) if is_main_process() else nullcontext():
        if "RANK" in os.environ:
            with follow(job) if is_main_process() else nullcontext():
                _join(job)
        else:
            with ray_runtime(address), follow(job):
                _fit(job, own_runtime=not (address or os.environ.get("RAY_ADDRESS")))
    return job.model_directory


def finished(job: TrainJob) -> bool:
    """Whether a job's model is there; the same for all workers, whatever each of them sees."""
    if "RANK" not in os.environ:
        return job.finished()
    return join_world().gather(job.finished())[0]


def _alone(job: TrainJob) -> AbstractContextManager[None]:
    """Be the one command that trains into a directory.

    Raises:
        UserError: if another does.
    """
    return writing(job.out, f"streamdit {job.run_name}", say)


def number_of_workers(config: RunConfig) -> int:
    """Of torchrun or Slurm where they started this process, else as many as Ray shall start."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else config.launch.workers


def is_main_process() -> bool:
    """Whether this process speaks for all that torchrun or Slurm started."""
    return os.environ.get("RANK", "0") == "0"


def say_once(message: str) -> None:
    """Print a line, once for all workers."""
    if is_main_process():
        say(message)


def catch_up(job: TrainJob) -> None:
    """Send what a finished run could not send to its tracking server, if anything."""
    if is_main_process() and (left := send_left(job)):
        say(f"{job.run_name}: MLflow is away; records not sent yet: {left}, in {job.out}")


def _with_pinned_store(config: RunConfig) -> RunConfig:
    """Workers may run in another folder, on another machine, without this environment."""
    return config.model_copy(update={"tracking": pinned(config.tracking)})


def _join(job: TrainJob) -> None:
    """Take part as the worker that torchrun or Slurm started."""
    try:
        train_loop(job)
    except Interrupted as stopped:
        raise Stopped(str(stopped)) from None


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    job = settings["job"]
    with _warnings_kept(Path(job.out) / WARNINGS_FILE):
        train_loop(job)


@contextmanager
def _warnings_kept(path: Path) -> Iterator[None]:
    """Write our warnings to a file: those of a worker end in a log of Ray's that nobody reads."""
    handler = logging.FileHandler(path, delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers = [logging.getLogger(name) for name in OUR_LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def _fit(job: TrainJob, own_runtime: bool) -> None:
    """Start the workers on Ray Train and wait for them."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    launch_config = job.config.launch
    resources: dict[str, float] = {"CPU": launch_config.cpus_per_worker}
    if launch_config.use_gpu:
        resources["GPU"] = 1
    _check_nodes(launch_config, len(_alive_nodes()), may_grow=not own_runtime)
    if own_runtime:  # a cluster may still grow: Ray then waits
        check_resources(resources, launch_config.workers, ray.cluster_resources())
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=_torch_config(launch_config.use_gpu),
        scaling_config=ScalingConfig(
            num_workers=launch_config.workers,
            use_gpu=launch_config.use_gpu,
            resources_per_worker=resources,
            placement_strategy=launch_config.placement,
        ),
        run_config=RunConfig(
            name=job.run_name,
            storage_path=str((Path(job.out) / "ray").resolve()),
            failure_config=FailureConfig(max_failures=launch_config.max_failures),
            callbacks=[_end_at_user_errors()],
        ),
    )
    with _interruptible():
        try:
            trainer.fit()
        except Exception as error:
            if (stopped := find_cause(error, Interrupted)) is not None:
                raise Stopped(str(stopped)) from None
            if (mistake := find_cause(error, UserError)) is not None:
                raise mistake from None
            if lost_worker(error):
                raise UserError(
                    f"a worker of {job.run_name} was lost: its process was killed (often for want "
                    "of memory) or its node went away; the same command continues from the newest "
                    "checkpoint, and launch.max_failures=N lets Ray do so by itself"
                ) from None
            raise


def _end_at_user_errors() -> Any:
    """Ends a run at once whose worker found a mistake, which to begin again would only repeat.

    Ray Train begins again after any exception of a worker, but not after one of a callback.
    """
    from ray.train import UserCallback

    class EndAtUserErrors(UserCallback):  # type: ignore[misc]
        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            for error in worker_exceptions.values():
                if (mistake := find_cause(error, UserError)) is not None:
                    raise mistake

    return EndAtUserErrors()


def lost_worker(error: BaseException) -> bool:
    """Whether training ended because a worker's process ended, and not by an error of ours."""
    from ray.exceptions import RayActorError

    return find_cause(error, UserError) is None and find_cause(error, RayActorError) is not None


def _prepare_worker(use_gpu: bool) -> None:
    """What a Ray Train worker needs before its process group is made.

    Workers of a group without GPUs see none, which Ray does not see to. The group goes over the
    interface that has the node's address in the cluster.
    """
    import ray

    if not use_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    use_interface_with(ray.util.get_node_ip_address())


def _torch_config(use_gpu: bool) -> Any:
    """Ray Train's process group, of workers that are prepared for it."""
    from ray.train.torch import TorchConfig

    class RoutedBackend(TorchConfig().backend_cls):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_prepare_worker, use_gpu)
            super().on_start(worker_group, backend_config)

    class RoutedConfig(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> Any:
            return RoutedBackend

    return RoutedConfig()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends a command of ours as it ends any other.

    Ray Train takes the signal over to stop its workers, leaves the process by itself, and does not
    give the signal back after a run that ended well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread, and Ray Train leaves them alone here
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        signal.signal(signal.SIGINT, handler)


def _alive_nodes() -> list[str]:
    """Ids of the cluster's nodes."""
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def _check_nodes(launch_config: LaunchConfig, nodes: int, may_grow: bool) -> None:
    """Every worker on a node of its own needs as many nodes."""
    workers = launch_config.workers
    if launch_config.placement != "STRICT_SPREAD" or workers <= nodes:
        return
    if may_grow:
        say(f"{workers} workers wait for a node each: the cluster has {nodes} now")
        return
    raise UserError(
        f"launch.placement=STRICT_SPREAD needs {workers} nodes for {workers} workers but this is "
        f"{nodes}; name a cluster with --address, or set launch.placement=PACK"
    )


def check_resources(needed: dict[str, float], workers: int, total: dict[str, float]) -> None:
    """Refuse a job that the cluster could never start, instead of waiting for ever."""
    remedies = {
        "CPU": "lower launch.workers or launch.cpus_per_worker",
        "GPU": "lower launch.workers, or set launch.use_gpu=false",
    }
    for name, amount in needed.items():
        if amount * workers > total.get(name, 0):
            raise UserError(
                f"{workers} workers need {amount * workers:g} {name} but this machine has "
                f"{total.get(name, 0):g}; {remedies[name]}, or name a cluster with --address"
            )


@contextmanager
def follow(job: TrainJob) -> Iterator[None]:
    """Show the run's log lines, and a bar on a terminal, while it is under way."""
    stop = threading.Event()
    lines, warnings = NewLines(job.metrics_path), NewLines(Path(job.out) / WARNINGS_FILE)
    for file in (lines, warnings):
        file.read()  # what is left of an earlier start
    with progress(job.run_name, unit="steps") as on_progress:
        thread = threading.Thread(
            target=_show_lines, args=(job, lines, warnings, on_progress, stop), daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _show_lines(
    job: TrainJob,
    lines: NewLines,
    warnings: NewLines,
    on_progress: Any,
    stop: threading.Event,
) -> None:
    """Print the lines of the metrics file, and the workers' warnings, as they appear."""
    while True:
        last_look = stop.wait(POLL_S)
        for warning in warnings.read():
            say(f"warning: {warning}")
        for row in map(json.loads, lines.read()):
            console.print(format_line(row, job.config.steps), markup=False, soft_wrap=True)
            if console.is_terminal and "loss" in row:  # in a log file the lines say it already
                on_progress(row["step"], job.config.steps, {"loss": row["loss"]})
        if last_look:
            return


class NewLines:
    """Complete lines of a growing file, each given once; only what was added is read.

    A file that another takes the place of, as a resumed run's does, is read from its start: lines
    that it repeats are not given again, those after them are, whatever the earlier one had there.

    Args:
        path: the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = -1, 0
        self._given: list[int] = []  # hashes of all lines so far
        self._next = 0  # place among them of the line that is read next

    def read(self) -> list[str]:
        """Lines that are there now and were not given before."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset, self._next = status.st_ino, 0, 0
            file.seek(self._offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line.decode() for line in whole.splitlines() if self._is_new(hash(line))]

    def _is_new(self, line: int) -> bool:
        place, self._next = self._next, self._next + 1
        if self._given[place : place + 1] == [line]:
            return False
        self._given[place:] = [line]
        return True
