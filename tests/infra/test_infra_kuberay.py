"""The KubeRay manifests against KubeRay's own resource definitions, and against each other."""

import os
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from jobs.config import load_config
from training.config import TrainConfig

FOLDER = Path(__file__).parents[2] / "infra" / "kuberay"
MANIFESTS = {"RayCluster": FOLDER / "raycluster.yaml", "RayJob": FOLDER / "rayjob-train.yaml"}
DEFINITIONS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}


def documents(path):
    return list(yaml.load_all(path.read_text(), yaml.CSafeLoader))


def resource(kind):
    return next(d for d in documents(MANIFESTS[kind]) if d["kind"] == kind)


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


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifest_fits_the_resource_definition(kind, validator_for):
    errors = [e.message for e in validator_for(kind).iter_errors(resource(kind))]
    assert errors == []


def test_misspelt_key_and_wrong_type_are_noticed(validator_for):
    cluster = resource("RayCluster")
    cluster["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = 5
    messages = " ".join(e.message for e in validator_for("RayCluster").iter_errors(cluster))
    assert "maxReplica" in messages
    assert "5 is not of type 'string'" in messages


def pod_specs():
    spec = resource("RayCluster")["spec"]
    return [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_no_pod_runs_as_root_or_may_become_it():
    for pod in pod_specs():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_every_pod_mounts_the_claimed_shared_volume():
    claim = next(
        d for d in documents(MANIFESTS["RayCluster"]) if d["kind"] == "PersistentVolumeClaim"
    )
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pod_specs():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        shared = volumes["shared"]["persistentVolumeClaim"]["claimName"]
        assert shared == claim["metadata"]["name"]
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert set(mounts) == set(volumes)
            assert mounts == {"shared": "/mnt/streamdit", "shm": "/dev/shm"}


def pools():
    """Per worker group: the group, and the CPUs and GPUs of its nodes that are always up."""
    found = {}
    for group in resource("RayCluster")["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        nodes = group["minReplicas"]
        gpus = nodes * int(limits.get("nvidia.com/gpu", 0))
        found[group["groupName"]] = (group, nodes * int(limits["cpu"]), gpus)
    return found


def test_pools_scale_up_and_only_training_holds_gpus():
    assert resource("RayCluster")["spec"]["enableInTreeAutoscaling"] is True
    for group, _, gpus in pools().values():
        assert 0 < group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
        assert (gpus > 0) == (group["groupName"] == "gpu-train")


def test_ray_version_is_the_one_that_is_tested():
    constraints = (FOLDER.parents[1] / "constraints.txt").read_text()
    tested = re.search(r"^ray==(.+)$", constraints, re.MULTILINE).group(1)
    assert resource("RayCluster")["spec"]["rayVersion"] == tested


def test_training_job_runs_on_that_cluster_with_settings_that_exist():
    job, cluster = resource("RayJob"), resource("RayCluster")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.train"]
    config = load_config(
        TrainConfig,
        stage="train",
        preset=words[words.index("--preset") + 1],
        overrides=[word for word in words if "=" in word],
    )
    workers = config.launch.workers
    assert config.launch.use_gpu
    config.accumulation(workers)
    _, cpus, gpus = pools()["gpu-train"]
    assert workers <= gpus
    assert workers * config.launch.cpus_per_worker <= cpus
