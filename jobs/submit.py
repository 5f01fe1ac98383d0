"""`streamdit submit`: one of the jobs, on a Ray cluster."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from jobs.cluster import ClusterAddress, connect, exit_status, follow, stop
from jobs.console import console, format_bytes, say
from jobs.errors import INTERRUPTED_STATUS
from jobs.options import split_overrides
from jobs.package import Package, collect
from jobs.stores import VARIABLE, check_server, check_store, store_of_model
from streamdit.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

CONTEXT_SETTINGS = {"ignore_unknown_options": True}
"""The options of the job itself are passed on as they are."""


class Job(StrEnum):
    """What can be submitted."""

    INGEST = "ingest"
    TRAIN = "train"
    DISTILL = "distill"
    REGISTER = "register"


def command(
    job: Annotated[
        Job, typer.Argument(metavar="ingest|train|distill|register", help="What to run.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ARGUMENT",
            help="Arguments and options of that command; after `--` they may look like options "
            "of this one.",
            show_default=False,
        ),
    ] = None,
    address: ClusterAddress = None,
    working_dir: Annotated[
        Path,
        typer.Option(
            "--working-dir", metavar="DIR", help="Folder that is sent along: code and settings."
        ),
    ] = Path(),
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Left out of it, as in .gitignore."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME[=VALUE]",
            help="Environment variable of the job; without a value, the one set here. Whoever "
            "reaches the dashboard can read it: give secrets to the cluster instead.",
        ),
    ] = None,
    cpus: Annotated[
        float | None,
        typer.Option(
            "--cpus", min=0, help="CPUs that the command itself holds, beside its workers."
        ),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            "--gpus",
            min=0,
            help="GPUs likewise: it then runs on a node that has them, as `register` wants to for "
            "its sample video.",
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the job's id and do not follow it.")
    ] = False,
) -> None:
    """Run `ingest`, `train`, `distill` or `register` on a Ray cluster and follow its log.

    The working directory is packed and sent along, without data, runs, environments and what its
    .gitignore names; the job runs in a copy of it. Datasets, runs and models are given by absolute
    paths on storage that every node of the cluster reads, or as s3:// addresses. The exit status is
    the job's. Ctrl-C asks whether to stop the job too; without a terminal it leaves it running.
    """
    client = connect(address)
    package = collect(working_dir, exclude or ())
    variables = {**revision_of(package), **job_environment(env or [])}
    words = job_arguments(job, list(arguments or []), package, VARIABLE in variables)
    entrypoint = shlex.join(["python", "-m", f"jobs.{job.value}", *words])
    identifier = submit(client, entrypoint, package, variables, job.value, cpus, gpus)
    server = client.get_address()
    say(f"submitted {identifier}: {entrypoint}")
    say(f"sent {len(package.files):,} files, {format_bytes(package.size)}, of {package.root}")
    if no_wait:
        say(f"follow: streamdit jobs logs {identifier} --follow --address {server}")
        typer.echo(identifier)
        return
    raise typer.Exit(exit_status(follow_to_its_end(client, identifier)))


def submit(
    client: JobSubmissionClient,
    entrypoint: str,
    package: Package,
    variables: dict[str, str],
    name: str,
    cpus: float | None = None,
    gpus: float | None = None,
) -> str:
    """Send the package and start the job; returns the job's id.

    Args:
        client: of the cluster's job server.
        entrypoint: command line of the job.
        package: working directory of the job.
        variables: environment variables of the job.
        name: what the dashboard calls it.
        cpus: CPUs that the command itself holds; None: it runs on the head without any.
        gpus: GPUs likewise.
    """
    with tempfile.TemporaryDirectory() as folder, console.status("sending the working directory"):
        archive = package.write(Path(folder) / "package.zip")
        try:
            return str(
                client.submit_job(
                    entrypoint=entrypoint,
                    runtime_env={"working_dir": str(archive), "env_vars": variables},
                    metadata={"job_submission_name": f"streamdit {name}"},
                    entrypoint_num_cpus=cpus,
                    entrypoint_num_gpus=gpus,
                )
            )
        except RuntimeError as error:
            raise UserError(f"the job server refuses: {str(error).splitlines()[0]}") from None


def follow_to_its_end(client: JobSubmissionClient, job: str) -> JobDetails:
    """Show a job's log until it ends. Ctrl-C lets go of it, or stops it where a person says so."""
    try:
        ended = follow(client, job, _write)
    except KeyboardInterrupt:
        _let_go(client, job)
        raise typer.Exit(INTERRUPTED_STATUS) from None
    say(f"{job} {str(ended.status).lower()}" + _reason(ended))
    return ended


def _reason(job: JobDetails) -> str:
    """Why a job failed, where its log cannot say: it never ran."""
    if job.status != "FAILED" or job.driver_exit_code is not None or not job.message:
        return ""
    return f": {job.message.strip().splitlines()[-1]}"


def _let_go(client: JobSubmissionClient, job: str) -> None:
    server = client.get_address()
    if sys.stdin.isatty() and typer.confirm(f"\nstop {job} on the cluster?", default=False):
        stop(client, job)
        say(f"{job} is being stopped; the same command continues from its finished parts")
        return
    say(f"{job} goes on without this terminal")
    say(f"follow: streamdit jobs logs {job} --follow --address {server}")
    say(f"stop:   streamdit jobs stop {job} --address {server}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def revision_of(package: Package) -> dict[str, str]:
    """Environment variable with the git revision of the code, where that is sent along."""
    from training.revision import REVISION_VARIABLE, git_revision

    if Path("training/revision.py") not in package.files:
        return {}
    revision = git_revision(package.root)
    return {REVISION_VARIABLE: revision} if revision else {}


def job_environment(wanted: Sequence[str]) -> dict[str, str]:
    """Environment variables of the job, from `NAME` or `NAME=VALUE`.

    The MLflow store goes along unasked, so that the job records where the person who submits it
    looks.

    Raises:
        UserError: for a name that is not set here, or a store that the cluster does not reach.
    """
    variables = {}
    for text in wanted:
        name, given, value = text.partition("=")
        if not given and name not in os.environ:
            raise UserError(f"--env {name}: it is not set here; set it, or write {name}=VALUE")
        variables[name] = value if given else os.environ[name]
    tracking = os.environ.get(VARIABLE, "")
    if tracking and VARIABLE not in variables and not urlsplit(tracking).password:
        check_store(VARIABLE, tracking)
        variables[VARIABLE] = tracking
    return variables


def job_arguments(
    job: Job, words: list[str], package: Package, has_store: bool = False
) -> list[str]:
    """The words of a job's command line as the cluster is to run it, checked here.

    Args:
        job: which command.
        words: what it was given here.
        package: what goes along.
        has_store: whether the job's environment names an MLflow store.

    Raises:
        UserError: for what would be lost or not found on the cluster.
    """
    from jobs.cli import COMMANDS, build_command

    module = importlib.import_module(COMMANDS[job.value].module)
    parser = build_command(module.command, job.value)
    context = parser.make_context(f"streamdit submit {job.value} --", list(words))
    if context.params.get("address"):
        raise UserError("--address is given twice: the job finds the cluster it runs on by itself")
    for name, path in _paths(parser, context):
        check_path(name, path)
    if uri := context.params.get("tracking_uri"):
        check_server("--tracking-uri", uri)
    for key, value in _settings(context):
        if key.endswith("tracking.uri"):
            check_server(key, value)
    for option in ("--config", "--recipe"):
        given = context.params.get(option.removeprefix("--"))
        if given is not None and Path(given).suffix in (".yaml", ".yml"):
            inside = file_in_package(option, Path(given), package)
            words = [_renamed(word, option, str(given), str(inside)) for word in words]
    return words if has_store else words + _store_beside(job, words, context)


def _paths(parser: Any, context: Any) -> Iterator[tuple[str, str]]:
    """Every path among a command's parameters, with what the command line calls it."""
    for parameter in parser.params:
        value = context.params.get(parameter.name)
        if not value or parameter.name == "config":
            continue
        if parameter.name == "tracking_directory" and _is_default(context, parameter.name):
            continue  # takes the place that is chosen for it
        name = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name
        if isinstance(value, Path) or parameter.name in ("dataset", "out", "rollouts"):
            yield name, str(value)
        elif parameter.name == "data":  # of a recipe: NAME=DIR
            yield from ((name, word.partition("=")[2]) for word in value)
        elif parameter.name == "arguments":  # of ingest: videos and KEY=VALUE
            yield from (("the input", word) for word in split_overrides(value)[0])
        elif parameter.name == "overrides":
            yield from (
                (key, word)
                for key, word in _settings(context)
                if key.endswith(("tracking.directory", "rollouts"))
            )
        elif isinstance(value, str) and parameter.name == "autoencoder" and Path(value).exists():
            yield name, value


def _settings(context: Any) -> Iterator[tuple[str, str]]:
    """Keys and values of the single settings on a command line."""
    for override in context.params.get("overrides") or ():
        key, _, value = override.partition("=")
        yield key, value


def _is_default(context: Any, name: str) -> bool:
    return bool(context.get_parameter_source(name).name == "DEFAULT")


def check_path(name: str, path: str) -> None:
    """Refuse a path that means another place on the cluster than here.

    Raises:
        UserError: for a relative one.
    """
    if not Path(path).is_absolute() and "://" not in path:
        raise UserError(
            f"{name} {path} is relative: the job runs in a copy of the working directory that is "
            "deleted with it; give an absolute path on storage that every node reads, as in "
            f"/mnt/streamdit/{path}"
        )


def file_in_package(option: str, file: Path, package: Package) -> Path:
    """Where a file of settings is in the package.

    Raises:
        UserError: if it does not go along.
    """
    inside = file.resolve()
    if inside.is_relative_to(package.root):
        inside = inside.relative_to(package.root)
        if inside in package.files:
            return inside
    raise UserError(
        f"{option} {file} does not go along with the job: put it into {package.root}, and not "
        "among what is left out (.gitignore, .rayignore, --exclude, data, runs)"
    )


def _renamed(word: str, option: str, old: str, new: str) -> str:
    """`word`, or what the job is to be given in place of it: the new name of a file."""
    if word == old:
        return new
    return f"{option}={new}" if word == f"{option}={old}" else word


def _store_beside(job: Job, words: list[str], context: Any) -> list[str]:
    """Words that put the embedded MLflow store on shared storage too, where no server is named.

    Its default is relative, so it would be deleted with the job.
    """
    if job == Job.REGISTER:
        given = context.params["tracking_uri"] or not _is_default(context, "tracking_directory")
        return [] if given else store_of_model(Path(context.params["model"]))
    if job == Job.INGEST or any(word.startswith("tracking.directory=") for word in words):
        return []
    return [f"tracking.directory={Path(context.params['out']).parent / 'mlflow'}"]


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
