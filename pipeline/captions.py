"""Captions: from files beside the video, or from open_clip's CoCa."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.storage import read_bytes
from streamdit.errors import UserError

_TIMING = re.compile(r"^\s*(\S+)\s+-->\s+(\S+)")
_TAG = re.compile(r"<[^>]*>")


class CaptionFileError(ValueError):
    """A caption file cannot be understood."""


@dataclass(frozen=True)
class Cue:
    """A caption and the span that it describes, in seconds; without an end it is the whole."""

    text: str
    start_s: float = 0.0
    end_s: float = float("inf")


def read_cues(uri: str) -> list[Cue]:
    """Captions of a `.vtt`, `.json` or `.txt` file.

    JSON is a text, an object with `caption` (and optionally `start` and `end` in seconds), an
    object with a list of such under `captions`, or that list itself.

    Raises:
        CaptionFileError: if the file is not valid UTF-8 or not of its format.
    """
    try:
        text = read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionFileError(f"{uri} is not UTF-8 text ({error.reason})") from None
    suffix = uri.rsplit(".", 1)[-1]
    try:
        if suffix == "vtt":
            return parse_vtt(text)
        if suffix in ("json", "manifest"):
            return parse_json(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise CaptionFileError(f"{uri} is not a caption file ({error})") from None
    return _non_empty([Cue(text)])


def parse_vtt(text: str) -> list[Cue]:
    """Cues of a WebVTT file; notes, styles and markup are dropped."""
    if not text.startswith("WEBVTT"):
        raise CaptionFileError("it does not start with WEBVTT")
    cues = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.strip().split("\n")
        # A cue may carry an identifier in the line above its timing.
        for i, line in enumerate(lines[:2]):
            if timing := _TIMING.match(line):
                spoken = html.unescape(_TAG.sub("", " ".join(lines[i + 1 :])))
                cues.append(Cue(spoken, _seconds(timing[1]), _seconds(timing[2])))
                break
    return _non_empty(cues)


def parse_json(value: Any) -> list[Cue]:
    """Cues of a decoded JSON caption file, see :func:`read_cues`."""
    if isinstance(value, dict) and "captions" in value:
        value = value["captions"]
    if isinstance(value, (str, dict)):
        value = [value]
    if not isinstance(value, list):
        raise CaptionFileError("it holds neither a caption nor a list of captions")
    cues = []
    for item in value:
        if isinstance(item, str):
            cues.append(Cue(item))
            continue
        end_s = item.get("end")
        cues.append(
            Cue(
                str(item["caption"]),
                float(item.get("start") or 0.0),
                float("inf") if end_s is None else float(end_s),
            )
        )
    return _non_empty(cues)


def caption_for(cues: Sequence[Cue], start_s: float, end_s: float) -> str | None:
    """The caption of a clip: of the cue that covers most of the clip's middle half.

    The middle, because the first and last frames of a clip often belong to a neighbour's cue. The
    earlier cue wins a tie; a clip whose middle no cue touches has no caption.
    """
    quarter = (end_s - start_s) / 4
    low, high = start_s + quarter, end_s - quarter
    best, most = None, 0.0
    for cue in cues:
        overlap = min(cue.end_s, high) - max(cue.start_s, low)
        if overlap > most + 1e-9:
            best, most = cue.text, overlap
    return best


def _seconds(timestamp: str) -> float:
    """`[hh:]mm:ss.mmm` in seconds."""
    total = 0.0
    for part in timestamp.replace(",", ".").split(":"):
        total = total * 60 + float(part)
    return total


def _non_empty(cues: list[Cue]) -> list[Cue]:
    """Cues with white space collapsed, those without words left out."""
    cleaned = [Cue(" ".join(cue.text.split()), cue.start_s, cue.end_s) for cue in cues]
    return [cue for cue in cleaned if cue.text]


class CocaCaptioner:
    """Greedy captions from open_clip's CoCa, batched.

    CoCa's own `generate` needs a class that transformers no longer has, so tokens are drawn here
    from its forward pass; the pictures are encoded once.
    """

    def __init__(
        self, model: str, pretrained: str | None, batch: int, max_tokens: int, device: str = "cpu"
    ) -> None:
        """Load the model.

        Args:
            model: open_clip model name, `hf-hub:org/name` or `local-dir:/path`.
            pretrained: weights tag or checkpoint path of a named model.
            batch: pictures at once.
            max_tokens: longest caption.
            device: torch device.

        Raises:
            UserError: if it cannot be loaded or is not a CoCa.
        """
        import open_clip
        from open_clip.coca_model import CoCa

        named = ":" not in model
        if named and pretrained is None:
            raise UserError(
                f"captions.model {model!r} has no weights: set captions.pretrained to a tag or a "
                "checkpoint file"
            )
        try:
            network, _, self.preprocess = open_clip.create_model_and_transforms(
                model, pretrained=pretrained if named else None, device=device
            )
            self.tokenizer: Any = open_clip.get_tokenizer(model)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"captions.model {model!r} cannot be loaded ({reason}): check captions.model and "
                "captions.pretrained"
            ) from None
        if not isinstance(network, CoCa):
            raise UserError(
                f"captions.model {model!r} writes no text: choose a CoCa, e.g. coca_ViT-L-14"
            )
        if not hasattr(self.tokenizer, "sot_token_id"):
            raise UserError(
                f"captions.model {model!r} uses another tokenizer than CLIP's: choose "
                "coca_ViT-B-32 or coca_ViT-L-14"
            )
        self.network = network.eval()
        self.batch = batch
        self.max_tokens = min(max_tokens, network.context_length)
        self.device = device

    @torch.no_grad()
    def caption(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """Describe RGB pictures `uint8 [h, w, 3]`, each by itself."""
        captions: list[str] = []
        for first in range(0, len(pictures), self.batch):
            captions.extend(self._caption_batch(pictures[first : first + self.batch]))
        return captions

    def _caption_batch(self, pictures: Sequence[np.ndarray]) -> list[str]:
        from PIL import Image

        images = torch.stack([self.preprocess(Image.fromarray(p)) for p in pictures])
        tokens = self.decode_greedily(images.to(self.device))
        return [self._to_text(row) for row in tokens.tolist()]

    def decode_greedily(self, images: Tensor) -> Tensor:
        """Likeliest next token, one after another.

        Args:
            images: preprocessed, `[b, 3, H, W]`.

        Returns:
            Tokens `[b, l]` int64: start, words, end, then padding.
        """
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        padding = self.network.pad_id
        features = self.network(images)
        tokens = torch.full((len(images), 1), start, dtype=torch.long, device=images.device)
        ended = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        while tokens.shape[1] < self.max_tokens and not ended.all():
            logits = self.network(
                None,
                tokens,
                image_latent=features["image_features"],
                image_embs=features["image_embs"],
                output_labels=False,
            )["logits"][:, -1]
            logits[:, [start, padding]] = float("-inf")
            if tokens.shape[1] == 1:
                logits[:, end] = float("-inf")  # a caption has at least one word
            chosen = logits.argmax(dim=-1).masked_fill(ended, padding)
            ended |= chosen == end
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        return tokens

    def _to_text(self, tokens: list[int]) -> str:
        """Words between the start and the end token."""
        end = self.tokenizer.eot_token_id
        words = tokens[1 : tokens.index(end)] if end in tokens else tokens[1:]
        return " ".join(self.tokenizer.decode(words).split())
