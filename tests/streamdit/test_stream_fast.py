"""A stream with prepared steps shows the plain stream's video, prompts and pauses included."""

import numpy as np
import pytest
import torch
from model_directory import write_model_directory
from no_host_reads import NoHostReads

import streamdit
from streamdit.config import SamplingConfig
from streamdit.decoding import ChunkDecoder, DecoderConfig
from streamdit.errors import UserError
from streamdit.model.fast import FastConfig

SCHEMES = {
    "guided, two micro steps": SamplingConfig(chunk_frames=1, micro_steps=2, guidance_scale=2.0),
    "one step a chunk": SamplingConfig(chunk_frames=2, micro_steps=1),
    "ramp": SamplingConfig(chunk_frames=1, micro_steps=1, start="ramp"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return streamdit.load(write_model_directory(tmp_path_factory.mktemp("model")))


def played(stream, chunks):
    return np.concatenate([next(stream).frames for _ in range(chunks)]).astype(int)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_video_of_prepared_steps_equals_the_plain_video_through_a_change_of_prompt(model, scheme):
    videos = []
    for fast in (None, FastConfig()):
        stream = model.stream("a red circle", seed=3, sampling=SCHEMES[scheme], fast=fast)
        before = played(stream, 2)
        stream.prompt = "a blue square that moves to the left"
        videos.append(np.concatenate([before, played(stream, 3)]))
    assert np.abs(videos[0] - videos[1]).max() <= 1  # rounding of 8-bit pixels


def test_denoiser_of_several_streams_can_be_accelerated_on_its_way(model):
    prompts, seeds = ["a red circle", "a blue square"], [1, 2]
    plain = model.denoiser(prompts, seeds, fast=None)
    other = model.denoiser(prompts, seeds, fast=None)
    for _ in range(5):
        plain.step(), other.step()
    other.accelerate(FastConfig(), model.max_text_tokens)
    for _ in range(6):
        plain.step(), other.step()
    torch.testing.assert_close(other.buffer, plain.buffer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_running_stream_reads_no_tensor_on_the_host(model, scheme):
    denoiser = model.denoiser(["a red circle"], [0], SCHEMES[scheme])
    with NoHostReads():
        for _ in range(denoiser.schedule.fill_steps + 4):
            denoiser.step()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoding_ahead_shows_the_same_video(model, scheme):
    plain = model.stream("a red circle", sampling=SCHEMES[scheme])
    ahead = model.stream(
        "a red circle", sampling=SCHEMES[scheme], decoder=DecoderConfig(overlap=True)
    )
    for _ in range(5):
        expected, found = next(plain), next(ahead)
        assert found.first_frame == expected.first_frame
        assert np.array_equal(found.frames, expected.frames)


def test_decoding_ahead_shows_a_new_prompt_one_chunk_later(model):
    plain = model.stream("a red circle")
    ahead = model.stream("a red circle", decoder=DecoderConfig(overlap=True))
    played(plain, 2), played(ahead, 1)
    plain.prompt = ahead.prompt = "a blue square"
    before = next(ahead)
    assert before.prompt_version == 0
    for _ in range(3):
        expected, found = next(plain), next(ahead)
        assert found.prompt_version == expected.prompt_version == 1
        assert np.array_equal(found.frames, expected.frames)


def test_stream_that_decodes_ahead_is_saved_with_the_chunk_under_way(model, tmp_path):
    options = {"decoder": DecoderConfig(overlap=True)}
    stream = model.stream("a red circle", **options)
    played(stream, 2)
    path = stream.save(tmp_path / "stream.safetensors")
    expected = [next(stream) for _ in range(3)]
    # The chunk under way is handed out whether or not the other stream works ahead.
    for other in (model.resume(path, **options), model.resume(path)):
        for chunk in expected:
            found = next(other)
            assert (found.first_frame, found.prompt_version) == (chunk.first_frame, 0)
            assert np.array_equal(found.frames, chunk.frames)


@pytest.mark.parametrize(
    ("options", "tolerance"), [({"channels_last": True}, 1), ({"bfloat16": True}, 4)]
)
def test_decoder_options_leave_the_pictures_within_the_stated_levels(model, options, tolerance):
    """Of 255: one for the order of sums, four for bfloat16."""
    plain = played(model.stream("a red circle", seed=5), 3)
    other = played(model.stream("a red circle", seed=5, decoder=DecoderConfig(**options)), 3)
    assert np.abs(plain - other).max() <= tolerance
    assert next(model.autoencoder.parameters()).dtype == torch.float32


def test_prompt_that_does_not_fit_is_refused_and_the_stream_goes_on_as_it_was(model, monkeypatch):
    expected = played(model.stream("a red circle"), 4)
    stream = model.stream("a red circle")
    # Memories of fixed size, as compiled steps have them, without the minutes of compiling.
    monkeypatch.setattr(FastConfig, "static_text", True)
    limited = FastConfig(text_tokens=5)
    stream.denoiser.accelerate(limited, model.max_text_tokens)
    before = played(stream, 2)
    with pytest.raises(UserError, match="the stream keeps room for 5; shorten it"):
        stream.prompt = "a blue square that moves to the left and then comes back again"
    assert stream.prompt == "a red circle"
    assert stream.prompt_version == 0
    assert np.abs(np.concatenate([before, played(stream, 2)]) - expected).max() <= 1


@pytest.mark.slow
def test_compiled_decoder_shows_the_same_pictures(model):
    """Within one of 255 levels: fused code rounds elsewhere."""
    plain = played(model.stream("a red circle", seed=5), 4)
    compiled = model.stream("a red circle", seed=5, decoder=DecoderConfig(compile=True))
    assert np.abs(plain - played(compiled, 4)).max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_denoising_and_decoding_on_two_device_streams_shows_the_same_video(tmp_path):
    model = streamdit.load(write_model_directory(tmp_path), device="cuda", dtype=torch.float32)
    plain = played(model.stream("a red circle", fast=None), 6)
    fast = FastConfig(cuda_graph=True)
    both = model.stream("a red circle", fast=fast, decoder=DecoderConfig(overlap=True))
    assert np.abs(plain - played(both, 6)).max() <= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fast", [FastConfig(), FastConfig(cuda_graph=True)])
@pytest.mark.parametrize("guided", [False, True])
def test_a_running_stream_never_waits_for_the_device(tmp_path, fast, guided):
    """Neither its steps nor what begins to decode a chunk; only who takes the frames waits."""
    model = streamdit.load(write_model_directory(tmp_path), device="cuda")
    guide = model.guide(np.zeros((96, 32, 32, 3), np.uint8), strength=0.5) if guided else None
    denoiser = model.denoiser(["a red circle"], [0], guide=guide, fast=fast)
    decoder = ChunkDecoder(model.autoencoder, model.device)
    for _ in range(denoiser.schedule.fill_steps + 2 * denoiser.scheme.s):
        latents = denoiser.step()
    pending = [decoder.submit(latents)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4 * denoiser.scheme.s):
            latents = denoiser.step()
            if latents is not None:
                pending.append(decoder.submit(latents))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(chunk.wait().shape == (4, 32, 32, 3) for chunk in pending)
