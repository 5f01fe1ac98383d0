"""The MLflow server's compose file: schema, secrets, and options that the server takes."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "infra" / "mlflow"
COMPOSE = FOLDER / "compose.yaml"


def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def check_schema(path):
    return subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", "vendor.compose-spec", path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def test_compose_file_fits_the_specification(tmp_path):
    result = check_schema(COMPOSE)
    assert result.returncode == 0, result.stdout
    broken = tmp_path / "compose.yaml"
    broken.write_text(COMPOSE.read_text().replace("restart:", "restarts:"))
    assert check_schema(broken).returncode == 1


def test_every_image_has_a_version():
    for name, service in services().items():
        image = re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", service["image"])
        assert re.search(r":[^:]*\d", image), name
        assert not image.endswith(":latest")


def test_image_that_the_project_makes_is_built_where_there_is_none():
    own = {name for name, service in services().items() if "STREAMDIT_IMAGE" in service["image"]}
    assert own == {"bucket", "server"}
    for name, service in services().items():
        assert ("build" in service) == (name in own)
    for name in own:
        build = services()[name]["build"]
        context = (FOLDER / build["context"]).resolve()
        assert (context / "pyproject.toml").is_file()
        recipe = (context / build["dockerfile"]).read_text()
        assert re.search(rf"^FROM \S+ AS {build['target']}$", recipe, re.MULTILINE)


def test_secrets_come_from_the_environment_only():
    text = COMPOSE.read_text()
    for name in ("POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        uses = re.findall(rf"\$\{{{name}([^}}]*)\}}", text)
        assert uses, name
        # `:?` refuses to start without one: there is no default password.
        assert all(use.startswith(":?") for use in uses), name
    for service in services().values():
        assert "PASSWORD" not in str(service.get("command", ""))
    named = re.findall(r"^#? ?(\w+)=(.*)$", (FOLDER / "example.env").read_text(), re.MULTILINE)
    assert {name for name, value in named if not value} == {
        "POSTGRES_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
    }


def test_variables_of_the_example_are_those_of_the_file():
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    named = set(re.findall(r"^#? ?([A-Z_0-9]+)=", (FOLDER / "example.env").read_text(), re.M))
    assert named <= used


def test_what_waits_waits_for_what_is_there_and_can_tell_its_health():
    for service in services().values():
        for name, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in services()[name]


def test_server_is_open_to_this_machine_only_unless_said():
    assert services()["server"]["ports"] == ["${MLFLOW_BIND:-127.0.0.1}:5000:5000"]


def test_mlflow_knows_the_options(monkeypatch):
    from mlflow.cli import server

    words = services()["server"]["command"]
    assert words[:2] == ["mlflow", "server"]
    known = {option for parameter in server.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words[2:]} <= known
    variables = {name for parameter in server.params if (name := parameter.envvar)}
    assert "MLFLOW_BACKEND_STORE_URI" in variables
    # SQLAlchemy's default driver changes between its versions; the installed one is named.
    store = services()["server"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    importlib.import_module(re.match(r"postgresql\+(\w+)://", store).group(1))


@pytest.mark.parametrize("taken", [[], ["mlflow"]])
def test_bucket_is_made_once(taken, monkeypatch):
    """The program in the compose file, with an S3 client that writes down what it is asked."""
    import boto3

    made = []

    class Client:
        def list_buckets(self):
            return {"Buckets": [{"Name": name} for name in taken]}

        def create_bucket(self, Bucket):
            made.append(Bucket)

    monkeypatch.setattr(boto3, "client", lambda service: Client())
    program = services()["bucket"]["command"]
    assert program[:2] == ["python", "-c"]
    exec(program[2], {})
    assert made == ([] if taken else ["mlflow"])
