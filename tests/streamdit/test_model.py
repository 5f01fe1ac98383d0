"""The transformer against slow, obvious references (arXiv:2507.03745v4, Sec. 3.3)."""

import itertools

import pytest
import torch
from pydantic import ValidationError

from streamdit.config import DiTConfig
from streamdit.model import StreamDiT, build_dit
from streamdit.model.block import WindowAttention, WindowContext
from streamdit.model.position import axis_widths, rotary_angles
from streamdit.model.text import TextContext
from streamdit.model.windows import Windowing
from streamdit.text import TextStates


def config(**changes):
    values = {
        "latent_channels": 3,
        "buckets": [{"frames": 4, "height": 8, "width": 12, "window": [2, 2, 3]}],
        "width": 32,
        "depth": 3,
        "heads": 2,
        "ffn_width": 48,
        "text": {"t": 5},
        "time_frequencies": 16,
    }
    return DiTConfig.model_validate(values | changes)


def randomised(model: StreamDiT) -> StreamDiT:
    """Random weights everywhere, so that gates and output are not zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


def text(batch=2, length=4):
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, -1] = False
    return TextStates({"t": (torch.randn(batch, length, 5, generator=generator), mask)})


def same_window(a, b, grid, window, shift):
    """Whether tokens at grid places a and b share a window, from the definition alone."""
    return all(
        ((i - d) % g) // w == ((j - d) % g) // w
        for i, j, g, w, d in zip(a, b, grid, window, shift, strict=True)
    )


def rotate_slowly(vector, place, head_width, theta):
    """Rotary embedding of one token, pair by pair."""
    out, start = vector.clone(), 0
    for position, width in zip(place, axis_widths(head_width), strict=True):
        for pair in range(width // 2):
            angle = torch.tensor(position / theta ** (2 * pair / width), dtype=torch.float64)
            a, b = vector[start + 2 * pair], vector[start + 2 * pair + 1]
            out[start + 2 * pair] = a * angle.cos() - b * angle.sin()
            out[start + 2 * pair + 1] = a * angle.sin() + b * angle.cos()
        start += width
    return out


def wraps_in_time(i, j, shift):
    """Whether frames i and j, of one window, lie at the two ends of the buffer."""
    return (i < shift) != (j < shift)


@pytest.mark.parametrize("temporal_wrap", [True, False])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("qk_norm", ["per_head", "across_heads", "none"])
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ((4, 4, 6), (2, 2, 3)),
        ((6, 2, 4), (3, 2, 2)),
        ((4, 2, 6), (4, 2, 2)),
        ((2, 4, 4), (1, 4, 4)),
    ],
)
def test_window_attention_equals_masked_full_attention(
    grid, window, shifted, qk_norm, temporal_wrap
):
    layer = WindowAttention(config(qk_norm=qk_norm)).double()
    torch.manual_seed(0)
    frames, rows, columns = grid
    x = torch.randn(2, frames, rows * columns, 32, dtype=torch.float64)
    windowing = Windowing.of(grid, window, shifted, temporal_wrap)
    angles = rotary_angles(grid, 16, 10_000.0, torch.device("cpu"))
    result = layer(x, WindowContext.of(windowing, angles)).detach()

    shift = [w // 2 if shifted and w < g else 0 for g, w in zip(grid, window, strict=True)]
    places = list(itertools.product(*map(range, grid)))
    allowed = torch.tensor(
        [
            [
                same_window(a, b, grid, window, shift)
                and (temporal_wrap or not wraps_in_time(a[0], b[0], shift[0]))
                for b in places
            ]
            for a in places
        ]
    )
    assert windowing.pairs == allowed.sum()
    tokens = x.reshape(2, -1, 32)
    query, key, value = layer.qkv(tokens).detach().chunk(3, dim=-1)

    def normalise(heads):
        # Queries and keys are rotated in float32 by the layer, hence the tolerance below.
        return heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    if qk_norm == "across_heads":
        query, key = normalise(query), normalise(key)

    merged = torch.empty_like(tokens)
    for b, head in itertools.product(range(2), range(2)):
        part = slice(16 * head, 16 * head + 16)
        q, k = query[b, :, part], key[b, :, part]
        if qk_norm == "per_head":
            q, k = normalise(q), normalise(k)
        q = torch.stack([rotate_slowly(v, p, 16, 10_000.0) for v, p in zip(q, places, strict=True)])
        k = torch.stack([rotate_slowly(v, p, 16, 10_000.0) for v, p in zip(k, places, strict=True)])
        scores = (q @ k.T / 4).masked_fill(~allowed, float("-inf"))
        merged[b, :, part] = scores.softmax(-1) @ value[b, :, part]
    expected = layer.output(merged).detach().view_as(x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_merging_windows_undoes_splitting(shifted):
    tokens = torch.randn(2, 4, 4, 6, 5)
    windowing = Windowing.of((4, 4, 6), (2, 2, 3), shifted)
    windows = windowing.split(tokens)
    assert windows.shape == (2 * windowing.count, 12, 5)
    assert torch.equal(windowing.merge(windows, 2), tokens)


def test_shift_along_an_axis_that_one_window_spans_changes_nothing():
    assert Windowing.of((4, 4, 6), (4, 2, 6), True).shift == (0, 1, 0)
    assert Windowing.of((4, 4, 6), (4, 4, 6), True) == Windowing.of((4, 4, 6), (4, 4, 6), False)


@pytest.mark.parametrize("modulation", ["zero", "single"])
def test_time_of_a_frame_reaches_other_frames_through_attention_only(modulation):
    """With frames cut off from each other, a frame's output depends on its own tau alone."""
    apart = config(
        buckets=[{"frames": 4, "height": 8, "width": 12, "window": [1, 4, 6]}],
        modulation=modulation,
    )
    model = randomised(StreamDiT(apart))
    latents, tau = torch.randn(2, 4, 3, 8, 12), torch.rand(2, 4)
    base = model(latents, tau, text())
    changed = tau.clone()
    changed[:, 2] = 0.9 * changed[:, 2] + 0.05
    other = model(latents, changed, text())
    differs = (other - base).abs().amax(dim=(0, 2, 3, 4)) > 1e-6
    assert differs.tolist() == [False, False, True, False]


@pytest.mark.parametrize("modulation", ["zero", "single"])
def test_modulation_is_the_same_for_every_patch_of_a_frame(modulation):
    model = randomised(StreamDiT(config(modulation=modulation)))
    time = model.time_embedding(torch.tensor([[0.1, 0.1, 0.6, 0.9]]))
    shared = None if model.shared_modulation is None else model.shared_modulation(time)
    for signal in model.blocks[0].modulation(time, shared):
        assert signal.shape == (1, 4, 1, 32)
        assert signal.dtype == torch.float32
        assert torch.equal(signal[:, 0], signal[:, 1])
        assert not torch.equal(signal[:, 1], signal[:, 2])


def test_window_choice_leaves_the_weights_alone():
    wide = config(buckets=[{"frames": 4, "height": 8, "width": 12, "window": [4, 4, 6]}])
    assert {n: p.shape for n, p in StreamDiT(wide).state_dict().items()} == {
        n: p.shape for n, p in StreamDiT(config()).state_dict().items()
    }


def test_padding_of_text_changes_nothing():
    model = randomised(StreamDiT(config())).double()
    latents, tau = torch.randn(2, 4, 3, 8, 12).double(), torch.rand(2, 4)
    states = text()
    values, mask = states["t"]
    padded = TextStates(
        {
            "t": (
                torch.cat([values, torch.full((2, 3, 5), 9.0)], 1),
                torch.cat([mask, torch.zeros(2, 3).bool()], 1),
            )
        }
    )
    torch.testing.assert_close(model(latents, tau, states), model(latents, tau, padded))


def test_text_without_padding_has_no_mask_and_the_same_velocity():
    model = randomised(StreamDiT(config())).double()
    latents, tau = torch.randn(2, 4, 3, 8, 12).double(), torch.rand(2, 4)
    values, _ = text()["t"]
    plain = TextStates({"t": (values, None)})
    masked = TextStates({"t": (values, torch.ones(2, 4, dtype=torch.bool))})
    assert model.project_text(plain).mask is None
    assert model.project_text(masked).mask.shape == (2, 1, 1, 4)
    torch.testing.assert_close(model(latents, tau, plain), model(latents, tau, masked))


def test_one_encoder_with_padding_gives_all_a_mask():
    model = StreamDiT(config(text={"t": 5, "u": 7}))
    states = TextStates({**text(), "u": (torch.randn(2, 3, 7), None)})
    mask = model.project_text(states).mask
    assert mask[:, 0, 0].tolist() == [[True] * 3 + [False] + [True] * 3, [True] * 7]


def test_zero_padding_is_attended_to_like_text():
    model = randomised(StreamDiT(config(text_padding=6, text_norm=False))).double()
    latents, tau = torch.randn(2, 4, 3, 8, 12).double(), torch.rand(2, 4)
    values, _ = text()["t"]
    filled = torch.zeros(2, 6, 5)
    filled[0, :3], filled[1, :4] = values[0, :3], values[1]
    context = model.project_text(text())
    assert context.mask is None
    first, last = model.text.projectors["t"][1], model.text.projectors["t"][3]
    expected = last(torch.nn.functional.gelu(first(filled.double()), approximate="tanh"))
    torch.testing.assert_close(context.values, expected)
    whole = TextStates({"t": (filled, None)})
    torch.testing.assert_close(model(latents, tau, text()), model(latents, tau, whole))
    with pytest.raises(ValueError, match="7 tokens is longer than the 6"):
        model.project_text(TextStates({"t": (torch.zeros(1, 7, 5), None)}))


def test_noise_axis_of_time_is_one_minus_tau():
    forward, backward = (
        StreamDiT(config(time_axis=axis)).time_embedding for axis in ("tau", "noise")
    )
    backward.load_state_dict(forward.state_dict())
    tau = torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    torch.testing.assert_close(backward(tau), forward(1.0 - tau))


def test_rows_of_a_batch_do_not_depend_on_each_other():
    model = randomised(StreamDiT(config()))
    latents, tau, states = torch.randn(2, 4, 3, 8, 12), torch.rand(2, 4), text()
    whole = model(latents, tau, states)
    for row in range(2):
        alone = model(latents[row : row + 1], tau[row : row + 1], states.select([row]))
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modulation", ["zero", "single"])
def test_fresh_model_predicts_zero_and_every_parameter_gets_a_gradient_after_a_nudge(modulation):
    model = build_dit(config(modulation=modulation), seed=1)
    again = build_dit(config(modulation=modulation), seed=1)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    latents, tau, states = torch.randn(2, 4, 3, 8, 12), torch.rand(2, 4), text()
    assert torch.all(model(latents, tau, states) == 0)
    randomised(model)(latents, tau, states).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_activation_checkpointing_gives_the_same_gradients():
    model = randomised(StreamDiT(config()))
    latents, tau, states = torch.randn(2, 4, 3, 8, 12), torch.rand(2, 4), text()
    runs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients = []
    for setting, forwards in ((False, 0), (1, 1), (True, len(model.blocks))):
        model.zero_grad()
        runs.clear()
        model.activation_checkpointing = setting
        model(latents, tau, states).square().mean().backward()
        assert len(runs) == len(model.blocks) + forwards
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, *others in zip(*gradients, strict=True):
        for checkpointed in others:
            torch.testing.assert_close(plain, checkpointed)


def test_bf16_forward_stays_close_to_float32():
    model = randomised(StreamDiT(config()))
    latents, tau, states = torch.randn(2, 4, 3, 8, 12), torch.rand(2, 4), text()
    exact = model(latents, tau, states)
    rounded = model.bfloat16()(latents, tau, states)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.03


def test_text_context_can_be_projected_once_and_used_again():
    model = randomised(StreamDiT(config()))
    latents, tau, states = torch.randn(2, 4, 3, 8, 12), torch.rand(2, 4), text()
    context = model.project_text(states)
    assert isinstance(context, TextContext)
    assert torch.equal(model.denoise(latents, tau, context), model(latents, tau, states))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "width 32 is not divisible by heads 3"),
        (
            {"buckets": [{"frames": 4, "height": 8, "width": 12, "window": [2, 3, 3]}]},
            r"window \[2, 3, 3\] does not divide",
        ),
        (
            {"buckets": [{"frames": 4, "height": 7, "width": 12, "window": [2, 1, 3]}]},
            "height 7 is not divisible by patch 2",
        ),
        ({"patch": [2, 2, 2]}, "merges frames"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_impossible_configurations_are_refused_with_the_reason(changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_latents_of_an_unknown_grid_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"4x6x12 fit no bucket of this model \(4x8x12\)"):
        StreamDiT(config())(torch.randn(1, 4, 3, 6, 12), torch.rand(1, 4), text().select([0]))
