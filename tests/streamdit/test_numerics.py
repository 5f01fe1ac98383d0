"""Precision, gradients, determinism and compilation of the transformer."""

from __future__ import annotations

import pytest
import torch

from jobs.config import available_presets, load_config
from streamdit.config import DiTConfig
from streamdit.model import StreamDiT, build_dit
from streamdit.model.modulation import Float32Linear
from streamdit.text import TextStates
from training.config import TrainConfig

TINY = {
    "latent_channels": 2,
    "buckets": [{"frames": 2, "height": 4, "width": 4, "window": [1, 2, 1]}],
    "width": 12,
    "depth": 2,
    "heads": 2,
    "ffn_width": 16,
    "text": {"t": 3},
    "time_frequencies": 4,
}
VARIANTS = [
    {},
    {"modulation": "single", "qk_norm": "across_heads", "time_axis": "noise"},
    {"temporal_wrap": False, "qk_norm": "none", "absolute_position": True},
    {"text_norm": False, "text_padding": 4},
]


def preset(name: str, **changes) -> DiTConfig:
    model = load_config(TrainConfig, stage="train", preset=name).model
    return model.model_copy(update=changes)


def randomised(model: StreamDiT, std: float) -> StreamDiT:
    """Random weights everywhere, so that gates and output are not zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def draws(config: DiTConfig, batch: int = 1, tokens: int = 3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    bucket = config.buckets[0]
    grid = (batch, bucket.frames, config.latent_channels, bucket.height, bucket.width)
    latents = torch.randn(grid, generator=generator, dtype=dtype)
    tau = torch.rand(batch, bucket.frames, generator=generator, dtype=dtype)
    values = {
        name: torch.randn(batch, tokens, width, generator=generator, dtype=dtype)
        for name, width in config.text.items()
    }
    return latents, tau, values


def states(values) -> TextStates:
    return TextStates({name: (value, None) for name, value in values.items()})


@pytest.mark.parametrize("modulation", ["zero", "single"])
def test_float32_and_bf16_stay_within_a_stated_error_of_float64(modulation):
    """The demo preset: float32 within 1e-5, bf16 within 2 % of what float64 gives."""
    config = preset("demo", modulation=modulation)
    exact = randomised(StreamDiT(config), 0.05).double()
    latents, tau, values = draws(config, batch=2, dtype=torch.float64)
    errors = {}
    with torch.no_grad():
        expected = exact(latents, tau, states(values))
        for dtype in (torch.float32, torch.bfloat16):
            model = StreamDiT(config).to(dtype)
            model.load_state_dict(exact.state_dict())
            found = model(latents.float(), tau.float(), states(values))
            errors[dtype] = float((found.double() - expected).norm() / expected.norm())
    assert expected.dtype == torch.float64
    assert expected.std() > 0.05
    assert errors[torch.float32] < 1e-5
    assert 1e-4 < errors[torch.bfloat16] < 0.02


def test_float64_is_float64_all_the_way():
    """A change far below float32's resolution still shows, for latents and for time."""
    config = DiTConfig.model_validate(TINY)
    model = randomised(StreamDiT(config), 0.3).double()
    latents, tau, values = draws(config, dtype=torch.float64)
    with torch.no_grad():
        base = model(latents, tau, states(values))
        for changed in ((latents * (1 + 1e-12), tau), (latents, tau * (1 + 1e-12))):
            difference = (model(*changed, states(values)) - base).norm() / base.norm()
            assert 1e-14 < difference < 1e-8


@pytest.mark.parametrize("changes", VARIANTS)
def test_gradients_of_the_inputs_equal_finite_differences(changes):
    config = DiTConfig.model_validate(TINY | changes)
    model = randomised(StreamDiT(config), 0.3).double()
    latents, tau, values = draws(config, dtype=torch.float64)

    def velocity(latents, tau, text):
        return model(latents, tau, states({"t": text}))

    given = tuple(x.requires_grad_() for x in (latents, tau, values["t"]))
    # tau reaches the network stretched a thousandfold, so its differences must be small.
    assert torch.autograd.gradcheck(velocity, given, eps=1e-7, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("changes", VARIANTS)
def test_gradients_of_every_weight_equal_finite_differences(changes):
    """Along a random direction of each weight in turn."""
    config = DiTConfig.model_validate(TINY | changes)
    model = randomised(StreamDiT(config), 0.3).double()
    latents, tau, values = draws(config, dtype=torch.float64)

    def loss():
        return model(latents, tau, states(values)).square().mean()

    loss().backward()
    generator = torch.Generator().manual_seed(2)
    step = 1e-5
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            values_around = []
            for offset in (step, -2 * step, step):
                values_around.append(loss())
                parameter.add_(direction, alpha=offset)
        slope = (values_around[1] - values_around[2]) / (2 * step)
        found = (parameter.grad * direction).sum()
        torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-7, msg=f"weight {name}")


def test_float32_layer_of_bf16_weights_has_the_gradients_of_a_widened_copy_but_keeps_none():
    torch.manual_seed(0)
    layer = Float32Linear(24, 40).bfloat16()
    x = torch.randn(2, 5, 24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = layer(x)
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    expected = torch.nn.functional.linear(x, weight.float(), bias.float())
    direction = torch.randn_like(expected)
    assert torch.equal(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, [x, layer.weight, layer.bias], direction),
        torch.autograd.grad(expected, [x, weight, bias], direction),
        strict=True,
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
    assert sum(t.nbytes for t in kept) == x.nbytes + layer.weight.nbytes

    layer.requires_grad_(False)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).sum(), x)[0][0, 0], weight.float().sum(0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_seeds_give_equal_bits_forwards_and_backwards(dtype):
    config = DiTConfig.model_validate(TINY)
    latents, tau, values = draws(config, batch=2)
    runs = []
    for _ in range(2):
        model = build_dit(config, seed=4).to(dtype)
        randomised(model, 0.3)
        output = model(latents, tau, states(values))
        output.square().mean().backward()
        runs.append([output, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_batch_equal_single_samples(dtype):
    config = preset("demo", depth=2)
    model = randomised(StreamDiT(config), 0.05).to(dtype)
    latents, tau, values = draws(config, batch=3)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    with torch.no_grad():
        together = model(latents, tau, states(values))
        for row in range(3):
            one = slice(row, row + 1)
            text = states({name: value[one] for name, value in values.items()})
            alone = model(latents[one], tau[one], text)
            assert (together[one] - alone).norm() / alone.norm() < tolerance


def traced(config: DiTConfig):
    """Compile a model on the meta device, and the shape that it gives."""
    torch._dynamo.reset()
    with torch.device("meta"):
        model = StreamDiT(config).bfloat16()
    bucket = config.buckets[0]
    grid = (1, bucket.frames, config.latent_channels, bucket.height, bucket.width)
    latents = torch.empty(grid, device="meta")
    text = {name: torch.empty(1, 9, width, device="meta") for name, width in config.text.items()}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        return compiled(latents, torch.empty(grid[:2], device="meta"), states(text)).shape, grid


@pytest.mark.parametrize("name", available_presets("train"))
def test_every_preset_traces_as_one_graph(name):
    """Two blocks, one with regular and one with shifted windows: the others repeat them."""
    shape, expected = traced(preset(name, depth=2))
    assert shape == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", available_presets("train"))
def test_every_preset_traces_as_one_graph_in_its_full_depth(name):
    shape, expected = traced(preset(name))
    assert shape == expected


@pytest.mark.parametrize("changes", VARIANTS)
def test_variants_trace_as_one_graph_and_give_the_same(changes):
    torch._dynamo.reset()
    config = DiTConfig.model_validate(TINY | changes)
    model = randomised(StreamDiT(config), 0.3)
    latents, tau, values = draws(config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(latents, tau, states(values))
        torch.testing.assert_close(compiled(latents, tau, states(values)), expected)


@pytest.mark.slow
def test_inductor_gives_the_velocity_of_the_demo_preset():
    """On a CPU, in float32 and in bf16; needs a C++ compiler."""
    config = preset("demo")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
        torch._dynamo.reset()
        model = randomised(StreamDiT(config), 0.05).to(dtype)
        latents, tau, values = draws(config)
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            expected = model(latents, tau, states(values))
            found = compiled(latents, tau, states(values))
        assert (found - expected).norm() / expected.norm() < tolerance
