"""A user's mistake is found wherever a runtime has wrapped it."""

import pytest
import ray.exceptions
import typer
from ray.train import TrainingFailedError

from jobs.errors import find_user_error, one_line_errors
from streamdit.errors import UserError

MISTAKE = UserError("window 3 does not divide 8; use 4")


def ray_task_error(cause):
    """As a driver receives what a worker raised: its text is the worker's traceback."""
    error = ray.exceptions.RayTaskError("stage", "Traceback ...\nworker lines", cause)
    return error.as_instanceof_cause()


def test_mistake_itself_is_found():
    assert find_user_error(MISTAKE) is MISTAKE


def test_mistake_of_a_ray_worker_is_found_without_the_traceback():
    wrapped = ray_task_error(MISTAKE)
    assert isinstance(wrapped, UserError)
    assert "worker lines" in str(wrapped)
    assert str(find_user_error(wrapped)) == str(MISTAKE)


def test_mistake_below_other_errors_is_found():
    outer = RuntimeError("the job failed")
    outer.__cause__ = ray_task_error(MISTAKE)
    assert str(find_user_error(outer)) == str(MISTAKE)


def test_mistake_of_a_training_worker_is_found():
    from ray.train import WorkerGroupError

    failed = WorkerGroupError("training failed", {3: ray_task_error(MISTAKE)})
    assert isinstance(failed, TrainingFailedError)
    assert str(find_user_error(failed)) == str(MISTAKE)


def test_bug_is_not_taken_for_a_mistake():
    assert find_user_error(ValueError("a bug")) is None
    assert find_user_error(ray_task_error(ValueError("a bug"))) is None
    looping = RuntimeError("loop")
    looping.__cause__ = looping
    assert find_user_error(looping) is None


def test_bug_passes_through_unchanged():
    bug = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError) as caught, one_line_errors():
        raise bug
    assert caught.value is bug


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MISTAKE, 2, "error: window 3 does not divide 8; use 4\n"),
        (
            KeyboardInterrupt(),
            130,
            "interrupted: finished parts are kept; the same command continues from there\n",
        ),
    ],
)
def test_expected_ends_are_one_line_and_a_status(error, status, line, capsys):
    with pytest.raises(typer.Exit) as caught, one_line_errors():
        raise error
    assert caught.value.exit_code == status
    assert capsys.readouterr().err == line
