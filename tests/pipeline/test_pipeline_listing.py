import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import code_picture, read_code, scene_pictures, write_video

from pipeline.annotate import annotate
from pipeline.archives import Member
from pipeline.captions import read_cues
from pipeline.clips import read_clip
from pipeline.curate import curate
from pipeline.decode import read_sparse
from pipeline.schema import read_annotations, read_clips
from pipeline.signatures import looks_like_video
from pipeline.sources import list_sources
from streamdit.errors import UserError


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def captions_of(source):
    return [(cue.text, cue.start_s, cue.end_s) for uri in source.sidecars for cue in read_cues(uri)]


def by_name(listing):
    return {source.uri.rsplit("/", 1)[-1].rsplit("#", 1)[-1]: source for source in listing.sources}


FOREVER = float("inf")
ROWS = [
    {"video": "clips/a.mp4", "Caption": 'a "red", fast car', "license": "CC-BY-4.0"},
    {"video": "b.webm", "Caption": "ein Bär", "license": "", "credit": "B. Ear"},
    {"video": "b.webm", "Caption": "a bear sleeps", "start": 2, "end": 4.5},
]


def csv_text(separator=","):
    lines = [["video", "Caption", "license", "credit", "start", "end"]]
    lines += [[str(row.get(name, "")) for name in lines[0]] for row in ROWS]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in lines]
    return "\n".join(separator.join(line) for line in quoted)


def parquet_bytes():
    sink = io.BytesIO()
    names = ["video", "Caption", "license", "credit", "start", "end"]
    pq.write_table(pa.table({n: pa.array([row.get(n) for row in ROWS]) for n in names}), sink)
    return sink.getvalue()


MANIFESTS = {
    "v.csv": csv_text,
    "v.tsv": lambda: csv_text("\t"),
    "v.jsonl": lambda: "\n".join(map(json.dumps, ROWS)) + "\n\n",
    "v.parquet": parquet_bytes,
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_tables_name_videos_with_captions_licence_and_attribution(tmp_path, name):
    put(tmp_path / "clips" / "a.mp4", b"a")
    put(tmp_path / "clips" / "a.txt", "beside")
    put(tmp_path / "b.webm", b"b")
    put(tmp_path / "c.mp4", b"not in the table")
    found = by_name(list_sources([str(put(tmp_path / name, MANIFESTS[name]()))]))
    assert sorted(found) == ["a.mp4", "b.webm"]
    a, b = found["a.mp4"], found["b.webm"]
    assert (a.licence, a.attribution) == ("CC-BY-4.0", None)
    assert (b.licence, b.attribution) == (None, "B. Ear")
    assert captions_of(a) == [('a "red", fast car', 0, FOREVER), ("beside", 0, FOREVER)]
    assert captions_of(b) == [("ein Bär", 0, FOREVER), ("a bear sleeps", 2, 4.5)]


def test_a_missing_video_of_a_list_or_table_is_a_dead_letter_and_the_others_stay(tmp_path):
    put(tmp_path / "a.mp4", b"a")
    table = put(tmp_path / "t.csv", "path,caption\na.mp4,x\ngone.mp4,y\nhttp://host/v.mp4,z\n")
    listed = put(tmp_path / "v.list", "a.mp4\nlost.mp4\n")
    listing = list_sources([str(table), str(listed)])
    assert sorted(by_name(listing)) == ["a.mp4"]
    assert {uri.rsplit("/", 1)[-1]: error for uri, error, _, _ in listing.dead} == {
        "gone.mp4": "FileNotFoundError",
        "lost.mp4": "FileNotFoundError",
        "v.mp4": "AddressError",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "name,caption\na.mp4,x\n", r"does not say where the videos are \(columns: name"),
        ("t.csv", "path,caption\na.mp4,x\n,y\n", r"names no video in row 2"),
        ("t.csv", b"path\na\xff.mp4\n", r"cannot be read after 0 rows .*write UTF-8 CSV"),
        ("t.jsonl", '{"path": "a.mp4"}\n{"path": \n', r"cannot be read after 1 rows"),
        ("t.jsonl", "[1]\n", r"\[1\] is not an object"),
        ("t.jsonl", '{"path": "a.mp4", "caption": "x", "start": "soon"}', r"after 0 rows .*soon"),
        ("t.parquet", "PAR", r"cannot be read after 0 rows"),
    ],
)
def test_a_table_that_is_not_understood_is_named_with_the_remedy(tmp_path, name, content, message):
    put(tmp_path / "a.mp4", b"a")
    with pytest.raises(UserError, match=message) as error:
        list_sources([str(put(tmp_path / name, content))])
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_metadata_of_a_video_folder_describe_the_videos_that_lie_there(tmp_path):
    put(tmp_path / "train" / "a.mp4", b"a")
    put(tmp_path / "train" / "sub" / "b.mp4", b"b")
    put(tmp_path / "train" / "metadata.csv", "file_name,text\na.mp4,an a\nsub/b.mp4,a b\n")
    put(tmp_path / "test" / "c.mp4", b"c")
    put(tmp_path / "test" / "metadata.jsonl", '{"file_name": "c.mp4", "text": "a c"}\n')
    put(tmp_path / "more" / "d.mp4", b"d")
    put(tmp_path / "more" / "metadata.csv", "file_name,text\nd.mp4,a d\n,lost\n")
    listing = list_sources([str(tmp_path)])
    texts = {name: [c[0] for c in captions_of(s)] for name, s in by_name(listing).items()}
    assert texts == {"a.mp4": ["an a"], "b.mp4": ["a b"], "c.mp4": ["a c"], "d.mp4": []}
    assert listing.skipped == {}
    assert [(Path(uri).name, error) for uri, error, _, _ in listing.dead] == [
        ("metadata.csv", "ManifestError")
    ]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_webdataset(path: Path, video: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        add(tar, "x/0001.mp4", video)
        add(tar, "x/0001.json", json.dumps({"caption": "numbers", "license": "CC0"}).encode())
        add(tar, "x/0002.mp4", video[:-1] + bytes([video[-1] ^ 1]))
        add(tar, "x/0002.vtt", b"WEBVTT\n\n00:00.000 --> 00:01.000\nlow numbers\n")
        add(tar, "x/0002.jpg", b"jpg")
        add(tar, "x/.0003.mp4", b"hidden")
        add(tar, "y/0001.mkv", b"no video")
    return path


def test_videos_of_a_webdataset_are_read_in_place_with_their_captions(tmp_path):
    video = write_video(tmp_path / "v.mp4", [code_picture(i) for i in range(48)])
    write_webdataset(tmp_path / "set" / "00000.tar", video.read_bytes())
    listing = list_sources([str(tmp_path / "set")])
    found = by_name(listing)
    assert sorted(found) == ["0001.mkv", "0001.mp4", "0002.mp4"]
    assert listing.skipped == {"hidden": 1, "not video": 1}
    first, second = found["0001.mp4"], found["0002.mp4"]
    assert (captions_of(first), first.licence) == ([("numbers", 0, FOREVER)], "CC0")
    assert captions_of(second) == [("low numbers", 0, 1)]
    assert captions_of(found["0001.mkv"]) == []
    assert first.source_id == next(iter(list_sources([str(video)]).sources)).source_id
    assert first.size == video.stat().st_size
    clip = read_clip(first.uri, 1.0, 16, 16.0, 48, 96)
    assert np.array_equal(clip, read_clip(str(video), 1.0, 16, 16.0, 48, 96))
    assert [read_code(p) for p in read_sparse(first.uri, [2.5, 0.5], 24)] == [40, 8]


def test_damaged_and_compressed_archives_are_dead_letters(tmp_path):
    content = write_webdataset(tmp_path / "ok.tar", b"v" * 5000).read_bytes()
    put(tmp_path / "cut.tar", content[:3000])
    put(tmp_path / "none.tar", b"x" * 2000)
    put(tmp_path / "packed.tar.gz", b"x")
    listing = list_sources([str(tmp_path)])
    assert {s.uri.split("@")[0] for s in listing.sources} == {str(tmp_path / "ok.tar")}
    assert {Path(uri).name: error for uri, error, _, _ in listing.dead} == {
        "cut.tar": "ReadError",
        "none.tar": "ReadError",
        "packed.tar.gz": "CompressedArchiveError",
    }


def test_an_archive_that_is_cut_off_loses_what_lies_behind_the_cut_only(tmp_path):
    content = write_webdataset(tmp_path / "whole.tar", b"v" * 5000).read_bytes()
    (tmp_path / "whole.tar").unlink()
    cut = put(tmp_path / "cut.tar", content[: content.index(b"x/0002.mp4") + 1000])
    listing = list_sources([str(tmp_path)])
    (source,) = listing.sources
    assert source.uri.endswith("#x/0001.mp4")
    assert captions_of(source) == [("numbers", 0, FOREVER)]
    ((uri, error, message, _),) = listing.dead
    assert (uri, error, message) == (str(cut), "ReadError", "the archive ends within x/0002.mp4")


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_an_archive_with_a_broken_header_is_a_dead_letter(tmp_path, damage):
    content = write_webdataset(tmp_path / "whole.tar", b"v" * 5000).read_bytes()
    (tmp_path / "whole.tar").unlink()
    header = content.index(b"x/0002.mp4")
    broken = content[: header + 100]
    if damage == "overwritten":
        broken += bytes(50) + content[header + 150 :]
    archive = put(tmp_path / "broken.tar", broken)
    listing = list_sources([str(tmp_path)])
    assert [source.uri.rsplit("#")[-1] for source in listing.sources] == ["x/0001.mp4"]
    ((uri, error, message, _),) = listing.dead
    assert (uri, error) == (str(archive), "ReadError")
    assert message == f"the archive is damaged or cut off at byte {header}"


def test_captions_of_json_lines_may_hold_any_character(tmp_path):
    put(tmp_path / "a.mp4", b"a")
    row = {"path": "a.mp4", "caption": "one\u2028two\x85three"}
    table = put(tmp_path / "t.jsonl", json.dumps(row, ensure_ascii=False) + "\r\n")
    (source,) = list_sources([str(table)]).sources
    assert captions_of(source) == [("one two three", 0, FOREVER)]


def test_an_s3_input_is_an_object_or_a_folder_and_no_other_names_that_begin_alike(s3):
    keys = ("raw/a.mp4", "raw-private/b.mp4", "raw", "rawer.mp4", "c.mp4", "c.mp4.mp4")
    for key in keys:
        content = b"\x00\x00\x00\x18ftypisom" + key.encode()
        s3.put_object(Bucket="videos", Key=f"alike/{key}", Body=content)

    def found(name):
        return sorted(source.uri for source in list_sources([f"s3://videos{name}"]).sources)

    root = "s3://videos/alike"
    assert found("/alike/raw") == [f"{root}/raw", f"{root}/raw/a.mp4"]
    assert found("/alike/raw/") == [f"{root}/raw/a.mp4"]
    assert found("/alike/c.mp4") == [f"{root}/c.mp4"]
    assert found("/alike") == sorted(f"{root}/{key}" for key in keys)
    assert found("") == found("/")
    assert set(found("/alike")) <= set(found(""))


def test_member_addresses_survive_odd_names():
    for archive in ("/data/a.tar", "s3://b/k/a@1+2#.tar", "/x y/ü.tar"):
        member = Member(archive, 512, 77, "a/b c#1@2+3#.tar.mp4")
        assert Member.parse(member.uri) == member
    assert Member.parse("/data/a.tar") is None
    assert Member.parse("/data/a@1+2.mp4") is None


def test_files_without_a_telling_name_are_judged_by_content(tmp_path):
    frames = [code_picture(i) for i in range(4)]
    for name in ("a.mp4", "b.mkv", "c.avi", "d.ts", "e.flv", "f.mpg"):
        codec = {"c": "mpeg4", "f": "mpeg2video"}.get(name[0], "libx264")
        video = write_video(tmp_path / name, frames, fps=25, codec=codec)
        assert looks_like_video(video.read_bytes()[:192]), name
        video.rename(tmp_path / name[0])
    put(tmp_path / "blob.bin2", b"\x00" * 500)
    put(tmp_path / "text", "ftyp is a word")
    put(tmp_path / "photo.pic0", b"\x00\x00\x00\x18ftypheic" + bytes(200))
    put(tmp_path / "paper.pdf", b"\x00\x00\x00\x18ftypisom" + bytes(200))
    listing = list_sources([str(tmp_path)])
    assert sorted(by_name(listing)) == list("abcdef")
    assert listing.skipped == {"not video": 4}


def test_tables_archives_and_folders_are_found_on_s3(s3, tmp_path):
    video = write_video(tmp_path / "v.mp4", [code_picture(i) for i in range(20)])
    tar = write_webdataset(tmp_path / "t.tar", video.read_bytes())
    s3.upload_file(str(tar), "videos", "wds/t.tar")
    s3.upload_file(str(video), "videos", "hf/v.mp4")
    s3.upload_file(str(video), "videos", "hf/nameless")
    s3.put_object(Bucket="videos", Key="hf/metadata.csv", Body=b"file_name,text\nv.mp4,digits\n")
    lines = b"".join(b'{"uri": "../hf/%s", "caption": "c"}\n' % n for n in (b"v.mp4", b"no.mp4"))
    s3.put_object(Bucket="videos", Key="lists/all.jsonl", Body=lines)
    archived = by_name(list_sources(["s3://videos/wds/"]))
    assert captions_of(archived["0002.mp4"]) == [("low numbers", 0, 1)]
    remote = read_sparse(archived["0001.mp4"].uri, [1.0], None)
    assert read_code(remote[0]) == 16
    folder = list_sources(["s3://videos/hf/"])
    assert folder.skipped == {"duplicate": 1}
    table = list_sources(["s3://videos/lists/all.jsonl"])
    assert [s.uri for s in table.sources] == ["s3://videos/hf/v.mp4"]
    assert captions_of(*table.sources) == [("c", 0, FOREVER)]
    assert [uri for uri, *_ in table.dead] == ["s3://videos/hf/no.mp4"]


def test_captions_and_licence_of_a_table_reach_the_dataset(tmp_path, small_config, without_ray):
    for name, colour in (("v0", (200, 30, 30)), ("v200", (30, 40, 200))):
        write_video(tmp_path / f"{name}.mp4", scene_pictures(colour, 32))
    rows = "path,caption,licence,start,end\nv0.mp4,first,CC0,0,1\nv0.mp4,second,CC0,1,2\n"
    table = put(tmp_path / "t.csv", rows + "v200.mp4,other,CC-BY,,\n")
    curate([str(table)], tmp_path / "data", small_config)
    annotate(tmp_path / "data", small_config)
    clips = {clip["clip_id"]: clip for clip in read_clips(tmp_path / "data").to_pylist()}
    notes = read_annotations(tmp_path / "data").to_pylist()
    found = {
        (Path(clips[n["clip_id"]]["uri"]).stem, clips[n["clip_id"]]["start_s"]): (
            n["caption"],
            n["caption_model"],
            clips[n["clip_id"]]["licence"],
        )
        for n in notes
    }
    assert found == {
        ("v0", 0.0): ("first", "sidecar:manifest", "CC0"),
        ("v0", 1.0): ("second", "sidecar:manifest", "CC0"),
        ("v200", 0.0): ("other", "sidecar:manifest", "CC-BY"),
        ("v200", 1.0): ("other", "sidecar:manifest", "CC-BY"),
    }
