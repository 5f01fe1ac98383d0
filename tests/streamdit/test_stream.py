"""A stream: decoded chunks of an endless video that a prompt steers."""

import numpy as np
import pytest
import torch
from model_directory import write_model_directory

import streamdit
from streamdit.config import SamplingConfig
from streamdit.decoding import to_uint8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return streamdit.load(write_model_directory(tmp_path_factory.mktemp("model")))


def take(stream, count):
    return [next(stream) for _ in range(count)]


def test_chunks_are_consecutive_frames(model):
    chunks = take(model.stream("a red circle"), 5)
    assert [chunk.first_frame for chunk in chunks] == [0, 4, 8, 12, 16]
    for chunk in chunks:
        assert chunk.frames.dtype == np.uint8
        assert chunk.frames.shape == (4, 32, 32, 3)


def test_chunked_video_equals_the_latents_decoded_whole(model):
    chunks = take(model.stream("a red circle", seed=3), 5)
    denoiser = model.denoiser(["a red circle"], [3])
    latents = []
    while len(latents) < 5:
        emitted = denoiser.step()
        if emitted is not None:
            latents.append(emitted)
    frames, _ = model.autoencoder.decode(model.autoencoder.denormalise(torch.cat(latents, dim=1)))
    whole = to_uint8(frames[0]).astype(int)
    played = np.concatenate([chunk.frames for chunk in chunks]).astype(int)
    assert np.abs(whole - played).max() <= 1  # rounding of 8-bit pixels


def test_same_seed_same_video_and_other_seed_other_video(model):
    first, again, other = (
        np.concatenate([chunk.frames for chunk in take(model.stream("x", seed=seed), 3)])
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_new_prompt_steers_from_the_next_step_on(model):
    plain, steered = model.stream("a red circle"), model.stream("a red circle")
    before, same = take(plain, 2), take(steered, 2)
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(before, same, strict=True))
    steered.prompt = "a blue square moving left"
    after, changed = take(plain, 3), take(steered, 3)
    assert [chunk.prompt_version for chunk in changed] == [1, 1, 1]
    assert [chunk.prompt_version for chunk in after] == [0, 0, 0]
    assert not np.array_equal(after[0].frames, changed[0].frames)


def test_restored_stream_continues_bit_for_bit_with_its_prompt(model):
    stream = model.stream("a red circle")
    take(stream, 2)
    stream.prompt = "a blue square"
    take(stream, 1)
    state = stream.state()
    expected = take(stream, 4)
    other = model.stream("something else", seed=0)
    other.restore(state)
    assert other.prompt == "a blue square"
    for a, b in zip(expected, take(other, 4), strict=True):
        assert np.array_equal(a.frames, b.frames)
        assert (a.first_frame, a.prompt_version) == (b.first_frame, b.prompt_version)


def test_two_streams_interleaved_do_not_disturb_each_other(model):
    alone = [take(model.stream("x", seed=seed), 4) for seed in (1, 2)]
    streams = [model.stream("x", seed=seed) for seed in (1, 2)]
    for round_number in range(4):
        for stream, expected in zip(streams, alone, strict=True):
            assert np.array_equal(next(stream).frames, expected[round_number].frames)


def test_evaluations_per_chunk_are_counted_at_the_network(model):
    calls = []
    # The layer that takes in the latents runs once an evaluation, prepared or not.
    hook = model.model.patch_embedding.register_forward_hook(
        lambda *args: calls.append(args[1][0].shape[0])
    )
    try:
        sampling = SamplingConfig(chunk_frames=2, micro_steps=1)
        stream = model.stream("a red circle", sampling=sampling)
        next(stream)
        calls.clear()
        take(stream, 6)
        assert calls == [1] * 6
        guided = SamplingConfig(chunk_frames=2, micro_steps=3, guidance_scale=2.0)
        stream = model.stream("a red circle", sampling=guided)
        next(stream)
        calls.clear()
        take(stream, 2)
        assert calls == [2] * 6
    finally:
        hook.remove()
