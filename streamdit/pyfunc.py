"""A registered model as MLflow's pyfunc flavour sees it: a table of prompts in, videos out."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamdit.loading import StreamingModel, load


def _load_pyfunc(data_path: str) -> StreamPyFunc:
    """Entry point that MLflow's pyfunc flavour calls (`loader_module="streamdit.pyfunc"`)."""
    return StreamPyFunc(load(data_path))


class StreamPyFunc:
    """A model as MLflow's pyfunc flavour sees it: a table of prompts in, videos out."""

    def __init__(self, model: StreamingModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[Any]:
        """Generate a clip for each prompt.

        Args:
            model_input: table with a column `prompt`.
            params: `frames` (default 32) and `seed` (default 0).

        Returns:
            One uint8 array `[frames, H, W, 3]` per prompt.
        """
        params = params or {}
        frames, seed = int(params.get("frames", 32)), int(params.get("seed", 0))
        videos = []
        for prompt in list(model_input["prompt"]):
            stream = self.model.stream(str(prompt), seed=seed)
            chunks: list[np.ndarray] = []
            while sum(map(len, chunks)) < frames:
                chunks.append(next(stream).frames)
            videos.append(np.concatenate(chunks)[:frames])
        return videos
