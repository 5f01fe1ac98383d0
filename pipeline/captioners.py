"""Who captions clips: files beside the video, CoCa, or a vision model behind an HTTP endpoint.

All have one form: clips in, a caption by clip id out. Nothing relies on an order of answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.captions import Cue, caption_for, read_cues
from pipeline.catalogue import Source
from pipeline.child import ChildError, describe_error
from pipeline.coca import CocaCaptioner
from pipeline.config import CaptionConfig
from pipeline.endpoint import EndpointCaptioner, EndpointError

Clip = Mapping[str, Any]
"""A row of the clip table."""

Pictures = Mapping[str, Sequence[np.ndarray]]
"""Clip id to a few of its frames, RGB `uint8 [h, w, 3]`, in order of time."""


@dataclass(frozen=True)
class Caption:
    """What a captioner answered for one clip."""

    text: str
    """The caption; empty unless the status is `ok`."""
    model: str
    """Where it comes from."""
    status: str
    """`ok`, `missing` (there is no caption) or `failed`."""
    error: ChildError | None = None
    """Why it failed; none where the reason lies elsewhere."""

    @staticmethod
    def of(text: str, model: str) -> Caption:
        """A caption, or that there is none."""
        return Caption(text, model if text else "", "ok" if text else "missing")

    @staticmethod
    def failed(error: ChildError | None = None) -> Caption:
        """No caption, because something failed."""
        return Caption("", "", "failed", error)


class Captioner(Protocol):
    """Describes the clips of one video."""

    reads_pictures: bool
    """Whether it looks at frames; such captions are kept, the others are read again each time."""

    def describe(
        self, source: Source, clips: Sequence[Clip], pictures: Pictures
    ) -> dict[str, Caption]:
        """A caption for every clip of `clips`, by its id."""
        ...


class SidecarCaptions:
    """Takes captions from the first file beside the video that describes a clip."""

    reads_pictures = False

    def describe(
        self, source: Source, clips: Sequence[Clip], pictures: Pictures
    ) -> dict[str, Caption]:
        """See :class:`Captioner`; a file that cannot be read fails the captions of its video."""
        try:
            cues = [(_origin(uri), read_cues(uri)) for uri in source.sidecars]
        except Exception as error:  # whatever a file holds is no other video's business
            failure = Caption.failed(ChildError(*describe_error(error)))
            return {clip["clip_id"]: failure for clip in clips}
        return {clip["clip_id"]: _first_caption(cues, clip) for clip in clips}


def _origin(uri: str) -> str:
    return f"sidecar:{uri.rsplit('.', 1)[-1]}"


def _first_caption(files: Sequence[tuple[str, list[Cue]]], clip: Clip) -> Caption:
    for name, cues in files:
        if text := caption_for(cues, clip["start_s"], clip["end_s"]):
            return Caption.of(text, name)
    return Caption.of("", "")


class CocaCaptions:
    """Has CoCa describe the middle picture of each clip."""

    reads_pictures = True

    def __init__(self, config: CaptionConfig, device: str = "cpu") -> None:
        self.coca = CocaCaptioner(
            config.model, config.pretrained, config.batch, config.max_tokens, device
        )
        self.name = f"coca:{config.model}"

    def describe(
        self, source: Source, clips: Sequence[Clip], pictures: Pictures
    ) -> dict[str, Caption]:
        """See :class:`Captioner`."""
        seen = [clip["clip_id"] for clip in clips if clip["clip_id"] in pictures]
        texts = self.coca.caption([pictures[i][len(pictures[i]) // 2] for i in seen])
        answers = dict(zip(seen, texts, strict=True))
        return {
            clip["clip_id"]: Caption.of(answers[clip["clip_id"]], self.name)
            if clip["clip_id"] in answers
            else Caption.failed()
            for clip in clips
        }


class EndpointCaptions:
    """Asks a vision model about the pictures of each clip."""

    reads_pictures = True

    def __init__(self, config: CaptionConfig) -> None:
        self.endpoint = EndpointCaptioner(config)
        self.name = f"endpoint:{config.model}"

    def describe(
        self, source: Source, clips: Sequence[Clip], pictures: Pictures
    ) -> dict[str, Caption]:
        """See :class:`Captioner`."""
        answers = self.endpoint.caption({i: pictures[i] for i in _ids(clips) if i in pictures})
        return {clip_id: self._caption(answers.get(clip_id)) for clip_id in _ids(clips)}

    def _caption(self, answer: str | EndpointError | None) -> Caption:
        if answer is None:
            return Caption.failed()
        if isinstance(answer, EndpointError):
            return Caption.failed(ChildError("EndpointError", str(answer), answer.retryable))
        return Caption.of(answer, self.name)


def _ids(clips: Sequence[Clip]) -> list[str]:
    return [clip["clip_id"] for clip in clips]


def build_captioner(config: CaptionConfig, device: str = "cpu") -> Captioner:
    """The configured captioner, its model loaded on `device`.

    Raises:
        UserError: if the model or endpoint cannot be used.
    """
    if config.captioner == "coca":
        return CocaCaptions(config, device)
    if config.captioner == "endpoint":
        return EndpointCaptions(config)
    return SidecarCaptions()
