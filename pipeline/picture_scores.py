"""Every score of the few pictures that `annotate` takes of a clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.clip_scores import ClipScores
from pipeline.config import ScoreConfig
from pipeline.scores import colourfulness
from pipeline.text_area import TextArea

PICTURE_SCORES = {
    "colourfulness": "Hasler and Süsstrunk's measure; 0 is grey, above 60 vivid",
    "text_area": "share of the picture under lines of text, 0-1",
    "clip_similarity": "cosine of caption and picture in CLIP's space",
    "aesthetic": "what the aesthetic head says of the picture, in its own scale",
    "unsafe": "what the unsafe-content head says of the picture, as a probability",
}
"""Name and meaning of every number; each is the mean over a clip's pictures.

All but the first take a model, and are null where `scores` does not name it.
"""


class PictureScores:
    """Holds the models that `scores` names."""

    def __init__(self, config: ScoreConfig, threads: int, device: str = "cpu") -> None:
        """Load them.

        Raises:
            UserError: if one cannot be loaded.
        """
        self.text_area = TextArea(threads) if config.text_area else None
        self.clip = ClipScores(config.clip, device) if config.clip.model else None

    @property
    def read_captions(self) -> bool:
        """Whether a new caption changes a score."""
        return self.clip is not None

    def has_all(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of annotations has every score that these models give its clip."""
        due = ["colourfulness"]
        if self.text_area:
            due.append("text_area")
        if self.clip:
            due.extend(self.clip.heads)
            due.extend(["clip_similarity"] if row["caption"] else [])
        return all(row[name] is not None for name in due)

    def measure(
        self, pictures: Mapping[str, Sequence[np.ndarray]], captions: Mapping[str, str]
    ) -> dict[str, dict[str, float | None]]:
        """The scores of clips by their ids, from RGB pictures `uint8 [h, w, 3]` and captions."""
        by_clip = self.clip.score(pictures, captions) if self.clip else {}
        return {
            clip_id: {
                **dict.fromkeys(PICTURE_SCORES),
                "colourfulness": colourfulness(several),
                "text_area": self.text_area.mean_share(several) if self.text_area else None,
                **by_clip.get(clip_id, {}),
            }
            for clip_id, several in pictures.items()
        }
