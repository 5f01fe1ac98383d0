"""Presets that ship with the package."""

import pytest

from distillation.config import DistillConfig
from jobs.config import load_config
from pipeline.config import IngestConfig
from streamdit.partition import PartitionMixture, PartitionScheme
from training.config import TrainConfig


@pytest.mark.parametrize("preset", ["demo", "small"])
def test_presets_of_one_name_fit_each_other(preset):
    """What `ingest` makes, `train` takes and `distill` continues, each with the same preset."""
    ingest = load_config(IngestConfig, stage="ingest", preset=preset)
    train = load_config(TrainConfig, stage="train", preset=preset)
    distill = load_config(DistillConfig, stage="distill", preset=preset)
    bucket = train.model.buckets[0]
    assert (ingest.clip.height, ingest.clip.width) == (8 * bucket.height, 8 * bucket.width)
    assert ingest.clip.frames == 4 * train.model.buffer_frames
    assert {encoder.name: encoder.width for encoder in ingest.text_encoders} == train.model.text
    teacher = distill.teacher
    scheme = PartitionScheme.for_buffer(
        train.model.buffer_frames, teacher.chunk_frames, teacher.micro_steps
    )
    assert PartitionMixture(train.partition, train.model.buffer_frames).serves(scheme)
