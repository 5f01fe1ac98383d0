"""Model directories on disk: everything that is needed to stream.

model/
  config.json           StreamDiTConfig
  model.safetensors     weights of the transformer
  autoencoder/          the project's own autoencoder, where the model uses one
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamdit.config import StreamDiTConfig
from streamdit.errors import UserError
from streamdit.hashing import file_sha256
from streamdit.model import StreamDiT

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
AUTOENCODER_FOLDER = "autoencoder"


def resolve_source(source: str, base: Path) -> str:
    """An identity's `source`, which may be relative to the directory that holds the record."""
    local = base / source
    return str(local) if local.exists() else source


def save_model_directory(
    directory: Path | str,
    config: StreamDiTConfig,
    weights: Mapping[str, Tensor],
    autoencoder_base: Path | str = ".",
) -> Path:
    """Write a model directory; an existing one is replaced only once the new one is complete.

    Args:
        directory: where it will be.
        config: its configuration; a local autoencoder in it is copied in, and `weights_sha256`
            is set.
        weights: state dict of the transformer; written in the dtype it has.
        autoencoder_base: directory that `config.autoencoder.source` is relative to.

    Returns:
        The directory.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with new_model_directory(directory, config, autoencoder_base) as path:
        save_file(contiguous, path, metadata={"format": "pt"})
    return Path(directory)


@contextmanager
def new_model_directory(
    directory: Path | str, config: StreamDiTConfig, autoencoder_base: Path | str = "."
) -> Iterator[Path]:
    """Like :func:`save_model_directory`, for weights that the caller writes.

    Yields:
        Path of the weights file. The directory appears when the block ends without an error.
    """
    directory = Path(directory)
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging / WEIGHTS_FILE
        _finish_model_directory(staging, config, Path(autoencoder_base))
        shutil.rmtree(directory, ignore_errors=True)
        staging.replace(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _finish_model_directory(staging: Path, config: StreamDiTConfig, base: Path) -> None:
    """Copy a local autoencoder beside the weights and write the configuration of both."""
    source = Path(resolve_source(config.autoencoder.source, base))
    if source.is_dir():
        shutil.copytree(source, staging / AUTOENCODER_FOLDER)
        identity = config.autoencoder.model_copy(update={"source": AUTOENCODER_FOLDER})
        config = config.model_copy(update={"autoencoder": identity})
    config = config.model_copy(update={"weights_sha256": file_sha256(staging / WEIGHTS_FILE)})
    (staging / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n")


def read_model_config(directory: Path | str) -> StreamDiTConfig:
    """Read and check `config.json` of a model directory.

    Raises:
        UserError: if the directory is none, or its configuration does not fit this version.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} is no model directory: it has no {CONFIG_FILE}; give the directory that "
            "`streamdit train` or `streamdit distill` wrote"
        )
    try:
        return StreamDiTConfig.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"{path}: {key}: {first['msg']}; write it again with this version of streamdit"
        ) from None


def load_weights(directory: Path | str, config: StreamDiTConfig) -> dict[str, Tensor]:
    """Weights of a model directory, after checking their hash.

    Raises:
        UserError: if the file is missing or its hash differs from the configuration's.
    """
    path = Path(directory) / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing; copy or export the model directory again")
    digest = file_sha256(path)
    if config.weights_sha256 and digest != config.weights_sha256:
        raise UserError(
            f"{path} has SHA-256 {digest[:12]}... but its config.json says "
            f"{config.weights_sha256[:12]}...; the file is damaged, copy or export it again"
        )
    return load_file(path)


def load_model(
    directory: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[StreamDiT, StreamDiTConfig]:
    """Load the transformer of a model directory and its configuration."""
    config = read_model_config(directory)
    with torch.device("meta"):
        model = StreamDiT(config.model)
    weights = load_weights(directory, config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))[0]
        raise UserError(
            f"{Path(directory) / WEIGHTS_FILE} does not fit its config.json, first at "
            f"{wrong[0]} {tuple(wrong[1])}; export the model directory again"
        )
    model.load_state_dict(weights, assign=True)
    return model.to(device=device, dtype=dtype), config
