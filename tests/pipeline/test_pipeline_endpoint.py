"""Captions from an OpenAI-compatible server: a small real one, on this machine."""

import base64
import io
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import COLOURS, write_shots
from PIL import Image

from pipeline.annotate import annotate
from pipeline.clips import read_clip
from pipeline.config import CaptionConfig
from pipeline.curate import curate
from pipeline.endpoint import EndpointCaptioner, EndpointError
from pipeline.schema import read_annotations, read_clips, read_dead_letters
from streamdit.errors import UserError


def nearest_colour(picture):
    corner = np.asarray(picture, np.float64)[-4:, -4:].reshape(-1, 3).mean(0)
    return min(COLOURS, key=lambda name: np.abs(corner - COLOURS[name]).sum())


class Server:
    """Names the background colour of the first picture, after a random wait."""

    def __init__(self):
        self.requests = []
        self.under_way = self.most_under_way = 0
        self.wait = lambda: 0.0
        self.answer = lambda number, colour: (200, f"a square over {colour}")
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer.handle(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def handle(self, request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append((request.path, dict(request.headers), body))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        time.sleep(self.wait())
        _, *pictures = body["messages"][0]["content"]
        data = base64.b64decode(pictures[0]["image_url"]["url"].partition(",")[2])
        status, answer = self.answer(number, nearest_colour(Image.open(io.BytesIO(data))))
        reply = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
        content = json.dumps(reply if status == 200 else {"error": answer}).encode()
        with self._lock:
            self.under_way -= 1
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("pipeline.endpoint.BACKOFF_S", 0.01)
    server = Server()
    yield server
    server.http.shutdown()


def settings(server, **changes):
    values = {"captioner": "endpoint", "model": "vision-1", "url": server.url} | changes
    return CaptionConfig.model_validate(values)


def plain(colour):
    return np.full((32, 48, 3), COLOURS[colour], np.uint8)


def test_captions_stay_with_their_clips_in_whatever_order_answers_come(server):
    random.seed(0)
    waits = [random.uniform(0, 0.05) for _ in range(60)]
    server.wait = lambda: waits.pop()
    names = [random.choice(list(COLOURS)) for _ in range(60)]
    clips = {f"clip{i}": [plain(name)] for i, name in enumerate(names)}
    answers = EndpointCaptioner(settings(server, concurrency=7)).caption(clips)
    assert answers == {f"clip{i}": f"a square over {name}" for i, name in enumerate(names)}
    assert 1 < server.most_under_way <= 7
    asked = [nearest_colour_of(body) for *_, body in server.requests]
    assert asked != names, "the requests were meant to overtake each other"


def nearest_colour_of(body):
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    return nearest_colour(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_a_request_carries_prompt_pictures_model_and_key(server, monkeypatch):
    monkeypatch.setenv("VISION_KEY", "secret")
    config = settings(server, prompt="What is it?", api_key_env="VISION_KEY", max_tokens=9)
    EndpointCaptioner(config).caption({"a": [plain("red"), plain("blue")]})
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("vision-1", 9, 0)
    text, first, second = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    assert first["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert first != second


def test_a_passing_failure_is_asked_again_and_a_lasting_one_is_not(server):
    server.answer = lambda number, colour: (503, "busy") if number < 2 else (200, colour)
    captioner = EndpointCaptioner(settings(server, retries=3))
    assert captioner.caption({"a": [plain("green")]}) == {"a": "green"}
    assert len(server.requests) == 3

    server.answer = lambda number, colour: (400, "picture refused")
    refused = captioner.caption({"a": [plain("green")]})["a"]
    assert isinstance(refused, EndpointError)
    assert not refused.retryable
    assert "answers 400" in str(refused)
    assert len(server.requests) == 4

    server.answer = lambda number, colour: (500, "broken")
    failed = captioner.caption({"a": [plain("green")]})["a"]
    assert failed.retryable
    assert len(server.requests) == 8


def test_a_refused_key_and_a_missing_address_are_named(server):
    server.answer = lambda number, colour: (401, "no such key")
    with pytest.raises(UserError, match=r"answers 401 .*no such key.*OPENAI_API_KEY") as error:
        EndpointCaptioner(settings(server)).caption({"a": [plain("red")]})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"needs captions\.url"):
        EndpointCaptioner(settings(server, url=None))


def test_an_unreachable_server_fails_the_caption_only(server):
    server.http.shutdown()
    server.http.server_close()
    answer = EndpointCaptioner(settings(server, retries=1)).caption({"a": [plain("red")]})["a"]
    assert isinstance(answer, EndpointError)
    assert answer.retryable


@pytest.fixture
def curated(tmp_path, small_config, without_ray, server):
    write_shots(tmp_path / "videos" / "a.mp4", ["red", "green", "blue"])
    write_shots(tmp_path / "videos" / "b.mp4", ["yellow", "purple", "cyan"])
    captions = settings(server, frames=2, retries=0)
    config = small_config.model_copy(update={"captions": captions})
    curate([str(tmp_path / "videos")], tmp_path / "data", config)
    return tmp_path / "data", config


def test_every_clip_gets_the_caption_of_its_own_pictures(curated, server):
    dataset, config = curated
    server.wait = lambda: random.uniform(0, 0.02)
    assert annotate(dataset, config).captions == 12
    notes = {row["clip_id"]: row for row in read_annotations(dataset).to_pylist()}
    for clip in read_clips(dataset).to_pylist():
        frames = read_clip(clip["uri"], clip["start_s"], 16, 16.0, 32, 32)
        note = notes[clip["clip_id"]]
        assert note["caption"] == f"a square over {nearest_colour(frames[8])}"
        assert (note["caption_status"], note["caption_model"]) == ("ok", "endpoint:vision-1")


def test_only_captions_that_failed_are_asked_for_again(curated, server):
    dataset, config = curated
    server.answer = lambda number, colour: (500 if colour == "red" else 200, f"over {colour}")
    first = annotate(dataset, config)
    assert (first.captions, first.failed, first.dead) == (10, 2, 2)
    letters = read_dead_letters(dataset).to_pylist()
    assert [row["start_s"] for row in letters] == [0.0, 1.0]
    assert {row["error_class"] for row in letters} == {"EndpointError"}
    assert all(row["retryable"] for row in letters)
    server.requests.clear()
    server.answer = lambda number, colour: (200, f"over {colour}")
    second = annotate(dataset, config)
    assert (second.captions, second.failed, second.dead) == (12, 0, 0)
    assert len(server.requests) == 2
    captions = read_annotations(dataset)["caption"].to_pylist()
    assert sorted(captions) == sorted(f"over {name}" for name in COLOURS for _ in range(2))


def test_another_prompt_asks_for_all_captions_again(curated, server):
    dataset, config = curated
    annotate(dataset, config)
    server.requests.clear()
    elsewhere = config.captions.model_copy(update={"concurrency": 2})
    annotate(dataset, config.model_copy(update={"captions": elsewhere}))
    assert server.requests == []
    prompt = config.captions.model_copy(update={"prompt": "Name the colour."})
    annotate(dataset, config.model_copy(update={"captions": prompt}))
    assert len(server.requests) == 12
