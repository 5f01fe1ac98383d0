"""Answers of an S3 store that break off are asked for again."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline import storage
from pipeline.child import describe_error
from pipeline.store import open_store

CONTENT = bytes(range(256)) * 400


class CuttingHandler(BaseHTTPRequestHandler):
    """Serves one object under every key; the first answers end in the middle."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        start, end = 0, len(CONTENT)
        if span := self.headers.get("Range"):
            start, last = map(int, span.removeprefix("bytes=").split("-"))
            end = last + 1
        body = CONTENT[start:end]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.answers += 1
        if self.server.answers <= self.server.broken:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), CuttingHandler)
    server.answers = server.broken = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(storage, "READ_WAIT_S", 0.01)
    storage._s3_client.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    storage._s3_client.cache_clear()


def test_an_answer_that_breaks_off_is_asked_for_again(server):
    server.broken = 2
    assert storage.read_bytes("s3://bucket/key") == CONTENT
    assert server.answers == 3
    server.answers, server.broken = 0, 1
    assert storage.read_span("s3://bucket/key", 1000, 5000) == CONTENT[1000:6000]
    assert server.answers == 2


def test_answers_that_always_break_off_are_a_failure_that_may_pass(server):
    server.broken = 1000
    with pytest.raises(storage.StorageError, match=r"^s3://bucket/data/plan\.json: ") as error:
        open_store("s3://bucket/data").read_text("plan.json")
    assert server.answers == storage.READ_TRIES
    name, _, retryable = describe_error(error.value)
    assert (name, retryable) == ("StorageError", True)
