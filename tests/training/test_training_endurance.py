"""What a long run meets: folders that are not shared, full disks, signals, engines before it."""

import logging
import os
import resource
import signal
import socket
import sys
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from latent_dataset import train_settings, write_dataset
from processes import run, started
from pydantic import ValidationError
from training_runs import losses, tiny_job, train

import training.checkpoint
import training.loop
from jobs.launch import _warnings_kept, launch
from pipeline.lock import writing
from streamdit.errors import UserError
from training.checkpoint import find_checkpoints, load_checkpoint, read_facts, require_shared_folder
from training.engine import World
from training.loader import allow_open_files
from training.run import Run


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.mark.parametrize("stage", [1, 3])
def test_what_a_run_held_is_free_for_the_next_one_of_its_process(
    stage, dataset_dir, tmp_path, monkeypatch
):
    """The stages of a recipe under torchrun follow each other in the same processes."""
    held, build = [], training.loop.build_engine

    def building(module, *arguments):
        engine = build(module, *arguments)
        held.extend([weakref.ref(module), weakref.ref(engine)])
        return engine

    monkeypatch.setattr(training.loop, "build_engine", building)
    for name in ("one", "two"):
        train(dataset_dir, tmp_path / name, steps=2, zero_stage=stage)
        assert [reference() for reference in held] == [None] * len(held)


@dataclass(frozen=True)
class Other(World):
    """A worker whose fellow, rank 0, says what it is told to say."""

    says: list = field(default_factory=list)

    def gather(self, value):
        return [self.says.pop(0), value]

    def barrier(self):
        pass


def other(*says):
    return Other(rank=1, size=2, device=torch.device("cpu"), says=list(says))


def test_a_folder_that_another_worker_does_not_see_is_refused_before_any_step(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(training.checkpoint, "NFS_WAIT_S", 0.0)
    with pytest.raises(UserError, match=r"^worker 1 does not see what worker 0 writes"):
        require_shared_folder(tmp_path, other(".shared-1", True))
    (tmp_path / ".shared-1").touch()
    require_shared_folder(tmp_path, other(".shared-1", True))


def test_a_file_that_nfs_shows_late_is_waited_for(tmp_path, monkeypatch):
    mark = tmp_path / ".shared-1"
    monkeypatch.setattr(training.checkpoint.time, "sleep", lambda seconds: mark.touch())
    require_shared_folder(tmp_path, other(".shared-1", True))


def test_checkpoints_that_the_first_worker_has_and_another_lacks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training.checkpoint, "NFS_WAIT_S", 0.0)
    monkeypatch.setattr(training.checkpoint, "require_shared_folder", lambda root, world: None)
    with pytest.raises(UserError, match="workers see different checkpoints"):
        load_checkpoint(tmp_path, None, None, other(["step-00000002"], None), 1, None)
    # One that only this worker still sees, of those that were dropped, is nobody's concern.
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "complete.json").touch()
    assert load_checkpoint(tmp_path, None, None, other([], None), 1, None) is None


def test_what_was_cut_off_makes_room_before_the_next_checkpoint(dataset_dir, tmp_path, monkeypatch):
    out, seen, save = tmp_path / "out", [], training.checkpoint.save_average
    train(dataset_dir, out, crash_at=2, checkpoint={"every": 1})
    cut_off = out / "checkpoints" / "step-00000003"
    cut_off.mkdir()
    (cut_off / "half").write_bytes(b"x" * 1000)

    def saving(*arguments):
        seen.append(cut_off.exists())
        return save(*arguments)

    monkeypatch.setattr(training.checkpoint, "save_average", saving)
    train(dataset_dir, out, steps=6, checkpoint={"every": 6})
    assert seen == [False]


def test_a_checkpoint_that_cannot_be_removed_yet_ends_no_run(
    dataset_dir, tmp_path, monkeypatch, caplog
):
    def busy(folder, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy: .nfs0001")

    monkeypatch.setattr(training.checkpoint.shutil, "rmtree", busy)
    train(dataset_dir, tmp_path / "out", checkpoint={"every": 1, "keep": 1})
    assert "step-00000001 cannot be removed yet" in caplog.text
    assert [path.name for path in find_checkpoints(tmp_path / "out" / "checkpoints")] == [
        "step-00000006"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_of_another_layout_are_let_go_of_once_they_are_read(
    dataset_dir, tmp_path, monkeypatch
):
    out, mapped, step = tmp_path / "out", [], Run._train_step
    train(dataset_dir, out, crash_at=3, zero_stage=1, checkpoint={"every": 1})

    def looking(run, batches, stop):
        maps = Path("/proc/self/maps").read_text()
        mapped.append([line for line in maps.splitlines() if str(out / "checkpoints") in line])
        return step(run, batches, stop)

    monkeypatch.setattr(Run, "_train_step", looking)
    train(dataset_dir, out, zero_stage=2, checkpoint={"every": 1})
    assert mapped[0] == []


def test_two_commands_do_not_train_into_one_folder(dataset_dir, tmp_path, one_worker):
    job = tiny_job(dataset_dir, tmp_path / "out")
    with (
        writing(str(tmp_path / "out"), "streamdit train"),
        pytest.raises(UserError, match=r"^`streamdit train` .* is writing to .*out: wait until"),
    ):
        launch(job)
    assert launch(job) == tmp_path / "out" / "model"


def test_warnings_of_workers_on_ray_are_kept_for_whoever_follows(tmp_path):
    with _warnings_kept(tmp_path / "warnings.log"):
        logging.getLogger("training.checkpoint").warning("step-%d is damaged", 4)
        logging.getLogger("training.checkpoint").info("not this")
        logging.getLogger("of.a.library").warning("nor this")
    logging.getLogger("training.checkpoint").warning("later")
    assert (tmp_path / "warnings.log").read_text() == "step-4 is damaged\n"


def test_a_process_may_open_as_many_files_as_the_machine_lets_it():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_seed_that_no_generator_takes_is_refused_by_the_configuration(dataset_dir, tmp_path):
    with pytest.raises(ValidationError, match="seed"):
        tiny_job(dataset_dir, tmp_path, seed=-1)


def status_of(process):
    """What Linux says of a process, by name."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


EXITS = """
import sys
from training.config import DataConfig
from training.data import LatentDataset
from training.loader import BatchLoader
from training.order import BatchOrder

if __name__ == "__main__":
    dataset = LatentDataset(sys.argv[1], "train")
    order = BatchOrder(dataset.buckets, 8, seed=1)
    steps = BatchLoader(dataset, order, 4, 0, 1, 8, DataConfig(processes=2)).steps(0, 100)
    next(steps)
    raise SystemExit(3)  # with loaders that do not hear SIGTERM
"""


def test_a_trainer_that_fails_does_not_wait_for_its_loaders(dataset_dir, tmp_path):
    script = tmp_path / "exits.py"
    script.write_text(EXITS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    status, said = run(sys.executable, script, dataset_dir, timeout=120, env=environment)
    assert status == 3, said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_to_the_whole_group_saves_though_loaders_are_in_it(dataset_dir, tmp_path):
    """As torchrun ends a worker: with all that it started."""
    settings = tmp_path / "train.yaml"
    changes = {"steps": 3000, "checkpoint": {"every": 1500}, "data": {"processes": 1}}
    settings.write_text(str(train_settings(**changes)).replace("None", "null"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out"
    environment = {
        **os.environ,
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    with started(
        *(sys.executable, "-m", "jobs.train", dataset_dir, "--out", out, "--config", settings),
        f"tracking.directory={tmp_path / 'mlflow'}",
        env=environment,
        start_new_session=True,
    ) as worker:
        deadline = time.monotonic() + 200
        while len(losses(out)) < 3:
            assert worker.poll() is None, worker.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        held_back = [
            int(status["SigBlk"], 16) & 1 << signal.SIGTERM - 1
            for status in map(status_of, psutil.Process(worker.pid).children(recursive=True))
            if status["Name"] == "pt_data_worker"
        ]
        assert held_back
        assert all(held_back)
        os.killpg(worker.pid, signal.SIGTERM)
        said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0, said
    (saved,) = find_checkpoints(out / "checkpoints")
    assert f"stopped at step {read_facts(saved).step}; the same command continues" in said
