"""Captions from open_clip's CoCa."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.open_clip_model import load_open_clip
from streamdit.errors import UserError


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
        from open_clip.coca_model import CoCa

        loaded = load_open_clip("captions", model, pretrained, device)
        network, self.preprocess = loaded.network, loaded.preprocess
        self.tokenizer: Any = loaded.tokenizer
        if not isinstance(network, CoCa):
            raise UserError(
                f"captions.model {model!r} writes no text: choose a CoCa, e.g. coca_ViT-L-14"
            )
        if not hasattr(self.tokenizer, "sot_token_id"):
            raise UserError(
                f"captions.model {model!r} uses another tokenizer than CLIP's: choose "
                "coca_ViT-B-32 or coca_ViT-L-14"
            )
        self.network = network
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
