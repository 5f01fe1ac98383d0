"""Ingestion survives `kill -9` of the whole job or of its workers, on disk and on S3."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import write_shots

from pipeline import storage
from pipeline.annotate import annotate
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.schema import load_manifest
from pipeline.storage import read_bytes
from pipeline.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

JOB = """
import sys
from pipeline.annotate import annotate
from pipeline.config import IngestConfig
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.graph import ensure_ray

videos, dataset, autoencoder, config = sys.argv[1:]
config = IngestConfig.model_validate_json(config)
ensure_ray()
curate([videos], dataset, config)
annotate(dataset, config)
encode(dataset, autoencoder, config)
"""
SHOTS = {
    "one": ["red", "green", "blue", "cyan"],
    "two": ["blue", "yellow", "purple", "red"],
    "three": ["cyan", "red", "green", "yellow"],
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for step, (name, colours) in enumerate(SHOTS.items()):
        write_shots(folder / f"{name}.mp4", colours, step=step)
    return str(folder)


@pytest.fixture
def config(small_config):
    """A source per unit, shards of a few clips: many moments at which to die."""
    shards = small_config.shards.model_copy(update={"row_group_mb": 0.001, "shard_mb": 0.002})
    changes = {"shards": shards, "unit_sources": 1, "workers": 1}
    return small_config.model_copy(update=changes)


@pytest.fixture
def bucket(monkeypatch):
    """An S3 store on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage._s3_client.cache_clear()
    boto3.client("s3").create_bucket(Bucket="data")
    yield "s3://data"
    server.stop()
    storage._s3_client.cache_clear()


class Job:
    """Ingestion in a process of its own, with the processes that it starts."""

    def __init__(self, *arguments):
        command = [sys.executable, "-c", JOB, *map(str, arguments)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def descendants(self):
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self):
        """`kill -9` of the job and all that it started."""
        family = self.descendants()
        self.process.kill()
        for process in family:
            kill(process)
        self.process.communicate()
        psutil.wait_procs(family, timeout=30)

    def finish(self):
        _, errors = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, errors[-3000:]


def kill(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def markers(store):
    return sum(path.count("/") == 2 for path in store.files("ledger"))


def contents(root):
    store = open_store(root)
    return {path: read_bytes(store.uri(path)) for path in store.files()}


def undisturbed(videos, root, autoencoder_dir, config):
    curate([videos], root, config)
    annotate(root, config)
    encode(root, autoencoder_dir, config)
    return contents(root)


def same_files(found, expected):
    assert sorted(found) == sorted(expected)
    assert [path for path in expected if found[path] != expected[path]] == []


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_job_killed_again_and_again_ends_like_an_undisturbed_one(
    tmp_path, place, videos, autoencoder_dir, config, without_ray, request
):
    root = request.getfixturevalue("bucket") if place == "s3" else str(tmp_path)
    expected = undisturbed(videos, f"{root}/undisturbed", autoencoder_dir, config)
    dataset = f"{root}/disturbed"
    arguments = (videos, dataset, autoencoder_dir, config.model_dump_json())
    store = open_store(dataset)
    # One death in each stage: after so many markers, and a little into the next unit.
    for count, later_s in ((1, 0.0), (4, 0.3), (7, 0.1), (10, 0.0)):
        job = Job(*arguments)
        while markers(store) < count and job.process.poll() is None:
            time.sleep(0.02)
        time.sleep(later_s)
        job.kill()
    assert not store.exists("manifest.json"), "the last death was meant to come before the end"
    job = Job(*arguments)
    job.finish()
    same_files(contents(dataset), expected)
    assert load_manifest(dataset).selection.rows == 24


def test_workers_and_decoders_may_be_killed_while_the_job_runs(
    tmp_path, videos, autoencoder_dir, config, without_ray
):
    expected = undisturbed(videos, str(tmp_path / "undisturbed"), autoencoder_dir, config)
    dataset = tmp_path / "disturbed"
    job = Job(videos, dataset, autoencoder_dir, config.model_dump_json())
    killed = {"worker": 0, "decoder": 0}
    done_before = 0
    while job.process.poll() is None:
        done = markers(open_store(dataset))
        if done > done_before:  # once after each marker, so that the job gets on
            done_before = done
            victim = min(killed, key=killed.get)
            killed[victim] += next(kill_one(job, victim), False)
        time.sleep(0.05)
    job.finish()
    assert min(killed.values()) > 0, killed
    same_files(contents(dataset), expected)


def kill_one(job, kind):
    """Kill processes of a kind, one at each step."""
    for process in job.descendants():
        # Ray names a worker after what it runs; its own agents are `ray::` too, and are left alone.
        if ("pipeline.child" if kind == "decoder" else "FlatMap(") in command_of(process):
            kill(process)
            yield True


def command_of(process):
    """Its command line; empty where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def test_no_process_outlives_a_killed_job(tmp_path, videos, autoencoder_dir, config):
    dataset = tmp_path / "data"
    job = Job(videos, dataset, autoencoder_dir, config.model_dump_json())
    while markers(open_store(dataset)) < 1 and job.process.poll() is None:
        time.sleep(0.02)
    decoders = [p for p in job.descendants() if "pipeline.child" in command_of(p)]
    workers = [p for p in job.descendants() if p not in decoders]
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.communicate()
    for process in workers:
        kill(process)
    _, alive = psutil.wait_procs(decoders, timeout=30)
    assert decoders
    assert alive == []
