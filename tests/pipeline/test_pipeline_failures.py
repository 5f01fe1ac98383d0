"""What fails is counted, left alone, tried again on demand, and stops a job when it is too much."""

import os
import tarfile

import pytest
from broken_videos import decoder_that
from conftest import file_hashes, write_shots

from pipeline import decoders
from pipeline.annotate import annotate
from pipeline.clips import read_clip
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.schema import load_manifest, read_dead_letters
from streamdit.errors import UserError


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for step, name in enumerate(("red", "green", "blue"), 1):
        write_shots(folder / f"{name}.mp4", [name], step=step)
    return folder


def with_limits(config, **limits):
    return config.model_copy(update={"limits": config.limits.model_copy(update=limits)})


def curated_names(monkeypatch):
    """Record which videos are surveyed from here on."""
    from pipeline import curate as module

    names, real = [], module.survey_in_child

    def recording(source, config):
        names.append(os.path.basename(source.uri))
        return real(source, config)

    monkeypatch.setattr(module, "survey_in_child", recording)
    return names


def test_retry_dead_tries_what_failed_and_nothing_else(
    tmp_path, videos, small_config, without_ray, monkeypatch
):
    config = small_config.model_copy(update={"unit_sources": 8})
    whole = (videos / "blue.mp4").read_bytes()
    # The identity of a source is its size and ends, so a repaired middle keeps it.
    broken = bytearray(whole)
    broken[4:40] = bytes(36)
    (videos / "blue.mp4").write_bytes(broken)
    dataset = tmp_path / "data"
    assert curate([str(videos)], dataset, config).dead == 1
    names = curated_names(monkeypatch)
    assert curate([str(videos)], dataset, config).dead == 1
    assert names == []
    assert curate([str(videos)], dataset, config, retry_dead=True).dead == 1
    assert names == ["blue.mp4"]


def test_too_many_dead_inputs_stop_the_job_with_the_commonest_reasons(
    tmp_path, videos, small_config, without_ray
):
    for i in range(4):
        (videos / f"bad{i}.mp4").write_text(f"no video {i}")
    config = with_limits(small_config, least_inputs=7, dead_share=0.5)
    dataset = tmp_path / "data"
    with pytest.raises(UserError, match=r"curate stops: 4 of 7 inputs failed, more than 50%") as e:
        curate([str(videos)], dataset, config)
    assert "4 × InvalidDataError" in str(e.value)
    assert "\n" not in str(e.value)
    assert curate([str(videos)], dataset, with_limits(config, dead_share=0.6)).dead == 4
    few = with_limits(small_config, least_inputs=8, dead_share=0.5)
    assert curate([str(videos)], dataset, few).dead == 4


def test_too_many_unreadable_files_stop_the_job_before_it_decodes(
    tmp_path, videos, small_config, without_ray, monkeypatch
):
    for i in range(3):
        (videos / f"empty{i}.mp4").touch()
    names = curated_names(monkeypatch)
    config = with_limits(small_config, least_inputs=6, dead_share=0.4)
    with pytest.raises(UserError, match=r"list stops: 3 of 6 inputs failed.*3 × EmptyFileError"):
        curate([str(videos)], tmp_path / "data", config)
    assert names == []
    assert len(read_dead_letters(tmp_path / "data")) == 3


def test_unreadable_files_are_remembered_until_their_inputs_are_listed_again(
    tmp_path, videos, small_config, without_ray
):
    dataset, other = tmp_path / "data", tmp_path / "other"
    write_shots(other / "good.mp4", ["cyan"])
    listed = tmp_path / "some.list"
    (tmp_path / "archive.tar").write_bytes(b"no archive")
    (videos / "empty.mp4").touch()
    (other / "empty.mp4").touch()

    def dead(*inputs):
        curate([str(path) for path in inputs], dataset, small_config)
        return sorted(row["uri"] for row in read_dead_letters(dataset).to_pylist())

    first, second = str(videos / "empty.mp4"), str(other / "empty.mp4")
    assert dead(videos) == [first]
    assert dead(other) == [second, first]
    (videos / "empty.mp4").unlink()
    assert dead(other) == [second, first]
    assert dead(videos) == [second]
    listed.write_text("archive.tar\nother/empty.mp4\nother/good.mp4\n")
    assert dead(listed) == [str(tmp_path / "archive.tar"), second]
    with tarfile.open(tmp_path / "archive.tar", "w"):
        pass
    (other / "empty.mp4").write_bytes((other / "good.mp4").read_bytes())
    assert dead(listed) == []


def test_a_stopped_job_keeps_what_it_did(tmp_path, videos, small_config, without_ray, monkeypatch):
    (videos / "bad.mp4").write_text("no video")
    config = with_limits(small_config, least_inputs=2, dead_share=0.2)
    dataset = tmp_path / "data"
    with pytest.raises(UserError, match="curate stops"):
        curate([str(videos)], dataset, config)
    names = curated_names(monkeypatch)
    before = len(list(dataset.glob("ledger/curate/*.json")))
    assert before >= 1
    curate([str(videos)], dataset, with_limits(config, dead_share=1.0))
    assert len(names) == 4 - 2 * before


def test_a_source_that_crashes_its_decoder_is_quarantined_and_the_others_are_kept(
    tmp_path, videos, small_config, autoencoder_dir, without_ray, monkeypatch
):
    dataset = tmp_path / "data"
    curate([str(videos)], dataset, small_config)
    annotate(dataset, small_config)
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    # The children import this before anything else: a decoder that dies on one video.
    (plugin / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'pipeline.child' in ' '.join(sys.orig_argv):\n"
        "    import pipeline.decoders as d\n"
        "    real = d.read_clip\n"
        "    def read_clip(*a):\n"
        "        if a[0].endswith('red.mp4'):\n"
        f"            open({str(tmp_path / 'tries')!r}, 'a').write('x')\n"
        "            os.kill(os.getpid(), signal.SIGSEGV)\n"
        "        return real(*a)\n"
        "    d.read_clip = read_clip\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{plugin}:{os.environ.get('PYTHONPATH', '')}")
        summary = encode(dataset, autoencoder_dir, small_config)
    assert (summary.clips, summary.dead) == (4, 2)
    letters = read_dead_letters(dataset).to_pylist()
    assert sorted(row["error_class"] for row in letters) == ["DecoderCrashed", "Quarantined"]
    assert {row["uri"].rsplit("/", 1)[-1] for row in letters} == {"red.mp4"}
    tries = len((tmp_path / "tries").read_text())
    assert encode(dataset, autoencoder_dir, small_config).clips == 4
    assert len((tmp_path / "tries").read_text()) == tries
    again = encode(dataset, autoencoder_dir, small_config, retry_dead=True)
    assert (again.clips, again.dead) == (6, 0)


def test_other_settings_are_refused_with_what_changed(
    tmp_path, videos, small_config, autoencoder_dir, without_ray
):
    dataset = tmp_path / "data"
    curate([str(videos)], dataset, small_config)
    annotate(dataset, small_config)
    encode(dataset, autoencoder_dir, small_config)
    before = file_hashes(dataset)
    scenes = small_config.scenes.model_copy(update={"min_scene_s": 0.7})
    stricter = small_config.model_copy(update={"scenes": scenes})
    with pytest.raises(UserError, match=r"2 units of curate .*min_scene_s 0\.5 → 0\.7.*--replace"):
        curate([str(videos)], dataset, stricter)
    (encoder,) = small_config.text_encoders
    wider = small_config.model_copy(
        update={"text_encoders": (encoder.model_copy(update={"width": 32}),)}
    )
    with pytest.raises(UserError, match=r"units of text .*text_encoders\.bytes\.width 16 → 32"):
        encode(dataset, autoencoder_dir, wider)
    assert file_hashes(dataset) == before
    encode(dataset, autoencoder_dir, wider, replace=True)
    assert load_manifest(dataset).text_encoders[0].width == 32


def test_another_autoencoder_is_refused_unless_latents_are_to_be_replaced(
    tmp_path, videos, small_config, autoencoder_dir, without_ray
):
    from streamdit.autoencoder import load_autoencoder, save_autoencoder

    dataset, other = tmp_path / "data", tmp_path / "other"
    curate([str(videos)], dataset, small_config)
    annotate(dataset, small_config)
    encode(dataset, autoencoder_dir, small_config)
    model = load_autoencoder(autoencoder_dir)
    next(model.parameters()).data.add_(0.01)
    sha256 = save_autoencoder(model, other).sha256
    with pytest.raises(UserError, match=r"units of latents .*autoencoder [0-9a-f]{20}"):
        encode(dataset, str(other), small_config)
    assert load_manifest(dataset).autoencoder.sha256 != sha256
    encode(dataset, str(other), small_config, replace=True)
    assert load_manifest(dataset).autoencoder.sha256 == sha256
    assert load_autoencoder(str(dataset / "autoencoder")).identity.sha256 == sha256


def clip_row(videos, name, start_s):
    return {
        "source_id": name,
        "uri": str(videos / f"{name}.mp4"),
        "start_s": start_s,
        "frames": 8,
        "fps": 16.0,
        "height": 32,
        "width": 32,
    }


def decoder_pool(decoders_, ahead, deadline_s):
    size = 8 * 32 * 32 * 3
    return decoders.DecoderPool(decoders_, ahead, size, with_lead=False, deadline_s=deadline_s)


def test_decoders_give_frames_in_order_and_end_when_closed(videos):
    rows = [clip_row(videos, name, 0.1 * i) for i in range(5) for name in ("red", "green", "blue")]
    rows.insert(4, clip_row(videos, "none", 0.0))
    pool = decoder_pool(2, 3, 60)
    found = 0
    blocked = {}
    for (clip, frames), row in zip(pool.read(rows, blocked), rows, strict=True):
        assert clip is row
        if clip["source_id"] == "none":
            assert frames.error_class == "FileNotFoundError"
            continue
        expected = read_clip(clip["uri"], clip["start_s"], 8, 16.0, 32, 32)
        assert (frames == expected).all()
        found += 1
    assert found == 15
    assert blocked == {}
    processes = [child.process for child in pool.children]
    pool.close()
    assert all(process.poll() is not None for process in processes)


ONE_BAD_SOURCE = """
import os, signal, time
import pipeline.decoders as module
real = module.read_clip
def read_clip(uri, *rest):
    if uri.endswith('red.mp4'):
        open({tries!r}, 'a').write('x')
        {deed}
    return real(uri, *rest)
module.read_clip = read_clip
"""


@pytest.mark.parametrize(
    ("deed", "children", "error_class", "retryable", "tries"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1, "DecoderCrashed", False, 2),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "DecoderKilled", True, 2),
        ("time.sleep(600)", 1, "DeadlineExceeded", False, 1),
        ("time.sleep(600)", 2, "DeadlineExceeded", False, 2),
    ],
    ids=["crashes", "is killed", "hangs", "hangs two at once"],
)
def test_a_source_that_takes_its_decoder_along_is_not_tried_again_with_its_other_clips(
    tmp_path, videos, monkeypatch, deed, children, error_class, retryable, tries
):
    rows = [clip_row(videos, "red", i / 16) for i in range(24)]
    rows[4::6] = [clip_row(videos, "green", i / 16) for i in range(4)]
    blocked = {}
    code = ONE_BAD_SOURCE.format(tries=str(tmp_path / "tries"), deed=deed)
    with decoder_that(monkeypatch, tmp_path, code):
        pool = decoder_pool(children, 8, 10.0)
        answers = []
        for (clip, frames), row in zip(pool.read(rows, blocked), rows, strict=True):
            assert clip is row
            if clip["source_id"] == "green":
                assert (frames == read_clip(clip["uri"], clip["start_s"], 8, 16.0, 32, 32)).all()
            else:
                answers.append((frames.error_class, frames.retryable))
        again = {frames.error_class for _, frames in pool.read(rows[:4], blocked)}
        pool.close()
    assert answers == [(error_class, retryable)] + 19 * [("Quarantined", retryable)]
    assert again == {"Quarantined"}
    assert len((tmp_path / "tries").read_text()) == tries
