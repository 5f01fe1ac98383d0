"""Ray wiring: units in, one small result per unit out, progress as they finish."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

from pipeline.dead_letters import DeadLimit
from streamdit.errors import UserError

logger = logging.getLogger(__name__)

TASKS_PER_SLOT = 4
LEAST_TASKS = 64
"""Tasks at Ray, under way or waiting: what an autoscaler sees of the work there is. Not all of it,
for a task takes memory of the driver."""
LOOK_AROUND_S = 5.0
"""How soon nodes that join are noticed."""
HIDDEN_COUNTERS = ("inputs", "lost", "retryable")
SPEEDS = {"clips": "clips/s", "texts": "texts/s", "video_s": "× real time"}
"""Counters whose speed is shown, and its name."""

OnProgress = Callable[[int, int, dict[str, float]], None]
"""Called with units done, units in all, and the totals so far."""

Row = dict[str, Any]
"""A row that Ray carries: plain values only, never pixels."""


def ensure_ray() -> None:
    """Use the Ray runtime that is there (also by RAY_ADDRESS), or start a quiet local one."""
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        start_ray(include_dashboard=False, **quiet)


def start_ray(**options: Any) -> None:
    """Start a Ray on this machine; `options` are those of `ray.init`.

    Ray's processes give up on each other after 15 seconds, which they may need where other
    programs take the cores: then they are started once more.
    """
    import psutil
    import ray

    this_process = psutil.Process()
    for another in (True, False):
        before = set(this_process.children())
        try:
            ray.init("local", **options)
            return
        except Exception as error:  # what Ray raises here has no class of its own
            ray.shutdown()
            # Which knows nothing yet of the processes of a runtime that did not come up.
            for child in set(this_process.children()) - before:
                child.kill()
            if not (another and "timed out during startup" in str(error)):
                raise
            logger.warning("Ray did not come up in time on this busy machine; starting it again")


def stop_ray() -> None:
    """Leave the Ray runtime, and end it if this process started it.

    Ray ends a process in which another thread drops a reference to an object of it meanwhile. What
    is only held in cycles goes now, not when such a thread happens to collect garbage.
    """
    import ray

    gc.collect()
    ray.shutdown()


def result_row(unit: str, counters: Mapping[str, float]) -> Row:
    """What a stage returns for a finished unit."""
    return {"unit": unit, "counters": json.dumps(dict(counters))}


def run_units(
    tasks: Sequence[Row],
    stage: Callable[[Row], Iterable[Row]] | type,
    *,
    constructor: dict[str, Any] | None = None,
    workers: int | None = None,
    cpus: int = 1,
    gpus: float = 0.0,
) -> Generator[dict[str, float]]:
    """Run `stage` over `tasks` on Ray, each task by itself.

    Args:
        tasks: one row per unit.
        stage: function from a row to result rows, or a class of such (its instances are actors
            that keep what they load).
        constructor: keyword arguments of the class.
        workers: tasks at once; none means as many as there is room for, also on nodes that join
            and those that an autoscaler adds because tasks wait.
        cpus: CPUs of a task.
        gpus: GPUs of a task, fractions allowed.

    Yields:
        Counters of each unit, as it finishes. A task whose worker dies is started again by Ray.

    Raises:
        UserError: if no node of the cluster can hold a worker.
    """
    if not tasks:
        return
    ensure_ray()
    most = min(len(tasks), workers or len(tasks))
    room = min(most, _room(cpus, gpus))
    if isinstance(stage, type):
        results = _from_actors(tasks, stage, constructor or {}, room, most, cpus, gpus)
    else:
        results = _from_tasks(tasks, stage, workers, cpus, gpus)
    with closing(results):
        for row in results:
            yield json.loads(row["counters"])


def _from_actors(
    tasks: Sequence[Row],
    stage: type,
    constructor: dict[str, Any],
    now: int,
    most: int,
    cpus: int,
    gpus: float,
) -> Generator[Row]:
    """Results of a stage whose workers keep what they load: a pool that grows up to `most`."""
    import ray

    quiet_ray_data()
    results = ray.data.from_items(list(tasks), override_num_blocks=len(tasks)).flat_map(
        stage,
        fn_constructor_kwargs=constructor,
        # Actors that find no room wait, and so ask an autoscaler for a node.
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=now, max_size=most),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    yield from results.iter_rows()


def _from_tasks(
    tasks: Sequence[Row],
    stage: Callable[[Row], Iterable[Row]],
    workers: int | None,
    cpus: int,
    gpus: float,
) -> Generator[Row]:
    """Results of a stage that is a plain function, in Ray's own tasks.

    Ray Data starts only about one task a second for as long as none has finished, which at a unit
    of minutes leaves most of a large cluster idle.
    """
    import ray

    remote = ray.remote(stage).options(
        num_cpus=cpus,
        num_gpus=gpus,
        # A task whose node goes away is done again, however often that happens.
        max_retries=-1,
        retry_exceptions=[ray.exceptions.RaySystemError],
        # Decoding is bound by disks and networks too: not all on one node while others rest.
        scheduling_strategy="SPREAD",
    )
    waiting = iter(tasks)
    running: set[Any] = set()
    try:
        while True:
            # Those without room wait at Ray, and so ask an autoscaler for nodes.
            most = workers or max(LEAST_TASKS, TASKS_PER_SLOT * workers_on(_nodes(), cpus, gpus))
            running |= {remote.remote(row) for row in islice(waiting, max(0, most - len(running)))}
            if not running:
                return
            done, _ = ray.wait(list(running), timeout=LOOK_AROUND_S)
            for task in done:
                running.remove(task)
                yield from ray.get(task)
    finally:
        if ray.is_initialized():  # else Ray would be started to cancel what is gone
            for task in running:
                ray.cancel(task, force=True)


def run_stage(
    units: Sequence[str],
    done: Mapping[str, dict[str, float]],
    results: Generator[dict[str, float]],
    on_progress: OnProgress | None,
    limit: DeadLimit | None = None,
) -> dict[str, float]:
    """Add up finished units and report each.

    Args:
        units: all units of the stage.
        done: counters of those that an earlier run finished.
        results: counters of the others, as they come.
        on_progress: told about every step, once at the start too.
        limit: share of inputs that may fail.

    Returns:
        Totals over all units.

    Raises:
        UserError: if too many inputs failed.
    """
    totals: dict[str, float] = {}
    finished = len(done)
    for counters in done.values():
        _add(totals, counters)
    shown = _Shown(totals)
    if on_progress:
        on_progress(finished, len(units), shown.counters(totals))
    if limit:
        limit.check(totals)
    # Closed at once where it is left early: work that goes on would be nobody's.
    with closing(results):
        for counters in results:
            _add(totals, counters)
            finished += 1
            if on_progress:
                on_progress(finished, len(units), shown.counters(totals))
            if limit:
                limit.check(totals)
    return totals


def quiet_ray_data() -> None:
    """Turn off Ray Data's own progress bars and messages; the caller shows progress."""
    import ray

    # Its thread would go on, asking the cluster for figures, for as long as this process lives.
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    # A unit that raises is a bug or a broken machine: Ray must not drop it silently.
    context.max_errored_blocks = 0
    for name in ("ray.data", "ray.data._internal", "ray.data.dataset"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _room(cpus: int, gpus: float) -> int:
    """Workers that the nodes of the cluster can hold at once."""
    nodes = _nodes()
    room = workers_on(nodes, cpus, gpus)
    if room < 1:
        most_cpus, most_gpus = (max(n.get(name, 0.0) for n in nodes) for name in ("CPU", "GPU"))
        raise UserError(
            f"no worker fits into the Ray cluster: it needs {cpus} CPUs and {gpus:g} GPUs of one "
            f"node, the largest of {len(nodes)} has {most_cpus:g} and {most_gpus:g}; lower "
            "`threads` or the GPUs of the stage, or add nodes"
        )
    return room


def _nodes() -> list[dict[str, float]]:
    """Resources of the nodes that are up."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def workers_on(nodes: Iterable[Mapping[str, float]], cpus: int, gpus: float) -> int:
    """Workers that nodes with these resources can hold, each on one of them."""
    room = 0
    for resources in nodes:
        here = math.floor(resources.get("CPU", 0.0) / cpus)
        if gpus:
            here = min(here, math.floor(resources.get("GPU", 0.0) / gpus + 1e-9))
        room += here
    return room


class _Shown:
    """Totals as people see them: with the speed of this run, without what only limits need."""

    def __init__(self, before: Mapping[str, float]) -> None:
        self.before = dict(before)
        self.started = time.monotonic()

    def counters(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Counters for a progress line."""
        elapsed = time.monotonic() - self.started
        shown = {name: value for name, value in totals.items() if name not in HIDDEN_COUNTERS}
        for name, speed in SPEEDS.items():
            made = totals.get(name, 0) - self.before.get(name, 0)
            if made and elapsed > 0:
                shown[speed] = round(made / elapsed, 2)
        return shown


def _add(totals: dict[str, float], counters: Mapping[str, float]) -> None:
    for name, value in counters.items():
        totals[name] = totals.get(name, 0) + value
