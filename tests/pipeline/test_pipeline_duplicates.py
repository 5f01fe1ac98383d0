import cv2
import numpy as np
import pytest
from conftest import scene_pictures, write_video

from pipeline.annotate import annotate
from pipeline.check import check_dataset
from pipeline.curate import curate
from pipeline.duplicate_table import DUPLICATES_FILE, join_duplicates, read_duplicates
from pipeline.duplicates import find_duplicates, find_groups
from pipeline.encode import encode
from pipeline.plan import read_plan
from pipeline.removal import remove_source
from pipeline.reselect import preview
from pipeline.schema import read_clips
from pipeline.store import open_store


def flip(code: bytes, bits) -> bytes:
    value = int.from_bytes(code, "big")
    for bit in bits:
        value ^= 1 << int(bit)
    return value.to_bytes(24, "big")


def rows_of(codes):
    """Hashes `uint8 [n, 24]`."""
    return np.frombuffer(b"".join(codes), np.uint8).reshape(-1, 24)


def groups_by_comparing_all(codes, max_distance):
    """Slow reference: join every close pair, smallest index names the group."""
    group = list(range(len(codes)))
    numbers = [int.from_bytes(code, "big") for code in codes]
    for i in range(len(codes)):
        for j in range(i):
            if (numbers[i] ^ numbers[j]).bit_count() <= max_distance:
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if g == old else g for g in group]
    return group


@pytest.mark.parametrize("max_distance", [0, 4, 11])
def test_no_close_pair_is_missed(max_distance):
    generator = np.random.default_rng(max_distance)
    bases = [generator.bytes(24) for _ in range(12)]
    codes = [
        flip(bases[generator.integers(12)], generator.integers(0, 192, generator.integers(0, 9)))
        for _ in range(120)
    ]
    expected = groups_by_comparing_all(codes, max_distance)
    assert find_groups(rows_of(codes), max_distance).tolist() == expected
    assert 12 <= len(set(expected)) < 120


def test_pairs_that_differ_in_every_band_but_one_are_found():
    code = bytes(24)
    spread = flip(code, range(0, 11 * 16, 16))  # one bit in each of eleven of twelve bands
    assert find_groups(rows_of([code, spread]), 11).tolist() == [0, 0]
    assert find_groups(rows_of([code, flip(spread, [180])]), 11).tolist() == [0, 1]


def test_many_equal_hashes_cost_no_more_than_one():
    hashes = [bytes(24)] * 30_000 + [b"\xff" * 24]
    groups = find_groups(rows_of(hashes), 11)
    assert groups[:30_000].max() == 0
    assert groups[30_000] == 30_000


def test_groups_do_not_depend_on_the_order_and_the_largest_source_stays():
    generator = np.random.default_rng(3)
    base, other = generator.bytes(24), generator.bytes(24)
    ids = np.array([b"c", b"a", b"d", b"b", b"x"])
    codes = rows_of([base, flip(base, [5]), flip(base, [9]), base, other])
    pixels = np.array([100, 100, 400, 400, 900])

    def rows(order):
        found = find_duplicates(ids[order], codes[order], pixels[order], 11)
        names = ids[order]
        return [
            (names[clip], names[kept], size)
            for clip, kept, size in zip(*(part.tolist() for part in found), strict=True)
        ]

    assert rows([0, 1, 2, 3, 4]) == [(name, b"b", 4) for name in (b"a", b"b", b"c", b"d")]
    assert rows([3, 0, 4, 2, 1]) == rows([0, 1, 2, 3, 4])
    assert rows(np.array([], int)) == []


def textured(seed, frames=32, size=96):
    """A drifting texture, which has a hash of its own."""
    noise = np.random.default_rng(seed).integers(30, 220, (9, 9, 3), np.uint8)
    wide = cv2.resize(noise, (size + frames, size), interpolation=cv2.INTER_CUBIC)
    return [np.ascontiguousarray(wide[:, i // 4 : i // 4 + size]) for i in range(frames)]


def test_copies_in_other_sizes_and_encodings_are_duplicates_in_the_dataset(
    tmp_path, small_config, without_ray
):
    videos = tmp_path / "videos"
    for seed in (1, 2):
        write_video(videos / f"v{seed}.mp4", textured(seed))
    small = [cv2.resize(p, (64, 64), interpolation=cv2.INTER_AREA) for p in textured(1)]
    write_video(videos / "copy.mkv", small, options={"crf": "30"})
    dataset = tmp_path / "data"
    summary = curate([str(videos)], dataset, small_config)
    store = open_store(dataset)
    clips = join_duplicates(read_clips(dataset), read_duplicates(store)).to_pylist()
    names = {clip["clip_id"]: clip["uri"].rsplit("/", 1)[-1] for clip in clips}
    assert summary.duplicates == 2
    assert {(names[c["clip_id"]], c["start_s"], c["duplicate"]) for c in clips} == {
        *(("v1.mp4", s, False) for s in (0.0, 1.0)),
        *(("v2.mp4", s, False) for s in (0.0, 1.0)),
        *(("copy.mkv", s, True) for s in (0.0, 1.0)),
    }
    assert {names[c["duplicate_of"]] for c in clips if c["duplicate"]} == {"v1.mp4"}
    written = (dataset / DUPLICATES_FILE).stat().st_mtime_ns
    curate([str(videos)], dataset, small_config)
    assert (dataset / DUPLICATES_FILE).stat().st_mtime_ns == written
    write_video(videos / "other.mp4", scene_pictures((30, 40, 200), 16))
    curate([str(videos)], dataset, small_config)
    assert (dataset / DUPLICATES_FILE).stat().st_mtime_ns > written
    assert read_duplicates(store).num_rows == 4


def test_when_the_clip_that_stands_for_others_is_removed_another_takes_its_place(
    tmp_path, small_config, without_ray
):
    videos = tmp_path / "videos"
    for name, crf in (("a.mp4", "12"), ("b.mp4", "20"), ("c.mp4", "26")):
        write_video(videos / name, textured(1, frames=16), options={"crf": crf})
    dataset = tmp_path / "data"
    curate([str(videos)], dataset, small_config)
    store = open_store(dataset)
    (before,) = set(read_duplicates(store)["duplicate_of"].to_pylist())
    uris = {clip["clip_id"]: clip["uri"] for clip in read_clips(dataset).to_pylist()}
    remove_source(dataset, uris[before])
    after = read_duplicates(store).to_pylist()
    assert len(after) == 2
    assert before not in {row["clip_id"] for row in after} | {row["duplicate_of"] for row in after}
    assert sorted(row["duplicate"] for row in after) == [False, True]
    assert check_dataset(dataset).problems == ()
    (dataset / DUPLICATES_FILE).write_bytes(b"damaged")
    assert [problem.path for problem in check_dataset(dataset).problems] == [DUPLICATES_FILE]


class Killed(Exception):
    """The job ended here."""


def test_a_copy_is_left_out_though_the_curation_died_before_it_compared_clips(
    tmp_path, small_config, autoencoder_dir, without_ray, monkeypatch
):
    videos, dataset = tmp_path / "videos", tmp_path / "data"
    write_video(videos / "first.mp4", textured(1, frames=16))
    curate([str(videos)], dataset, small_config)

    def dying(*_):
        raise Killed

    write_video(videos / "copy.mp4", textured(1, frames=16), options={"crf": "26"})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.curate.update_duplicates", dying)
        with pytest.raises(Killed):
            curate([str(videos)], dataset, small_config)
    assert read_duplicates(open_store(dataset)).num_rows == 0
    annotate(dataset, small_config)
    assert preview(dataset, "not duplicate").selected == 1
    selection = small_config.selection.model_copy(update={"expression": "not duplicate"})
    config = small_config.model_copy(update={"selection": selection})
    assert encode(dataset, autoencoder_dir, config).clips == 1


def test_a_source_can_be_removed_before_an_interrupted_curation_is_finished(
    tmp_path, small_config, without_ray, monkeypatch
):
    videos, dataset = tmp_path / "videos", tmp_path / "data"
    for name, crf in (("a.mp4", "12"), ("b.mp4", "20")):
        write_video(videos / name, textured(1, frames=16), options={"crf": crf})
    curate([str(videos)], dataset, small_config)
    write_video(videos / "c.mp4", textured(1, frames=16), options={"crf": "26"})

    def dying(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.curate.run_units", dying)
        with pytest.raises(Killed):
            curate([str(videos)], dataset, small_config)
    remove_source(dataset, "a.mp4")
    assert read_duplicates(open_store(dataset)).num_rows == 0
    (videos / "a.mp4").unlink()
    summary = curate([str(videos)], dataset, small_config)
    assert (summary.clips, summary.duplicates) == (2, 1)


def test_the_rows_of_one_unit_are_those_of_the_whole_table(tmp_path, small_config, without_ray):
    videos, dataset = tmp_path / "videos", tmp_path / "data"
    for crf in ("12", "16", "20", "24"):
        write_video(videos / f"{crf}.mp4", textured(1, frames=16), options={"crf": crf})
    curate([str(videos)], dataset, small_config)
    store = open_store(dataset)
    whole = read_duplicates(store).to_pylist()
    units = [unit.name for unit in read_plan(store)]
    parts = [read_duplicates(store, unit).to_pylist() for unit in sorted(units)]
    assert [len(part) for part in parts] == [2, 2]
    assert [row for part in parts for row in part] == whole
    assert read_duplicates(store, "none").num_rows == 0
