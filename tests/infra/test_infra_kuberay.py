"""The KubeRay manifests against KubeRay's and Kubernetes' definitions, and against the project."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray_head import free_ports, ray_head

from distillation.config import DistillConfig
from jobs.cli import COMMANDS, build_command
from jobs.config import load_config
from jobs.options import split_overrides
from pipeline.config import IngestConfig
from training.config import TrainConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "kuberay"
CLUSTER = FOLDER / "raycluster.yaml"
JOBS = {path.stem.removeprefix("rayjob-"): path for path in sorted(FOLDER.glob("rayjob-*.yaml"))}
DEFINITIONS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
SCHEMAS = {"ingest": IngestConfig, "train": TrainConfig, "distill": DistillConfig}


def documents(path):
    return list(yaml.load_all(path.read_text(), yaml.CSafeLoader))


def cluster():
    return next(d for d in documents(CLUSTER) if d["kind"] == "RayCluster")


def forbid_unknown(schema):
    """The schema as the API server checks it strictly: a key that it does not name is an error."""
    if isinstance(schema, list):
        return [forbid_unknown(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: forbid_unknown(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        strict.setdefault("additionalProperties", False)
    return strict


@pytest.fixture(scope="module")
def validator_for():
    folder = os.environ.get("STREAMDIT_KUBERAY_CRDS")
    if not folder:
        pytest.skip("STREAMDIT_KUBERAY_CRDS does not name a folder with KubeRay's definitions")
    made = {}

    def validator(kind):
        if kind not in made:
            definition = documents(Path(folder) / DEFINITIONS[kind])[0]
            version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
            schema = forbid_unknown(version["schema"]["openAPIV3Schema"])
            made[kind] = jsonschema.Draft202012Validator(schema)
        return made[kind]

    return validator


@pytest.mark.parametrize("path", [CLUSTER, *JOBS.values()], ids=lambda path: path.stem)
def test_manifest_fits_the_resource_definition(path, validator_for):
    checked = 0
    for document in documents(path):
        if document["kind"] in DEFINITIONS:
            errors = [e.message for e in validator_for(document["kind"]).iter_errors(document)]
            assert errors == []
            checked += 1
    assert checked == 1


def test_misspelt_key_and_wrong_type_are_noticed(validator_for):
    manifest = cluster()
    manifest["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = 5
    messages = " ".join(e.message for e in validator_for("RayCluster").iter_errors(manifest))
    assert "maxReplica" in messages
    assert "5 is not of type 'string'" in messages


def pod_specs():
    spec = cluster()["spec"]
    return [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def check_kubernetes(document):
    kubernetes_validate.validate(document, "1.34", strict=True)


def test_a_node_that_goes_away_asks_the_workers_of_a_training_to_save():
    (training,) = [
        container
        for pod in pod_specs()
        for container in pod["containers"]
        if container.get("lifecycle")
    ]
    assert training["resources"]["limits"]["nvidia.com/gpu"] == "8"
    python, option, program = training["lifecycle"]["preStop"]["exec"]["command"]
    assert (python, option) == ("python", "-c")
    # By another name: whatever trains on this machine is to go on.
    title = f"ray::TestedWorker{os.getpid()}"
    assert program.count("ray::RayTrainWorker") == 1
    program = program.replace("ray::RayTrainWorker", title)
    with (
        subprocess.Popen(["bash", "-c", f"exec -a {title} sleep 100"]) as worker,
        subprocess.Popen(["sleep", "100"]) as another,
    ):
        threading.Thread(target=worker.wait).start()  # as its raylet does
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
        assert worker.wait(10) == -signal.SIGTERM
        assert another.poll() is None
        another.kill()


def test_pods_and_volume_fit_kubernetes_own_schema():
    for document in documents(CLUSTER):
        if document["kind"] != "RayCluster":
            check_kubernetes(document)
    for spec in pod_specs():
        check_kubernetes(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        )
    broken = pod_specs()[0] | {"nodeSelecter": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelecter"):
        check_kubernetes(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": broken}
        )


def test_no_pod_runs_as_root_or_may_become_it():
    for pod in pod_specs():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    for worker in pod_specs()[1:]:
        assert worker["automountServiceAccountToken"] is False


def test_pods_run_as_the_user_of_the_image():
    dockerfile = (ROOT / "infra" / "image" / "Dockerfile").read_text()
    user, group = re.search(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE).groups()
    for pod in pod_specs():
        context = pod["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))


def test_every_pod_mounts_the_claimed_shared_volume():
    claim = next(d for d in documents(CLUSTER) if d["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pod_specs():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        shared = volumes["shared"]["persistentVolumeClaim"]["claimName"]
        assert shared == claim["metadata"]["name"]
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert set(mounts) == set(volumes)
            assert mounts == {"shared": "/mnt/streamdit", "shm": "/dev/shm"}


def size_in_bytes(text):
    units = {"Gi": 2**30, "Mi": 2**20}
    return int(text[:-2]) * units[text[-2:]]


def test_object_store_fits_into_shared_memory():
    from ray._private import ray_constants

    for pod in pod_specs():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        shared = size_in_bytes(volumes["shm"]["emptyDir"]["sizeLimit"])
        (container,) = pod["containers"]
        memory = size_in_bytes(container["resources"]["limits"]["memory"])
        # What Ray takes unless it is told; it leaves /dev/shm for a disk if that is smaller.
        most = max(ray_constants.REQUIRE_SHM_SIZE_THRESHOLD, 0.95 * shared)
        store = ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * memory
        assert min(store, most) <= shared < memory


def test_what_is_fetched_from_hubs_is_kept_on_the_shared_volume():
    for pod in pod_specs():
        for container in pod["containers"]:
            variables = {entry["name"]: entry["value"] for entry in container["env"]}
            assert set(variables) == {"HF_HOME", "TORCH_HOME"}
            assert all(value.startswith("/mnt/streamdit/") for value in variables.values())


def test_registering_makes_its_sample_on_a_node_with_a_gpu():
    assert documents(JOBS["register"])[0]["spec"]["entrypointNumGpus"] == 1
    # The drivers of the other jobs only wait: the head, which has no GPU, will do.
    for name in set(JOBS) - {"register"}:
        assert "entrypointNumGpus" not in documents(JOBS[name])[0]["spec"]


def pools():
    """Per worker group: the group, and the CPUs and GPUs of its nodes that are always up."""
    found = {}
    for group in cluster()["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        nodes = group["minReplicas"]
        gpus = nodes * int(limits.get("nvidia.com/gpu", 0))
        found[group["groupName"]] = (group, nodes * int(limits["cpu"]), gpus)
    return found


def test_pools_scale_up_and_only_those_that_need_gpus_hold_them():
    assert cluster()["spec"]["enableInTreeAutoscaling"] is True
    assert set(pools()) == {"cpu-ingest", "gpu-encode", "gpu-train"}
    for name, (group, _, gpus) in pools().items():
        assert 0 < group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
        assert (gpus > 0) == name.startswith("gpu-")


def test_ray_version_is_the_one_that_is_tested():
    constraints = (ROOT / "constraints.txt").read_text()
    tested = re.search(r"^ray==(.+)$", constraints, re.MULTILINE).group(1)
    assert cluster()["spec"]["rayVersion"] == tested


def entrypoint(name):
    """Parsed command line of a job: what the command would be called with."""
    job = documents(JOBS[name])[0]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster()["metadata"]["name"]}
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", f"jobs.{name}"]
    module = __import__(COMMANDS[name].module, fromlist=["command"])
    return build_command(module.command, name).make_context(name, words[3:]).params


@pytest.mark.parametrize("name", JOBS)
def test_job_has_options_that_exist_and_keeps_everything_on_the_shared_volume(name):
    params = entrypoint(name)
    for value in params.values():
        if isinstance(value, Path):
            assert value.is_relative_to("/mnt/streamdit")


@pytest.mark.parametrize("name", SCHEMAS)
def test_job_has_settings_that_exist_and_fit_the_pools(name):
    params = entrypoint(name)
    given = params.get("overrides") or split_overrides(params.get("arguments") or [])[1]
    config = load_config(SCHEMAS[name], stage=name, preset=params["preset"], overrides=given)
    if name == "ingest":
        _, _, gpus = pools()["gpu-encode"]
        assert 0 < config.encode.autoencoder_gpus <= gpus
        return
    workers = config.launch.workers
    assert config.launch.use_gpu
    config.accumulation(workers)
    _, cpus, gpus = pools()["gpu-train"]
    assert workers <= gpus
    assert workers * config.launch.cpus_per_worker <= cpus


def test_each_job_reads_what_the_one_before_it_writes():
    train, distill = entrypoint("train"), entrypoint("distill")
    assert str(train["dataset"]) == str(entrypoint("ingest")["out"]) == str(distill["dataset"])
    assert distill["teacher"] == train["out"] / "model"
    assert entrypoint("register")["model"] == distill["out"] / "model"
    # Presets of one name fit each other.
    assert {entrypoint(name)["preset"] for name in SCHEMAS} == {train["preset"]}
    assert "tracking.directory={}".format(entrypoint("register")["tracking_directory"]) in (
        set(train["overrides"]) & set(distill["overrides"])
    )


@pytest.mark.slow
def test_health_checks_ask_for_a_page_that_ray_serves(tmp_path):
    probe = pod_specs()[1]["containers"][0]["readinessProbe"]["httpGet"]
    for pod in pod_specs():
        for container in pod["containers"]:
            assert container["readinessProbe"]["httpGet"] == probe
            assert container["livenessProbe"]["httpGet"] == probe
    port = free_ports(1)[0]
    with ray_head(tmp_path, agent_port=port):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{probe['path']}") as answer:
            assert answer.status == 200
