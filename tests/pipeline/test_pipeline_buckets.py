"""Clips of several sizes and lengths."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import scene_pictures, write_video

from pipeline.annotate import annotate
from pipeline.buckets import best_shape, clip_spans
from pipeline.config import ClipConfig
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.schema import load_manifest, read_clips

LANDSCAPE, PORTRAIT, SQUARE = (48, 80), (80, 48), (64, 64)


def clip_config(*shapes, stride=16):
    (frames, height, width), *others = shapes
    return ClipConfig.model_validate(
        {
            "frames": frames,
            "height": height,
            "width": width,
            "fps": 8.0,
            "stride_frames": stride,
            "buckets": [dict(zip(("frames", "height", "width"), s, strict=True)) for s in others],
        }
    )


@pytest.mark.parametrize(
    ("video", "expected"),
    [((480, 800), LANDSCAPE), ((1920, 1080), PORTRAIT), ((500, 520), SQUARE), ((90, 100), SQUARE)],
)
def test_a_video_goes_to_the_shape_that_crops_least(video, expected):
    config = clip_config((16, *SQUARE), (16, *LANDSCAPE), (16, *PORTRAIT))
    shape = best_shape(*video, 16, config)
    assert (shape.height, shape.width) == expected

    def kept(size):
        scale = max(size[0] / video[0], size[1] / video[1])
        return size[0] * size[1] / (video[0] * video[1] * scale**2)

    assert kept(expected) == pytest.approx(max(map(kept, (SQUARE, LANDSCAPE, PORTRAIT))))


@pytest.mark.parametrize(("rows", "expected"), [(300, 128), (128, 128), (100, 64), (20, 32)])
def test_of_equal_shapes_the_largest_that_does_not_enlarge_is_taken(rows, expected):
    config = clip_config((16, 64, 64), (16, 32, 32), (16, 128, 128))
    assert best_shape(rows, rows, 16, config).height == expected


def test_a_scene_gives_its_longest_clips_first_and_shorter_ones_at_its_end():
    config = clip_config((8, 32, 32), (32, 32, 32), (16, 32, 32), stride=32)
    assert list(clip_spans(0.0, 4.0, config)) == [(0.0, 32)]
    assert list(clip_spans(1.0, 4.5, config)) == [(1.0, 16), (3.0, 8)]
    assert list(clip_spans(0.0, 11.2, config)) == [(0.0, 32), (4.0, 32), (8.0, 16), (10.0, 8)]
    assert list(clip_spans(0.0, 0.9, config)) == []


def test_overlapping_clips_leave_only_the_true_rest_to_shorter_ones():
    config = clip_config((32, 32, 32), (16, 32, 32), stride=16)
    spans = list(clip_spans(0.0, 8.1, config))
    assert spans == [(0.0, 32), (2.0, 32), (4.0, 32)]
    assert list(clip_spans(0.0, 10.1, config))[-1] == (6.0, 32)
    assert list(clip_spans(0.0, 11.9, config))[-1] == (6.0, 32)
    assert list(clip_spans(0.0, 3.5, config)) == [(0.0, 16), (1.0, 16)]


def test_shards_hold_one_bucket_and_the_manifest_lists_all(
    tmp_path, small_config, autoencoder_dir, without_ray
):
    wide = [np.ascontiguousarray(np.tile(p, (1, 2, 1))) for p in scene_pictures((9, 9, 200), 40)]
    write_video(tmp_path / "videos" / "wide.mp4", wide)
    write_video(tmp_path / "videos" / "square.mp4", scene_pictures((200, 9, 9), 40))
    clip = {"frames": 16, "fps": 16, "height": 32, "width": 32, "stride_frames": 16}
    further = [(16, 32, 64), (8, 32, 32), (8, 32, 64)]
    clip["buckets"] = [dict(zip(("frames", "height", "width"), s, strict=True)) for s in further]
    config = type(small_config).model_validate(small_config.model_dump() | {"clip": clip})
    dataset = tmp_path / "data"
    curate([str(tmp_path / "videos")], dataset, config)
    annotate(dataset, config)
    summary = encode(dataset, autoencoder_dir, config)
    clips = read_clips(dataset).to_pylist()
    found = sorted((row["uri"].rsplit("/", 1)[-1], row["start_s"], row["bucket"]) for row in clips)
    assert found == [
        *(("square.mp4", t, f"{n}x32x32") for t, n in ((0.0, 16), (1.0, 16), (2.0, 8))),
        *(("wide.mp4", t, f"{n}x32x64") for t, n in ((0.0, 16), (1.0, 16), (2.0, 8))),
    ]
    assert summary.clips == 6
    assert summary.video_s == pytest.approx(5.0)
    manifest = load_manifest(dataset)
    shapes = {bucket.name: bucket.latent_shape for bucket in manifest.buckets}
    assert shapes == {
        "16x32x32": (4, 4, 4, 4),
        "16x32x64": (4, 4, 4, 8),
        "8x32x32": (2, 4, 4, 4),
        "8x32x64": (2, 4, 4, 8),
    }
    buckets = {row["clip_id"]: row["bucket"] for row in clips}
    for record in manifest.files_of("latent"):
        table = pq.read_table(dataset / record.path)
        (name,) = {buckets[clip_id] for clip_id in table["clip_id"].to_pylist()}
        assert f"-{name}-" in record.path
        assert {tuple(s) for s in table["latent_shape"].to_pylist()} == {shapes[name]}
    index = pq.read_table(dataset / manifest.selection.path).to_pylist()
    assert all(row["bucket"] in row["text_file"] for row in index)
