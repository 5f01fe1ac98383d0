"""Linear layers in 8-bit floating point round as stated and share everything else."""

import gc
import weakref

import torch
from fast_step import (
    SHAPE,
    model_for,
    prompt,
    relative_error,
    schedule,
)

from streamdit.model.fast import (
    FastConfig,
    FastVelocity,
)
from streamdit.model.quantise import (
    ERROR_BOUND,
    Float8Linear,
    quantise_rows,
    with_float8_linears,
)


def test_rounding_rows_to_float8_keeps_zeros_and_three_bits_of_mantissa():
    rows = torch.randn(16, 64) * torch.logspace(-6, 6, 16)[:, None]
    rows[3] = 0
    rounded, scale = quantise_rows(rows)
    error = (rounded.float() * scale - rows).abs()
    # Half a unit in the last place of a normal number; below those, of the smallest one.
    assert torch.all(error <= rows.abs() / 16 + scale * 2**-10)
    assert torch.all(rounded[3].float() == 0)


def test_float8_linear_equals_the_product_of_its_rounded_operands():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).bfloat16()
    x = torch.randn(2, 5, 64).bfloat16()
    with torch.no_grad():
        found = Float8Linear(linear)(x).double()
        weight, weight_scale = quantise_rows(linear.weight)
        rows, scale = quantise_rows(x.flatten(0, 1))
        exact = (rows.double() * scale) @ (weight.double() * weight_scale).T + linear.bias.double()
    assert relative_error(found.flatten(0, 1), exact) < 4e-3  # the output is bf16


def test_float8_blocks_share_the_other_weights_and_stay_within_the_stated_error():
    model, levels = model_for().bfloat16(), schedule()
    rounded = with_float8_linears(model)
    assert with_float8_linears(model) is rounded  # all streams of a model share it
    assert rounded.patch_embedding.weight is model.patch_embedding.weight
    assert isinstance(rounded.blocks[0].text_attention.to_key_value, torch.nn.Linear)
    assert isinstance(rounded.blocks[2].ffn[2], Float8Linear)
    assert isinstance(model.blocks[2].ffn[2], torch.nn.Linear)
    text, latents = prompt(1), torch.randn(1, 4, *SHAPE)
    fast = FastVelocity(model, levels, SHAPE, config=FastConfig(float8=True))
    fast.set_text(text)
    with torch.no_grad():
        expected = model(latents, levels[4][None], text)
    error = relative_error(fast(latents, 4), expected)
    assert 0 < error < ERROR_BOUND


def test_float8_blocks_are_released_with_their_model():
    model = model_for()
    rounded = weakref.ref(with_float8_linears(model))
    del model
    gc.collect()
    assert rounded() is None
