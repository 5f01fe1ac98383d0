"""Training on two hosts, of which one is cut off in the middle of a step and comes back."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest
from latent_dataset import train_settings, write_dataset
from ray_hosts import address_of_node, hold_until_cut_off, join, ray_on
from training_runs import losses, train

from jobs.launch import launch
from training.config import TrainConfig
from training.job import TrainJob
from training.objective import make_flow_matching

CUT_AT_STEP = 5


class Held:
    """An objective whose steps on the second host wait, at step 5, until the host is cut off.

    The step then goes on into a reduction of gradients that nobody answers.
    """

    def __init__(self, objective, folder, calls_before):
        self.objective, self.folder, self.calls_left = objective, folder, calls_before

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def __call__(self, student, batch, draws):
        if self.calls_left == 0:
            hold_until_cut_off(self.folder)
        self.calls_left -= 1
        return self.objective(student, batch, draws)


def held_objective(folder, head, job, device):
    """An ordinary objective that notes where it runs, and waits on the second host."""
    import torch.distributed as dist

    here = {"address": address_of_node(), "card": os.environ["GLOO_SOCKET_IFNAME"]}
    with (Path(folder) / "workers.jsonl").open("a") as file:
        file.write(json.dumps(here) + "\n")
    objective = make_flow_matching(job, device)
    if here["address"] == head:
        return objective
    _, micro_batches = job.config.accumulation(dist.get_world_size())
    return Held(objective, Path(folder), (CUT_AT_STEP - 1) * micro_batches)


def drive(arguments):
    """The driver, in a process of the first host."""
    address, folder, dataset, settings = json.loads(arguments)
    join(address, Path(folder))
    config = TrainConfig.model_validate(settings)
    objective = functools.partial(held_objective, folder, address.partition(":")[0])
    shapes = (config.model, config.partition, config.sampling)
    launch(TrainJob(config, *shapes, dataset, f"{folder}/run", objective), address)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_training_continues_when_a_host_that_was_cut_off_is_back(hosts, tmp_path):
    from mlflow import MlflowClient

    dataset = write_dataset(tmp_path / "dataset")
    settings = train_settings(
        tracking={"directory": str(tmp_path / "mlflow")},
        validation={"samples": 0},
        launch={"workers": 2, "placement": "STRICT_SPREAD", "max_failures": 1},
    )
    program = "import sys; from test_jobs_cut_off import drive; drive(sys.argv[1])"
    with ray_on(hosts, tmp_path, Path(__file__).parent) as cluster:
        arguments = json.dumps([cluster.address, str(tmp_path), str(dataset), settings])
        driver = cluster.run(
            hosts[0],
            *(sys.executable, "-c", program, arguments),
            # The worker that stays waits this long for the group to end before it is killed.
            environment={"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3"},
        )
        cluster.lose_and_regain_worker(tmp_path, driver)
        assert driver.wait(700) == 0, cluster.logs()

    workers = [json.loads(line) for line in (tmp_path / "workers.jsonl").read_text().splitlines()]
    everywhere = {(host.address, host.card) for host in hosts}
    assert len(workers) == 4
    for attempt in (workers[:2], workers[2:]):
        assert {(worker["address"], worker["card"]) for worker in attempt} == everywhere

    train(dataset, tmp_path / "straight", validation={"samples": 0})
    straight = losses(tmp_path / "straight")
    assert sorted(straight) == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "run") == pytest.approx(straight, rel=1e-5)
    run_id = json.loads((tmp_path / "run" / "mlflow-run.json").read_text())["run_id"]
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db").get_run(run_id)
    assert run.info.status == "FINISHED"
