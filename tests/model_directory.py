"""A small model directory with random weights, for tests that load and stream."""

from __future__ import annotations

from pathlib import Path

import torch
from latent_dataset import ENCODERS, tiny_autoencoder, train_settings

from streamdit.config import SamplingConfig, StreamDiTConfig
from streamdit.io import save_model_directory
from streamdit.model import StreamDiT
from training.config import TrainConfig


def model_config(autoencoder, **changes) -> StreamDiTConfig:
    settings = TrainConfig.model_validate(train_settings())
    values = {
        "model": settings.model,
        "partition": settings.partition,
        "sampling": SamplingConfig(chunk_frames=1, micro_steps=2, guidance_scale=2.0),
        "autoencoder": autoencoder,
        "text_encoders": ENCODERS,
        "fps": 16.0,
    }
    return StreamDiTConfig(**(values | changes))


def random_weights(config: StreamDiTConfig):
    model = StreamDiT(config.model)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.state_dict()


def write_model_directory(folder: Path, **changes) -> Path:
    """Model directory `folder/model`, with its autoencoder inside."""
    identity = tiny_autoencoder(folder / "autoencoder")
    config = model_config(identity.model_copy(update={"source": "autoencoder"}), **changes)
    return save_model_directory(folder / "model", config, random_weights(config), folder)
