"""Ingestion on a Ray cluster of two nodes."""

import os
import time
from pathlib import Path

import pytest
from conftest import file_hashes, write_shots

from pipeline.annotate import annotate
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.graph import run_units, stop_ray
from streamdit.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHOTS = {"one": ["red", "green"], "two": ["blue", "yellow"], "three": ["cyan", "red"]}


def add_node(cluster):
    """A node of one CPU."""
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of one node, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    cluster = Cluster()
    add_node(cluster)
    ray.init(cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        stop_ray()
        cluster.shutdown()


@pytest.fixture
def two_nodes(cluster):
    """Ids of the two nodes, of one CPU each, of the cluster that this process is connected to."""
    add_node(cluster)
    return {node.node_id for node in cluster.list_all_nodes()}


def meeting_place(folder, nodes):
    """Waits until something is, or was, under way on this many nodes."""

    def meet():  # within a function, so that Ray sends it along
        import ray

        (folder / ray.get_runtime_context().get_node_id()).touch()
        deadline = time.monotonic() + 120
        while len(os.listdir(folder)) < nodes and time.monotonic() < deadline:
            time.sleep(0.1)

    return meet


def meeting(stage, folder, nodes):
    """`stage`, but a unit is done only when one is under way on every node."""
    meet = meeting_place(folder, nodes)
    if not isinstance(stage, type):
        return lambda row: (meet(), stage(row))[1]

    class Meeting(stage):
        def __call__(self, row):
            meet()
            return super().__call__(row)

    return Meeting


def test_two_nodes_work_at_every_stage_and_write_what_one_process_writes(
    tmp_path, two_nodes, autoencoder_dir, small_config, without_ray, monkeypatch
):
    for step, (name, colours) in enumerate(SHOTS.items()):
        write_shots(tmp_path / "videos" / f"{name}.mp4", colours, step=step)
    config = small_config.model_copy(update={"unit_sources": 1})

    def ingest(dataset):
        curate([str(tmp_path / "videos")], dataset, config)
        annotate(dataset, config)
        encode(dataset, autoencoder_dir, config)

    ingest(tmp_path / "alone")
    met = {}

    def run_together(tasks, stage, **resources):
        name = getattr(stage, "__name__", "")
        met[name] = tmp_path / f"nodes-{name}"
        met[name].mkdir()
        return run_units(tasks, meeting(stage, met[name], len(two_nodes)), **resources)

    for module in ("curate", "annotate", "encode"):
        monkeypatch.setattr(f"pipeline.{module}.run_units", run_together)
    ingest(tmp_path / "together")
    assert sorted(met) == ["AnnotateUnit", "EncodeLatents", "EncodeTexts", "curate_unit"]
    assert {name: set(os.listdir(folder)) for name, folder in met.items()} == dict.fromkeys(
        met, two_nodes
    )
    assert len(two_nodes) == 2
    assert file_hashes(tmp_path / "together") == file_hashes(tmp_path / "alone")


def test_threads_that_no_single_node_has_are_refused(two_nodes):
    with pytest.raises(UserError, match=r"it needs 2 CPUs .* of one node, the largest of 2 has 1 "):
        next(run_units([{"unit": "a"}], lambda row: [row], cpus=2))


@pytest.mark.parametrize("kind", ["function", "class"])
def test_a_node_that_joins_a_run_gets_work(tmp_path, cluster, kind):
    meet = meeting_place(tmp_path, 2)

    def work(row):
        if row["unit"] != "0":
            meet()  # only the first unit ends before another node is at work
        return [{"unit": row["unit"], "counters": "{}"}]

    class Worker:
        def __call__(self, row):
            return work(row)

    tasks = [{"unit": str(i)} for i in range(8)]
    results = run_units(tasks, Worker if kind == "class" else work)
    next(results)
    add_node(cluster)
    assert len(list(results)) == 7
    assert len(os.listdir(tmp_path)) == 2
