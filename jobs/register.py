"""`streamdit register`: a model directory into the MLflow registry, under an alias."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from jobs.console import progress, say
from jobs.options import TrackingDirectory, TrackingUri
from jobs.services import without_secrets
from streamdit.errors import UserError
from streamdit.io import read_model_config
from training.config import TrackingConfig
from training.promotion import Promotion, check_metric
from training.registry import (
    Sample,
    check_names,
    check_scores,
    register,
)

SAMPLE_PROMPT = "a boat on a lake"


def command(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL_DIR", help="Directory that train or distill wrote."),
    ],
    name: Annotated[str, typer.Option("--name", help="Registered model.")] = "streamdit",
    alias: Annotated[
        str | None, typer.Option("--alias", help="Alias that will point to the new version.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="NAME=VALUE", help="A score to record; repeat for more."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option("--scores", metavar="FILE.json", help="Scores as a JSON object of numbers."),
    ] = None,
    if_better: Annotated[
        str | None,
        typer.Option(
            "--if-better",
            metavar="METRIC",
            help="Move the alias only if this score is higher than that of the version that has "
            "the alias.",
        ),
    ] = None,
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="For --if-better: a lower score wins.")
    ] = False,
    prompt: Annotated[
        str, typer.Option("--prompt", help="Prompt of the sample video and input example.")
    ] = SAMPLE_PROMPT,
    sample_frames: Annotated[
        int, typer.Option("--sample-frames", min=0, help="Frames of the sample video; 0: none.")
    ] = 64,
    tracking_uri: TrackingUri = None,
    tracking_directory: TrackingDirectory = Path("runs/mlflow"),
) -> None:
    """Put a model into the MLflow registry, so that anyone can load it by name and alias.

    The version carries its scheme, ancestry and scores as tags, and a model card with a sample
    video, which the model makes now.
    """
    if lower_is_better and if_better is None:
        raise UserError("--lower-is-better says how to compare; add --if-better METRIC")
    if if_better is not None and alias is None:
        raise UserError("--if-better decides whether an alias moves; add --alias ALIAS")
    numbers = read_scores(score or (), scores)
    # Before the sample video, which takes its time.
    check_names(name, alias)
    check_scores(numbers)
    promotion = Promotion(if_better, lower_is_better) if if_better is not None else None
    if promotion is not None:
        check_metric(promotion, numbers)
    for encoder, folder in local_text_encoders(model).items():
        say(f"only machines that have {folder} can load the model, for its text encoder {encoder}")
    tracking = TrackingConfig(uri=tracking_uri, directory=str(tracking_directory))
    with tempfile.TemporaryDirectory() as folder:
        sample = make_sample(model, prompt, sample_frames, Path(folder)) if sample_frames else None
        registered = register(model, name, alias, tracking, numbers, sample, promotion)
    store = without_secrets(registered.tracking_uri)
    say(f"registered {registered.name} version {registered.version} in {store}")
    if alias is not None:
        verb = "points to" if registered.alias else "does not move to"
        reason = f" ({registered.note})" if registered.note else ""
        say(f"alias {alias} {verb} version {registered.version}{reason}")
    say(
        f"next: MLFLOW_TRACKING_URI={store} streamdit generate "
        f'{registered.uri} --prompt "..." --out video.mp4'
    )


def read_scores(pairs: Sequence[str], file: Path | None) -> dict[str, float]:
    """Scores of `NAME=VALUE` pairs over those of a JSON file.

    Raises:
        UserError: for what is neither.
    """
    values: dict[str, float] = {}
    if file is not None:
        try:
            values = {key: float(value) for key, value in json.loads(file.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"scores {file} cannot be read ({error}); give a JSON object of numbers, as "
                '{"colour": 0.98}'
            ) from None
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            values[key] = float(text)
        except ValueError:
            raise UserError(f"--score {pair!r} is not NAME=VALUE, as in colour=0.98") from None
    return values


def local_text_encoders(model: Path) -> dict[str, str]:
    """Folders outside the model directory that its text encoders are loaded from, by encoder."""
    return {
        encoder.name: encoder.source
        for encoder in read_model_config(model).text_encoders
        if encoder.source is not None and Path(encoder.source).exists()
    }


def make_sample(model: Path, prompt: str, frames: int, folder: Path) -> Sample:
    """A video of the model, in `folder`."""
    import numpy as np

    import streamdit
    from evaluation.sheets import write_video
    from jobs.generate import PromptChange, stream_frames

    loaded = streamdit.load(model)
    chunks: list[np.ndarray] = []
    with progress("sample", unit="frames") as shown:
        for chunk in stream_frames(loaded, [PromptChange(0, prompt)], frames, seed=0):
            chunks.append(chunk.frames)
            shown(min(frames, sum(map(len, chunks))), frames, {})
    video = np.concatenate(chunks)[:frames]
    return Sample(prompt, write_video(folder / "sample.mp4", video, loaded.config.fps))


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
