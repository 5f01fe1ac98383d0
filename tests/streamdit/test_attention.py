"""Every implementation of attention gives the same answer and the same gradients."""

import pytest
import torch

from streamdit.model.attention import attention


@pytest.mark.parametrize("masked", [False, True])
def test_written_out_attention_equals_the_fused_one_with_its_gradients(masked):
    generator = torch.Generator().manual_seed(0)
    mask = None
    if masked:
        mask = torch.rand(3, 1, 1, 7, generator=generator) > 0.4
        mask[..., 0] = True
    tensors = [
        torch.randn(3, 2, length, 8, generator=generator, requires_grad=True)
        for length in (5, 7, 7)
    ]
    output = attention(*tensors, mask)
    gradients = torch.autograd.grad(output.square().sum(), tensors)
    fused = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
    expected = torch.autograd.grad(fused.square().sum(), tensors)
    torch.testing.assert_close(output, fused)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(attention(*tensors, mask), fused)
