"""Jobs on a Ray cluster, through its job server: connect, follow, and how they ended."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from jobs.errors import INTERRUPTED_STATUS
from streamdit.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

CONNECT_TIMEOUT_S = 5.0
RECONNECT_AFTER_S = 2.0
GIVE_UP_AFTER_S = 60.0
"""How long a job server may be away before a follower lets go of the job."""
NOT_FOUND = "status code 404"
"""In the errors of Ray's client, which are all of one class."""
DEFAULT_PORT = 8265
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"

ClusterAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="http://HEAD:8265",
        envvar=ADDRESS_VARIABLE,
        help="Job server of the Ray cluster: the address of its dashboard.",
    ),
]
"""`--address`, or Ray's own variable."""


def connect(address: str | None) -> JobSubmissionClient:
    """Client of the cluster's job server.

    Raises:
        UserError: if there is none at `address`, within seconds.
    """
    url = _job_server(address)
    _check_reachable(url)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)

    try:
        with _address_unset():
            return JobSubmissionClient(url)
    except AuthenticationError:
        raise UserError(
            f"{url} asks for a token: set RAY_AUTH_MODE=token, and give the cluster's token in "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from None
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{url} is not a Ray job server ({_reason(error)}): give the address of the "
            "dashboard of a cluster that runs ray[default]"
        ) from None


def _job_server(address: str | None) -> str:
    """`address` as `http://host:port`."""
    if not address:
        raise UserError(
            f"no cluster is named: pass --address http://HEAD:{DEFAULT_PORT}, or set "
            f"{ADDRESS_VARIABLE}"
        )
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"--address {address} is not the address of a job server: give the cluster's "
            f"dashboard, as in http://HEAD:{DEFAULT_PORT}"
        )
    return url.rstrip("/")


def _check_reachable(url: str) -> None:
    """Ray's client has no timeout of its own, and would wait minutes for a host that is down."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"Ray job server {url} does not answer ({_reason(error)}): start the cluster, forward "
            "its dashboard port to this machine, or correct --address"
        ) from None


@contextmanager
def _address_unset() -> Iterator[None]:
    """Ray's client prefers these variables to the address that it is given; the option wins."""
    names = (ADDRESS_VARIABLE, "RAY_ADDRESS")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def details(client: JobSubmissionClient, job: str) -> JobDetails:
    """What the server knows of a job.

    Raises:
        UserError: if it knows no such job.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        raise _unknown(job, error) from None


def stop(client: JobSubmissionClient, job: str) -> bool:
    """Ask a job to end; whether it was running.

    Raises:
        UserError: if there is no such job.
    """
    try:
        return bool(client.stop_job(job))
    except RuntimeError as error:
        raise _unknown(job, error) from None


def _unknown(job: str, error: Exception) -> UserError:
    if NOT_FOUND in str(error):
        return UserError(f"job {job} does not exist: `streamdit jobs list` names those that do")
    return UserError(f"the job server refuses: {_reason(error)}; try again, or read its logs")


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], Any]) -> JobDetails:
    """Write a job's log as it grows, until the job has ended.

    A connection that is lost is taken up again, where the log had been written to.

    Raises:
        UserError: if there is no such job, or the server stays away; the job goes on.
    """
    from aiohttp import ClientError  # what brings the log; Ray hands its errors on

    written = 0
    while True:
        try:
            for text in _tail(client, job, skip=written):
                written += len(text)
                write(text)
            found = client.get_job_info(job)
            if found.status.is_terminal():
                for text in _rest(client, job, written):
                    write(text)
                return found
        # A proxy that cuts long connections, a forwarded port, a head that starts again.
        except (OSError, RuntimeError, ClientError):
            _wait_for_server(client, job)
        time.sleep(RECONNECT_AFTER_S)


def _wait_for_server(client: JobSubmissionClient, job: str) -> None:
    """Return when the server tells of the job again.

    Raises:
        UserError: if it does not know the job, or stays away.
    """
    server = client.get_address()
    deadline = time.monotonic() + GIVE_UP_AFTER_S
    while True:
        try:
            _check_reachable(server)
            client.get_job_info(job)
            return
        except (OSError, RuntimeError, UserError) as error:
            if NOT_FOUND in str(error):
                raise _unknown(job, error) from None
            if time.monotonic() > deadline:
                raise UserError(
                    f"job server {server} has been away for {GIVE_UP_AFTER_S:.0f} s; {job} goes "
                    f"on: follow it with `streamdit jobs logs {job} --follow --address {server}`"
                ) from None
        time.sleep(RECONNECT_AFTER_S)


def _rest(client: JobSubmissionClient, job: str, written: int) -> Iterator[str]:
    """What the log says after `written` characters, now that the job has ended."""
    try:
        rest = client.get_job_logs(job)[written:]
    except RuntimeError:
        return  # a job that never started has no log
    if rest:
        yield rest


def _tail(client: JobSubmissionClient, job: str, skip: int) -> Iterator[str]:
    """The log from `skip` characters on, in pieces, until the server closes it."""
    with asyncio.Runner() as runner:
        pieces = client.tail_job_logs(job).__aiter__()
        while True:
            try:
                piece = runner.run(_next(pieces))
            except StopAsyncIteration:
                return
            if skip < len(piece):
                yield piece[skip:]
            skip = max(0, skip - len(piece))


async def _next(pieces: Any) -> str:
    return str(await pieces.__anext__())


def exit_status(job: JobDetails) -> int:
    """Exit status of a command that stands for a job that has ended: the job's own."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return INTERRUPTED_STATUS
    return job.driver_exit_code or 1


def _reason(error: BaseException) -> str:
    """What went wrong in a few words."""
    words = getattr(error, "strerror", None) or str(error)
    return (words.strip().splitlines() or [type(error).__name__])[0]
