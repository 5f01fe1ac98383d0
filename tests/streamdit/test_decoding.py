"""Every way to decode shows the plain decoder's pictures, with each kind of autoencoder."""

import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from wan_pipeline import VAE, VAE_TI2V

from streamdit.autoencoder import CausalAutoencoder, CausalAutoencoderConfig
from streamdit.autoencoder.causal import depth_to_space, space_to_depth
from streamdit.autoencoder.wan import WanAutoencoder
from streamdit.decoding import ChunkDecoder, DecoderConfig, converted, cudnn_autotuning

CPU = torch.device("cpu")
KINDS = ["causal", "wan2.1", "wan2.2"]

OPTIONS = {
    "channels last": (DecoderConfig(channels_last=True), 1),
    "bfloat16": (DecoderConfig(bfloat16=True), 4),
    "bfloat16, channels last": (DecoderConfig(bfloat16=True, channels_last=True), 4),
    "autotuned": (DecoderConfig(cudnn_autotune=True), 0),
}
"""Options and by how many of 255 levels they may change a pixel on average; rounding of sums."""


def tiny(kind):
    torch.manual_seed(0)
    if kind == "causal":
        config = CausalAutoencoderConfig(
            latent_channels=4,
            widths=(8, 8, 16),
            encoder_blocks=(1, 1, 1),
            decoder_blocks=(1, 1, 1),
        )
        autoencoder = CausalAutoencoder(config)
        for parameter in autoencoder.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        return autoencoder.eval()
    vae = AutoencoderKLWan(**(VAE if kind == "wan2.1" else VAE_TI2V))
    return WanAutoencoder(vae, source="random", sha256="").eval()


def pictures(autoencoder, options, device=CPU, chunks=3):
    decoder = ChunkDecoder(autoencoder, device, options)
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(1, 2, 4, 4, 6, generator=generator).to(device) for _ in range(chunks)]
    decoded = [torch.from_numpy(decoder.submit(chunk).wait()) for chunk in latents]
    return torch.cat(decoded).int()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_leaves_the_pictures_within_the_stated_levels(kind, option):
    options, tolerance = OPTIONS[option]
    autoencoder = tiny(kind)
    plain = pictures(autoencoder, DecoderConfig())
    assert plain.float().std() > 5  # there is something to see
    changes = (pictures(autoencoder, options) - plain).abs()
    assert changes.float().mean() <= tolerance / 4
    assert changes.max() <= 4 * tolerance
    assert {p.dtype for p in autoencoder.parameters()} == {torch.float32}


@pytest.mark.slow
def test_compiled_decoding_shows_the_same_pictures():
    autoencoder = tiny("causal")
    plain = pictures(autoencoder, DecoderConfig(), chunks=4)
    compiled = pictures(autoencoder, DecoderConfig(compile=True), chunks=4)
    assert (compiled - plain).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("kind", ["wan2.1", "wan2.2"])
def test_compiling_wans_decoder_ends_once_its_state_holds_tensors_alone(monkeypatch, kind, frames):
    """Its state is empty before the first latent frame and holds marks before the second."""
    compile_with_inductor = torch.compile
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: compile_with_inductor(
            function, backend=backend, fullgraph=True, **options
        ),
    )
    torch._dynamo.reset()
    autoencoder = tiny(kind)
    plain = ChunkDecoder(autoencoder, CPU)
    compiled = ChunkDecoder(autoencoder, CPU, DecoderConfig(compile=True))
    counts = []
    for _ in range(5):
        latents = torch.randn(1, frames, 4, 2, 3)
        expected, found = (decoder.submit(latents).wait() for decoder in (plain, compiled))
        assert np.array_equal(found, expected)
        counts.append(len(compilations))
    assert counts[0] == 1
    assert counts[-1] == counts[-2] == (3 if frames == 1 else 2)


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2), (4, 8, 8)])
def test_moving_channels_into_space_keeps_them_last_in_memory(factors):
    x = torch.randn(2, 5, 4, 8, 16)
    deep = space_to_depth(x, factors)
    last = depth_to_space(deep.contiguous(memory_format=torch.channels_last_3d), factors)
    assert last.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(last, x)
    first = depth_to_space(deep, factors)
    assert first.is_contiguous()
    assert torch.equal(first, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_stay_last_through_the_whole_decoder(dtype):
    options = DecoderConfig(channels_last=True, bfloat16=dtype == torch.bfloat16)
    autoencoder = tiny("causal")
    decoder = ChunkDecoder(autoencoder, CPU, options)
    copy = converted(autoencoder, options.bfloat16, channels_last=True)
    seen = []
    for module in copy.decoder.stages.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    for _ in range(2):
        decoder.submit(torch.randn(1, 2, 4, 4, 6)).wait()
    assert len(seen) == 2 * 3 * 2  # chunks, stages, convolutions of a block
    assert {x.dtype for x in seen} == {dtype}
    assert all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in seen)


def test_streams_share_the_converted_decoder_and_release_it_with_the_model():
    autoencoder = tiny("causal")
    copies = [converted(autoencoder, bfloat16=True, channels_last=True) for _ in range(2)]
    assert copies[0] is copies[1]
    assert converted(autoencoder, bfloat16=True, channels_last=False) is not copies[0]
    assert converted(autoencoder, bfloat16=False, channels_last=False) is autoencoder
    alive = weakref.ref(copies[0])
    del autoencoder, copies
    gc.collect()
    assert alive() is None


def test_autotuning_is_switched_on_for_the_decoder_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    seen = []
    with cudnn_autotuning(True):
        seen.append(torch.backends.cudnn.benchmark)
    seen.append(torch.backends.cudnn.benchmark)
    torch.backends.cudnn.benchmark = True
    with cudnn_autotuning(False):
        seen.append(torch.backends.cudnn.benchmark)
    assert seen == [True, False, True]


GPU_OPTIONS = {
    "channels last": (DecoderConfig(channels_last=True), 2),
    "bfloat16": (DecoderConfig(bfloat16=True), 6),
    "bfloat16, channels last, autotuned": (
        DecoderConfig(bfloat16=True, channels_last=True, cudnn_autotune=True),
        6,
    ),
    "compiled": (DecoderConfig(compile=True, channels_last=True), 2),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", GPU_OPTIONS)
def test_each_option_leaves_the_pictures_within_the_stated_levels_on_a_device(kind, option):
    options, tolerance = GPU_OPTIONS[option]
    autoencoder = tiny(kind).cuda()
    plain = pictures(autoencoder, DecoderConfig(), torch.device("cuda"))
    changes = (pictures(autoencoder, options, torch.device("cuda")) - plain).abs()
    assert changes.float().mean() <= tolerance / 4
    assert changes.max() <= 4 * tolerance
