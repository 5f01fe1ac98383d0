"""How a command ends when something went wrong: one line for people, a traceback for bugs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from streamdit.errors import UserError

E = TypeVar("E", bound=BaseException)

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130


class Stopped(KeyboardInterrupt):
    """Stopped as asked, by SIGTERM, with everything saved: no failure to whoever asked."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a user's mistake or an interrupt into one line on stderr and an exit status.

    Anything else passes through with its traceback: it is a bug.
    """
    try:
        yield
    except Stopped as stopped:
        _complain(str(stopped))
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        _complain("interrupted: finished parts are kept; the same command continues from there")
        raise typer.Exit(INTERRUPTED_STATUS) from None
    except Exception as error:
        mistake = find_user_error(error)
        if mistake is None:
            raise
        _complain(f"error: {mistake}")
        raise typer.Exit(USAGE_STATUS) from None


class JobCommand(TyperCommand):
    """A command whose user errors are one line."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command."""
        with one_line_errors():
            return super().invoke(ctx)


def find_user_error(error: BaseException) -> UserError | None:
    """The user's mistake behind `error`, which Ray may have wrapped on its way from a worker."""
    # Imported here because the library brings PyTorch along, and the overview must start at once.
    from streamdit.errors import UserError

    return find_cause(error, UserError)


def find_cause(error: BaseException, kind: type[E]) -> E | None:
    """The exception of a kind behind `error`.

    Ray hands an exception on as `.cause` of its own (which then also is of that kind, but one
    whose text is a traceback), by rank in `.worker_failures` when a training worker raised it, as
    `.controller_failure` when a callback did, or as `.health_check_failure` when a worker no longer
    answers.
    """
    pending: list[object] = [error]
    seen: set[int] = set()
    while pending:
        candidate = pending.pop(0)
        if not isinstance(candidate, BaseException) or id(candidate) in seen:
            continue
        seen.add(id(candidate))
        cause = getattr(candidate, "cause", None)
        if isinstance(candidate, kind) and not isinstance(cause, BaseException):
            return candidate
        pending += [
            cause,
            candidate.__cause__,
            getattr(candidate, "health_check_failure", None),
            getattr(candidate, "controller_failure", None),
        ]
        failures = getattr(candidate, "worker_failures", None)
        if isinstance(failures, dict):
            pending += failures.values()
    return None


def _complain(message: str) -> None:
    # Not through rich: a log must hold the whole line, whatever the width of a terminal.
    sys.stderr.write(" ".join(message.split()) + "\n")
    sys.stderr.flush()
