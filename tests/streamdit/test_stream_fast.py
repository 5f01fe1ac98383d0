"""A stream with prepared steps shows the plain stream's video, prompts and pauses included."""

import numpy as np
import pytest
import torch
from model_directory import write_model_directory
from no_host_reads import NoHostReads

import streamdit
from streamdit.config import SamplingConfig
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
