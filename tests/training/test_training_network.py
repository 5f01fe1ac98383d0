"""Workers on hosts with addresses of their own: network namespaces joined by a cable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from latent_dataset import train_settings, write_dataset

from streamdit.errors import UserError
from training import engine, network
from training.metrics import read_metrics

ROOT = Path(__file__).parents[2]

WORKER = """
import json, os, sys
import torch.distributed as dist
from training.config import TrainConfig
from training.engine import join_world
from training.job import TrainJob
from training.loop import train_loop
from training.network import route_source
from training.objective import make_flow_matching

settings, dataset, out = json.loads(sys.argv[1])
world = join_world()
me = {
    "rank": world.rank,
    "interface": os.environ["GLOO_SOCKET_IFNAME"],
    "address": route_source(os.environ["MASTER_ADDR"], 1),
}
everyone = [None] * world.size
dist.all_gather_object(everyone, me)
if world.is_main:
    with open(out + ".json", "w") as file:
        json.dump(everyone, file)
config = TrainConfig.model_validate(settings)
train_loop(
    TrainJob(
        config, config.model, config.partition, config.sampling, dataset, out, make_flow_matching
    )
)
"""


def start(host, rank, master, script, arguments):
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"),
        *(f"--master-addr={master.address}", "--master-port=29511", script, arguments),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    return host.start(*command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_workers_on_two_hosts_meet_over_the_cards_that_join_them(hosts, tmp_path):
    dataset, out = write_dataset(tmp_path / "dataset"), tmp_path / "run"
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    settings = train_settings(tracking={"directory": str(tmp_path / "mlflow")})
    arguments = json.dumps([settings, str(dataset), str(out)])
    processes = [start(host, rank, hosts[0], script, arguments) for rank, host in enumerate(hosts)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert json.loads((tmp_path / "run.json").read_text()) == [
        {"rank": rank, "interface": host.card, "address": host.address}
        for rank, host in enumerate(hosts)
    ]
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (out / "model" / "config.json").is_file()


@pytest.fixture
def no_interface(monkeypatch):
    """No interface is named; what a test chooses is forgotten after it."""
    monkeypatch.setenv(network.INTERFACE, "to be restored")
    monkeypatch.delenv(network.INTERFACE)


def own_address():
    """An address of this machine that is not the loopback's."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith("127."):
                return name, address.address
    pytest.skip("this machine has no network interface beside the loopback")


@pytest.mark.parametrize("local", ["1", "2"])
def test_loopback_is_taken_only_by_workers_of_one_host(local, no_interface, monkeypatch):
    name, address = own_address()
    monkeypatch.setattr(network, "FAR_AWAY", address)
    for key, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    network.use_route_to_master()
    assert os.environ[network.INTERFACE] == ("lo" if local == "2" else name)


def test_interface_that_the_environment_names_stays(monkeypatch):
    monkeypatch.setenv(network.INTERFACE, "ib0")
    network.use_interface_with("127.0.0.1")
    assert os.environ[network.INTERFACE] == "ib0"


def test_address_that_nobody_has_chooses_nothing(no_interface, monkeypatch):
    network.use_interface_with("203.0.113.77")
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    network.use_route_to_master()
    assert network.INTERFACE not in os.environ


@pytest.mark.parametrize(
    ("local_rank", "gpus", "slurm", "index"),
    [("0", 1, False, 0), ("3", 8, False, 3), ("3", 1, True, 0)],
)
def test_each_worker_takes_the_gpu_of_its_number(monkeypatch, local_rank, gpus, slurm, index):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    if slurm:  # which may show each task its own GPU alone
        monkeypatch.setenv("SLURM_LOCALID", local_rank)
    assert engine._gpu_of_worker() == index


@pytest.mark.parametrize("gpus", [1, 2])
def test_more_workers_than_gpus_are_refused(monkeypatch, gpus):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match="worker 2 of this machine finds no GPU of its own"):
        engine._gpu_of_worker()


def test_a_worker_of_ray_may_see_its_own_gpu_alone(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert engine._gpu_of_worker() == 0
