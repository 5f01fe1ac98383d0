"""Text encoders with learned weights: the T5 family, and text towers of CLIP models.

The paper takes the encoders of Movie Gen (arXiv:2507.03745v4, Sec. 4.1): UL2, ByT5 and MetaCLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamdit.config import TextEncoderConfig
from streamdit.errors import UserError


class T5Encoder:
    """Encoder of kind `t5`: T5, UL2, UMT5 or ByT5, from transformers.

    Weights are float32 on the CPU and bfloat16 on CUDA; states are float32 on either.
    """

    def __init__(self, config: TextEncoderConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.tokenizer, self.model = load_t5(config, dtype)
        self.model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Last hidden states `[b, l, width]`, zero where padded, and mask `[b, l]`.

        The end-of-sequence token is one of them, so the empty prompt has one.
        """
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.config.max_tokens,
            return_tensors="pt",
        ).to(self.device)
        mask = tokens["attention_mask"].bool()
        output = self.model(input_ids=tokens["input_ids"], attention_mask=mask.long())
        values = output.last_hidden_state.float()
        return values.masked_fill(~mask[:, :, None], 0.0), mask


def load_t5(config: TextEncoderConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and encoder half of a T5-like model.

    Raises:
        UserError: if it cannot be found, is of another family, or has another width.
    """
    from transformers import AutoTokenizer, T5EncoderModel, UMT5EncoderModel

    assert config.source is not None
    classes: dict[str, Any] = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel}
    found, model_folder, tokenizer_folder = find_t5(config)
    family = found.model_type
    if family not in classes:
        raise UserError(
            f"text encoder {config.name!r}: {config.source} is a {family} model; kind t5 needs "
            f"one of {', '.join(classes)}"
        )
    check_width(config, found.d_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.source, subfolder=tokenizer_folder)
        model = classes[family].from_pretrained(config.source, subfolder=model_folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise missing(config, error) from None
    # Padding must follow the text, so that states without padding are a prefix.
    tokenizer.padding_side = "right"
    return tokenizer, model


def find_t5(config: TextEncoderConfig) -> tuple[Any, str, str]:
    """Configuration of a text model, and the folders of model and tokenizer inside its source.

    A diffusers pipeline keeps the two in folders of their own.

    Raises:
        UserError: if the source is neither.
    """
    from transformers import AutoConfig

    assert config.source is not None
    # transformers raises OSError for what it cannot find and ValueError for what it cannot read.
    try:
        return AutoConfig.from_pretrained(config.source), "", ""
    except (OSError, ValueError) as error:
        reason = error
    try:
        found = AutoConfig.from_pretrained(config.source, subfolder="text_encoder")
    except (OSError, ValueError):
        raise missing(config, reason) from None
    return found, "text_encoder", "tokenizer"


class OpenClipEncoder:
    """Encoder of kind `open_clip`: per-token states of a CLIP text tower, such as MetaCLIP's.

    The states are those after the final norm, before pooling and projection. The tower is causal,
    so tokens after the end of the text do not change those before it; the mask ends with the
    end-of-text token.
    """

    def __init__(self, config: TextEncoderConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.tokenizer, model = load_open_clip(config)
        # CLIP keeps the parts of its text tower on the model itself, CustomTextCLIP in `text`.
        tower: Any = getattr(model, "text", model)
        self.context = int(tower.context_length)
        self.token_embedding: nn.Module = tower.token_embedding
        self.positions: Tensor = tower.positional_embedding
        self.transformer: nn.Module = tower.transformer
        self.final_norm: nn.Module = tower.ln_final
        self.end_token = end_token(tower)
        check_width(config, self.positions.shape[1])
        if config.max_tokens > self.context:
            raise UserError(
                f"text encoder {config.name!r}: max_tokens {config.max_tokens} is more than the "
                f"{self.context} tokens of {config.source}; set it to {self.context} or less"
            )
        self._to_device()

    def _to_device(self) -> None:
        """Move the text tower; the image tower is let go."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        for module in (self.token_embedding, self.transformer, self.final_norm):
            module.to(self.device, dtype).eval().requires_grad_(False)
        self.positions = self.positions.detach().to(self.device, dtype)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States `[b, max_tokens, width]`, zero after the end of the text, and mask."""
        tokens = self.tokenizer(list(prompts), context_length=self.config.max_tokens)
        tokens = tokens.to(self.device)  # [b, max_tokens]
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positions[:length]
        causal = torch.full((length, length), float("-inf"), device=self.device).triu(1)
        x = self.final_norm(self.transformer(x, attn_mask=causal.to(x.dtype)))
        ends = self._ends(tokens)
        mask = torch.arange(length, device=self.device) <= ends[:, None]
        return x.float().masked_fill(~mask[:, :, None], 0.0), mask

    def _ends(self, tokens: Tensor) -> Tensor:
        """Place `[b]` of the end-of-text token, found as the model's own pooling finds it."""
        if self.end_token is None:
            return tokens.argmax(dim=1)  # the largest id
        return (tokens == self.end_token).int().argmax(dim=1)


def load_open_clip(config: TextEncoderConfig) -> tuple[Any, nn.Module]:
    """Tokenizer and model, with weights.

    Raises:
        UserError: if the model, its weights, or the kind of text tower is not what is needed.
    """
    import open_clip

    assert config.source is not None
    named = config.source.startswith(("hf-hub:", "local-dir:"))
    if not named:
        check_open_clip_names(config)
    try:
        model = open_clip.create_model(config.source, pretrained=config.pretrained)
        tokenizer = open_clip.get_tokenizer(config.source)
    except (OSError, RuntimeError) as error:
        raise missing(config, error) from None
    tower: Any = getattr(model, "text", model)
    plain = all(
        hasattr(tower, part)
        for part in ("token_embedding", "positional_embedding", "transformer", "ln_final")
    )
    if not plain or tower.attn_mask is None or getattr(tower, "cls_emb", None) is not None:
        raise UserError(
            f"text encoder {config.name!r}: {config.source} has no plain causal CLIP text tower; "
            "use a CLIP or MetaCLIP model, or kind t5 for a T5 tower"
        )
    return tokenizer, model


def end_token(tower: Any) -> int | None:
    """Id of the end-of-text token, or None where it is the largest id of a sequence."""
    if hasattr(tower, "text_pool_type"):
        pool, token = tower.text_pool_type, tower.text_eos_id
    else:
        pool, token = tower.pool_type, tower.eos_id
    return token if pool == "eos" else None


def check_open_clip_names(config: TextEncoderConfig) -> None:
    """Refuse a model name, weights tag or checkpoint path that does not exist."""
    import open_clip

    assert config.source is not None
    if open_clip.get_model_config(config.source) is None:
        raise UserError(
            f"text encoder {config.name!r}: open_clip has no model {config.source!r}; see "
            "open_clip.list_models(), or use hf-hub:name or local-dir:path"
        )
    if config.pretrained is None:
        raise UserError(
            f"text encoder {config.name!r}: no weights are named for {config.source}, its states "
            "would be random; set `pretrained` to a tag or a checkpoint path"
        )
    tags = open_clip.list_pretrained_tags_by_model(config.source)
    if config.pretrained not in tags and not Path(config.pretrained).is_file():
        raise UserError(
            f"text encoder {config.name!r}: weights {config.pretrained!r} of {config.source} are "
            f"neither a file nor a known tag ({', '.join(tags) or 'none known'}); name one of these"
        )


def check_width(config: TextEncoderConfig, found: int) -> None:
    """Refuse a configured width that is not the model's."""
    if found != config.width:
        raise UserError(
            f"text encoder {config.name!r}: width is {config.width} in the configuration but "
            f"{config.source} has {found}; set width to {found}"
        )


def missing(config: TextEncoderConfig, error: Exception) -> UserError:
    """The error for a model that cannot be loaded."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"text encoder {config.name!r}: {config.source} could not be loaded ({reason}); check the "
        "name, or download the model and give its path"
    )
