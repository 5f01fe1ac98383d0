"""From an open Wan text-to-video model, as diffusers stores it, to a model directory of ours.

A base to start from instead of noise: the weights give the same velocity here as there (see
:mod:`streamdit.model.convert`), and training teaches them to stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamdit.config import (
    AutoencoderIdentity,
    BucketConfig,
    DiTConfig,
    GammaConfig,
    PartitionConfig,
    PartitionEntry,
    SamplingConfig,
    StreamDiTConfig,
    TextEncoderConfig,
)
from streamdit.errors import UserError
from streamdit.io import new_model_directory
from streamdit.model import StreamDiT
from streamdit.model.convert import TEXT_TOKENS, Recipe, dit_config, read_wan_config, recipes
from streamdit.weights import write_safetensors

TEXT_ENCODER = "umt5"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
HUB_DESCRIPTION = ("model_index.json", "*/config.json")
"""What says of a hub repository whether it can be converted."""

HUB_FILES = (*HUB_DESCRIPTION, "transformer/*", "vae/*", "scheduler/*")
"""What conversion needs of a hub repository: all but the text encoder's weights."""

SAMPLING_STEPS = 50
GUIDANCE_SCALE = 5.0
"""How Wan is sampled by default."""

Triple = tuple[int, int, int]
Progress = Callable[[int, int], None]
"""Called with the tensors written and their total."""


@dataclass(frozen=True)
class VideoShape:
    """The video that a converted model is to make.

    Attributes:
        frames: video frames of a buffer, 1 + 4k; the first latent stands for one frame.
        height: pixels.
        width: pixels.
        window: attention window in tokens; None: the whole grid, which is Wan's own attention.
        fps: frames per second; None: those that the model was trained with.
    """

    frames: int = 61
    height: int | None = None
    width: int | None = None
    window: Triple | None = None
    fps: float | None = None


@dataclass(frozen=True)
class Generation:
    """What is not written in a Wan model but goes with its autoencoder."""

    height: int
    width: int
    fps: float


GENERATIONS = {16: Generation(480, 832, 16.0), 48: Generation(704, 1280, 24.0)}
"""Size and rate that Wan 2.1 (16 latent channels) and Wan 2.2 TI2V (48) were trained for."""


def convert(
    source: str,
    directory: Path | str,
    shape: VideoShape | None = None,
    dtype: torch.dtype | None = None,
    on_progress: Progress | None = None,
) -> StreamDiTConfig:
    """Write the model directory of a Wan text-to-video model.

    Memory holds one tensor at a time, whatever the model's size.

    Args:
        source: directory or hub id of a diffusers pipeline (Wan 2.1 T2V, Wan 2.2 TI2V).
        directory: where the model directory will be.
        shape: video that it is to make.
        dtype: precision of the weights; None: as they are stored.
        on_progress: told how far it is.

    Returns:
        Configuration of the model directory.

    Raises:
        UserError: if there is no such model, or it cannot be converted, with the reason.
    """
    described = find_pipeline(source, HUB_DESCRIPTION)
    check_single_expert(described, source)
    wan = read_wan_config(_read_json(described / "transformer" / "config.json", source), source)
    # Gigabytes, which a model that cannot be converted need not be asked for.
    root = find_pipeline(source, HUB_FILES)
    folder = root / "transformer"
    identity = _autoencoder(source, root)
    bucket = _bucket(shape or VideoShape(), identity, wan.patch_size)
    generation = GENERATIONS.get(identity.latent_channels, GENERATIONS[16])
    model = dit_config(wan, bucket, TEXT_ENCODER)
    config = StreamDiTConfig(
        model=model,
        partition=PartitionConfig(
            entries=(PartitionEntry(chunk_frames=bucket.frames),), gamma=_schedule(root)
        ),
        sampling=SamplingConfig(
            chunk_frames=bucket.frames,
            micro_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE_SCALE,
        ),
        autoencoder=identity,
        text_encoders=(_text_encoder(source, root, wan.text_dim),),
        fps=(shape and shape.fps) or generation.fps,
        lineage={"converted_from": source},
    )
    with ExitStack() as stack:
        tensors = SourceTensors(folder, source, stack)
        made = recipes(wan, TEXT_ENCODER)
        tensors.check(made)
        kinds = {
            name: (dtype or tensors.dtype(made[name].sources[0]), meta)
            for name, meta in expected_shapes(model).items()
        }
        path = stack.enter_context(new_model_directory(directory, config))
        write_safetensors(path, kinds, _converted(tensors, made, kinds, on_progress))
    return config


def find_pipeline(source: str, files: Sequence[str]) -> Path:
    """Local directory of a pipeline, of which `files` are downloaded if need be.

    Args:
        source: directory or hub id.
        files: patterns of what is needed.

    Raises:
        UserError: if there is none.
    """
    from streamdit.autoencoder.io import looks_like_hub_id

    root = Path(source)
    if root.is_dir():
        if not (root / "model_index.json").is_file():
            raise UserError(
                f"{source} has no model_index.json; give the directory of a whole diffusers "
                "pipeline, with its transformer, vae, text_encoder and tokenizer"
            )
        return root
    if not looks_like_hub_id(source):
        raise UserError(
            f"{source} does not exist; give a directory or a hub id of a diffusers pipeline, such "
            "as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source} could not be downloaded ({reason}); check the name and the connection, or "
            "download it and give its directory"
        ) from None


def check_single_expert(root: Path, source: str) -> None:
    """Refuse a pipeline whose denoising is shared between two transformers.

    Raises:
        UserError: naming the boundary.
    """
    index = _read_json(root / "model_index.json", source)
    second = index.get("transformer_2") or [None, None]
    boundary = index.get("boundary_ratio")
    if second[0] is not None or boundary is not None:
        level = f" at noise level {boundary}" if boundary is not None else ""
        raise UserError(
            f"{source} has two transformers, one for high and one for low noise (they change over"
            f"{level}); the frames of a stream's buffer lie on both sides at once, so neither can "
            "denoise it. Give a model with one transformer, such as "
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
        )


class SourceTensors:
    """Tensors of a transformer's safetensors files, read when asked for."""

    def __init__(self, folder: Path, source: str, stack: ExitStack) -> None:
        self.source = source
        self._files: dict[str, Any] = {}
        for path in _weight_files(folder, source):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}); download it again") from None
            self._files |= dict.fromkeys(file.keys(), file)

    def check(self, made: Mapping[str, Recipe]) -> None:
        """Refuse weights that are missing, or that no recipe takes.

        Raises:
            UserError: naming the first.
        """
        needed = {name for recipe in made.values() for name in recipe.sources}
        for names, problem in (
            (needed - self._files.keys(), "is missing from"),
            (self._files.keys() - needed, "has no place in this model but is in"),
        ):
            if names:
                raise UserError(
                    f"{min(names)} {problem} the transformer's weights of {self.source}; download "
                    "it again, or give a published Wan text-to-video model"
                )

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Precision that a tensor is stored in."""
        return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[
            self._files[name].get_slice(name).get_dtype()
        ]


def expected_shapes(model: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model's state dict; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in StreamDiT(model).state_dict().items()}


def _converted(
    tensors: SourceTensors, made: Mapping[str, Recipe], kinds: Any, on_progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    for count, (name, (dtype, shape)) in enumerate(kinds.items(), start=1):
        tensor = made[name].combine([tensors[part] for part in made[name].sources])
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{tensors.source}: {made[name].sources[0]} has shape {list(tensor.shape)} where "
                f"its config.json implies {list(shape)}; download it again"
            )
        yield name, tensor.to(dtype)
        if on_progress is not None:
            on_progress(count, len(kinds))


def _weight_files(folder: Path, source: str) -> list[Path]:
    """The one file of weights, or all its shards."""
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index, source)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder / missing[0]} is missing; download {source} again")
        return [folder / name for name in names]
    if not (folder / WEIGHTS_NAME).is_file():
        raise UserError(
            f"{source} has no {folder.name}/{WEIGHTS_NAME}; give a pipeline whose weights are "
            "safetensors files"
        )
    return [folder / WEIGHTS_NAME]


def _autoencoder(source: str, root: Path) -> AutoencoderIdentity:
    """Identity of the pipeline's VAE; a local one is copied into the model directory."""
    from streamdit.autoencoder.wan import load_wan

    identity = load_wan(root / "vae").identity
    local = str((root / "vae").resolve())
    return identity.model_copy(update={"source": local if Path(source).is_dir() else source})


def _text_encoder(source: str, root: Path, width: int) -> TextEncoderConfig:
    """The pipeline's text encoder, which stays where it is."""
    local = Path(source).is_dir()
    if local and not (root / "text_encoder" / "config.json").is_file():
        raise UserError(f"{source} has no text_encoder/config.json; give a whole pipeline")
    return TextEncoderConfig(
        name=TEXT_ENCODER,
        kind="t5",
        source=str(root.resolve()) if local else source,
        width=width,
        max_tokens=TEXT_TOKENS,
    )


def _bucket(shape: VideoShape, identity: AutoencoderIdentity, patch: Triple) -> BucketConfig:
    """Latent grid of the video, with its window.

    Raises:
        UserError: if the autoencoder cannot encode such a video.
    """
    generation = GENERATIONS.get(identity.latent_channels, GENERATIONS[16])
    height, width = shape.height or generation.height, shape.width or generation.width
    latents, rest = divmod(shape.frames - 1, identity.temporal_factor)
    if rest or latents < 1:
        raise UserError(
            f"{shape.frames} frames do not fit the Wan autoencoder, which takes 1 + "
            f"{identity.temporal_factor}k; give 61 for a buffer of 16 latent frames"
        )
    step = identity.spatial_factor * patch[1]
    if height % step or width % step:
        raise UserError(f"size {height}x{width} is not a multiple of {step}; choose one that is")
    rows, columns = height // identity.spatial_factor, width // identity.spatial_factor
    grid = (1 + latents, rows // patch[1], columns // patch[2])
    window = shape.window or grid
    if any(g % w for g, w in zip(grid, window, strict=True)):
        raise UserError(
            f"window {'x'.join(map(str, window))} does not divide the token grid "
            f"{'x'.join(map(str, grid))}; choose a divisor on every axis, or leave it out for full "
            "attention"
        )
    return BucketConfig(frames=grid[0], height=rows, width=columns, window=window)


def _schedule(root: Path) -> GammaConfig:
    """The noise schedule that the pipeline's scheduler names."""
    path = root / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return GammaConfig()
    values = _read_json(path, str(root))
    shift = float(values.get("flow_shift") or values.get("shift") or 1.0)
    return GammaConfig(kind="shifted", shift=shift) if shift != 1.0 else GammaConfig()


def _read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{source}: {path.name} of {path.parent.name} cannot be read ({reason}); download it "
            "again"
        ) from None
    assert isinstance(values, dict)
    return values
