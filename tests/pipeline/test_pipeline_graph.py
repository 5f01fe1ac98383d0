"""The Ray wiring of the stages: room, starting Ray, errors, and work that is left early."""

import gc
import signal
import subprocess
import sys
import time

import pytest
import ray

from pipeline.graph import run_stage, run_units, start_ray, stop_ray, workers_on
from streamdit.errors import UserError

TIMED_OUT = "The current node timed out during startup. This could happen because ..."


@pytest.mark.parametrize(
    ("cpus", "gpus", "room"),
    [(1, 0, 2), (2, 0, 0), (1, 1.0, 0)],
)
def test_a_worker_needs_its_cpus_on_one_node(cpus, gpus, room):
    assert workers_on([{"CPU": 1.0}, {"CPU": 1.0}], cpus, gpus) == room


def test_gpus_are_shared_by_fractions_where_the_cpus_suffice():
    nodes = [{"CPU": 16.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 8.0}, {"GPU": 1.0}]
    assert workers_on(nodes, 1, 1 / 3) == 3 + 2
    assert workers_on(nodes, 4, 0.5) == 2
    assert workers_on(nodes, 4, 0) == 4 + 2


@pytest.mark.parametrize(
    ("failures", "error"),
    [
        ([TIMED_OUT], None),
        ([TIMED_OUT, TIMED_OUT], "timed out during startup"),
        (["no space left"], "no space left"),
    ],
)
def test_ray_is_started_a_second_time_where_its_processes_gave_up(monkeypatch, failures, error):
    started, left = [], list(failures)

    def init(address, **options):
        started.append((address, options))
        if left:
            raise Exception(left.pop(0))

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    if error:
        with pytest.raises(Exception, match=error):
            start_ray(num_cpus=1)
    else:
        start_ray(num_cpus=1)
    times = 1 if failures == ["no space left"] else 2
    assert started == [("local", {"num_cpus": 1})] * times


def test_a_runtime_that_did_not_come_up_leaves_no_processes(monkeypatch):
    sleepers = []

    def init(address, **options):
        sleepers.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        raise Exception("no space left")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with pytest.raises(Exception, match="no space left"):
            start_ray()
        assert [sleeper.wait(30) for sleeper in sleepers] == [-signal.SIGKILL]
        assert other.poll() is None


def test_what_is_held_in_cycles_goes_before_ray_is_shut_down(monkeypatch):
    """Ray ends the process where another thread collects references to its objects meanwhile."""
    happened = []

    class Held:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            happened.append("collected")

    monkeypatch.setattr(ray, "shutdown", lambda: happened.append("shut down"))
    gc.collect()
    Held()
    stop_ray()
    assert happened == ["collected", "shut down"]


def test_a_stage_that_fails_on_ray_says_why_and_its_other_work_ends(tmp_path, ray_runtime):
    written = tmp_path / "slow"

    def stage(row):
        if row["unit"] == "bad":
            while not written.exists():
                time.sleep(0.05)
            raise UserError("the model is missing: copy it")
        for _ in range(600):
            time.sleep(0.1)
            written.write_text(str(time.time()))
        return [{"unit": row["unit"], "counters": "{}"}]

    tasks = [{"unit": "slow"}, {"unit": "bad"}]
    with pytest.raises(UserError, match="the model is missing: copy it"):
        run_stage(["slow", "bad"], {}, run_units(tasks, stage), None)
    ended = time.time()
    time.sleep(1.5)
    assert float(written.read_text()) < ended + 1.0


def test_work_that_is_left_early_ends_at_once(tmp_path, ray_runtime):
    def stage(row):
        (tmp_path / row["unit"]).touch()
        time.sleep(0.0 if row["unit"] == "0" else 600.0)
        return [{"unit": row["unit"], "counters": "{}"}]

    def stop(done, total, counters):
        if done:
            raise KeyboardInterrupt

    tasks = [{"unit": str(number)} for number in range(6)]
    with pytest.raises(KeyboardInterrupt):
        run_stage(list("012345"), {}, run_units(tasks, stage), stop)
    # The room is free again: other work gets it.
    assert list(run_units([{"unit": "0"}], stage)) == [{}]
