"""How busy each machine of a run is: processors, memory, disk, network, GPUs, in its MLflow run."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from training.config import TrackingConfig
from training.engine import World
from training.tracking import Tracker, make_client

logger = logging.getLogger(__name__)


@contextmanager
def system_metrics(
    config: TrackingConfig,
    world: World,
    run_id: str | None,
    outbox: Callable[[str], Path],
    step: Callable[[], int],
    find_run: Callable[[], str | None],
) -> Iterator[None]:
    """Log the state of every machine while the context lasts; every rank calls this.

    One rank per machine logs, as `system/MACHINE/...`, which MLflow shows as system metrics.

    Args:
        config: store, and seconds between samples.
        world: this process.
        run_id: the MLflow run, on the main rank; None if it is not made yet.
        outbox: file of a machine by its name, for what cannot be sent.
        step: training step that a sample belongs to.
        find_run: looks for a run that is made later.
    """
    machine = socket.gethostname()
    told = world.gather((machine, run_id))
    leads = [name for name, _ in told].index(machine) == world.rank
    run_id = told[0][1]
    if not (config.system_every_s and leads):
        yield
        return
    make = partial(_made_run, find_run)
    tracker = Tracker(make_client(config), run_id, outbox(machine), make)
    done = threading.Event()

    def sample() -> None:
        monitors = _monitors()
        while not done.wait(config.system_every_s):
            figures = _read(monitors)
            tracker.log(step(), {f"system/{machine}/{name}": v for name, v in figures.items()})

    thread = threading.Thread(target=sample, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        tracker.leave()


def _made_run(find_run: Callable[[], str | None]) -> str:
    """The run that the main rank made; until then what is logged waits.

    Raises:
        RuntimeError: if it is not made yet.
    """
    if (run_id := find_run()) is None:
        raise RuntimeError("the run itself is not made yet")
    return run_id


def _monitors() -> list[Any]:
    """MLflow's own monitors, as far as this machine has what they look at."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:
        logger.debug("no GPU metrics: %s", error)
    return monitors


def _read(monitors: list[Any]) -> dict[str, float]:
    """One sample of every monitor."""
    figures: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        figures |= monitor.aggregate_metrics()
        monitor.clear_metrics()
    return figures
