import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from conftest import code_picture, read_code, write_video

from pipeline import storage
from pipeline.captions import read_cues
from pipeline.clips import read_clip
from pipeline.plan import extend_plan, read_plan, require_places, unit_of, unit_tasks, write_plan
from pipeline.sources import list_sources
from pipeline.storage import S3Object, open_video
from pipeline.store import open_store
from streamdit.errors import UserError


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def uris(listing):
    return sorted(source.uri for source in listing.sources)


def test_folders_are_searched_and_what_is_no_video_is_counted(tmp_path):
    a = put(tmp_path / "a.mp4", b"a")
    b = put(tmp_path / "deep" / "er" / "b.MKV", b"b")
    put(tmp_path / ".hidden.mp4", b"c")
    put(tmp_path / ".cache" / "d.mp4", b"d")
    put(tmp_path / "e.mp4.part", b"e")
    put(tmp_path / "f.webm.crdownload", b"f")
    put(tmp_path / "notes.pdf", b"g")
    put(tmp_path / "copy of a.mp4", b"a")
    for suffix in (".txt", ".vtt", ".json"):
        put(a.with_suffix(suffix), b"x")
    listing = list_sources([str(tmp_path)])
    assert uris(listing) == [str(a), str(b)]
    assert listing.skipped == {"hidden": 1, "partial": 2, "not video": 1, "duplicate": 1}
    by_uri = {source.uri: source for source in listing.sources}
    assert [Path(s).suffix for s in by_uri[str(a)].sidecars] == [".vtt", ".json", ".txt"]
    assert by_uri[str(b)].sidecars == ()


def test_files_lists_and_their_sidecars(tmp_path, monkeypatch):
    a = put(tmp_path / "one" / "a.mp4", b"a")
    put(a.with_suffix(".txt"), b"caption")
    b = put(tmp_path / "two" / "b.mp4", b"b")
    listed = put(tmp_path / "videos.list", b"# mine\n\none/a.mp4\n" + str(b).encode())
    listing = list_sources([str(listed)])
    assert uris(listing) == [str(a), str(b)]
    assert [s.sidecars for s in listing.sources if s.uri == str(a)] == [
        (str(a.with_suffix(".txt")),)
    ]
    monkeypatch.chdir(tmp_path)
    assert uris(list_sources(["one/a.mp4"])) == [str(a)]


def test_identity_follows_content_not_name(tmp_path):
    big = os.urandom(3 << 20)
    (first,) = list_sources([str(put(tmp_path / "a.mp4", big))]).sources
    assert first.size == 3 << 20
    (moved,) = list_sources([str(put(tmp_path / "x" / "b.mkv", big))]).sources
    changed = big[:-1] + bytes([big[-1] ^ 1])
    (ended,) = list_sources([str(put(tmp_path / "c.mp4", changed))]).sources
    assert moved.source_id == first.source_id != ended.source_id


def test_unreadable_files_are_dead_letters(tmp_path):
    good = put(tmp_path / "good.mp4", b"x")
    put(tmp_path / "empty.mp4", b"")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    listing = list_sources([str(tmp_path)])
    assert uris(listing) == [str(good)]
    found = {Path(uri).name: error_class for uri, error_class, _, _ in listing.dead}
    assert found == {"empty.mp4": "EmptyFileError", "gone.mp4": "FileNotFoundError"}


def test_wrong_inputs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"input nowhere does not exist"):
        list_sources(["nowhere"])
    put(tmp_path / "readme.md", b"x")
    with pytest.raises(UserError, match=r"no video found in .*give files"):
        list_sources([str(tmp_path)])


def planned(dataset, videos):
    """Units of the plan after the videos were added."""
    count = extend_plan(dataset, list_sources([str(videos)]).sources, unit_sources=2)
    units = list(read_plan(dataset))
    assert len(units) == count
    return units


def test_later_sources_form_new_units_and_moved_ones_keep_theirs(tmp_path):
    old = tmp_path / "old"
    for name in "abc":
        put(old / f"{name}.mp4", name.encode())
    first = planned(tmp_path / "ds", old)
    assert [len(unit.sources) for unit in first] == [2, 1]
    moved = old.rename(tmp_path / "new")
    put(moved / "d.mp4", b"d")
    second = planned(tmp_path / "ds", moved)
    assert [unit.name for unit in second[:2]] == [unit.name for unit in first]
    assert [len(unit.sources) for unit in second] == [2, 1, 1]
    assert all(source.uri.startswith(str(moved)) for unit in second for source in unit.sources)


def test_a_worker_reads_its_unit_alone_and_finds_it_in_another_plan(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.plan.SECOND_LOOKS_S", (0.0, 0.01))
    for name in "abcd":
        put(tmp_path / "videos" / f"{name}-é.mp4", name.encode())
    units = planned(tmp_path / "ds", tmp_path / "videos")
    store = open_store(tmp_path / "ds")
    tasks = unit_tasks(require_places(store), {units[0].name}, "s", retry_dead=False)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.plan.read_plan", lambda store: pytest.fail("all was read"))
        assert [unit_of(store, task) for task in tasks] == units[1:]
    write_plan(store, units[1:])
    assert [unit_of(store, task) for task in tasks] == units[1:]
    write_plan(store, units[:1])
    with pytest.raises(UserError, match=r"plan\.json no longer has unit .*run this one again"):
        unit_of(store, tasks[0])


def test_a_name_that_is_not_text_is_a_dead_letter(tmp_path):
    good = put(tmp_path / "good.mp4", b"g")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")).write_bytes(b"v")
    listing = list_sources([str(tmp_path)])
    assert uris(listing) == [str(good)]
    assert [letter[:2] for letter in listing.dead] == [
        (str(tmp_path / "caf\\xe9.mp4"), "FileNameError")
    ]


def test_more_files_than_a_page_of_the_catalogue_come_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.catalogue.PAGE", 3)
    for number in range(10):
        put(tmp_path / f"{number}.mp4", str(number).encode())
        put(tmp_path / f"nameless-{number}", b"no video")
    table = put(tmp_path / "t.csv", b"path\n" + b"".join(b"%d.mp4\n" % i for i in range(7)))
    listing = list_sources([str(tmp_path)])
    assert uris(listing) == sorted(str(tmp_path / f"{number}.mp4") for number in range(10))
    assert listing.skipped == {"not video": 11}
    ids = [source.source_id for source in listing.sources]
    assert ids == sorted(ids)
    assert len(listing.sources) == 10
    assert uris(list_sources([str(table)])) == [str(tmp_path / f"{i}.mp4") for i in range(7)]


def test_a_link_in_a_circle_costs_itself_only(tmp_path):
    for number in range(6):
        put(tmp_path / f"{number}.mp4", str(number).encode())
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    listing = list_sources([str(tmp_path)])
    assert len(listing.sources) == 6
    assert [Path(letter[0]).name for letter in listing.dead] == ["loop.mp4"]
    assert listing.skipped == {"not video": 1}


def test_no_room_for_the_list_of_videos_is_one_line(tmp_path, monkeypatch):
    put(tmp_path / "a.mp4", b"a")

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("pipeline.catalogue.Catalogue.add_video", full)
    with pytest.raises(UserError, match=r"cannot be kept in .*is full.*TMPDIR"):
        list_sources([str(tmp_path)])


def test_a_folder_of_a_list_that_can_be_read_again_loses_its_letter(tmp_path):
    put(tmp_path / "set" / "a.mp4", b"a")
    listed = put(tmp_path / "in.list", b"set\n")
    assert list_sources([str(listed)]).has_seen(str(tmp_path / "set"))


def test_a_folder_that_cannot_be_read_is_a_dead_letter(tmp_path, monkeypatch):
    put(tmp_path / "a.mp4", b"a")
    put(tmp_path / "locked" / "b.mp4", b"b")
    scandir = os.scandir

    def refusing(path):
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    listing = list_sources([str(tmp_path)])
    assert uris(listing) == [str(tmp_path / "a.mp4")]
    assert [letter[:2] for letter in listing.dead] == [
        (str(tmp_path / "locked"), "PermissionError")
    ]


def test_a_copy_elsewhere_does_not_move_a_source(tmp_path):
    put(tmp_path / "a" / "v.mp4", b"v")
    put(tmp_path / "b" / "v.mp4", b"v")
    first = planned(tmp_path / "ds", tmp_path / "a")
    second = planned(tmp_path / "ds", tmp_path / "b")
    assert second == first


def test_s3_prefixes_are_listed_and_objects_are_read_like_files(s3, tmp_path):
    video = write_video(tmp_path / "v.mp4", [code_picture(i) for i in range(48)])
    s3.upload_file(str(video), "videos", "set/a/v.mp4")
    s3.put_object(Bucket="videos", Key="set/a/v.txt", Body=b"numbers")
    s3.put_object(Bucket="videos", Key="set/.hidden.mp4", Body=b"x")
    s3.put_object(Bucket="videos", Key="set/empty.mp4", Body=b"")
    s3.put_object(Bucket="videos", Key="other/w.mp4", Body=b"x")
    listing = list_sources(["s3://videos/set/"])
    (source,) = listing.sources
    assert source.uri == "s3://videos/set/a/v.mp4"
    assert source.sidecars == ("s3://videos/set/a/v.txt",)
    assert source.source_id == next(iter(list_sources([str(video)]).sources)).source_id
    assert [(uri, name) for uri, name, _, _ in listing.dead] == [
        ("s3://videos/set/empty.mp4", "EmptyFileError")
    ]
    remote = read_clip(source.uri, 1.0, 16, 16.0, 48, 96)
    assert [read_code(frame) for frame in remote] == list(range(16, 32))
    assert np.array_equal(remote, read_clip(str(video), 1.0, 16, 16.0, 48, 96))
    assert read_cues(source.sidecars[0])[0].text == "numbers"


def test_a_remote_file_seeks_and_reads_like_a_local_one(s3):
    content = os.urandom(2_500_000)
    s3.put_object(Bucket="videos", Key="blob", Body=content)
    with open_video("s3://videos/blob") as file:
        assert file.read(10) == content[:10]
        file.seek(2_000_000)
        assert file.read(700_000) == content[2_000_000:]
        assert file.read(5) == b""
        file.seek(-4, os.SEEK_END)
        assert file.read() == content[-4:]


def test_a_missing_bucket_or_object_is_named(s3):
    with pytest.raises(UserError, match=r"s3://nowhere/x cannot be listed .*credentials"):
        list_sources(["s3://nowhere/x"])
    with pytest.raises(storage.StorageError, match=r"s3://videos/gone"):
        S3Object("s3://videos/gone")
