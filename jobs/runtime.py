"""The Ray runtime that a command works in: the one given, or one of its own."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.graph import start_ray, stop_ray
from streamdit.errors import UserError

CONNECT_TIMEOUT_S = 5.0


@contextmanager
def ray_runtime(address: str | None = None) -> Iterator[None]:
    """Connect to the cluster at `address` (or RAY_ADDRESS), else run Ray on this machine.

    A runtime that is up already is used and left up.

    Raises:
        UserError: if the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS", "")
    try:
        _check_listening(where)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if where:
            ray.init(where, **quiet)
        else:
            start_ray(**quiet, **_without_dashboard())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"Ray cluster {where} cannot be reached ({reason}); start it with `ray start --head`, "
            "or leave --address away to work on this machine"
        ) from None
    try:
        yield
    finally:
        stop_ray()


def _without_dashboard() -> dict[str, Any]:
    """No dashboard, and no trust in that of another Ray on this machine.

    Even without one, Ray Train asks the port it would have whether the run still has a controller:
    on the default port, the dashboard of another Ray answers that it has not, and the workers are
    taken away.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"include_dashboard": False, "dashboard_port": probe.getsockname()[1]}


def _check_listening(address: str) -> None:
    """Fail at once where nobody listens; Ray itself would try for minutes.

    Raises:
        OSError: if nobody accepts a connection at `[ray://]host:port`.
        ValueError: if the port is no number.
    """
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
