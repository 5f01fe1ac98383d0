"""Ray clusters: workers on nodes of their own, killed ones that continue, and none at an address.

Two raylets on one machine are two nodes to Ray's scheduler but share an address; workers on hosts
with addresses of their own are tested in network namespaces, with the trainer.
"""

import functools
import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from latent_dataset import train_settings, write_dataset
from training_runs import losses, tiny_job, train

from jobs.errors import Stopped
from jobs.launch import (
    NewLines,
    _check_nodes,
    _end_at_user_errors,
    _torch_config,
    follow,
    launch,
    lost_worker,
)
from jobs.runtime import ray_runtime
from pipeline.graph import stop_ray
from streamdit.errors import UserError
from training.checkpoint import find_checkpoints, read_facts
from training.config import LaunchConfig, TrainConfig
from training.job import TrainJob
from training.loop import train_loop
from training.metrics import MetricsFile, read_metrics
from training.objective import make_flow_matching
from training.records import outbox_path
from training.run import Run
from training.stop import Interrupted


def telling_objective(folder, job, device):
    """An ordinary objective that notes which worker runs on which node."""
    import ray
    import torch.distributed as dist

    context = ray.get_runtime_context()
    note = {"node": context.get_node_id(), "interface": os.environ["GLOO_SOCKET_IFNAME"]}
    (Path(folder) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(note))
    return make_flow_matching(job, device)


def tell_at_steps(mark, signal_number, steps):
    """Send this process a signal in each of these steps, once each, if it is the second worker."""
    train_step = Run._train_step

    def told(run, *arguments):
        number = run.step + 1
        told_already = mark.with_name(f"{mark.name}-{number}")
        if run.world.rank == 1 and number in steps and not told_already.exists():
            told_already.write_text("")
            os.kill(os.getpid(), signal_number)
        return train_step(run, *arguments)

    Run._train_step = told


def dying_objective(folder, job, device):
    """An ordinary objective whose second worker is killed, once, in step 5."""
    tell_at_steps(Path(folder) / "killed", signal.SIGKILL, (5,))
    return make_flow_matching(job, device)


def stopping_objective(folder, job, device):
    """An ordinary objective whose second worker is asked to stop at steps 3 and 5, once each."""
    tell_at_steps(Path(folder) / "asked", signal.SIGTERM, (3, 5))
    return make_flow_matching(job, device)


def job_of(folder, make_objective, **launch_settings):
    dataset = folder / "dataset"
    if not dataset.exists():
        write_dataset(dataset)
    settings = train_settings(
        tracking={"directory": str(folder / "mlflow")},
        validation={"samples": 0},
        launch={"workers": 2} | launch_settings,
    )
    config = TrainConfig.model_validate(settings)
    return TrainJob(
        config,
        config.model,
        config.partition,
        config.sampling,
        str(dataset),
        str(folder / "run"),
        functools.partial(make_objective, str(folder)),
    )


@pytest.fixture
def two_nodes(monkeypatch):
    """Address of a cluster of two nodes with one CPU each, and their ids."""
    from ray.cluster_utils import Cluster

    # Workers import the objectives above.
    here = Path(__file__).parent
    paths = [str(here.parents[1]), str(here.parent), str(here)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    # Without a dashboard of its own, at a port where no other Ray's answers for it.
    head = {"num_cpus": 1, "object_store_memory": 100 << 20, "dashboard_port": free_port()}
    stop_ray()  # a runtime that is up already would be used instead
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    try:
        yield cluster.address, {node.node_id for node in cluster.list_all_nodes()}
    finally:
        stop_ray()
        cluster.shutdown()


@pytest.mark.slow
def test_strict_spread_gives_each_worker_a_node_and_a_killed_one_continues(two_nodes, tmp_path):
    address, nodes = two_nodes
    spread, broken = tmp_path / "spread", tmp_path / "broken"
    for folder in (spread, broken):
        folder.mkdir()
    launch(job_of(spread, telling_objective, placement="STRICT_SPREAD"), address)
    notes = [json.loads((spread / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert {note["node"] for note in notes} == nodes
    assert len(nodes) == 2

    job = job_of(broken, dying_objective, placement="STRICT_SPREAD", max_failures=1)
    assert launch(job, address) == broken / "run" / "model"
    assert (broken / "killed-5").exists()
    curves = [
        {row["step"]: row["loss"] for row in read_metrics(folder / "run/metrics.jsonl")}
        for folder in (spread, broken)
    ]
    assert sorted(curves[0]) == [1, 2, 3, 4, 5, 6]
    assert curves[0] == curves[1]


def test_lost_worker_is_told_from_an_error_in_one():
    from ray.exceptions import ActorDiedError
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    silent = WorkerHealthCheckFailedError("no answer", ActorDiedError())
    left_alone = RuntimeError("Connection closed by peer")
    assert lost_worker(WorkerGroupError("two", {0: left_alone, 1: silent}))
    assert not lost_worker(WorkerGroupError("one", {0: RuntimeError("a bug")}))
    assert not lost_worker(WorkerGroupError("two", {0: UserError("no such file"), 1: silent}))


@pytest.mark.slow
def test_workers_asked_to_stop_save_and_start_again_as_often_as_allowed(two_nodes, tmp_path):
    """The first SIGTERM costs the one restart that is allowed, the second ends the command."""
    job = job_of(tmp_path, stopping_objective, max_failures=1)
    with pytest.raises(Stopped, match=r"^stopped at step 5; the same command continues$"):
        launch(job, two_nodes[0])
    assert (tmp_path / "asked-3").exists()
    saved = [read_facts(path).step for path in find_checkpoints(tmp_path / "run/checkpoints")]
    assert sorted(saved) == [3, 5]
    train(job.dataset, tmp_path / "straight", validation={"samples": 0})
    expected = losses(tmp_path / "straight")
    del expected[6]
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_unreachable_cluster_is_one_line_within_seconds(scheme):
    address = f"{scheme}127.0.0.1:{free_port()}"
    started = time.monotonic()
    with (
        pytest.raises(UserError, match=rf"^Ray cluster {address} cannot be reached .*refused.*"),
        ray_runtime(address),
    ):
        pass
    assert time.monotonic() - started < 10


def test_worker_per_node_needs_as_many_nodes_unless_a_cluster_may_grow(capsys):
    spread = LaunchConfig(workers=3, placement="STRICT_SPREAD")
    _check_nodes(spread, nodes=3, may_grow=False)
    _check_nodes(LaunchConfig(workers=3), nodes=1, may_grow=False)
    with pytest.raises(UserError, match=r"needs 3 nodes for 3 workers .* launch.placement=PACK"):
        _check_nodes(spread, nodes=1, may_grow=False)
    assert capsys.readouterr().err == ""
    _check_nodes(spread, nodes=1, may_grow=True)
    assert capsys.readouterr().err == ("3 workers wait for a node each: the cluster has 1 now\n")


def test_records_that_a_finished_run_left_behind_are_sent_by_the_same_command(
    tmp_path, capsys, monkeypatch
):
    from mlflow import MlflowClient

    dataset, out = write_dataset(tmp_path / "dataset"), tmp_path / "run"
    train(dataset, out, steps=1)
    mine = tiny_job(dataset, out, steps=1)
    outboxes = [outbox_path(mine), outbox_path(mine, "gpu-7")]
    # Of an earlier run in the same directory: no record of it goes into this one's.
    other = outbox_path(tiny_job(dataset, out, steps=2))
    other.write_text(json.dumps({"kind": "tag", "key": "dataset", "value": "another"}) + "\n")
    for number, outbox in enumerate(outboxes):
        record = {"kind": "metrics", "values": [[f"late_{number}", 1.5 + number, 1000, 1]]}
        outbox.write_text(json.dumps(record) + "\n")

    with monkeypatch.context() as impatient:
        impatient.setattr("training.outbox.CLOSE_WAIT_S", 0.2)
        away = {"uri": f"http://127.0.0.1:{free_port()}"}
        launch(tiny_job(dataset, out, steps=1, tracking=away))
    assert f"train: MLflow is away; records not sent yet: 2, in {out}" in capsys.readouterr().err
    assert all(len(outbox.read_text().splitlines()) == 1 for outbox in outboxes)

    assert launch(tiny_job(dataset, out, steps=1)) == out / "model"
    assert capsys.readouterr().err == f"train: {out}/model is finished already\n"
    record = json.loads((out / "mlflow-run.json").read_text())
    assert record["tracking_uri"] == f"sqlite:///{out}/mlflow/mlflow.db"
    found = MlflowClient(record["tracking_uri"]).get_run(record["run_id"])
    assert (found.data.metrics["late_0"], found.data.metrics["late_1"]) == (1.5, 2.5)
    assert found.info.status == "FINISHED"
    assert not any(outbox.exists() for outbox in outboxes)
    assert other.exists()
    assert found.data.tags["dataset"] == str(dataset)


def test_a_stage_that_begins_and_ends_without_its_store_is_recorded_later(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    dataset, out = write_dataset(tmp_path / "dataset"), tmp_path / "run"
    away = {"uri": f"http://127.0.0.1:{free_port()}"}
    with monkeypatch.context() as impatient:
        impatient.setattr("training.outbox.CLOSE_WAIT_S", 0.2)
        job = tiny_job(dataset, out, steps=1, tracking=away)
        with pytest.raises(UserError, match=r"MLflow store .* cannot be used"):
            train_loop(job)
        train_loop(replace(job, store_may_be_away=True))
    begun = json.loads((out / "mlflow-run.json").read_text())
    assert begun["run_id"] is None
    launch(tiny_job(dataset, out, steps=1))
    record = json.loads((out / "mlflow-run.json").read_text())
    found = MlflowClient(record["tracking_uri"]).get_run(record["run_id"])
    assert found.info.status == "FINISHED"
    assert found.info.start_time == record["began_ms"] == begun["began_ms"]
    assert found.data.metrics["loss"] == pytest.approx(losses(out)[1])
    assert found.data.tags["fingerprint"] == record["fingerprint"]
    assert not list(out.glob("mlflow-outbox*"))


def test_lines_of_a_run_are_shown_once_also_when_it_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jobs.launch.POLL_S", 0.01)
    job = tiny_job(tmp_path / "dataset", tmp_path / "run")

    def write(resume_step, rows):
        file = MetricsFile(job.metrics_path, resume_step)
        for step, loss in rows:
            file.write({"step": step, "loss": loss})
            time.sleep(0.05)
        file.close()

    write(0, [(1, 1.0), (2, 0.5)])
    with follow(job):
        write(2, [(3, 0.25), (4, 0.125)])
        write(3, [(4, 0.0625), (5, 0.03125)])
    said = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert said == [
        "step      3/6  loss 0.2500",
        "step      4/6  loss 0.1250",
        "step      4/6  loss 0.0625",
        "step      5/6  loss 0.0312",
    ]


def test_new_lines_are_read_without_those_before_them(tmp_path):
    path = tmp_path / "lines"
    lines = NewLines(path)
    assert lines.read() == []
    path.write_text("one\ntw")
    assert lines.read() == ["one"]
    with path.open("r+") as file:
        file.write("???")  # is not looked at again
        file.seek(0, os.SEEK_END)
        file.write("o\nthree\n")
    assert lines.read() == ["two", "three"]
    assert lines.read() == []
    path.write_text("???\nfour\n")  # shorter: another file at the same place
    assert lines.read() == ["???", "four"]


def test_runtime_of_our_own_does_not_listen_to_the_dashboard_of_another():
    import ray
    from ray._private import ray_constants

    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        pytest.skip("there is a Ray runtime already, which would be used")
    with ray_runtime():
        kept = ray._private.worker.global_worker.gcs_client.internal_kv_get(
            ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD
        )
    assert kept.decode().rpartition(":")[2] != str(ray_constants.DEFAULT_DASHBOARD_PORT)


@pytest.mark.parametrize(("use_gpu", "seen"), [(False, ""), (True, "0,1")])
def test_workers_without_gpus_see_none(monkeypatch, use_gpu, seen):
    """Else each would take the GPU of its number, of which a machine may have fewer."""
    import ray
    from ray.train.torch import TorchConfig

    made = []

    class Group:
        def execute(self, function, *arguments):
            function(*arguments)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr("jobs.launch.use_interface_with", lambda address: None)
    monkeypatch.setattr(
        TorchConfig().backend_cls, "on_start", lambda self, group, config: made.append(config)
    )
    config = _torch_config(use_gpu)
    config.backend_cls().on_start(Group(), config)
    assert made == [config]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_mistakes_that_a_worker_finds_end_the_run_and_other_errors_are_left_to_ray():
    callback = _end_at_user_errors()
    callback.after_exception(None, {0: RuntimeError("reset"), 1: Interrupted("asked")})
    with pytest.raises(UserError, match="no such shard"):
        callback.after_exception(None, {0: RuntimeError("reset"), 1: UserError("no such shard")})


def mistaken_objective(folder, job, device):
    """An objective that is refused, and counts how often it was asked for."""
    mark = Path(folder) / "asked"
    mark.write_text(mark.read_text() + "x" if mark.exists() else "x")
    raise UserError("the objective is refused")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_with_a_mistake_is_not_begun_again(tmp_path, monkeypatch):
    paths = [Path(__file__).parents[2], Path(__file__).parents[1], Path(__file__).parent]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    job = job_of(tmp_path, mistaken_objective, workers=1, max_failures=3)
    with ray_runtime(), pytest.raises(UserError, match=r"^the objective is refused$"):
        launch(job)
    assert (tmp_path / "asked").read_text() == "x"
