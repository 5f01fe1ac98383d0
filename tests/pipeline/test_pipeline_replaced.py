"""Units made again with other settings: what a job that dies halfway leaves is never used."""

import pytest
from conftest import file_hashes, write_shots

from pipeline.annotate import annotate
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.ledger import Ledger


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
