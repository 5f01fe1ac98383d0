"""`streamdit train-autoencoder`: the autoencoder that turns clips into latents and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from jobs.config import load_config
from jobs.console import OnProgress, format_duration, format_parameters, progress, say
from jobs.options import DEFAULT_PRESET, ConfigFile, Overrides, Preset, same_settings
from pipeline.store import DatasetPath
from training.autoencoder import AutoencoderTrainSummary, train_autoencoder
from training.autoencoder_config import AutoencoderTrainConfig
from training.config import TrackingConfig
from training.tracking import Tracker

RUN_FILE = "mlflow_run_id"
"""In the output directory: the MLflow run that a resumed training goes on with."""

SHOWN = ("loss", "psnr", "held_out_psnr", "clips_per_s")
"""Metrics beside the progress bar; MLflow gets all."""


def command(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="Curated dataset (`streamdit ingest --only curate`): a folder, or "
            "s3://bucket/prefix.",
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory of the autoencoder.")
    ] = Path("runs/autoencoder"),
    preset: Preset = DEFAULT_PRESET,
    config: ConfigFile = None,
) -> None:
    """Train the autoencoder that makes the latents: 4 times fewer frames, 8 times fewer pixels.

    Learns from the clips of a curated dataset; encode then uses it: `streamdit ingest VIDEOS --out
    DATASET --autoencoder DIR`. The run can be interrupted: the same command continues. It is
    recorded in MLflow, at MLFLOW_TRACKING_URI or else in runs/mlflow.
    """
    settings = load_config(
        AutoencoderTrainConfig,
        stage="autoencoder",
        preset=preset,
        file=config,
        overrides=overrides or (),
    )
    train_tracked(dataset, out, settings, TrackingConfig())
    more = same_settings("ingest", preset)
    say(f"next: streamdit ingest VIDEOS --out {dataset} --autoencoder {out}{more}")


def train_tracked(
    dataset: DatasetPath, out: Path, config: AutoencoderTrainConfig, tracking: TrackingConfig
) -> AutoencoderTrainSummary:
    """Train with progress on the console and the run in MLflow.

    Args:
        dataset: curated dataset, a folder or an `s3://` prefix.
        out: directory of the autoencoder; a finished one is not trained again.
        config: how to train.
        tracking: where the run is recorded.

    Raises:
        UserError: if the clips do not fit, or `out` holds another run.
    """
    params = config.model_dump(mode="json")
    with progress("autoencoder", unit="steps") as on_progress:
        log = TrackedLog(
            out, tracking, params, {"dataset": str(dataset)}, config.steps, on_progress
        )
        try:
            summary = train_autoencoder(dataset, out, config, log)
            log.record(summary)
        except BaseException as error:  # Only to tell MLflow how it ended; raised again at once.
            log.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
    log.finish("FINISHED")
    say(
        f"autoencoder: {out} ({format_parameters(summary.parameters)} parameters, "
        f"{summary.psnr:.1f} dB on {summary.psnr_split.replace('_', '-')} clips, "
        f"{format_duration(summary.seconds)} of training)"
    )
    return summary


class TrackedLog:
    """Log lines of a training, to the console and to one MLflow run.

    The run is opened by the first line, so that a finished training leaves no empty run; a resumed
    one goes on with the run that it began.
    """

    def __init__(
        self,
        out: Path,
        tracking: TrackingConfig,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        steps: int,
        on_progress: OnProgress,
    ) -> None:
        self.run_file = out / RUN_FILE
        self.tracking = tracking
        self.params = params
        self.tags = {"stage": "autoencoder", "directory": str(out), **tags}
        self.steps = steps
        self.on_progress = on_progress
        self.tracker: Tracker | None = None

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Show and record the numbers of a step."""
        self.on_progress(step, self.steps, {k: metrics[k] for k in SHOWN if k in metrics})
        self._run().log(step, metrics)

    def record(self, summary: AutoencoderTrainSummary) -> None:
        """Record the outcome, where this call trained at all."""
        if self.tracker is None:
            return
        self.tracker.log(summary.steps, {f"final_{summary.psnr_split}_psnr": summary.psnr})
        self.tracker.tag("autoencoder_sha256", summary.identity.sha256)
        self.tracker.artifact(summary.directory / "config.json")

    def finish(self, status: str) -> None:
        """Close the run, if one was opened."""
        if self.tracker is not None:
            self.tracker.finish(status)

    def _run(self) -> Tracker:
        if self.tracker is None:
            run_id = self.run_file.read_text().strip() if self.run_file.is_file() else None
            self.tracker = Tracker.start(
                self.tracking, "autoencoder", self.params, self.tags, run_id=run_id
            )
            self.run_file.parent.mkdir(parents=True, exist_ok=True)
            self.run_file.write_text(self.tracker.run_id + "\n")
        return self.tracker


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
