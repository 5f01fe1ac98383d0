"""`streamdit doctor`: true findings, remedies, no secrets, and an exit status for scripts."""

import http.server
import json
import socket
import threading
from importlib import metadata

import pytest
from typer.testing import CliRunner

import jobs.doctor
from jobs import machine, services
from jobs.cli import app
from jobs.findings import Finding
from jobs.services import without_secrets


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("COLUMNS", "100")


def doctor(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture
def closed_port():
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_json_names_what_this_machine_really_has():
    result = doctor("--json")
    report = json.loads(result.stdout)
    found = {(f["section"], f["name"]): f for f in report["findings"]}
    assert found["libraries", "torch"]["found"] == metadata.version("torch")
    assert found["libraries", "ray"]["status"] == "ok"
    assert "h264" in found["video", "PyAV decoders"]["found"]
    assert found["video", "H.264 encoder"]["found"] == "libx264"
    assert "accelerator" in found["services", "DeepSpeed"]["found"]
    assert {f["status"] for f in report["findings"]} <= {"ok", "warning", "missing"}
    assert report["ok"] == (result.exit_code == 0)
    assert report["ok"] == all(f["status"] != "missing" for f in report["findings"])


def test_everything_that_is_not_well_has_a_remedy():
    for finding in machine.examine():
        assert bool(finding.remedy) == (finding.status != "ok"), finding


def table_of(monkeypatch, *findings):
    monkeypatch.setattr(jobs.doctor, "examine", lambda: iter(findings))
    return doctor()


def test_something_missing_sets_the_exit_status_and_shows_the_remedy(monkeypatch):
    result = table_of(
        monkeypatch,
        Finding("libraries", "torch", "ok", "2.14.1"),
        Finding("libraries", "decord", "missing", "not [installed]", "pip install decord"),
    )
    assert result.exit_code == 1
    assert "not [installed]" in result.stdout
    assert "→ pip install decord" in result.stdout
    assert "Missing: decord." in result.stdout


def test_warnings_alone_do_not(monkeypatch):
    result = table_of(monkeypatch, Finding("machine", "GPU", "warning", "none", "get one"))
    assert result.exit_code == 0
    assert "Everything needed is there, with 1 warning." in result.stdout


def test_library_outside_the_declared_range_is_a_warning(monkeypatch):
    requirements = ["numpy>=99", "no-such-package>=1", 'torch; sys_platform == "plan9"']
    monkeypatch.setattr(machine, "_declared_requirements", lambda: requirements)
    numpy, absent = machine._libraries()
    assert (numpy.status, numpy.remedy) == ("warning", 'pip install "numpy>=99"')
    assert numpy.found == f"{metadata.version('numpy')}, outside >=99"
    assert (absent.status, absent.found) == ("missing", "not installed")


def test_library_that_breaks_a_probe_is_reported_and_the_others_still_run(monkeypatch):
    def _devices():
        raise ImportError("libcuda.so.1: cannot open")
        yield

    monkeypatch.setattr(machine, "_devices", _devices)
    findings = list(machine.examine())
    broken = next(f for f in findings if f.name == "devices")
    assert broken.status == "missing"
    assert "libcuda.so.1" in broken.found
    assert findings[-1].name == "S3"


def test_secrets_are_not_shown(monkeypatch, closed_port):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRET")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:9000")
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", f"postgresql://me:hunter2@127.0.0.1:{closed_port}/db?token=hunter2"
    )
    findings = [*services.s3(), *services.mlflow()]
    text = " ".join(f"{f.found} {f.remedy}" for f in findings)
    assert "127.0.0.1:9000" in text
    assert "credentials from the environment" in text
    for secret in ("AKIASECRET", "verysecret", "hunter2"):
        assert secret not in text
    assert without_secrets("s3://bucket/key") == "s3://bucket/key"


def test_ray_cluster_is_reached_or_reported(monkeypatch, closed_port):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    (finding,) = services.ray()
    assert finding.status == "missing"
    assert "does not answer" in finding.found
    assert "unset it" in finding.remedy
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{server.getsockname()[1]}")
        (finding,) = services.ray()
    assert finding.status == "ok"
    assert finding.found.endswith("is reachable")


def test_ray_auto_without_a_cluster_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert [f.status for f in services.ray()] == ["missing"]


@pytest.fixture
def mlflow_server():
    """A server that answers as MLflow's health page does; `status` is what it answers with."""

    class Handler(http.server.BaseHTTPRequestHandler):
        status = 200

        def do_GET(self):
            self.send_response(self.status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", Handler
        server.shutdown()


@pytest.mark.parametrize(
    ("answer", "status"), [(200, "ok"), (401, "ok"), (500, "missing"), (404, "missing")]
)
def test_mlflow_server_is_asked_for_its_health(monkeypatch, mlflow_server, answer, status):
    address, handler = mlflow_server
    monkeypatch.setattr(handler, "status", answer)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert [f.status for f in services.mlflow()] == [status]


def test_mlflow_store_in_a_folder_must_be_writable(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert [f.status for f in services.mlflow()] == ["ok"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none/mlflow.db")
    (finding,) = services.mlflow()
    assert finding.status == "missing"
    assert f"{tmp_path}/none is no folder" in finding.found


def test_full_or_absent_disk_is_reported(monkeypatch, tmp_path):
    absent = machine._disk("disk", tmp_path / "none", "free space")
    assert (absent.status, absent.remedy) == ("missing", "free space")
    monkeypatch.setattr(machine, "FREE_DISK_REQUIRED", 1e18)
    assert machine._disk("disk", tmp_path, "free space").status == "missing"
    monkeypatch.setattr(machine, "FREE_DISK_REQUIRED", 1)
    monkeypatch.setattr(machine, "FREE_DISK_WARNING", 1e18)
    assert machine._disk("disk", tmp_path, "free space").status == "warning"
