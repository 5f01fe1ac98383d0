"""`streamdit ingest` and `train-autoencoder`: what they refuse, say, and make of real videos."""

import io
import json
from pathlib import Path

import pytest
from latent_dataset import tiny_autoencoder
from rich.console import Console
from typer.testing import CliRunner

import jobs.ingest
from evaluation.sprites import SpriteWorldConfig, make_world
from jobs.cli import app
from jobs.config import load_config
from jobs.ingest import Stage, next_step, print_summary, warn_of_channels
from jobs.options import same_settings, split_overrides
from jobs.train_autoencoder import RUN_FILE, train_tracked
from pipeline.config import IngestConfig
from pipeline.curate import CurateSummary
from pipeline.dead_letters import DeadLetter, write_dead_letters
from pipeline.schema import load_manifest
from streamdit.autoencoder import CausalAutoencoder, CausalAutoencoderConfig, save_autoencoder
from streamdit.errors import UserError
from training.autoencoder_config import AutoencoderTrainConfig
from training.config import TrackingConfig


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def no_work(monkeypatch):
    """Fail the test if any work begins."""
    monkeypatch.setattr(jobs.ingest, "ray_runtime", lambda address: pytest.fail("work began"))


@pytest.fixture
def small_autoencoder(tmp_path):
    """Directory of an untrained autoencoder."""
    model = CausalAutoencoder(
        CausalAutoencoderConfig(
            latent_channels=4,
            patch=(4, 4, 4),
            widths=(8, 8),
            strides=((1, 2, 2),),
            encoder_blocks=(1, 1),
            decoder_blocks=(1, 1),
        )
    )
    save_autoencoder(model, tmp_path / "ae")
    return tmp_path / "ae"


def refusal(result):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_encode_without_autoencoder_is_refused_before_any_work(invoke, no_work, tmp_path):
    for extra in ((), ("--only", "encode")):
        line = refusal(invoke("ingest", "videos", "--out", "data", *extra))
        assert line.startswith("error: encode needs --autoencoder")
        assert "streamdit train-autoencoder data --out DIR" in line
    assert not (tmp_path / "data").exists()


def test_autoencoder_that_does_not_exist_is_refused_before_any_work(invoke, no_work):
    line = refusal(invoke("ingest", "videos", "--autoencoder", "./nowhere"))
    assert "./nowhere" in line or "nowhere" in line


def test_autoencoder_that_does_not_fit_the_clips_is_refused_before_any_work(
    invoke, no_work, small_autoencoder
):
    line = refusal(invoke("ingest", "videos", "--autoencoder", small_autoencoder, "clip.frames=30"))
    assert line.startswith("error: clip.frames 30 does not fit the causal autoencoder")


def test_missing_inputs_are_refused_with_an_example(invoke, no_work):
    line = refusal(invoke("ingest", "--only", "curate", "--out", "data"))
    assert line == (
        "error: no videos are given: name files, folders, lists or s3:// prefixes, as in "
        "`streamdit ingest my_videos/ --out data`"
    )


def test_unknown_setting_among_the_inputs_is_refused(invoke, no_work):
    line = refusal(invoke("ingest", "videos", "clip.frame=8", "--only", "curate"))
    assert line.endswith("is not a known key: did you mean clip.frames?")


def test_settings_are_told_from_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "take=2.mp4").touch()
    (tmp_path / "take=3").mkdir()
    arguments = [
        "videos",
        "clip.frames=64",
        "take=2.mp4",
        "take=3",
        "s3://b/a=1/x.mp4",
        "a.0.b=c=d",
    ]
    assert split_overrides(arguments) == (
        ["videos", "take=2.mp4", "take=3", "s3://b/a=1/x.mp4"],
        ["clip.frames=64", "a.0.b=c=d"],
    )
    with pytest.raises(UserError, match="an input is empty"):
        split_overrides([""])


def test_next_step_follows_the_jobs_that_ran(tmp_path):
    data = str(tmp_path / "data")
    assert next_step(data, [Stage.CURATE]) == "the same command with --only annotate"
    autoencoder = next_step(data, [Stage.CURATE, Stage.ANNOTATE])
    assert autoencoder.startswith(f"streamdit train-autoencoder {data} --out ")
    assert next_step(data, list(Stage)).startswith(f"streamdit train {data} --out ")


def test_next_step_has_the_preset_of_these_if_it_is_not_the_default(tmp_path):
    data, curated = str(tmp_path), [Stage.CURATE, Stage.ANNOTATE]
    for stages in (curated, list(Stage)):
        assert "--preset" not in next_step(data, stages, "small")
        assert next_step(data, stages, "streamdit-4b").endswith(" --preset streamdit-4b")
    # It has no autoencoder of its own to train.
    assert "--preset" not in next_step(data, curated, "streamdit-4b-wan")
    given = same_settings("distill", "demo", Path("my own.yaml"), ["teacher.micro_steps=2"])
    assert given == " --preset demo --config 'my own.yaml' teacher.micro_steps=2"


def test_latents_that_the_preset_of_training_will_refuse_are_told_before_they_are_made(
    tmp_path, capsys
):
    tiny_autoencoder(tmp_path, latent_channels=8)
    warn_of_channels(str(tmp_path), "streamdit-4b")
    assert capsys.readouterr().err == ""
    warn_of_channels(str(tmp_path), "small")
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"note: {tmp_path} makes latents of 8 channels")
    assert "`streamdit train --preset small` takes 16" in said


def summary_text(monkeypatch, *arguments):
    file = io.StringIO()
    console = Console(file=file, width=100, highlight=False)
    monkeypatch.setattr(jobs.ingest, "Console", lambda **options: console)
    print_summary(*arguments)
    return [" ".join(line.split()) for line in file.getvalue().splitlines()]


def test_summary_counts_failures_by_reason(tmp_path, monkeypatch):
    letters = [
        DeadLetter(
            source_id=None,
            uri=f"/v/{index}.mp4",
            stage="curate",
            error_class=name,
            message="m",
            retryable=name == "TimeoutError",
        )
        for index, name in enumerate(["A"] * 1 + ["B"] * 2 + ["C"] * 3 + ["TimeoutError"] * 4)
    ]
    write_dead_letters(tmp_path, "curate", "unit", letters)
    facts = jobs.ingest.curated_facts(
        CurateSummary(
            sources=7,
            clips=1234,
            duplicates=30,
            dead=10,
            video_s=90.0,
            skipped={"hidden": 2},
            units=1,
        )
    )
    lines = summary_text(monkeypatch, str(tmp_path), [Stage.CURATE], facts)
    assert lines[:3] == [
        "videos 7 of 1 min 30 s together",
        "clips 1,234, 30 of them near duplicates",
        "left aside hidden 2",
    ]
    assert lines[3] == (
        "failed 10: 4 × TimeoutError in curate, 3 × C in curate, 2 × B in curate, 1 more"
    )
    assert lines[4] == "4 may succeed when the same command runs again"


def test_summary_of_a_clean_run_says_that_nothing_failed(tmp_path, monkeypatch):
    assert "failed nothing" in summary_text(monkeypatch, str(tmp_path), [Stage.ANNOTATE], {})


def test_missing_captions_come_with_the_remedy():
    facts = jobs.ingest.annotated_facts(
        jobs.ingest.AnnotateSummary(clips=5, captions=0, missing=5, failed=0, dead=0)
    )
    assert facts["captions"].startswith("0 of 5 clips: put .vtt, .json or .txt files")


@pytest.mark.slow
def test_videos_become_a_dataset_through_the_commands(invoke, tmp_path):
    make_world(tmp_path / "videos", SpriteWorldConfig(videos=2, shots_per_video=2, size=64))
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"not a video")
    ingest = ("ingest", "videos", "--out", "data", "--preset", "demo")

    first = invoke(*ingest, "--only", "curate", "--only", "annotate")
    assert first.exit_code == 0, first.output
    assert "train-autoencoder data" in first.stdout
    assert "1 × " in first.stdout

    budget = ("steps=2", "log_every=1", "fit_clips=2", "held_out_clips=1", "statistics_clips=2")
    trained = invoke("train-autoencoder", "data", "--out", "ae", "--preset", "demo", *budget)
    assert trained.exit_code == 0, trained.output
    assert "streamdit ingest VIDEOS --out data --autoencoder ae" in trained.stderr

    last = invoke(*ingest, "--autoencoder", "ae")
    assert last.exit_code == 0, last.output
    manifest = load_manifest(tmp_path / "data")
    assert f"{manifest.selection.rows:,} clips by 'true'" in last.stdout
    assert "data/manifest.json" in last.stdout
    assert "streamdit train data" in last.stdout
    record = json.loads((tmp_path / "ae" / "config.json").read_text())
    assert manifest.autoencoder.sha256 == record["sha256"]


@pytest.mark.slow
def test_training_of_the_autoencoder_is_one_run_that_a_finished_one_does_not_repeat(
    tmp_path, monkeypatch
):
    from mlflow import MlflowClient

    from pipeline.curate import curate

    make_world(tmp_path / "videos", SpriteWorldConfig(videos=1, shots_per_video=2, size=64))
    ingest = load_config(IngestConfig, stage="ingest", preset="demo")
    curate([str(tmp_path / "videos")], tmp_path / "data", ingest)
    config = load_config(
        AutoencoderTrainConfig,
        stage="autoencoder",
        preset="demo",
        overrides=["steps=3", "log_every=1", "fit_clips=2", "statistics_clips=2", "seconds=null"],
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = TrackingConfig(directory=str(tmp_path / "mlflow"), experiment="ae")
    out = tmp_path / "ae"
    summary = train_tracked(tmp_path / "data", out, config, tracking)
    again = train_tracked(tmp_path / "data", out, config, tracking)
    assert again.identity.sha256 == summary.identity.sha256

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("ae")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (out / RUN_FILE).read_text().strip()
    assert run.info.status == "FINISHED"
    assert run.data.params["steps"] == "3"
    assert run.data.params["model.latent_channels"] == "16"
    assert run.data.tags["autoencoder_sha256"] == summary.identity.sha256
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
    assert run.data.metrics[f"final_{summary.psnr_split}_psnr"] == pytest.approx(summary.psnr)
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["config.json"]


@pytest.mark.slow
def test_refused_training_leaves_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        train_tracked(
            tmp_path / "nowhere", tmp_path / "ae", AutoencoderTrainConfig(), TrackingConfig()
        )
    assert not (tmp_path / "runs").exists()
