"""How much of a picture is writing, from a text detector that carries its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamdit.errors import UserError

DETECTOR_ROWS = 320
"""Smaller pictures are enlarged to this many rows: small print is lost below."""
LEAST_CONFIDENCE = 0.65
"""The detector is sure of subtitles and titles (above 0.7), and less so of car roofs and lights."""


class TextArea:
    """RapidOCR's detector (PP-OCR, on ONNX Runtime); nothing is recognised, only found."""

    def __init__(self, threads: int = 1) -> None:
        """Load the detector.

        Raises:
            UserError: if the extra `ocr` is not installed.
        """
        try:
            from rapidocr import RapidOCR
        except ImportError:
            raise UserError(
                "scores.text_area needs the packages rapidocr and onnxruntime: install them with "
                "`pip install 'streamdit[ocr]'`, or set scores.text_area=false"
            ) from None
        self.find: Any = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,
                "Global.use_rec": False,
                "Det.box_thresh": LEAST_CONFIDENCE,
                "Det.limit_type": "min",
                "Det.limit_side_len": DETECTOR_ROWS,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def share(self, picture: np.ndarray) -> float:
        """Share of RGB `uint8 [h, w, 3]` that lies within the outlines of lines of text, 0-1."""
        import cv2

        outlines = self.find(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)).boxes
        if outlines is None:
            return 0.0
        mask = np.zeros(picture.shape[:2], np.uint8)
        for outline in outlines:  # one by one: overlaps count once
            cv2.fillPoly(mask, [np.rint(outline).astype(np.int32)], 1)
        return float(mask.mean())

    def mean_share(self, pictures: Sequence[np.ndarray]) -> float:
        """Mean of :meth:`share` over pictures."""
        return float(np.mean([self.share(picture) for picture in pictures]))
