"""Scores from CLIP: likeness of pictures and caption, and linear heads on picture embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ClipScoreConfig
from pipeline.open_clip_model import load_open_clip
from streamdit.errors import UserError


class ClipScores:
    """One pass of CLIP over the pictures of clips, from which all its scores follow."""

    def __init__(self, config: ClipScoreConfig, device: str = "cpu") -> None:
        """Load the model and the heads.

        Raises:
            UserError: if one of them cannot be loaded, or a head is of another width.
        """
        assert config.model is not None
        self.model = load_open_clip("scores.clip", config.model, config.pretrained, device)
        self.batch = config.batch
        self.device = device
        self.heads = {
            name: load_head(f"scores.clip.{name}_head", path)
            for name, path in (("aesthetic", config.aesthetic_head), ("unsafe", config.unsafe_head))
            if path is not None
        }

    @torch.inference_mode()
    def embed_pictures(self, clips: Sequence[Sequence[np.ndarray]]) -> list[Tensor]:
        """Unit embeddings `[pictures, d]` of the RGB pictures `uint8 [h, w, 3]` of each clip."""
        from PIL import Image

        pictures = [picture for clip in clips for picture in clip]
        parts = []
        for first in range(0, len(pictures), self.batch):
            some = pictures[first : first + self.batch]
            images = torch.stack([self.model.preprocess(Image.fromarray(p)) for p in some])
            features = self.model.network.encode_image(images.to(self.device))
            parts.append(torch.nn.functional.normalize(features.float(), dim=-1).cpu())
        return list(torch.cat(parts).split([len(clip) for clip in clips])) if parts else []

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings `[texts, d]`."""
        parts = []
        for first in range(0, len(texts), self.batch):
            tokens = self.model.tokenizer(list(texts[first : first + self.batch]))
            features = self.model.network.encode_text(tokens.to(self.device))
            parts.append(torch.nn.functional.normalize(features.float(), dim=-1).cpu())
        return torch.cat(parts)

    def score(
        self, pictures: Mapping[str, Sequence[np.ndarray]], captions: Mapping[str, str]
    ) -> dict[str, dict[str, float]]:
        """Scores by clip id, each the mean over the clip's pictures.

        `clip_similarity` (cosine of caption and picture, only where there is a caption),
        `aesthetic` (the head's own scale) and `unsafe` (probability) where there is such a head.

        Args:
            pictures: clip id to RGB pictures `uint8 [h, w, 3]`.
            captions: clip id to caption; empty and missing ones have no similarity.
        """
        ids = [clip_id for clip_id, several in pictures.items() if len(several)]
        embedded = dict(zip(ids, self.embed_pictures([pictures[i] for i in ids]), strict=True))
        scores: dict[str, dict[str, float]] = {clip_id: {} for clip_id in pictures}
        for clip_id, features in embedded.items():
            for name, head in self.heads.items():
                values = head(self._fitting(name, head, features)).squeeze(-1)
                values = values.sigmoid() if name == "unsafe" else values
                scores[clip_id][name] = float(values.mean())
        described = [clip_id for clip_id in ids if captions.get(clip_id)]
        if described:
            texts = self.embed_texts([captions[clip_id] for clip_id in described])
            for clip_id, text in zip(described, texts, strict=True):
                scores[clip_id]["clip_similarity"] = float((embedded[clip_id] @ text).mean())
        return scores

    def _fitting(self, name: str, head: torch.nn.Linear, features: Tensor) -> Tensor:
        if head.in_features != features.shape[-1]:
            raise UserError(
                f"scores.clip.{name}_head is for embeddings of width {head.in_features}, but "
                f"scores.clip.model gives {features.shape[-1]}: use the model it was trained on"
            )
        return features


def load_head(setting: str, path: str) -> torch.nn.Linear:
    """A linear head `[d] -> [1]` from `.safetensors`, or a state dict that torch saved.

    Its layers are taken in the order of their names; without an activation between them (as in
    LAION's aesthetic predictors) several are one linear map.

    Raises:
        UserError: if the file does not hold such a head.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        names = sorted({name.rpartition(".")[0] for name in state}, key=_layer_number)
        prefixes = [f"{name}." if name else "" for name in names]
        weight, bias = torch.eye(state[f"{prefixes[0]}weight"].shape[1]).double(), torch.zeros(1)
        for prefix in prefixes:
            layer = state[f"{prefix}weight"].double()
            bias = layer @ bias.double().expand(layer.shape[1]) + state[f"{prefix}bias"].double()
            weight = layer @ weight
        if weight.shape[0] != 1:
            raise ValueError(f"it gives {weight.shape[0]} numbers, not one")
    except (OSError, KeyError, IndexError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{setting} {path} is no linear head ({' '.join(str(error).split())[:200]}): name a "
            ".safetensors or .pth file with the weight and bias of linear layers that end in one "
            "number"
        ) from None
    head = torch.nn.Linear(weight.shape[1], 1)
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return head.eval().requires_grad_(False)


def _layer_number(name: str) -> tuple[int, str]:
    digits = name.rpartition(".")[2]
    return (int(digits) if digits.isdigit() else -1, name)
