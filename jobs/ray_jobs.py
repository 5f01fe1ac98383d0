"""`streamdit jobs`: what runs on a Ray cluster, what it says, and how to end it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cluster import ClusterAddress, connect, details, exit_status
from jobs.cluster import stop as stop_job
from jobs.console import format_duration, say
from jobs.errors import JobCommand
from jobs.submit import follow_to_its_end

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

STYLES = {"SUCCEEDED": "green", "RUNNING": "cyan", "FAILED": "bold red"}
STOP_WAIT_S = 60.0

command = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id that `submit` printed.")]


@command.callback()
def _overview() -> None:
    """Show, follow and stop the jobs of a Ray cluster."""


@command.command("list", cls=JobCommand)
def list_jobs(
    address: ClusterAddress = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """List the submitted jobs of a cluster, newest first."""
    jobs = sorted(
        (job for job in connect(address).list_jobs() if job.submission_id),
        key=lambda job: job.start_time or 0,
        reverse=True,
    )
    if as_json:
        typer.echo(json.dumps([_facts(job) for job in jobs], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("job", "status", "took"):
        table.add_column(heading, no_wrap=True)
    table.add_column("command", overflow="fold")
    for job in jobs:
        facts = _facts(job)
        status = Text(facts["status"].lower(), style=STYLES.get(facts["status"], ""))
        took = "" if facts["seconds"] is None else format_duration(facts["seconds"])
        table.add_row(facts["id"], status, took, Text(facts["entrypoint"]))
    out = Console(highlight=False)
    out.print(table if jobs else "no job has been submitted to this cluster")


def _facts(job: JobDetails) -> dict[str, Any]:
    """A job as plain data; times in seconds."""
    started = None if job.start_time is None else job.start_time / 1000
    ended = time.time() if not job.end_time else job.end_time / 1000
    return {
        "id": job.submission_id,
        "status": str(job.status),
        "started": started,
        "seconds": None if started is None else max(0.0, ended - started),
        "exit_code": job.driver_exit_code,
        "entrypoint": job.entrypoint,
    }


@command.command("logs", cls=JobCommand)
def logs(
    job: JobId,
    address: ClusterAddress = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends; its exit status.")
    ] = False,
) -> None:
    """Print what a job has said so far."""
    client = connect(address)
    details(client, job)
    if follow:
        raise typer.Exit(exit_status(follow_to_its_end(client, job)))
    typer.echo(client.get_job_logs(job), nl=False)


@command.command("stop", cls=JobCommand)
def stop(job: JobId, address: ClusterAddress = None) -> None:
    """Stop a job; finished parts are kept, and the same command continues from there."""
    client = connect(address)
    if not stop_job(client, job):
        say(f"{job} had ended already: {str(details(client, job).status).lower()}")
        return
    deadline = time.monotonic() + STOP_WAIT_S
    while not details(client, job).status.is_terminal():
        if time.monotonic() > deadline:
            say(f"{job} is asked to stop and still busy; `streamdit jobs list` tells when it has")
            return
        time.sleep(0.5)
    say(f"{job} is stopped")


if __name__ == "__main__":
    command()
