"""Autoencoders as directories: saving the project's own, loading any.

A directory of the project's own autoencoder holds `config.json` (see :class:`AutoencoderFile`)
and `autoencoder.safetensors`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from streamdit.autoencoder.base import Autoencoder
from streamdit.autoencoder.causal import (
    CausalAutoencoder,
    CausalAutoencoderConfig,
    unnamed_identity,
)
from streamdit.autoencoder.wan import WAN_CLASS, load_wan
from streamdit.config import AutoencoderIdentity, StrictModel
from streamdit.errors import UserError
from streamdit.hashing import file_sha256

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "autoencoder.safetensors"


class AutoencoderFile(StrictModel):
    """`config.json` of an autoencoder directory."""

    format_version: Literal[1] = 1
    """Version of the directory's layout."""
    kind: Literal["causal"] = "causal"
    """Which autoencoder this is."""
    sha256: str
    """Hash of the weights file."""
    scale: tuple[float, ...]
    """Per channel: `normalised = (latent - shift) * scale`."""
    shift: tuple[float, ...]
    """Per channel, see `scale`."""
    model: CausalAutoencoderConfig
    """Architecture."""
    training: dict[str, Any] = Field(default_factory=dict)
    """How it was trained, and how well it reconstructs held-out clips."""

    def identity(self, source: str) -> AutoencoderIdentity:
        """The identity of these weights at `source`."""
        facts = unnamed_identity(self.model).model_dump()
        own = {"sha256": self.sha256, "scale": self.scale, "shift": self.shift}
        return AutoencoderIdentity(**{**facts, **own, "source": source})


def save_autoencoder(
    autoencoder: CausalAutoencoder,
    directory: str | Path,
    training: dict[str, Any] | None = None,
) -> AutoencoderIdentity:
    """Write `autoencoder` as a directory.

    `config.json` is removed first and written last, so a directory that has one is whole.

    Args:
        autoencoder: what to save; its identity's scale and shift are saved with it.
        directory: where to; created if missing. Other files in it are left alone.
        training: facts for the record, JSON values only.

    Returns:
        Identity of what was written, with the hash of its weights; also set on `autoencoder`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    partial_weights = weights_path.with_suffix(".safetensors.partial")
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in autoencoder.state_dict().items()
    }
    save_file(weights, partial_weights)
    record = AutoencoderFile(
        sha256=file_sha256(partial_weights),
        scale=autoencoder.identity.scale,
        shift=autoencoder.identity.shift,
        model=autoencoder.config,
        training=training or {},
    )
    partial_config = config_path.with_suffix(".json.partial")
    partial_config.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    config_path.unlink(missing_ok=True)
    os.replace(partial_weights, weights_path)
    os.replace(partial_config, config_path)
    autoencoder.identity = record.identity(str(directory))
    return autoencoder.identity


def load_autoencoder(source: str | Path, device: torch.device | str = "cpu") -> Autoencoder:
    """Load an autoencoder, in evaluation mode and without gradients.

    Args:
        source: a directory that :func:`save_autoencoder` wrote; or a Wan VAE of diffusers, as a
            local directory (of the VAE, or of a pipeline with a `vae` folder) or as a hub id.
        device: where to put it.

    Raises:
        UserError: if there is nothing to load at `source`, or its weights are not those that its
            configuration names.
    """
    directory = Path(source)
    if directory.is_dir():
        record = read_config(directory)
        autoencoder = (
            load_causal(directory, record) if record.get("kind") == "causal" else load_wan(source)
        )
    elif looks_like_hub_id(str(source)):
        autoencoder = load_wan(source)
    else:
        raise UserError(
            f"autoencoder {source} does not exist; train one with `streamdit train-autoencoder`, "
            f"or name a diffusers {WAN_CLASS} by directory or hub id"
        )
    return autoencoder.to(device).eval().requires_grad_(False)


def load_causal(directory: Path, record: dict[str, Any]) -> CausalAutoencoder:
    """The project's own autoencoder from its directory, its weights checked."""
    parsed = parse_record(directory, record)
    weights_path = directory / WEIGHTS_FILE
    if not weights_path.is_file():
        raise UserError(
            f"autoencoder {directory} has no {WEIGHTS_FILE}; copy the whole directory again"
        )
    found = file_sha256(weights_path)
    if found != parsed.sha256:
        raise UserError(
            f"{weights_path} has SHA-256 {found[:12]}… but {CONFIG_FILE} names "
            f"{parsed.sha256[:12]}…: the files do not belong together; copy the directory again"
        )
    autoencoder = CausalAutoencoder(parsed.model, parsed.identity(str(directory)))
    try:
        autoencoder.load_state_dict(load_file(weights_path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{weights_path} does not fit the architecture in {CONFIG_FILE} "
            f"({str(error).splitlines()[0]}); save the autoencoder again"
        ) from None
    return autoencoder


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of `directory`, or an empty record if it has none (a diffusers pipeline)."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); copy the directory again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is not a JSON object; copy the directory again")
    return record


def read_record(directory: str | Path) -> AutoencoderFile | None:
    """The record of an autoencoder directory, or None where no whole one is."""
    record = read_config(Path(directory))
    return parse_record(Path(directory), record) if record else None


def parse_record(directory: Path, record: dict[str, Any]) -> AutoencoderFile:
    """Validate a `config.json` of this project."""
    try:
        parsed = AutoencoderFile.model_validate(record)
        parsed.identity(str(directory))
        return parsed
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the record"
        raise UserError(
            f"{directory / CONFIG_FILE}: {where}: {first['msg']}; save the autoencoder again with "
            "this version"
        ) from None


def looks_like_hub_id(source: str) -> bool:
    """Whether `source` has the form `organisation/name` and is no path."""
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")
