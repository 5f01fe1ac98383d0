"""From a model directory, or a registry, to something that streams."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamdit.autoencoder.base import Autoencoder
from streamdit.config import AutoencoderIdentity, SamplingConfig, StreamDiTConfig
from streamdit.decoding import DecoderConfig
from streamdit.denoiser import Denoiser
from streamdit.devices import choose_device
from streamdit.errors import UserError
from streamdit.io import load_model, resolve_source
from streamdit.model import StreamDiT
from streamdit.model.fast import FastConfig
from streamdit.partition import PartitionScheme
from streamdit.schemes import check_references, check_scheme, check_start
from streamdit.start import Guide, StreamStart, encode_frames
from streamdit.state import load_state
from streamdit.stream import Stream
from streamdit.text.base import TextEncoders

DEFAULT_FAST = FastConfig()
"""What costs nothing: tables of modulations and text memories, which change no result."""


@dataclass
class StreamingModel:
    """A model with everything around it: what :func:`load` returns.

    Attributes:
        config: configuration of the model directory.
        model: the transformer, in evaluation mode.
        autoencoder: decoder (and encoder) of its latents.
        text_encoders: encoders of its prompts.
        device: where it runs.
    """

    config: StreamDiTConfig
    model: StreamDiT
    autoencoder: Autoencoder
    text_encoders: TextEncoders
    device: torch.device

    def scheme(self, sampling: SamplingConfig | None = None) -> PartitionScheme:
        """The scheme that a sampling configuration (default: the model's own) stands for.

        Raises:
            UserError: if the model was not trained, or not distilled, for it.
        """
        return check_scheme(self.config, sampling or self.config.sampling)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(C, h, w)` of a latent frame of a stream."""
        bucket = self.config.model.buckets[0]
        return self.config.model.latent_channels, bucket.height, bucket.width

    @property
    def max_text_tokens(self) -> int:
        """Most text tokens that a prompt is projected to."""
        model, encoders = self.config.model, self.config.text_encoders
        return sum(model.text_padding or encoder.max_tokens for encoder in encoders)

    def denoiser(
        self,
        prompts: list[str],
        seeds: Iterable[int],
        sampling: SamplingConfig | None = None,
        guide: Guide | None = None,
        references: Tensor | None = None,
        fast: FastConfig | None = DEFAULT_FAST,
    ) -> Denoiser:
        """A denoiser for several streams in step, one prompt and seed each, prompts set.

        Args:
            prompts: one per stream.
            seeds: one per stream.
            sampling: scheme, guidance and start; default: the model's own.
            guide: video that the streams follow (see :meth:`guide`).
            references: the K latents before the stream (see :meth:`latents`), for K > 0.
            fast: which optimisations the steps run with; None: the network as it is.

        Raises:
            UserError: if the model cannot be asked for this.
        """
        sampling = sampling or self.config.sampling
        denoiser = self._unprompted(seeds, sampling, guide, references, fast)
        null = self.text_encoders.encode([""]) if sampling.guidance_scale != 1.0 else None
        denoiser.set_text(self.text_encoders.encode(prompts), null)
        return denoiser

    def _unprompted(
        self,
        seeds: Iterable[int],
        sampling: SamplingConfig,
        guide: Guide | None,
        references: Tensor | None,
        fast: FastConfig | None,
    ) -> Denoiser:
        """A denoiser that has yet to be told its prompts; see :meth:`denoiser`."""
        scheme = self.scheme(sampling)
        if references is not None:
            references = check_references(self.config, references, scheme)
        else:
            check_start(self.config, sampling)
        denoiser = Denoiser(
            self.model,
            scheme,
            self.latent_shape,
            list(seeds),
            self.config.partition.gamma,
            sampling.guidance_scale,
            self.device,
            StreamStart(sampling.start, guide, references),
        )
        if fast is not None:
            denoiser.accelerate(fast, self.max_text_tokens)
        return denoiser

    def stream(
        self,
        prompt: str,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        guide: Guide | None = None,
        history: Tensor | None = None,
        fast: FastConfig | None = DEFAULT_FAST,
        decoder: DecoderConfig | None = None,
    ) -> Stream:
        """Start a stream; iterate it for chunks, assign its `prompt` to steer it.

        Args:
            prompt: what to show.
            seed: fixes all noise.
            sampling: scheme, guidance and start; default: the model's own.
            guide: video to follow (SDEdit; see :meth:`guide`).
            history: latents of a video to continue (see :meth:`latents`); its last K frames are
                the first references, so the scheme needs K > 0.
            fast: which optimisations the steps run with; None: the network as it is.
            decoder: how to decode; default: as the autoencoder is, chunk by chunk.
        """
        sampling = sampling or self.config.sampling
        denoiser = self._unprompted([seed], sampling, guide, history, fast)
        return self._stream(denoiser, prompt, history, decoder)

    def _stream(
        self,
        denoiser: Denoiser,
        prompt: str,
        history: Tensor | None,
        decoder: DecoderConfig | None,
    ) -> Stream:
        """A stream of this model's."""
        return Stream(
            denoiser,
            self.autoencoder,
            self.text_encoders,
            prompt,
            history,
            decoder,
            identity={
                "weights": self.config.weights_sha256,
                "autoencoder weights": self.config.autoencoder.sha256,
                "precision": _name(next(self.model.parameters()).dtype),
                "decoder's precision": self._decoder_precision(decoder),
            },
        )

    def _decoder_precision(self, decoder: DecoderConfig | None) -> str:
        if decoder is not None and decoder.bfloat16:
            return _name(torch.bfloat16)
        return _name(next(self.autoencoder.parameters()).dtype)

    def latents(self, frames: np.ndarray) -> Tensor:
        """Normalised latents `[1, f, C, h, w]` of frames uint8 `[n, H, W, 3]`, fitted in size.

        For a stream to continue them: of frames that are too few for another latent, the first
        are left out.
        """
        bucket = self.config.model.buckets[0]
        return encode_frames(self.autoencoder, bucket, frames, to_the_end=True)

    def guide(self, frames: np.ndarray, strength: float) -> Guide:
        """A video uint8 `[n, H, W, 3]` to follow; one frame is held for a whole buffer.

        Args:
            frames: at the model's frame rate; any size.
            strength: share of each frame's way that the model makes alone, 0...1.
        """
        if len(frames) == 1:
            identity = self.autoencoder.identity
            held = self.config.model.buffer_frames * identity.temporal_factor
            frames = frames.repeat(held, axis=0)
        latents = encode_frames(self.autoencoder, self.config.model.buckets[0], frames)
        return Guide(latents, strength, self.config.partition.sigma_min)

    def resume(
        self,
        path: Path | str,
        fast: FastConfig | None = DEFAULT_FAST,
        decoder: DecoderConfig | None = None,
    ) -> Stream:
        """Continue a stream that :meth:`Stream.save` wrote, bit for bit, in this process.

        Args:
            path: the file.
            fast: which optimisations the steps run with; others than the saved stream's may differ
                by rounding.
            decoder: how to decode; default: in the precision of the saved stream.

        Raises:
            UserError: if the file is none, the model does not serve its scheme, or another model
                made it, or one in another precision.
        """
        state = load_state(path, self.device)
        plan = state["denoiser"]["plan"]
        sampling = SamplingConfig(
            chunk_frames=plan["c"],
            micro_steps=plan["s"],
            reference_frames=plan["K"],
            guidance_scale=plan["guidance_scale"],
            start=plan["start"],
        )
        given = (1, plan["K"], *self.latent_shape) if plan["references_given"] else None
        references = torch.zeros(given, device=self.device) if given else None
        denoiser = self._unprompted(state["denoiser"]["seeds"], sampling, None, references, fast)
        if decoder is None:
            saved = state.get("identity", {}).get("decoder's precision")
            decoder = DecoderConfig(bfloat16=saved == _name(torch.bfloat16))
        stream = self._stream(denoiser, state["prompt"], None, decoder)
        stream.restore(state)
        return stream


def load(
    source: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> StreamingModel:
    """Turn a model directory, or a model in an MLflow registry, into something that streams.

    Args:
        source: a model directory, or `models:/name@alias` / `models:/name/version`.
        device: default: a CUDA device if there is one.
        dtype: precision of the transformer; default: bfloat16 on CUDA, as stored elsewhere.

    Raises:
        UserError: if it cannot be found or does not fit.
    """
    from streamdit.autoencoder import load_autoencoder
    from streamdit.registered import download
    from streamdit.text import build_text_encoders

    directory = download(str(source)) if str(source).startswith("models:/") else Path(source)
    chosen = choose_device(device)
    if dtype is None and chosen.type == "cuda":
        dtype = torch.bfloat16
    model, config = load_model(directory, chosen, dtype)
    identity = config.autoencoder
    autoencoder = load_autoencoder(resolve_source(identity.source, directory), device=chosen)
    check_autoencoder(autoencoder.identity, identity)
    encoders = build_text_encoders(config.text_encoders, device=chosen)
    return StreamingModel(config, model.eval(), autoencoder.eval(), encoders, chosen)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_autoencoder(found: AutoencoderIdentity, expected: AutoencoderIdentity) -> None:
    """Refuse an autoencoder other than the one that the latents were made with."""
    if found.sha256 != expected.sha256:
        raise UserError(
            f"autoencoder {found.source} has SHA-256 {found.sha256[:12]}... but the model was "
            f"trained on latents of {expected.sha256[:12]}...; restore the original autoencoder"
        )
    for what in ("scale", "shift"):
        mine, theirs = getattr(found, what), getattr(expected, what)
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(mine, theirs, strict=True)):
            raise UserError(
                f"autoencoder {found.source} has another {what} of its latents than the model was "
                "trained on; restore its original config.json"
            )
