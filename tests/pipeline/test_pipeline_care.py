"""Looking after a dataset: verify, repair, remove."""

import contextlib
import json
import shutil

import pyarrow.parquet as pq
import pytest
from conftest import file_hashes, write_shots

from pipeline import removal
from pipeline.annotate import annotate
from pipeline.check import check_dataset
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.plan import read_plan
from pipeline.removal import remove_source
from pipeline.repair import repair_dataset
from pipeline.schema import load_manifest, read_clips, read_dead_letters
from pipeline.store import DiskStore, open_store
from streamdit.errors import UserError

SHOTS = {"one": ["red", "green"], "two": ["blue"], "three": ["cyan", "yellow"]}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for step, (name, colours) in enumerate(SHOTS.items()):
        write_shots(folder / f"{name}.mp4", colours, step=step)
    (folder / "broken.mp4").write_text("no video")
    return folder


@pytest.fixture
def dataset(tmp_path, videos, autoencoder_dir, small_config, without_ray):
    folder = tmp_path / "data"
    ingest(folder, videos, autoencoder_dir, small_config)
    return folder


def ingest(dataset, videos, autoencoder_dir, config):
    curate([str(videos)], dataset, config)
    annotate(dataset, config)
    encode(dataset, autoencoder_dir, config)


@contextlib.contextmanager
def silent(name):
    yield None


def flip(path, place=200):
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


def test_a_whole_dataset_has_no_problems(dataset):
    seen = []
    result = check_dataset(dataset, lambda *progress: seen.append(progress))
    assert result.problems == ()
    assert result.complete
    manifest = load_manifest(dataset)
    assert result.files == len(manifest.files)
    assert result.bytes == sum(record.bytes for record in manifest.files)
    assert seen[-1][:2] == (result.files, result.files)


@pytest.mark.parametrize(
    "kind", ["sources", "clips", "duplicates", "annotations", "latents", "text"]
)
def test_each_kind_of_damage_is_found_and_repaired_byte_for_byte(dataset, kind):
    whole = file_hashes(dataset)
    path = sorted((dataset / kind).glob(f"{kind.rstrip('s')}-*.parquet"))[0]
    name = path.relative_to(dataset).as_posix()
    flip(path)
    (problem,) = check_dataset(dataset).problems
    assert (problem.path, problem.message) == (name, "its content has changed (SHA-256 differs)")
    summary = repair_dataset(dataset, silent)
    assert summary.units == 1
    assert file_hashes(dataset) == whole


def test_missing_short_and_stray_files_are_named_and_mended(dataset):
    whole = file_hashes(dataset)
    gone, short = sorted((dataset / "latents").glob("*.parquet"))[:2]
    gone.unlink()
    short.write_bytes(short.read_bytes()[:-10])
    (dataset / "text" / ".text-u-b-00000.parquet.partial").write_bytes(b"torn")
    messages = {p.path.rsplit("/", 1)[-1]: p.message for p in check_dataset(dataset).problems}
    size = len(whole[f"latents/{short.name}"])
    assert messages == {
        gone.name: "it is missing",
        short.name: f"it has {size - 10:,} bytes instead of {size:,}",
        ".text-u-b-00000.parquet.partial": "nothing lists it; an interrupted run left it over",
    }
    repair_dataset(dataset, silent)
    assert file_hashes(dataset) == whole


@pytest.fixture
def many_shards(tmp_path, videos, autoencoder_dir, small_config, without_ray):
    """A dataset with several shards of each unit, and the folder of its videos."""
    shards = small_config.shards.model_copy(update={"row_group_mb": 0.0001, "shard_mb": 0.001})
    config = small_config.model_copy(update={"shards": shards})
    folder = shutil.copytree(videos, tmp_path / "videos")
    ingest(tmp_path / "data", folder, autoencoder_dir, config)
    return tmp_path / "data", folder


def test_of_a_unit_with_one_damaged_shard_only_that_one_is_encoded_again(many_shards):
    dataset, _ = many_shards
    whole = file_hashes(dataset)
    shards = sorted((dataset / "latents").glob("*-00001.parquet"))
    first = shards[0].with_name(shards[0].name.replace("-00001.", "-00000."))
    untouched = first.stat().st_mtime_ns
    flip(shards[0])
    assert repair_dataset(dataset, silent).units == 1
    assert first.stat().st_mtime_ns == untouched
    assert file_hashes(dataset) == whole


def test_a_repair_without_the_videos_keeps_the_shards_that_are_whole(many_shards):
    dataset, folder = many_shards
    shards = sorted((dataset / "latents").glob("*.parquet"))
    lost = pq.read_metadata(shards[0]).num_rows
    kept = {path.name: path.read_bytes() for path in shards[1:]}
    flip(shards[0])
    shutil.rmtree(folder)
    repair_dataset(dataset, silent)
    left = {path.name: path.read_bytes() for path in (dataset / "latents").glob("*.parquet")}
    assert left == kept
    assert load_manifest(dataset).selection.rows == 10 - lost
    assert check_dataset(dataset).problems == ()


def test_clip_tables_are_not_dropped_when_the_videos_are_gone(many_shards):
    dataset, folder = many_shards
    flip(sorted((dataset / "clips").glob("*.parquet"))[0])
    shutil.rmtree(folder)
    before = file_hashes(dataset)
    with pytest.raises(UserError, match=r"cannot be made again without .*mp4.* put the video back"):
        repair_dataset(dataset, silent)
    assert file_hashes(dataset) == before


def test_an_index_that_leads_to_other_clips_is_found(dataset):
    manifest = load_manifest(dataset)
    path = dataset / manifest.selection.path
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["latent_row"], rows[1]["latent_row"] = rows[1]["latent_row"], rows[0]["latent_row"]
    rows[0]["latent_file"], rows[1]["latent_file"] = rows[1]["latent_file"], rows[0]["latent_file"]
    pq.write_table(table.from_pylist(rows, schema=table.schema), path)
    record = next(r for r in manifest.files if r.kind == "selection")
    fresh = {"bytes": path.stat().st_size, "sha256": open_store(dataset).sha256(record.path)}
    files = [r.model_copy(update=fresh) if r is record else r for r in manifest.files]
    text = manifest.model_copy(update={"files": tuple(files)}).model_dump_json()
    (dataset / "manifest.json").write_text(text)
    problems = check_dataset(dataset).problems
    assert problems
    assert all("are not of the clip that the index names" in p.message for p in problems)


def test_a_lost_manifest_is_written_again(dataset):
    whole = file_hashes(dataset)
    (dataset / "manifest.json").unlink()
    result = check_dataset(dataset)
    assert not result.complete
    assert result.problems == ()
    repair_dataset(dataset, silent)
    assert file_hashes(dataset) == whole


def test_a_damaged_autoencoder_needs_the_one_that_made_the_latents(dataset):
    flip(dataset / "autoencoder" / "autoencoder.safetensors", -3)
    (problem,) = check_dataset(dataset).problems
    assert problem.path == "autoencoder"
    with pytest.raises(UserError, match=r"cannot be made from the videos: run .*--autoencoder"):
        repair_dataset(dataset, silent)


def everything(dataset):
    """All that can be read in a dataset: its files, and every value of its tables."""
    texts = []
    for path in sorted(dataset.rglob("*")):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            texts.append(str(table.to_pylist()) + str(table.schema.metadata))
        elif path.is_file() and path.suffix != ".safetensors":
            texts.append(path.read_text())
        texts.append(path.name)
    return "\n".join(texts)


def test_a_removed_source_leaves_no_trace_but_its_hash(
    dataset, videos, autoencoder_dir, small_config
):
    rows = [row for row in read_clips(dataset).to_pylist() if row["uri"].endswith("one.mp4")]
    (source_id,) = {row["source_id"] for row in rows}
    traces = ["one.mp4", "one.vtt", *(row["clip_id"] for row in rows)]
    before = everything(dataset)
    assert all(trace in before for trace in traces)
    summary = remove_source(dataset, "one.mp4")
    assert summary.uris == (str(videos / "one.mp4"),)
    assert summary.clips == 4
    after = everything(dataset)
    assert [trace for trace in traces if trace in after] == []
    assert after.count(source_id) == 1
    assert json.loads((dataset / "removed.json").read_text()) == [source_id]
    assert check_dataset(dataset).problems == ()
    manifest = load_manifest(dataset)
    assert (manifest.selection.rows, manifest.selection.version) == (6, 2)
    assert [path.name for path in dataset.glob("selection/*")] == ["selection-v0002.parquet"]


def test_what_is_left_stays_as_it_was_and_the_source_does_not_come_back(
    dataset, videos, autoencoder_dir, small_config
):
    def latents():
        rows = {}
        for path in dataset.glob("latents/*.parquet"):
            rows |= {row["clip_id"]: row["latent"] for row in pq.read_table(path).to_pylist()}
        return rows

    before = latents()
    remove_source(dataset, "three.mp4")
    left = latents()
    assert len(left) == 6
    assert left.items() <= before.items()
    whole = file_hashes(dataset)
    seen = []
    summary = curate([str(videos)], dataset, small_config, lambda *p: seen.append(p))
    assert summary.skipped["removed"] == 1
    annotate(dataset, small_config, lambda *p: seen.append(p))
    encode(dataset, autoencoder_dir, small_config, lambda *p: seen.append(p))
    assert all(done == total or total == 5 for done, total, _ in seen), "units were done again"
    assert file_hashes(dataset) == whole


def test_dead_letters_of_a_source_go_with_it(dataset):
    assert len(read_dead_letters(dataset)) == 1
    remove_source(dataset, "broken.mp4")
    assert len(read_dead_letters(dataset)) == 0
    assert "broken.mp4" not in everything(dataset)


def test_the_last_source_of_a_unit_takes_the_unit_along(dataset):
    units = {unit.name: [s.uri for s in unit.sources] for unit in read_plan(dataset)}
    name, uris = next(iter(units.items()))
    for uri in uris:
        remove_source(dataset, uri)
    assert name not in {unit.name for unit in read_plan(dataset)}
    assert not [path for path in dataset.rglob("*") if name in path.name]
    assert check_dataset(dataset).problems == ()


def test_a_video_replaced_in_its_place_goes_with_what_was_there_before(
    dataset, videos, small_config, tmp_path
):
    folder = tmp_path / "copy"
    shutil.copytree(videos, folder)
    again = tmp_path / "again"
    curate([str(folder)], again, small_config)
    (folder / "one.mp4").write_bytes((folder / "one.mp4").read_bytes() + b"longer")
    curate([str(folder)], again, small_config)
    sources = [source for unit in read_plan(again) for source in unit.sources]
    ids = {source.source_id for source in sources if source.uri == str(folder / "one.mp4")}
    assert len(ids) == 2
    remove_source(again, str(folder / "one.mp4"))
    assert "one.mp4" not in everything(again)
    assert curate([str(folder)], again, small_config).skipped["removed"] == 1


class Killed(Exception):
    pass


@pytest.mark.parametrize("steps", range(2, 22, 2))
def test_an_interrupted_removal_is_finished_by_the_next_command(
    tmp_path, dataset, small_config, monkeypatch, steps
):
    undisturbed = tmp_path / "undisturbed" / "data"
    shutil.copytree(dataset, undisturbed)
    remove_source(undisturbed, "one.mp4")
    count = 0

    def dying(real):
        def step(self, path):
            nonlocal count
            count += 1
            if count > steps:
                raise Killed
            return real(self, path)

        return step

    with monkeypatch.context() as patch:
        for name in ("sink", "delete"):
            patch.setattr(DiskStore, name, dying(getattr(DiskStore, name)))
        with contextlib.suppress(Killed):
            remove_source(dataset, "one.mp4")
    if (dataset / removal.NOTE_FILE).exists():
        annotate(dataset, small_config)
    if (dataset / "removed.json").exists():
        assert file_hashes(dataset) == file_hashes(undisturbed)


def test_an_unknown_source_is_named(dataset):
    with pytest.raises(UserError, match=r"has no source nine\.mp4: .* of its 4 sources"):
        remove_source(dataset, "nine.mp4")
