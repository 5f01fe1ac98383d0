"""A stream's state on disk: continued bit for bit by another process, without pickles."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from model_directory import write_model_directory
from safetensors.torch import load_file

import streamdit
from streamdit.config import PartitionConfig, PartitionEntry, SamplingConfig
from streamdit.decoding import DecoderConfig
from streamdit.errors import UserError
from streamdit.io import read_model_config, save_model_directory
from streamdit.state import load_state, save_state
from streamdit.text import TextStates

CONTINUE = """
import sys, numpy as np, streamdit
stream = streamdit.load(sys.argv[1]).resume(sys.argv[2])
chunks = [next(stream) for _ in range(4)]
np.savez(sys.argv[3], *[chunk.frames for chunk in chunks], prompt=stream.prompt,
         first=[chunk.first_frame for chunk in chunks])
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("model"))


def test_nested_state_comes_back_as_it_was(tmp_path):
    text = TextStates({"t": (torch.randn(1, 3, 2), torch.tensor([[True, True, False]]))})
    state = {
        "tensor": torch.randn(2, 3).bfloat16(),
        "cache": (torch.arange(4), None, "Rep", [1, 2.5, True]),
        "text": text,
        "same": {"dict": 1, "tensor": "a word that is also a tag"},
    }
    back = load_state(save_state(state, tmp_path / "state.safetensors"))
    assert torch.equal(back["tensor"], state["tensor"])
    assert back["tensor"].dtype == torch.bfloat16
    assert torch.equal(back["cache"][0], state["cache"][0])
    assert back["cache"][1:] == state["cache"][1:]
    assert all(torch.equal(a, b) for a, b in zip(back["text"]["t"], text["t"], strict=True))
    assert back["same"] == state["same"]


@pytest.mark.parametrize("chunks_before", [0, 2])
def test_saved_stream_is_continued_bit_for_bit_by_another_process(
    model_dir, tmp_path, chunks_before
):
    model = streamdit.load(model_dir)
    sampling = SamplingConfig(chunk_frames=1, micro_steps=2, guidance_scale=2.0)
    stream = model.stream("a red circle", seed=7, sampling=sampling)
    for _ in range(chunks_before):
        next(stream)
    stream.prompt = "a blue square"
    stream.denoiser.step()  # between two chunks
    path = stream.save(tmp_path / "stream.safetensors")
    expected = [next(stream) for _ in range(4)]
    out = tmp_path / "out.npz"
    subprocess.run([sys.executable, "-c", CONTINUE, model_dir, path, out], check=True, cwd=tmp_path)
    with np.load(out) as found:
        assert str(found["prompt"]) == "a blue square"
        assert found["first"].tolist() == [chunk.first_frame for chunk in expected]
        for number, chunk in enumerate(expected):
            assert np.array_equal(found[f"arr_{number}"], chunk.frames)


def test_replay_with_the_same_prompts_is_the_same_video(model_dir):
    model = streamdit.load(model_dir)

    def video():
        stream = model.stream("a red circle", seed=3)
        frames = [next(stream).frames for _ in range(2)]
        stream.prompt = "a blue square"
        return np.concatenate(frames + [next(stream).frames for _ in range(3)])

    assert np.array_equal(video(), video())


def test_what_is_no_saved_stream_is_refused(model_dir, tmp_path):
    model = streamdit.load(model_dir)
    with pytest.raises(UserError, match="cannot be read as a saved stream"):
        model.resume(tmp_path / "nothing")
    with pytest.raises(UserError, match="is no saved stream"):
        model.resume(model_dir / "model.safetensors")


def test_stream_of_another_scheme_is_refused_by_a_running_one(model_dir, tmp_path):
    model = streamdit.load(model_dir)
    path = model.stream("x").save(tmp_path / "stream.safetensors")
    other = model.stream("x", sampling=SamplingConfig(chunk_frames=2, micro_steps=1))
    with pytest.raises(UserError, match="the saved stream has"):
        other.load(path)


def test_stream_of_other_latents_is_refused(model_dir, tmp_path):
    model = streamdit.load(model_dir)
    path = model.stream("x").save(tmp_path / "stream.safetensors")
    state = load_state(path)
    state["denoiser"]["plan"]["latent_shape"] = (9, 8, 8)
    save_state(state, path)
    with pytest.raises(UserError, match=r"the saved stream has latent_shape=\(9, 8, 8\)"):
        model.resume(path)


def test_stream_is_not_continued_by_another_model_of_the_same_shape(model_dir, tmp_path):
    path = streamdit.load(model_dir).stream("x").save(tmp_path / "stream.safetensors")
    config, weights = read_model_config(model_dir), load_file(model_dir / "model.safetensors")
    weights = {name: tensor + 0.01 for name, tensor in weights.items()}
    other = streamdit.load(save_model_directory(tmp_path / "other", config, weights, model_dir))
    with pytest.raises(UserError, match=r"made with the weights of SHA-256 .* continue it with"):
        other.resume(path)
    with pytest.raises(UserError, match="made with the weights"):
        other.stream("x").load(path)
    state = load_state(path)
    state["identity"]["autoencoder weights"] = "0" * 64
    save_state(state, path)
    with pytest.raises(
        UserError, match="made with the autoencoder weights of SHA-256 000000000000"
    ):
        streamdit.load(model_dir).resume(path)


def test_stream_goes_on_in_its_precision_or_not_at_all(model_dir, tmp_path):
    model = streamdit.load(model_dir)
    stream = model.stream("x", seed=np.int64(3), decoder=DecoderConfig(bfloat16=True))
    next(stream)
    path = stream.save(tmp_path / "stream.safetensors")
    expected = [next(stream).frames for _ in range(2)]
    resumed = model.resume(path)
    assert all(np.array_equal(next(resumed).frames, frames) for frames in expected)
    with pytest.raises(UserError, match="decoder's precision bfloat16, not float32"):
        model.resume(path, decoder=DecoderConfig())
    rough = streamdit.load(model_dir, dtype=torch.bfloat16)
    with pytest.raises(
        UserError, match=r"the precision float32, not bfloat16; .* as it was loaded"
    ):
        rough.resume(path)


def test_stream_that_continues_a_video_is_resumed(tmp_path):
    sampling = SamplingConfig(chunk_frames=2, micro_steps=2, reference_frames=2)
    partition = PartitionConfig(entries=(PartitionEntry(chunk_frames=2, reference_frames=2),))
    model = streamdit.load(write_model_directory(tmp_path, sampling=sampling, partition=partition))
    history = model.latents(np.full((16, 32, 32, 3), 90, np.uint8))
    stream = model.stream("x", history=history)
    next(stream)
    path = stream.save(tmp_path / "stream.safetensors")
    resumed = model.resume(path)
    for _ in range(2):
        assert np.array_equal(next(resumed).frames, next(stream).frames)


def test_a_stream_begins_with_one_encoding_of_its_prompt(model_dir, monkeypatch):
    model = streamdit.load(model_dir)
    encoded, encode = [], model.text_encoders.encode
    monkeypatch.setattr(
        model.text_encoders, "encode", lambda prompts: encoded.append(prompts) or encode(prompts)
    )
    next(model.stream("a red circle"))
    assert encoded == [["a red circle", ""]]


def test_every_frame_takes_n_evaluations_of_a_distilled_scheme_and_a_chunk_one(model_dir):
    """Counted at the network, by the times that it was given."""
    model = streamdit.load(model_dir)
    seen = []
    hook = model.model.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[1].clone())
    )
    sampling = SamplingConfig(chunk_frames=1, micro_steps=1)
    try:
        stream = model.stream("a red circle", sampling=sampling, fast=None)
        next(stream)
        first_buffer = len(seen)
        for _ in range(8):
            before = len(seen)
            next(stream)
            assert len(seen) - before == 1
    finally:
        hook.remove()
    frames = model.config.model.buffer_frames
    assert first_buffer == frames, "N - 1 evaluations fill the buffer, one emits the first chunk"
    taken = dict.fromkeys(range(8), 0)
    for number, tau in enumerate(seen):
        assert tau.shape == (1, frames)
        first = max(0, number - (frames - 1))
        for place in range(frames):
            # While the buffer fills, a frame's way is done once it stands at its own level.
            own_level = (frames - 1 - place) / frames
            moved = number >= frames - 1 or tau[0, place] < own_level
            if moved and first + place in taken:
                taken[first + place] += 1
    assert set(taken.values()) == {frames}
