"""The three jobs, one after the other, on real mp4 files."""

import hashlib
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from broken_videos import cut_inside_a_picture, cut_pictures, lose_index, write_sound
from conftest import COLOURS, file_hashes, run_in_a_loop, write_shots

from pipeline import stage_latents
from pipeline.annotate import annotate
from pipeline.clips import read_clip
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.plan import read_plan
from pipeline.schema import (
    decode_tensor,
    load_manifest,
    read_annotations,
    read_clips,
    read_dead_letters,
)
from streamdit.autoencoder import load_autoencoder
from streamdit.errors import UserError
from streamdit.text import build_text_encoders

SHOTS = {
    "one": ["red", "green"],
    "two": ["blue", "yellow", "purple"],
    "three": ["cyan", "red"],
    "four": ["green", "blue"],
    "five": ["yellow", "cyan"],
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five videos of plain shots of two seconds, each with a time-coded caption per shot."""
    folder = tmp_path_factory.mktemp("videos")
    for step, (name, colours) in enumerate(SHOTS.items()):
        write_shots(folder / f"{name}.mp4", colours, step=step)
    return folder


def ingest(videos, dataset, autoencoder_dir, config):
    """Run all three jobs; returns their summaries."""
    return (
        curate([str(videos)], dataset, config),
        annotate(dataset, config),
        encode(dataset, autoencoder_dir, config),
    )


@pytest.fixture
def dataset(tmp_path, videos, autoencoder_dir, small_config, without_ray):
    ingest(videos, tmp_path / "data", autoencoder_dir, small_config)
    return tmp_path / "data"


def test_summaries_count_what_came_out(
    tmp_path, videos, autoencoder_dir, small_config, without_ray
):
    shutil.copytree(videos, tmp_path / "videos")
    (tmp_path / "videos" / "five.vtt").unlink()
    dataset = tmp_path / "data"
    curated, annotated, encoded = ingest(
        tmp_path / "videos", dataset, autoencoder_dir, small_config
    )
    assert (curated.sources, curated.clips, curated.dead, curated.units) == (5, 22, 0, 3)
    assert curated.video_s == pytest.approx(22.0)
    assert (annotated.clips, annotated.captions, annotated.missing) == (22, 18, 4)
    assert (encoded.clips, encoded.dead, encoded.selection_version) == (22, 0, 1)
    split = pq.read_table(dataset / "selection/selection-v0001.parquet")["split"].to_pylist()
    assert encoded.held_out == split.count("held_out")


def test_manifest_names_every_file_with_its_hash(dataset, small_config, autoencoder_dir):
    manifest = load_manifest(dataset)
    tables = {p for p in file_hashes(dataset) if p.endswith(".parquet")}
    assert {record.path for record in manifest.files} == tables
    for record in manifest.files:
        content = (dataset / record.path).read_bytes()
        assert record.bytes == len(content)
        assert record.sha256 == hashlib.sha256(content).hexdigest()
        assert record.rows == pq.read_metadata(dataset / record.path).num_rows
    (bucket,) = manifest.buckets
    assert (bucket.name, bucket.fps, bucket.latent_shape) == ("16x32x32", 16.0, (4, 4, 4, 4))
    assert manifest.text_encoders == small_config.text_encoders
    assert manifest.autoencoder.source == "autoencoder"
    own = load_autoencoder(str(dataset / manifest.autoencoder.source))
    assert own.identity.sha256 == manifest.autoencoder.sha256
    assert manifest.selection.rows == 22


def read_place(dataset, row, kind):
    """The shard row that an index row points at."""
    file = pq.ParquetFile(dataset / row[f"{kind}_file"])
    return file.read_row_group(row[f"{kind}_row_group"]).to_pylist()[row[f"{kind}_row"]]


def test_the_index_leads_to_the_latent_and_text_of_each_clip(dataset, small_config):
    manifest = load_manifest(dataset)
    index = pq.read_table(dataset / manifest.selection.path).to_pylist()
    assert [row["clip_id"] for row in index] == sorted(row["clip_id"] for row in index)
    clips = {clip["clip_id"]: clip for clip in read_clips(dataset).to_pylist()}
    assert set(clips) == {row["clip_id"] for row in index}
    autoencoder = load_autoencoder(str(dataset / "autoencoder"))
    encoders = build_text_encoders(small_config.text_encoders)
    for row in index:
        clip = clips[row["clip_id"]]
        latent_row, text_row = read_place(dataset, row, "latent"), read_place(dataset, row, "text")
        assert latent_row["clip_id"] == text_row["clip_id"] == row["clip_id"]
        assert text_row["caption"] == row["caption"]
        frames = read_clip(clip["uri"], clip["start_s"], 16, 16.0, 32, 32)
        unit = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
        expected = autoencoder.encode(unit)[0]
        stored = (latent_row[f"latent{part}"] for part in ("", "_shape", "_dtype"))
        latent = decode_tensor(*stored)
        assert latent.dtype == torch.bfloat16
        assert torch.allclose(latent.float(), expected, atol=0.02, rtol=0.02)
        stored = (text_row[f"text_bytes{part}"] for part in ("", "_shape", "_dtype"))
        (states,) = encoders.encode([row["caption"]]).unpadded()
        assert torch.allclose(decode_tensor(*stored).float(), states["bytes"], atol=0.02)


def test_captions_describe_the_clip_that_they_stand_beside(dataset):
    index = pq.read_table(dataset / load_manifest(dataset).selection.path).to_pylist()
    clips = {clip["clip_id"]: clip for clip in read_clips(dataset).to_pylist()}
    for row in index:
        clip = clips[row["clip_id"]]
        frames = read_clip(clip["uri"], clip["start_s"], 16, 16.0, 32, 32)
        corner = frames[:, -4:, -4:].reshape(-1, 3).mean(0)
        nearest = min(COLOURS, key=lambda name: np.abs(corner - COLOURS[name]).sum())
        assert row["caption"] == f"a square over {nearest}"
    annotations = read_annotations(dataset).to_pylist()
    assert {note["caption_model"] for note in annotations} == {"sidecar:vtt"}
    assert all(note["colourfulness"] > 20 for note in annotations)


def test_the_empty_prompt_is_stored_for_guidance(dataset, small_config):
    (record,) = load_manifest(dataset).files_of("text-null")
    (row,) = pq.read_table(dataset / record.path).to_pylist()
    stored = (row[f"text_bytes{part}"] for part in ("", "_shape", "_dtype"))
    (states,) = build_text_encoders(small_config.text_encoders).encode([""]).unpadded()
    assert row["caption"] == ""
    assert torch.allclose(decode_tensor(*stored).float(), states["bytes"], atol=0.02)


def test_clips_of_one_source_share_a_split(dataset):
    index = pq.read_table(dataset / load_manifest(dataset).selection.path).to_pylist()
    splits = {}
    for row in index:
        splits.setdefault(row["source_id"], set()).add(row["split"])
    assert len(splits) == 5
    assert all(len(names) == 1 for names in splits.values())


class Stopped(Exception):
    """The job was interrupted."""


@pytest.mark.parametrize("units_before", [0, 1, 2])
@pytest.mark.parametrize("stage", ["curate", "annotate", "encode"])
def test_an_interrupted_and_repeated_run_equals_an_undisturbed_one(
    tmp_path, monkeypatch, dataset, videos, autoencoder_dir, small_config, stage, units_before
):
    def stop_early(tasks, *arguments, **settings):
        yield from run_in_a_loop(tasks[:units_before], *arguments, **settings)
        raise Stopped

    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(f"pipeline.{stage}.run_units", stop_early)
        with pytest.raises(Stopped):
            ingest(videos, again, autoencoder_dir, small_config)
    if stage == "encode":
        # A killed writer leaves a hidden torn file, and a part that its successor may not write.
        finished = {path.stem for path in again.glob("ledger/latents/*.json")}
        for unit in (unit.name for unit in read_plan(again) if unit.name not in finished):
            (again / "latents").mkdir(exist_ok=True)
            for name in (f".latent-{unit}-16x32x32-00000.parquet.partial", f"latent-{unit}-b-9"):
                (again / "latents" / name).write_bytes(b"torn")
        with pytest.raises(UserError, match=r"encoding is not finished"):
            load_manifest(again)
    ingest(videos, again, autoencoder_dir, small_config)
    assert file_hashes(again) == file_hashes(dataset)


def test_a_finished_dataset_is_left_alone(
    monkeypatch, dataset, videos, autoencoder_dir, small_config
):
    before = file_hashes(dataset)
    seen = []

    def nothing_to_do(tasks, *_, **__):
        assert tasks == []
        return (row for row in tasks)

    for module in ("curate", "annotate", "encode"):
        monkeypatch.setattr(f"pipeline.{module}.run_units", nothing_to_do)
    curate([str(videos)], dataset, small_config, lambda *progress: seen.append(progress))
    annotate(dataset, small_config, lambda *progress: seen.append(progress))
    encode(dataset, autoencoder_dir, small_config, lambda *progress: seen.append(progress))
    assert [(done, total) for done, total, _ in seen] == [(3, 3), (3, 3), (3, 7), (7, 7)]
    assert [counters["clips"] for *_, counters in seen] == [22, 22, 22, 22]
    assert file_hashes(dataset) == before


def modified(dataset, kind):
    return {path.name: path.stat().st_mtime_ns for path in dataset.glob(f"{kind}/*.parquet")}


def test_new_sources_are_added_without_touching_finished_units(
    dataset, tmp_path, videos, autoencoder_dir, small_config
):
    before = {kind: modified(dataset, kind) for kind in ("clips", "annotations", "latents")}
    write_shots(tmp_path / "more" / "six.mp4", ["purple", "green"])
    ingest(tmp_path / "more", dataset, autoencoder_dir, small_config)
    manifest = load_manifest(dataset)
    assert (manifest.selection.rows, manifest.selection.version) == (26, 2)
    for kind, files in before.items():
        after = modified(dataset, kind)
        assert len(after) == len(files) + 1
        assert files.items() <= after.items()


def test_a_new_caption_encodes_text_only(
    tmp_path, videos, autoencoder_dir, small_config, without_ray
):
    folder, dataset = tmp_path / "videos", tmp_path / "data"
    shutil.copytree(videos, folder)
    ingest(folder, dataset, autoencoder_dir, small_config)
    latents, texts = modified(dataset, "latents"), modified(dataset, "text")
    before = load_manifest(dataset)
    vtt = folder / "one.vtt"
    vtt.write_text(vtt.read_text().replace("a square", "a white box"))
    ingest(folder, dataset, autoencoder_dir, small_config)
    assert modified(dataset, "latents") == latents
    changed = {name for name, when in modified(dataset, "text").items() if texts[name] != when}
    assert len(changed) == 1
    manifest = load_manifest(dataset)
    captions = pq.read_table(dataset / manifest.selection.path)["caption"].to_pylist()
    assert sum("white box" in caption for caption in captions) == 4
    assert manifest.fingerprint != before.fingerprint
    assert manifest.selection.version == 2


def test_a_looser_selection_encodes_only_the_clips_that_are_new(
    tmp_path, monkeypatch, videos, autoencoder_dir, small_config, without_ray
):
    def selecting(expression):
        selection = small_config.selection.model_copy(update={"expression": expression})
        return small_config.model_copy(update={"selection": selection})

    encoded = []
    real = stage_latents.latent_row

    def counting(clip, latent):
        encoded.append(clip["clip_id"])
        return real(clip, latent)

    monkeypatch.setattr(stage_latents, "latent_row", counting)
    dataset = tmp_path / "data"
    strict, loose = selecting("scene == 0 and start_s < 0.5"), selecting("scene == 0")
    ingest(videos, dataset, autoencoder_dir, strict)
    first = set(encoded)
    assert len(encoded) == len(first) == load_manifest(dataset).selection.rows == 5
    encoded.clear()
    encode(dataset, autoencoder_dir, loose)
    assert len(encoded) == 5
    assert first.isdisjoint(encoded)
    manifest = load_manifest(dataset)
    assert (manifest.selection.rows, manifest.selection.version) == (10, 2)
    assert manifest.selection.expression == "scene == 0"
    for row in pq.read_table(dataset / manifest.selection.path).to_pylist():
        assert read_place(dataset, row, "latent")["clip_id"] == row["clip_id"]
        assert read_place(dataset, row, "text")["clip_id"] == row["clip_id"]
    encoded.clear()
    encode(dataset, autoencoder_dir, strict)
    assert encoded == []
    assert load_manifest(dataset).selection.rows == 5


@pytest.fixture
def bad_videos(tmp_path, videos):
    """One good video among bad ones."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for suffix in (".mp4", ".vtt"):
        shutil.copy(videos / f"one{suffix}", folder / f"good{suffix}")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video " * 100)
    lose_index(folder / "no-moov.mp4")
    cut_inside_a_picture(folder / "torn.mp4")
    cut_pictures(folder / "cut.mp4")
    write_sound(folder / "sound.mp4")
    return folder


def test_bad_inputs_become_dead_letters_and_nothing_else_is_lost(
    tmp_path, bad_videos, autoencoder_dir, small_config, without_ray
):
    dataset = tmp_path / "data"
    curated, _, encoded = ingest(bad_videos, dataset, autoencoder_dir, small_config)
    assert (curated.sources, curated.clips, curated.dead) == (1, 4, 6)
    assert encoded.clips == 4
    letters = {row["uri"].rsplit("/", 1)[-1]: row for row in read_dead_letters(dataset).to_pylist()}
    assert {name: row["error_class"] for name, row in letters.items()} == {
        "empty.mp4": "EmptyFileError",
        "text.mp4": "InvalidDataError",
        "no-moov.mp4": "InvalidDataError",
        "torn.mp4": "InvalidDataError",
        "cut.mp4": "TruncatedVideoError",
        "sound.mp4": "DecodeError",
    }
    assert letters["sound.mp4"]["message"] == "there is no video stream"
    assert all(row["message"] and not row["retryable"] for row in letters.values())


def test_only_bad_inputs_are_an_error_that_names_the_reasons(
    tmp_path, bad_videos, small_config, without_ray
):
    (bad_videos / "good.mp4").unlink()
    with pytest.raises(
        UserError, match=r"none of 6 videos could be decoded: InvalidDataError \(3\)"
    ):
        curate([str(bad_videos)], tmp_path / "data", small_config)


def test_a_wrong_caption_file_fails_its_captions_only(
    tmp_path, videos, autoencoder_dir, small_config, without_ray
):
    folder, dataset = tmp_path / "videos", tmp_path / "data"
    shutil.copytree(videos, folder)
    (folder / "two.vtt").write_bytes(
        "WEBVTT\n\n00:00.000 --> 00:09.000\ncaf\xe9\n".encode("latin-1")
    )
    _, annotated, encoded = ingest(folder, dataset, autoencoder_dir, small_config)
    assert (annotated.captions, annotated.failed, annotated.dead) == (16, 6, 1)
    assert encoded.clips == 22
    (letter,) = read_dead_letters(dataset).to_pylist()
    assert (letter["stage"], letter["error_class"]) == ("annotate", "CaptionFileError")
    assert "two.vtt is not UTF-8" in letter["message"]


def test_a_source_that_vanishes_after_curation_is_a_dead_letter_of_encoding(
    tmp_path, videos, autoencoder_dir, small_config, without_ray
):
    folder, dataset = tmp_path / "videos", tmp_path / "data"
    shutil.copytree(videos, folder)
    curate([str(folder)], dataset, small_config)
    annotate(dataset, small_config)
    (folder / "three.mp4").unlink()
    summary = encode(dataset, autoencoder_dir, small_config)
    assert (summary.clips, summary.dead) == (18, 4)
    letters = read_dead_letters(dataset).to_pylist()
    assert [letter["start_s"] for letter in letters] == [0.0, 1.0, 2.0, 3.0]
    assert {letter["error_class"] for letter in letters} == {"FileNotFoundError"}


def test_jobs_out_of_order_say_what_to_run(
    tmp_path, videos, autoencoder_dir, small_config, without_ray
):
    dataset = tmp_path / "data"
    with pytest.raises(UserError, match=r"holds no sources: run `streamdit ingest --only curate`"):
        annotate(dataset, small_config)
    curate([str(videos)], dataset, small_config)
    with pytest.raises(UserError, match=r"not finished with annotate"):
        encode(dataset, autoencoder_dir, small_config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": {"height": 36}}, r"clip\.height 36 does not fit .*multiple of 8"),
        ({"clip": {"frames": 18}}, r"clip\.frames 18 does not fit .*multiple of 4"),
        ({"selection": {"expression": "motion > 999"}}, r"keeps no clip"),
    ],
)
def test_what_cannot_be_encoded_is_named(
    tmp_path, videos, autoencoder_dir, small_config, without_ray, changes, message
):
    values = small_config.model_dump()
    for section, values_of in changes.items():
        values[section] |= values_of
    config = type(small_config).model_validate(values)
    with pytest.raises(UserError, match=message):
        ingest(videos, tmp_path / "data", autoencoder_dir, config)


def test_another_clip_size_than_curated_is_named(dataset, autoencoder_dir, small_config):
    clip = small_config.clip.model_copy(update={"height": 64})
    other = small_config.model_copy(update={"clip": clip})
    with pytest.raises(UserError, match=r"curated for clips of 16x32x32, .* says 16x64x32"):
        encode(dataset, autoencoder_dir, other)


def test_jobs_on_ray_write_what_the_plain_functions_write(
    tmp_path, dataset, videos, autoencoder_dir, small_config, ray_runtime, monkeypatch
):
    from pipeline.graph import run_units

    for module in ("curate", "annotate", "encode"):
        monkeypatch.setattr(f"pipeline.{module}.run_units", run_units)
    seen = []

    def follow(done, total, counters):
        seen.append((done, total, json.dumps(counters)))

    on_ray = tmp_path / "on-ray"
    curate([str(videos)], on_ray, small_config, follow)
    annotate(on_ray, small_config, follow)
    encode(on_ray, autoencoder_dir, small_config, follow)
    assert [(done, total) for done, total, _ in seen] == [
        *((i, 3) for i in range(4)),
        *((i, 3) for i in range(4)),
        *((i, 7) for i in range(4)),
        *((i, 7) for i in range(3, 8)),
    ]
    assert file_hashes(on_ray) == file_hashes(dataset)
