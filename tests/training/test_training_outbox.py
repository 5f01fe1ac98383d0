"""Records on their way to a server that may be away or slow."""

import json
import threading
import time

from outbox_server import Server, wait_for

from training.outbox import Outbox


def test_records_arrive_in_order_and_leave_no_file(tmp_path):
    server = Server()
    outbox = Outbox(server.send, tmp_path / "outbox.jsonl")
    for n in range(50):
        outbox.put({"n": n})
    assert outbox.close() == 0
    assert server.got == list(range(50))
    assert not (tmp_path / "outbox.jsonl").exists()


def test_records_wait_in_a_file_while_the_server_is_away_and_follow_when_it_is_back(
    tmp_path, caplog
):
    server, path = Server(), tmp_path / "outbox.jsonl"
    outbox = Outbox(server.send, path, retry_after_s=0.02)
    outbox.put({"n": 0})
    wait_for(lambda: server.got == [0])
    server.away = True
    for n in range(1, 4):
        outbox.put({"n": n})
    wait_for(lambda: path.exists() and len(path.read_text().splitlines()) == 3)
    wait_for(lambda: server.attempts > 5)
    assert caplog.text.count("nobody answers") == 1
    server.away = False
    wait_for(lambda: server.got == [0, 1, 2, 3])
    outbox.put({"n": 4})
    assert outbox.close() == 0
    assert server.got == [0, 1, 2, 3, 4]
    assert caplog.text.count("takes records again") == 1
    assert not path.exists()


def test_what_one_process_could_not_send_the_next_one_sends(tmp_path):
    server, path = Server(), tmp_path / "outbox.jsonl"
    server.away = True
    first = Outbox(server.send, path, retry_after_s=0.01)
    first.put({"n": 1})
    first.put({"n": 2})
    assert first.close(wait_s=0.1) == 2
    with path.open("a") as file:
        file.write('{"n": 3, "cut')
    server.away = False
    second = Outbox(server.send, path)
    second.put({"n": 4})
    assert second.close() == 0
    assert server.got == [1, 2, 4]


def test_putting_never_waits_for_a_slow_server():
    release = threading.Event()

    def slow(calls):
        release.wait(10)
        return len(calls)

    outbox = Outbox(slow)
    started = time.perf_counter()
    for n in range(1000):
        outbox.put({"n": n})
    assert time.perf_counter() - started < 1.0
    release.set()
    assert outbox.close() == 0


def test_closing_waits_for_a_slow_server_with_the_records_in_a_file_meanwhile(tmp_path, caplog):
    path, release, got = tmp_path / "outbox.jsonl", threading.Event(), []

    def slow(calls):
        release.wait(10)
        got.append(calls[0]["n"])
        return 1

    outbox = Outbox(slow, path)
    outbox.put({"n": 1})
    outbox.put({"n": 2})
    left = []
    closing = threading.Thread(target=lambda: left.append(outbox.close(wait_s=0.05)))
    closing.start()
    wait_for(lambda: path.exists() and len(path.read_text().splitlines()) == 2)
    wait_for(lambda: "waiting until the last records are sent: 2" in caplog.text)
    release.set()
    closing.join()
    assert (left, got) == ([0], [1, 2])
    assert not path.exists()


def test_closing_keeps_only_what_a_server_that_goes_away_did_not_take(tmp_path):
    path, release, got = tmp_path / "outbox.jsonl", threading.Event(), []

    def slow_then_away(calls):
        release.wait(10)
        if got:
            raise OSError("connection reset")
        got.append(calls[0]["n"])
        return 1

    outbox = Outbox(slow_then_away, path, retry_after_s=0.01)
    for n in range(3):
        outbox.put({"n": n})
    threading.Timer(0.2, release.set).start()
    assert outbox.close(wait_s=0.05) == 2
    assert [json.loads(line)["n"] for line in path.open()] == [1, 2]
