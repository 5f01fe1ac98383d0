"""How a stream begins: from noise by text-to-video or ramp, from a video, behind a video."""

import numpy as np
import pytest
import torch
from latent_dataset import tiny_autoencoder
from model_directory import write_model_directory

import streamdit
from streamdit.autoencoder import load_autoencoder
from streamdit.config import (
    BucketConfig,
    DistillationRecord,
    DistilledScheme,
    GammaConfig,
    PartitionConfig,
    PartitionEntry,
    SamplingConfig,
)
from streamdit.denoiser import Denoiser, frame_noise
from streamdit.errors import UserError
from streamdit.flow import interpolate
from streamdit.partition import PartitionScheme
from streamdit.schedule import StreamSchedule
from streamdit.start import Guide, StreamStart, encode_frames, fit_frames
from streamdit.text import TextStates

SHAPE = (2, 3, 3)
TEXT = TextStates({"t": (torch.zeros(1, 1, 1), torch.ones(1, 1).bool())})


def wavy(latents, tau, text):
    return latents.sin() + tau[:, :, None, None, None]


def denoiser_for(scheme, model=wavy, seeds=(0,), gamma=None, **start):
    options = {"gamma": gamma, "start": StreamStart(**start)}
    denoiser = Denoiser(model, scheme, SHAPE, list(seeds), **options)
    denoiser.set_text(TEXT.expand(len(seeds)))
    return denoiser


def play(denoiser, frames):
    played = []
    while len(played) < frames:
        latents = denoiser.step()
        if latents is not None:
            played.extend(latents[0])
    return played[:frames]


def test_ramp_lets_each_chunk_wait_for_its_turn():
    # (K, N, c, s) = (0, 4, 1, 2): six steps of ramp in eighths, written by hand.
    schedule = StreamSchedule(PartitionScheme(0, 4, 1, 2), start="ramp")
    table = [
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [2, 0, 0, 0],
        [3, 1, 0, 0],
        [4, 2, 0, 0],
        [5, 3, 1, 0],
        [6, 4, 2, 0],
    ]
    assert schedule.positions[:7].tolist() == table
    assert (schedule.levels[:7] * 8).tolist() == table


def test_ramp_leaves_every_chunk_at_its_own_level():
    scheme = PartitionScheme(0, 4, 2, 3)
    denoiser = denoiser_for(scheme, lambda x, tau, text: torch.ones_like(x), kind="ramp")
    while denoiser.filling:
        assert denoiser.step() is None
    for frame in range(8):
        moved = denoiser.buffer[0, frame] - frame_noise(0, frame, SHAPE)
        torch.testing.assert_close(moved, torch.full(SHAPE, float(scheme.levels(0)[frame])))


@pytest.mark.parametrize("kind", ["text-to-video", "ramp"])
@pytest.mark.parametrize("gamma", [GammaConfig(), GammaConfig(kind="exponential", power=2.0)])
def test_guide_at_strength_zero_is_given_back_without_a_single_evaluation(kind, gamma):
    def model(latents, tau, text):
        raise AssertionError("the model was evaluated")

    data = torch.randn(1, 30, *SHAPE, generator=torch.Generator().manual_seed(5))
    denoiser = denoiser_for(
        PartitionScheme(0, 4, 2, 2), model, kind=kind, gamma=gamma, guide=Guide(data, 0.0)
    )
    # The last buffer holds frames behind the guide's end, so it is not played to the end.
    played = torch.stack(play(denoiser, 22))
    torch.testing.assert_close(played, data[0, :22], rtol=1e-5, atol=1e-5)


def test_guide_at_strength_one_changes_nothing():
    scheme, data = PartitionScheme(0, 4, 2, 2), torch.randn(1, 6, *SHAPE)
    free = play(denoiser_for(scheme), 12)
    guided = play(denoiser_for(scheme, guide=Guide(data, 1.0)), 12)
    assert all(torch.equal(a, b) for a, b in zip(free, guided, strict=True))


@pytest.mark.parametrize("gamma", [GammaConfig(), GammaConfig(kind="exponential", power=2.0)])
def test_guided_frames_are_the_noised_video_until_the_model_takes_over(gamma):
    """Of T = 8 steps strength 0.5 leaves the model the last four, for every frame."""
    scheme = PartitionScheme(0, 4, 1, 2)
    data = torch.randn(1, 40, *SHAPE, generator=torch.Generator().manual_seed(5))
    denoiser = denoiser_for(scheme, gamma=gamma, guide=Guide(data, 0.5, sigma_min=0.1))
    first, checked = 0, 0
    for _ in range(40):
        positions = denoiser.schedule.positions[denoiser.schedule.row(denoiser.steps_taken)]
        tau = denoiser.tau()
        for place in range(scheme.buffer_frames):
            frame = first + place
            noised = interpolate(
                data[:, frame : frame + 1],
                frame_noise(0, frame, SHAPE)[None, None],
                tau[place].view(1, 1),
                sigma_min=0.1,
            )[0, 0]
            found = denoiser.buffer[0, place]
            if positions[place] <= 4:
                torch.testing.assert_close(found, noised, rtol=1e-4, atol=1e-5)
                checked += 1
            else:
                assert not torch.allclose(found, noised, rtol=1e-2, atol=1e-2)
        first += 0 if denoiser.step() is None else 1
    assert first > 10
    assert checked > 50


def test_stream_goes_on_by_itself_behind_the_end_of_the_guide():
    scheme = PartitionScheme(0, 4, 1, 1)
    evaluations = []

    def model(latents, tau, text):
        evaluations.append(tau)
        return wavy(latents, tau, text)

    data = torch.randn(1, 4, *SHAPE)
    play(denoiser_for(scheme, model, guide=Guide(data, 0.5)), 3)
    # The first fill step that any frame takes alone is the third of T = 4.
    assert evaluations[0].max() == 0.5
    long = play(denoiser_for(scheme, guide=Guide(data, 0.5)), 12)
    assert all(torch.isfinite(frame).all() for frame in long)


def test_given_references_stay_clean_and_slide_with_the_stream():
    scheme = PartitionScheme(2, 2, 3, 2)
    references = torch.randn(1, 2, *SHAPE)
    seen = []

    def model(latents, tau, text):
        seen.append((latents.clone(), tau.clone()))
        return wavy(latents, tau, text)

    denoiser = denoiser_for(scheme, model, references=references)
    played = play(denoiser, 9)
    for latents, tau in seen[:4]:
        assert torch.equal(latents[:, :2], references)
        assert torch.all(tau[:, :2] == 1)
    # Two steps of fill, two of the first chunk; then its last two frames are the references.
    assert torch.equal(seen[4][0][0, :2], torch.stack(played[1:3]))
    # The first frame behind the references starts as the stream's frame 0.
    assert torch.equal(seen[0][0][0, 2], frame_noise(0, 0, SHAPE))


def test_chunk_extension_needs_no_first_video():
    scheme = PartitionScheme(1, 1, 3, 4)
    calls = []

    def model(latents, tau, text):
        calls.append(tau[0].tolist())
        return torch.zeros_like(latents)

    denoiser = denoiser_for(scheme, model, references=torch.zeros(1, 1, *SHAPE))
    assert not denoiser.filling
    play(denoiser, 3)
    assert calls == [[1.0, k / 4, k / 4, k / 4] for k in range(4)]


@pytest.mark.parametrize("start", ["guide", "references"])
def test_one_video_serves_several_streams_in_step(start):
    scheme = PartitionScheme(1 if start == "references" else 0, 1, 3, 2)
    latents = torch.randn(1, 1 if start == "references" else 5, *SHAPE)
    options = {"references": latents} if start == "references" else {"guide": Guide(latents, 0.5)}

    def emitted(seeds):
        denoiser = denoiser_for(scheme, seeds=seeds, **options)
        found = [denoiser.step() for _ in range(4)]
        return torch.cat([latents for latents in found if latents is not None], dim=1)

    both = emitted((0, 1))
    assert torch.equal(both, torch.cat([emitted((0,)), emitted((1,))]))


@pytest.mark.parametrize("start", ["guide", "references", "ramp"])
def test_restored_stream_continues_bit_for_bit_from_any_start(start):
    scheme = PartitionScheme(1, 3, 2, 2) if start == "references" else PartitionScheme(0, 3, 2, 2)
    options = {
        "guide": {"guide": Guide(torch.randn(1, 11, *SHAPE), 0.6)},
        "references": {"references": torch.randn(1, 1, *SHAPE)},
        "ramp": {"kind": "ramp"},
    }[start]
    bare = {
        "guide": {},
        "references": {"references": torch.zeros(1, 1, *SHAPE)},
        "ramp": {"kind": "ramp"},
    }[start]
    for pause in range(12):
        denoiser = denoiser_for(scheme, seeds=(3,), **options)
        for _ in range(pause):
            denoiser.step()
        state = denoiser.state()
        ahead = play(denoiser, 14)
        other = denoiser_for(scheme, seeds=(8,), **bare)
        other.restore(state)
        assert all(torch.equal(a, b) for a, b in zip(ahead, play(other, 14), strict=True))


def test_state_of_another_scheme_is_refused():
    state = denoiser_for(PartitionScheme(0, 3, 2, 2)).state()
    with pytest.raises(UserError, match="saved stream has N=3 but this one 6"):
        denoiser_for(PartitionScheme(0, 6, 1, 2)).restore(state)


def test_state_of_another_noise_schedule_is_refused():
    scheme = PartitionScheme(0, 3, 2, 2)
    state = denoiser_for(scheme).state()
    curved = denoiser_for(scheme, gamma=GammaConfig(kind="exponential", power=2.0))
    with pytest.raises(UserError, match=r"saved stream has gamma=.*'linear'.* but this one"):
        curved.restore(state)


def test_strength_outside_its_range_is_refused():
    with pytest.raises(UserError, match=r"strength 1\.5 is not a share"):
        Guide(torch.zeros(1, 1, *SHAPE), 1.5)


def test_frames_are_scaled_to_cover_and_cut_in_the_middle():
    frames = np.zeros((3, 40, 100, 3), np.uint8)
    frames[:, :, 30:70] = 200  # the middle 40 columns survive the cut to a square
    fitted = fit_frames(frames, 20, 20)
    assert fitted.shape == (3, 20, 20, 3)
    assert fitted[:, :, 2:-2].min() >= 195
    assert np.array_equal(fit_frames(frames, 40, 100), frames)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    entries = (
        PartitionEntry(chunk_frames=1),
        PartitionEntry(chunk_frames=4),
        PartitionEntry(chunk_frames=2, reference_frames=2),
    )
    folder = tmp_path_factory.mktemp("model")
    return streamdit.load(write_model_directory(folder, partition=PartitionConfig(entries=entries)))


def video(frames=24, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8)


def test_guide_at_strength_zero_plays_the_video_as_the_autoencoder_sees_it(model):
    frames = video()
    stream = model.stream("a red circle", guide=model.guide(frames, strength=0.0))
    played = np.concatenate([next(stream).frames for _ in range(3)])
    decoded, _ = model.autoencoder.decode(model.autoencoder.denormalise(model.latents(frames)))
    expected = ((decoded[0, :12].clamp(-1, 1) + 1) * 127.5).round().movedim(1, -1).numpy()
    assert np.abs(played.astype(float) - expected).max() <= 1


@pytest.mark.parametrize("alone", [False, True])
def test_long_video_is_encoded_in_windows_to_what_one_call_gives(tmp_path, monkeypatch, alone):
    if alone:
        from diffusers import AutoencoderKLWan
        from wan_pipeline import VAE

        AutoencoderKLWan(**VAE).save_pretrained(tmp_path / "autoencoder")
    else:
        tiny_autoencoder(tmp_path / "autoencoder")
    autoencoder = load_autoencoder(tmp_path / "autoencoder")
    for parameter in autoencoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    scale = autoencoder.identity.spatial_factor
    bucket = BucketConfig(frames=4, height=32 // scale, width=32 // scale, window=(1, 1, 1))
    frames = video(4 * 19 + 3)
    windows, encode_next = [], autoencoder.encode_next

    def counted(window, state):
        windows.append(window.shape[1])
        return encode_next(window, state)

    monkeypatch.setattr(autoencoder, "encode_next", counted)
    found = encode_frames(autoencoder, bucket, frames)
    monkeypatch.undo()
    whole = np.concatenate([frames[:1], frames]) if alone else frames
    clip = torch.from_numpy(whole[: 76 + alone]).movedim(-1, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = autoencoder.normalise(autoencoder.encode(clip))[:, int(alone) :]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert windows == [32 + alone, 32, 12]


def test_an_image_is_held_for_one_buffer(model):
    guide = model.guide(video(1), strength=0.5)
    assert guide.latents.shape[1] == model.config.model.buffer_frames
    assert next(model.stream("x", guide=guide)).frames.shape == (4, 32, 32, 3)


def test_video_is_continued_from_its_last_frames_without_a_seam_in_the_decoder(model):
    history = model.latents(video())
    sampling = SamplingConfig(chunk_frames=2, micro_steps=2, reference_frames=2)
    stream = model.stream("x", sampling=sampling, history=history)
    assert torch.equal(stream.denoiser.buffer[:, :2], history[:, -2:])
    chunk = next(stream)
    assert (chunk.first_frame, len(chunk.frames)) == (0, 8)
    denoiser = model.denoiser(["x"], [0], sampling, references=history)
    latents = None
    while latents is None:
        latents = denoiser.step()
    raw = model.autoencoder.denormalise(torch.cat([history, latents], dim=1))
    whole, _ = model.autoencoder.decode(raw)
    expected = ((whole[0, -8:].clamp(-1, 1) + 1) * 127.5).round().movedim(1, -1).detach().numpy()
    assert np.abs(chunk.frames.astype(float) - expected).max() <= 1


def test_continuing_a_video_needs_references_in_the_scheme_and_enough_frames(model):
    with pytest.raises(UserError, match="K=0 has no reference frames"):
        model.stream("x", history=model.latents(video()))
    sampling = SamplingConfig(chunk_frames=2, micro_steps=2, reference_frames=2)
    with pytest.raises(UserError, match="1 latent frames but the scheme needs K=2"):
        model.stream("x", sampling=sampling, history=model.latents(video(4)))
    with pytest.raises(UserError, match="2 frames is too short"):
        model.latents(video(2))


def test_continuing_a_video_is_refused_where_filling_behind_it_was_not_learnt(tmp_path):
    staircase = PartitionEntry(chunk_frames=1, reference_frames=2)
    whole = PartitionEntry(chunk_frames=2, reference_frames=2)
    sampling = SamplingConfig(chunk_frames=1, micro_steps=2, reference_frames=2)
    for folder, entries in (("without", (staircase,)), ("with", (staircase, whole))):
        partition = PartitionConfig(entries=entries)
        directory = write_model_directory(tmp_path / folder, partition=partition, sampling=sampling)
        loaded = streamdit.load(directory)
        history = loaded.latents(video())
        if folder == "with":
            assert len(next(loaded.stream("x", history=history)).frames) == 4
            continue
        with pytest.raises(UserError, match=r"chunk_frames: 2, reference_frames: 2\}"):
            loaded.stream("x", history=history)


@pytest.mark.parametrize("continues", [False, True])
def test_distilled_model_continues_a_video_if_it_was_taught_to(tmp_path, continues):
    record = DistillationRecord(
        schemes=(DistilledScheme(chunk_frames=1, reference_frames=2),),
        starts=("text-to-video",),
        continues=continues,
        teacher_sha256="0" * 64,
        teacher_micro_steps=16,
        teacher_guidance_scale=3.0,
    )
    sampling = SamplingConfig(chunk_frames=1, micro_steps=1, reference_frames=2)
    loaded = streamdit.load(write_model_directory(tmp_path, distilled=record, sampling=sampling))
    history = loaded.latents(video())
    if continues:
        assert len(next(loaded.stream("x", history=history)).frames) == 4
        return
    with pytest.raises(UserError, match=r"distil one with teacher\.continued_share"):
        loaded.stream("x", history=history)


def test_model_that_never_saw_text_to_video_cannot_start_but_by_the_ramp(tmp_path):
    partition = PartitionConfig(entries=(PartitionEntry(chunk_frames=1),))
    loaded = streamdit.load(write_model_directory(tmp_path, partition=partition))
    with pytest.raises(UserError, match="K=0 c=4, which makes its first video, is not in the"):
        loaded.stream("x")
    ramp = SamplingConfig(chunk_frames=1, micro_steps=2, start="ramp")
    assert len(next(loaded.stream("x", sampling=ramp)).frames) == 4


def test_ramp_makes_no_references():
    with pytest.raises(ValueError, match="ramp makes no references"):
        SamplingConfig(chunk_frames=1, micro_steps=1, reference_frames=1, start="ramp")


def test_distilled_model_serves_exactly_what_it_was_distilled_for(tmp_path):
    record = DistillationRecord(
        schemes=(DistilledScheme(chunk_frames=1), DistilledScheme(chunk_frames=2)),
        starts=("text-to-video",),
        teacher_sha256="0" * 64,
        teacher_micro_steps=16,
        teacher_guidance_scale=3.0,
    )
    sampling = SamplingConfig(chunk_frames=1, micro_steps=1)
    loaded = streamdit.load(write_model_directory(tmp_path, distilled=record, sampling=sampling))
    assert loaded.scheme(SamplingConfig(chunk_frames=2, micro_steps=1)).N == 2
    for refused in (
        SamplingConfig(chunk_frames=1, micro_steps=2),
        SamplingConfig(chunk_frames=1, micro_steps=1, guidance_scale=2.0),
        SamplingConfig(chunk_frames=4, micro_steps=1),
    ):
        with pytest.raises(UserError, match="choose one of K=0 c=1 s=1 w=1, K=0 c=2 s=1 w=1"):
            loaded.scheme(refused)
    with pytest.raises(UserError, match="start ramp was not part of this model's distillation"):
        loaded.stream("x", sampling=sampling.model_copy(update={"start": "ramp"}))


def test_configuration_without_text_to_video_is_refused(tmp_path):
    from latent_dataset import train_settings

    from training.config import TrainConfig

    settings = train_settings(partition={"entries": [{"chunk_frames": 1}]})
    with pytest.raises(ValueError, match=r"add \{chunk_frames: 4\} to partition\.entries"):
        TrainConfig.model_validate(settings)
    sampling = settings["sampling"] | {"start": "ramp"}
    assert TrainConfig.model_validate(settings | {"sampling": sampling}).sampling.start == "ramp"


def test_few_steps_follow_a_guide_for_one_at_least_and_leave_it_for_one():
    latents = torch.zeros(1, 1, 1, 1, 1)
    steps = {s: Guide(latents, s).followed_steps(8) for s in (0.0, 0.01, 0.5, 0.99, 1.0)}
    assert steps == {0.0: 8, 0.01: 7, 0.5: 4, 0.99: 1, 1.0: 0}
    assert [Guide(latents, s).followed_steps(1) for s in (0.0, 0.4, 0.6, 1.0)] == [1, 1, 0, 0]


def test_frames_to_continue_are_kept_to_the_last_one(model):
    frames = video(4 * 3 + 3)
    assert torch.equal(model.latents(frames), model.latents(frames[3:]))
    guide = model.guide(frames, strength=0.5)
    assert torch.equal(guide.latents, model.latents(frames[:-3]))
