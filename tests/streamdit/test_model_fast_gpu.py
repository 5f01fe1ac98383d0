"""The same on a CUDA device, captured as graphs, and without waiting for it."""

import gc

import pytest
import torch
from fast_step import (
    CAPACITY,
    SHAPE,
    TOLERANCE,
    model_for,
    prompt,
    relative_error,
    schedule,
)

from streamdit.errors import UserError
from streamdit.flow import guided_velocity
from streamdit.model import packed
from streamdit.model.fast import (
    _STREAMS_IN_USE,
    FLOAT8_CAPABILITY,
    POOL_STREAMS,
    FastConfig,
    FastVelocity,
)
from streamdit.model.prepared import TextMemories
from streamdit.model.quantise import ERROR_BOUND, Float8Linear, quantise_rows

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

needs_float8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < FLOAT8_CAPABILITY,
    reason="needs a CUDA device of compute capability 8.9 or more",
)

BFLOAT16 = 0.01
"""Relative error in bf16, where fused code rounds in other places."""

GPU_SWITCHES = {
    "graph": (FastConfig(cuda_graph=True), BFLOAT16),
    "graph, padded text": (FastConfig(cuda_graph=True, packed_text=False), BFLOAT16),
    "compiled": (FastConfig(compile=True), BFLOAT16),
    "compiled graph": (FastConfig(cuda_graph=True, compile=True), BFLOAT16),
    "compiled graph, cuDNN attention": (
        FastConfig(cuda_graph=True, compile=True, attention="cudnn"),
        BFLOAT16,
    ),
}

FLOAT8_SWITCHES = {
    "float8": FastConfig(float8=True),
    "float8 graph": FastConfig(float8=True, cuda_graph=True),
    "float8 compiled": FastConfig(float8=True, compile=True),
    "float8 compiled graph": FastConfig(float8=True, cuda_graph=True, compile=True),
}


def check_on_device(
    config, tolerance, guidance, dtype=torch.bfloat16, device="cuda", width=SHAPE[2]
):
    """Every step's velocity is the plain one, for two prompts, without waiting for the device."""
    model, levels = model_for(width=width).to(device, dtype), schedule().to(device)
    shape = (*SHAPE[:2], width)
    fast = FastVelocity(model, levels, shape, 1, guidance, config, CAPACITY)
    null = prompt(9, lengths={"long": 3, "short": 1}).to(device)
    latents = torch.randn(1, 4, *shape, device=device)
    for seed in (1, 2):
        text = prompt(seed, padded=seed == 2).to(device)
        fast.set_text(text, null)
        fast(latents, 0)
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [fast(latents, row).clone() for row in range(len(levels))]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for row, velocity in enumerate(found):
            with torch.no_grad():
                expected = guided_velocity(model, latents, levels[row][None], text, null, guidance)
            assert relative_error(velocity, expected) < tolerance


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("switch", GPU_SWITCHES)
def test_a_step_on_the_device_gives_the_plain_velocity_without_waiting_for_it(switch, guidance):
    config, tolerance = GPU_SWITCHES[switch]
    check_on_device(config, tolerance, guidance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("switch", GPU_SWITCHES)
def test_a_step_of_many_tokens_takes_the_kernels_that_large_models_take(switch):
    """Attention to packed text has another kernel from 129 tokens on, in some versions."""
    config, tolerance = GPU_SWITCHES[switch]
    check_on_device(config, tolerance, 3.0, width=24)


@pytest.mark.gpu
@needs_gpu
def test_more_graphs_than_pytorch_has_streams_are_refused_and_a_dropped_one_makes_room():
    model, levels = model_for().bfloat16().cuda(), schedule().cuda()
    latents, text = torch.randn(1, 4, *SHAPE, device="cuda"), prompt(1).to("cuda")

    def captured():
        fast = FastVelocity(
            model, levels, SHAPE, config=FastConfig(cuda_graph=True), max_text_tokens=CAPACITY
        )
        fast.set_text(text)
        return fast, fast(latents, 4).clone()

    streams = [captured() for _ in range(POOL_STREAMS - len(_STREAMS_IN_USE))]
    with pytest.raises(UserError, match="replay CUDA graphs already"):
        captured()
    expected = streams[0][1]
    gc.disable()
    try:
        del streams[5:]
        streams.append(captured())
    finally:
        gc.enable()
    for fast, _ in streams:
        assert torch.equal(fast(latents, 4), expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_captured_step_in_float32_changes_nothing_but_the_order_of_sums(guidance):
    check_on_device(FastConfig(cuda_graph=True), TOLERANCE, guidance, torch.float32)


@pytest.mark.gpu
@needs_float8
@pytest.mark.parametrize("switch", FLOAT8_SWITCHES)
def test_float8_steps_stay_within_the_stated_error_compiled_and_captured(switch):
    check_on_device(FLOAT8_SWITCHES[switch], ERROR_BOUND, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_steps_are_captured_on_every_device_of_a_process():
    for device in ("cuda:0", "cuda:1"):
        check_on_device(FastConfig(cuda_graph=True), BFLOAT16, 3.0, device=device)


@pytest.mark.gpu
@needs_gpu
def test_text_is_packed_on_devices_that_can():
    if torch.cuda.get_device_capability() < packed.CAPABILITY:
        pytest.skip("needs a CUDA device of compute capability 8.0 or more")
    model = model_for().bfloat16().cuda()
    memories = TextMemories(model, CAPACITY)
    with torch.no_grad():
        memories.set(model.project_text(prompt(1).to("cuda")))
    assert isinstance(memories.of_block(0), packed.PackedTextMemory)


@pytest.mark.gpu
@needs_float8
def test_float8_on_the_device_is_the_product_of_its_rounded_operands():
    torch.manual_seed(0)
    layer = Float8Linear(torch.nn.Linear(256, 512).bfloat16())
    x = torch.randn(64, 256).bfloat16()
    with torch.no_grad():
        rows, scale = quantise_rows(x)
        weight = layer.weight.float() * layer.scale.t()
        expected = (rows.float() * scale) @ weight.t() + layer.bias.float()
        found = layer.cuda()(x.cuda()).cpu()
    assert relative_error(found.float(), expected) < 5e-3
