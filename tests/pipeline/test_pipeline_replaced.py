"""What is made again when something changed, and what is not."""

import json

import pytest
from conftest import file_hashes, write_shots

from pipeline.annotate import annotate
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.ledger import Ledger
from pipeline.schema import read_annotations, read_clips, read_dead_letters, read_sources


class Killed(Exception):
    """The job ended here."""


@pytest.fixture
def config(small_config):
    """Shards whose size does not tell one autoencoder's latents from another's."""
    shards = small_config.shards.model_copy(update={"compression": "none"})
    return small_config.model_copy(update={"shards": shards})


@pytest.fixture
def other_autoencoder_dir(tmp_path):
    """An autoencoder of the same shape with other weights."""
    import torch

    from streamdit.autoencoder import CausalAutoencoder, CausalAutoencoderConfig, save_autoencoder

    torch.manual_seed(1)
    config = CausalAutoencoderConfig(
        latent_channels=4,
        patch=(4, 8, 8),
        widths=(8,),
        strides=(),
        encoder_blocks=(1,),
        decoder_blocks=(1,),
    )
    save_autoencoder(CausalAutoencoder(config), tmp_path / "other")
    return str(tmp_path / "other")


def test_latents_of_an_autoencoder_that_was_given_up_are_not_taken_for_those_of_the_first(
    tmp_path, autoencoder_dir, other_autoencoder_dir, config, without_ray, monkeypatch
):
    write_shots(tmp_path / "videos" / "a.mp4", ["red", "green"])
    dataset = tmp_path / "data"
    curate([str(tmp_path / "videos")], dataset, config)
    annotate(dataset, config)
    encode(dataset, autoencoder_dir, config)
    first = file_hashes(dataset)
    (shard,) = (dataset / "latents").glob("*.parquet")

    def dying(self, unit, *_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "finish", dying)
        with pytest.raises(Killed):
            encode(dataset, other_autoencoder_dir, config, replace=True)
    kept = first[f"latents/{shard.name}"]
    assert shard.read_bytes() != kept
    assert shard.stat().st_size == len(kept), "the sizes were meant to tell nothing"
    encode(dataset, autoencoder_dir, config, replace=True)
    assert file_hashes(dataset) == first


@pytest.fixture
def no_work(monkeypatch):
    """Fail where a video is surveyed or looked at again."""

    def refuse(*_, **__):
        raise AssertionError("a video was read again")

    def forbid():
        monkeypatch.setattr("pipeline.curate.survey_in_child", refuse)
        monkeypatch.setattr("pipeline.annotate.sample_frames", refuse)

    return forbid


def test_videos_that_were_moved_are_not_read_again(tmp_path, small_config, without_ray, no_work):
    videos, dataset = tmp_path / "videos", tmp_path / "data"
    for step, name in enumerate(("red", "green", "blue"), start=1):
        write_shots(videos / f"{name}.mp4", [name], step=step)
    (videos / "broken.mp4").write_text("no video")
    curate([str(videos)], dataset, small_config)
    annotate(dataset, small_config)
    before = read_clips(dataset).drop(["uri"]), read_annotations(dataset)
    moved = videos.rename(tmp_path / "moved")
    no_work()
    summary = curate([str(moved)], dataset, small_config)
    annotate(dataset, small_config)
    assert (summary.sources, summary.clips, summary.dead) == (3, 6, 1)
    assert (read_clips(dataset).drop(["uri"]), read_annotations(dataset)) == before
    for table in (read_sources(dataset), read_clips(dataset), read_dead_letters(dataset)):
        assert {uri.rpartition("/")[0] for uri in table["uri"].to_pylist()} == {str(moved)}


def test_a_licence_told_later_is_written_without_reading_a_video_again(
    tmp_path, small_config, without_ray, no_work
):
    videos, dataset, table = tmp_path / "videos", tmp_path / "data", tmp_path / "videos.jsonl"
    rows = []
    for step, name in enumerate(("red", "green"), start=1):
        path = write_shots(videos / f"{name}.mp4", [name], step=step)
        rows.append({"video": str(path)})
    table.write_text("\n".join(map(json.dumps, rows)))
    curate([str(table)], dataset, small_config)
    terms = {"licence": "CC-BY-4.0", "attribution": "somebody"}
    table.write_text("\n".join(json.dumps(row | terms) for row in rows))
    no_work()
    assert curate([str(table)], dataset, small_config).clips == 4
    for found in (read_sources(dataset), read_clips(dataset)):
        for name, value in terms.items():
            assert set(found[name].to_pylist()) == {value}
