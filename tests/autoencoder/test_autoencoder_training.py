"""Training the autoencoder on a curated dataset: real mp4 files and a real clip table."""

from __future__ import annotations

import logging
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.clips import read_clip
from pipeline.schema import CLIP_SCHEMA
from pipeline.select import split_of
from streamdit.autoencoder import CausalAutoencoderConfig, load_autoencoder
from streamdit.autoencoder.io import read_record
from streamdit.errors import UserError
from training.autoencoder import posterior_noise, train_autoencoder
from training.autoencoder_clips import batches, open_clips
from training.autoencoder_config import AutoencoderLossConfig, AutoencoderTrainConfig
from training.autoencoder_quality import autoencoder_loss

FRAMES, SIDE, FPS = 8, 32, 8
SHARE = 0.3
CONFIG = AutoencoderTrainConfig(
    model=CausalAutoencoderConfig(
        latent_channels=4,
        patch=(4, 8, 8),
        widths=(16,),
        strides=(),
        encoder_blocks=(1,),
        decoder_blocks=(1,),
    ),
    steps=6,
    batch=2,
    frames=4,
    crop=(16, 24),
    learning_rate=1e-3,
    warmup_steps=2,
    held_out_share=SHARE,
    held_out_every=3,
    log_every=2,
    checkpoint_every=2,
    threads=1,
)


def write_mp4(path: Path, seed: int) -> None:
    """Twelve frames of a square that moves over a plain background."""
    generator = np.random.default_rng(seed)
    background, colour = generator.integers(0, 256, (2, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18"})
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        for index in range(12):
            picture = np.full((48, 48, 3), background, np.uint8)
            picture[8 + index : 28 + index, 10:30] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def row(uri: Path, clip_id: str, source_id: str, **changes: object) -> dict:
    values = dict.fromkeys(CLIP_SCHEMA.names)
    return values | {
        "clip_id": clip_id,
        "source_id": source_id,
        "uri": str(uri),
        "start_s": 0.25,
        "end_s": 0.25 + FRAMES / FPS,
        "fps": float(FPS),
        "bucket": f"{FRAMES}x{SIDE}x{SIDE}",
        "frames": FRAMES,
        "height": SIDE,
        "width": SIDE,
        **changes,
    }


def write_table(dataset: Path, rows: list[dict]) -> Path:
    (dataset / "clips").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=CLIP_SCHEMA)
    pq.write_table(table, dataset / "clips" / "clip-unit.parquet")
    return dataset


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for number in range(8):
        path = folder / f"{number}.mp4"
        write_mp4(path, number)
        rows.append(row(path, f"clip{number}", f"source{number}"))
    return rows


@pytest.fixture(scope="module")
def dataset(rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("dataset"), rows)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_autoencoder(directory).state_dict()


def test_training_writes_an_autoencoder_that_reconstructs_held_out_clips(
    dataset: Path, rows: list[dict], tmp_path: Path
):
    lines: list[tuple[int, dict[str, float]]] = []
    summary = train_autoencoder(
        dataset,
        tmp_path / "ae",
        CONFIG.model_copy(update={"steps": 30}),
        lambda step, metrics: lines.append((step, metrics)),
    )
    assert summary.steps == 30
    assert summary.psnr_split == "held_out"

    loaded = load_autoencoder(tmp_path / "ae")
    held_out = [r for r in rows if split_of(r["source_id"], SHARE) == "held_out"]
    assert 0 < len(held_out) < len(rows)
    values = []
    for r in held_out:
        frames = read_clip(r["uri"], r["start_s"], FRAMES, FPS, SIDE, SIDE)
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 127.5 - 1
        decoded = loaded.decode(loaded.encode(video))[0].clamp(-1, 1)
        error = ((decoded - video) / 2).square().mean().item()
        values.append(-10 * np.log10(error))
    assert summary.psnr == pytest.approx(np.mean(values), abs=0.01)

    logged = {step: metrics for step, metrics in lines if "loss" in metrics}
    assert list(logged) == list(range(2, 31, 2))
    assert {"l1", "l2", "kl", "psnr", "learning_rate", "clips_per_s", "data_wait"} <= set(logged[2])
    assert [step for step, metrics in lines if "held_out_psnr" in metrics] == list(range(3, 31, 3))
    record = read_record(tmp_path / "ae")
    assert record.training["psnr"] == summary.psnr
    assert record.training["config"]["steps"] == 30
    assert not (tmp_path / "ae" / "checkpoints").exists()


def test_normalised_latents_of_training_clips_have_unit_variance(
    dataset: Path, rows: list[dict], tmp_path: Path
):
    summary = train_autoencoder(dataset, tmp_path, CONFIG)
    loaded = load_autoencoder(summary.directory)
    latents = []
    for r in rows:
        if split_of(r["source_id"], SHARE) == "train":
            frames = read_clip(r["uri"], r["start_s"], FRAMES, FPS, SIDE, SIDE)
            video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 127.5 - 1
            latents.append(loaded.normalise(loaded.encode(video)))
    stacked = torch.cat(latents)
    torch.testing.assert_close(stacked.mean((0, 1, 3, 4)), torch.zeros(4), atol=1e-3, rtol=0)
    deviation = stacked.std((0, 1, 3, 4), unbiased=False)
    torch.testing.assert_close(deviation, torch.ones(4), atol=1e-3, rtol=0)


def test_training_improves_on_the_linear_start(dataset: Path, tmp_path: Path):
    config = CONFIG.model_copy(
        update={"crop": None, "frames": 8, "loss": AutoencoderLossConfig(l1=0.1, l2=5.0, kl=1e-6)}
    )
    short = train_autoencoder(
        dataset, tmp_path / "short", config.model_copy(update={"steps": 1, "learning_rate": 1e-9})
    )
    trained = train_autoencoder(
        dataset, tmp_path / "long", config.model_copy(update={"steps": 120, "held_out_every": 999})
    )
    assert trained.psnr > short.psnr + 0.5


class Interrupted(Exception):
    pass


def test_a_resumed_run_matches_an_uninterrupted_one(dataset: Path, tmp_path: Path):
    whole = train_autoencoder(dataset, tmp_path / "whole", CONFIG)

    def interrupt(step: int, metrics: dict[str, float]) -> None:
        if step == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_autoencoder(dataset, tmp_path / "resumed", CONFIG, interrupt)
    assert not (tmp_path / "resumed" / "config.json").exists()
    steps: list[int] = []
    resumed = train_autoencoder(
        dataset, tmp_path / "resumed", CONFIG, lambda step, metrics: steps.append(step)
    )
    assert resumed.resumed_from == 4
    assert min(steps) > 4
    assert resumed.identity.sha256 == whole.identity.sha256
    assert resumed.identity.scale == whole.identity.scale
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "resumed")[name]), name


def test_a_finished_run_is_not_repeated(dataset: Path, tmp_path: Path):
    first = train_autoencoder(dataset, tmp_path, CONFIG)
    written = (tmp_path / "autoencoder.safetensors").stat().st_mtime_ns
    steps: list[int] = []
    # How often it logs does not change what is learned.
    again = train_autoencoder(
        dataset,
        tmp_path,
        CONFIG.model_copy(update={"log_every": 1}),
        lambda step, metrics: steps.append(step),
    )
    assert steps == []
    assert again.identity == first.identity
    assert again.resumed_from == first.steps == 6
    assert (tmp_path / "autoencoder.safetensors").stat().st_mtime_ns == written


def test_a_directory_of_another_run_is_refused(dataset: Path, tmp_path: Path):
    train_autoencoder(dataset, tmp_path, CONFIG)
    with pytest.raises(UserError, match="another configuration"):
        train_autoencoder(dataset, tmp_path, CONFIG.model_copy(update={"seed": 1}))


def test_training_stops_when_its_seconds_are_spent(dataset: Path, tmp_path: Path):
    config = CONFIG.model_copy(update={"steps": 100_000, "seconds": 0.5})
    summary = train_autoencoder(dataset, tmp_path, config)
    assert 0 < summary.steps < 100_000
    assert 0.5 <= summary.seconds < 10


def test_batches_depend_on_the_step_only(dataset: Path):
    def take(first: int, count: int, cache_mb: float, workers: int) -> list[torch.Tensor]:
        clips, _ = open_clips(dataset, SHARE, cache_mb)
        stream = batches(clips, 0, 3, 4, (16, 24), first, workers, pin=False)
        taken = [next(stream) for _ in range(count)]
        stream.close()
        return taken

    whole = take(first=0, count=5, cache_mb=100, workers=1)
    assert whole[0].shape == (3, 4, 16, 24, 3)
    later = take(first=3, count=2, cache_mb=0, workers=3)
    assert torch.equal(whole[3], later[0])
    assert torch.equal(whole[4], later[1])
    assert not torch.equal(whole[0], whole[1])


def test_every_clip_is_met_once_per_epoch(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    clips, _ = open_clips(dataset, SHARE, cache_mb=100)
    seen: list[int] = []
    read = clips.frames
    monkeypatch.setattr(clips, "frames", lambda index: (seen.append(index), read(index))[1])
    stream = batches(clips, 0, len(clips), 4, (16, 16), 0, workers=1, pin=False)
    for _ in range(2):
        next(stream)
    stream.close()
    for epoch in range(2):
        part = seen[epoch * len(clips) : (epoch + 1) * len(clips)]
        assert sorted(part) == list(range(len(clips)))
    assert seen[: len(clips)] != seen[len(clips) : 2 * len(clips)]


def test_a_clip_that_cannot_be_read_is_reported_and_replaced(
    rows: list[dict], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    dataset = write_table(tmp_path / "d", [row(broken, "a", "s0"), *rows])
    clips, _ = open_clips(dataset, 0.0, cache_mb=1)
    with caplog.at_level(logging.WARNING):
        frames = clips.frames(0)
    assert np.array_equal(frames, clips.frames(1))
    assert "clip a (" in caplog.text
    only = write_table(tmp_path / "e", [row(broken, "a", "s0")])
    with pytest.raises(UserError, match="clips in a row cannot be read"):
        open_clips(only, 0.0, cache_mb=1)[0].frames(0)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"frames": 12}, r"frames 12 is more than the 8 .* set frames to 8"),
        ({"crop": (20, 24)}, r"crop \[20, 24\] does not fit.*multiples of 8"),
        ({"crop": (40, 24)}, r"set crop to \[32, 32\] or less"),
    ],
)
def test_clips_that_do_not_fit_are_refused(
    dataset: Path, tmp_path: Path, update: dict, message: str
):
    with pytest.raises(UserError, match=message):
        train_autoencoder(dataset, tmp_path, CONFIG.model_copy(update=update))


def test_clips_of_several_sizes_need_a_crop(rows: list[dict], tmp_path: Path):
    mixed = [*rows, row(Path(rows[0]["uri"]), "other", "source0", height=24)]
    dataset = write_table(tmp_path / "d", mixed)
    with pytest.raises(UserError, match=r"2 sizes.*set crop to \[24, 32\]"):
        train_autoencoder(dataset, tmp_path, CONFIG.model_copy(update={"crop": None}))


def test_a_dataset_that_is_not_curated_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="clip table"):
        train_autoencoder(tmp_path, tmp_path / "ae", CONFIG)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    generator = torch.Generator().manual_seed(0)
    video, made = (torch.randn(2, 4, 3, 5, 6, generator=generator) for _ in range(2))
    mean, logvar = (torch.randn(2, 1, 4, 2, 2, generator=generator) for _ in range(2))
    weights = AutoencoderLossConfig(l1=2.0, l2=3.0, gradient=5.0, temporal=7.0, kl=11.0)
    loss, terms = autoencoder_loss(video, made, mean, logvar, weights)
    e = made - video
    rows = (e[..., 1:, :] - e[..., :-1, :]).abs().mean()
    columns = (e[..., 1:] - e[..., :-1]).abs().mean()
    time = (e[:, 1:] - e[:, :-1]).abs().mean()
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    expected = 2 * e.abs().mean() + 3 * (e**2).mean() + 2.5 * (rows + columns) + 7 * time + 11 * kl
    torch.testing.assert_close(loss, expected)
    assert terms["psnr"].item() == pytest.approx(-10 * np.log10((e / 2).square().mean().item()))


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    wide = posterior_noise(torch.Size((3, 2, 4, 2, 2)), seed=1, step=5)
    narrow = posterior_noise(torch.Size((1, 2, 4, 2, 2)), seed=1, step=5)
    assert torch.equal(wide[:1], narrow)
    assert not torch.equal(wide[0], wide[1])
    assert not torch.equal(wide, posterior_noise(torch.Size((3, 2, 4, 2, 2)), seed=1, step=6))


@pytest.mark.parametrize("preset", ["small", "demo"])
def test_presets_fit_the_configuration(preset: str):
    import yaml

    path = Path(__file__).parents[2] / "configs" / "autoencoder" / f"{preset}.yaml"
    config = AutoencoderTrainConfig.model_validate(yaml.safe_load(path.read_text()))
    assert config.model.latent_channels == 16
