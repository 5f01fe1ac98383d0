"""One job at a time writes to a dataset, and one that was killed is in nobody's way."""

import os
import signal
import subprocess
import sys
import threading
import uuid

import pytest

from pipeline import lock, storage
from pipeline.lock import LOCK_FILE, WriterNote, writing
from pipeline.storage import StorageError, UnsupportedRequestError
from pipeline.store import open_store
from streamdit.errors import UserError

HOLD = """
import sys, time
from pipeline.lock import writing

with writing(sys.argv[1], "streamdit ingest"):
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("s3")
        return open_store(f"s3://videos/{uuid.uuid4()}")
    return open_store(tmp_path / "set")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "LOOK_S", 0.05)
    monkeypatch.setattr(lock, "SILENT_S", 0.6)


def foreign(**changes):
    """A note of a process that cannot be looked for from here."""
    note = WriterNote.of_this_process("streamdit ingest")
    return note.model_copy(update={"host": "elsewhere", "holder": "other"} | changes)


def leave(store, note):
    store.write_text(LOCK_FILE, note.model_dump_json())


def test_a_small_file_is_created_once(store):
    assert store.create_text("a/note", "one")
    assert not store.create_text("a/note", "two")
    assert store.read_text("a/note") == "one"


def test_a_small_file_appears_whole_and_nothing_else_stays(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    assert store.create_text("note", "one")
    assert not store.create_text("note", "two")
    assert list(store.files()) == ["note"]

    def no_links(*_):
        raise PermissionError("this file system has no hard links")

    monkeypatch.setattr(os, "link", no_links)
    assert store.create_text("other", "one")
    assert not store.create_text("other", "two")
    assert (store.read_text("other"), list(store.files())) == ("one", ["note", "other"])


def test_of_many_who_create_a_file_at_once_one_succeeds(store):
    start, made = threading.Barrier(8), []

    def create(name):
        start.wait()
        made.append(store.create_text("note", name))

    threads = [threading.Thread(target=create, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]


def test_store_without_conditional_writes_is_written_to_all_the_same(s3, monkeypatch):
    store = open_store(f"s3://videos/{uuid.uuid4()}")
    call = storage.call_s3

    def refuse(uri, operation, **arguments):
        if "IfNoneMatch" in arguments:
            raise UnsupportedRequestError(f"{uri}: An error occurred (NotImplemented)")
        return call(uri, operation, **arguments)

    monkeypatch.setattr("pipeline.store.call_s3", refuse)
    assert store.create_text("note", "one")
    assert not store.create_text("note", "two")
    assert store.read_text("note") == "one"


def test_other_refusals_of_a_store_are_errors(s3):
    with pytest.raises(StorageError, match="NoSuchBucket"):
        open_store("s3://nowhere/set").create_text("note", "one")


def test_a_second_job_is_told_who_writes(store):
    with writing(store.root, "streamdit ingest"):
        with (
            pytest.raises(UserError) as caught,
            writing(store.root, "streamdit select"),
        ):
            pass
        said = str(caught.value)
        assert f"`streamdit ingest` (process {os.getpid()} on" in said
        assert f"is writing to {store.root}: wait until it has finished" in said
    assert not store.exists(LOCK_FILE)
    with writing(store.root, "streamdit select"):
        assert store.exists(LOCK_FILE)


def test_lock_is_given_up_when_the_job_fails(store):
    with pytest.raises(ZeroDivisionError), writing(store.root, "streamdit ingest"):
        raise ZeroDivisionError
    assert not store.exists(LOCK_FILE)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_job_that_was_killed_here_is_passed_over_at_once(how, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 3600.0)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as job:
        assert job.stdout.readline() == b"holding\n"
        with pytest.raises(UserError, match=f"process {job.pid} on"), writing(tmp_path, "x"):
            pass
        job.send_signal(how)
    left = (tmp_path / LOCK_FILE).exists()
    assert left == (how == signal.SIGKILL)
    with writing(tmp_path, "streamdit ingest"):
        pass


def test_a_job_that_has_ended_unnoticed_by_its_parent_is_passed_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 3600.0)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as job:
        assert job.stdout.readline() == b"holding\n"
        os.kill(job.pid, signal.SIGKILL)
        os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie
        with writing(tmp_path, "streamdit ingest"):
            pass


def test_a_process_that_got_the_number_of_the_killed_one_is_not_it(store, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 3600.0)
    note = WriterNote.of_this_process("streamdit ingest")
    leave(store, note.model_copy(update={"process_start": str(int(note.process_start) - 1)}))
    with writing(store.root, "streamdit ingest"):
        pass


@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"host": None, "namespace": "container"}])
def test_a_silent_job_elsewhere_is_passed_over_after_a_while(store, quick, where):
    note = WriterNote.of_this_process("streamdit ingest")
    leave(store, foreign(**{name: value or note.host for name, value in where.items()}))
    told = []
    with writing(store.root, "streamdit select", told.append):
        pass
    assert len(told) == 1
    assert "`streamdit ingest` on" in told[0]
    assert "looking whether it still is" in told[0]
    assert not store.exists(LOCK_FILE)


def test_a_job_elsewhere_that_gives_signs_of_life_is_left_alone(store, quick, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 30.0)
    leave(store, foreign())
    timer = threading.Timer(0.2, leave, (store, foreign(beat=1)))
    timer.start()
    with pytest.raises(UserError, match="on elsewhere\\) is writing to"), writing(store.root, "x"):
        pass
    timer.join()
    assert store.exists(LOCK_FILE)


def test_waiting_ends_when_the_other_job_does(store, quick, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 30.0)
    leave(store, foreign())
    timer = threading.Timer(0.2, store.delete, (LOCK_FILE,))
    timer.start()
    with writing(store.root, "streamdit ingest"):
        pass
    timer.join()


def test_a_note_that_is_half_written_is_waited_for(store, quick):
    store.write_text(LOCK_FILE, '{"holder": "ab')
    told = []
    with writing(store.root, "streamdit ingest", told.append):
        pass
    assert told[0].startswith("another job was writing to")


def test_a_job_renews_its_note(store, quick):
    beats = set()
    with writing(store.root, "streamdit ingest"):
        for _ in range(100):
            beats.add(WriterNote.model_validate_json(store.read_text(LOCK_FILE)).beat)
            if len(beats) > 2:
                break
            threading.Event().wait(0.05)
    assert len(beats) > 2


def test_a_job_that_was_taken_for_dead_says_so_at_once_and_at_its_end(store, quick):
    said = []

    def be_taken_for_dead():
        with writing(store.root, "streamdit ingest", said.append):
            for _ in range(3):  # a beat may have been about to be written
                leave(store, foreign())
                threading.Event().wait(0.3)
            assert len(said) == 1

    with pytest.raises(UserError, match="another job took `streamdit ingest` for dead"):
        be_taken_for_dead()
    assert "writes to" in said[0]
    assert "other" in store.read_text(LOCK_FILE)  # the other's lock is left alone


def test_loss_is_noticed_also_between_the_last_beat_and_the_end(store):
    def be_taken_for_dead():
        with writing(store.root, "streamdit ingest"):
            leave(store, foreign())

    with pytest.raises(UserError, match="another job took `streamdit ingest` for dead"):
        be_taken_for_dead()


def test_of_two_that_find_a_killed_job_one_goes_on(store, quick, monkeypatch):
    """The slower one deletes the note of the faster one, which it takes for the old one."""
    leave(store, foreign(host=WriterNote.of_this_process("x").host, pid=2**22 + 1))
    create, delete, order = store.create_text, type(store).delete, []

    def slow_to_create(path, text):
        made = create(path, text)
        if made and not order:
            order.append("taken by the other")
            delete(store, path)
            leave(store, foreign(beat=len(order)))
        return made

    monkeypatch.setattr(lock, "open_store", lambda _: store)
    monkeypatch.setattr(store, "create_text", slow_to_create)
    timer = threading.Timer(0.3, leave, (store, foreign(beat=7)))
    timer.start()
    with pytest.raises(UserError, match="is writing to"), writing(store.root, "streamdit ingest"):
        pass
    timer.join()
    assert order


def test_a_request_that_was_repeated_finds_its_own_note(store, monkeypatch):
    """A store whose answer is lost is asked again, and then says that the note is there."""
    create = store.create_text
    monkeypatch.setattr(lock, "open_store", lambda _: store)
    monkeypatch.setattr(store, "create_text", lambda path, text: create(path, text) and False)
    with writing(store.root, "streamdit ingest"):
        assert store.exists(LOCK_FILE)
    assert not store.exists(LOCK_FILE)


def test_storage_that_fails_at_the_end_hides_nothing(store, monkeypatch):
    said = []

    def refuse(path):
        raise StorageError("AccessDenied")

    def fail():
        with writing(store.root, "streamdit ingest", said.append):
            monkeypatch.setattr(store, "delete", refuse)
            raise UserError("what the job says")

    monkeypatch.setattr(lock, "open_store", lambda _: store)
    with pytest.raises(UserError, match="what the job says"):
        fail()
    assert said == [f"{store.uri(LOCK_FILE)} cannot be removed: AccessDenied"]


def test_a_beat_that_fails_is_made_up_for(store, quick, monkeypatch):
    said, write = [], store.write_text

    def refuse_once(path, text):
        if not said:
            raise RuntimeError("no such luck")
        write(path, text)

    monkeypatch.setattr(lock, "open_store", lambda _: store)
    monkeypatch.setattr(store, "write_text", refuse_once)
    with writing(store.root, "streamdit ingest", said.append):
        for _ in range(100):
            threading.Event().wait(0.05)
            if WriterNote.model_validate_json(store.read_text(LOCK_FILE)).beat > 1:
                break
        else:
            pytest.fail("no beat after the failed one")
    assert said == [f"{store.uri(LOCK_FILE)} cannot be renewed: no such luck"]


def test_a_folder_that_nothing_came_into_is_not_left_behind(tmp_path):
    with writing(tmp_path / "new", "streamdit ingest"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "given").mkdir()
    with writing(tmp_path / "given", "streamdit ingest"):
        pass
    assert (tmp_path / "given").is_dir()
    with writing(tmp_path / "used", "streamdit ingest"):
        (tmp_path / "used" / "plan.json").write_text("{}")
    assert (tmp_path / "used").is_dir()
