"""Buffered flow matching (arXiv:2507.03745v4, Eqs. 1-6) against formulas written out per frame."""

import pytest
import torch

from streamdit.flow import (
    euler_step,
    flow_matching_loss,
    guided_velocity,
    interpolate,
    velocity_target,
)
from streamdit.text import TextStates


def text_of(*values):
    return TextStates(
        {"t": (torch.tensor(values).float().view(-1, 1, 1), torch.ones(len(values), 1).bool())}
    )


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_path_and_target_match_the_formulas_frame_by_frame(sigma_min):
    data, noise = torch.randn(2, 2, 4, 3, 5, 5)
    tau = torch.rand(2, 4)
    point = interpolate(data, noise, tau, sigma_min)
    target = velocity_target(data, noise, sigma_min)
    for b in range(2):
        for f in range(4):
            t = float(tau[b, f])
            expected = t * data[b, f] + (1 - (1 - sigma_min) * t) * noise[b, f]
            torch.testing.assert_close(point[b, f], expected)
            torch.testing.assert_close(target[b, f], data[b, f] - (1 - sigma_min) * noise[b, f])


def test_velocity_is_the_derivative_of_the_path():
    data, noise = torch.randn(2, 1, 4, 3, 5, 5, dtype=torch.float64)
    tau = torch.rand(1, 4, dtype=torch.float64) * 0.9
    step = 1e-6
    difference = interpolate(data, noise, tau + step, 0.05) - interpolate(data, noise, tau, 0.05)
    torch.testing.assert_close(
        difference / step, velocity_target(data, noise, 0.05), rtol=1e-6, atol=1e-6
    )


def test_one_chunk_is_plain_flow_matching():
    data, noise = torch.randn(2, 3, 8, 2, 4, 4)
    t = torch.rand(3)
    plain = t.view(3, 1, 1, 1, 1) * data + (1 - t.view(3, 1, 1, 1, 1)) * noise
    assert torch.equal(interpolate(data, noise, t[:, None].expand(3, 8)), plain)
    prediction = torch.randn_like(data)
    loss = flow_matching_loss(prediction, velocity_target(data, noise), torch.ones(3, 8))
    torch.testing.assert_close(loss.mean(), torch.nn.functional.mse_loss(prediction, data - noise))


def test_euler_with_the_true_velocity_walks_the_path_of_every_frame_to_its_data():
    data, noise = torch.randn(2, 1, 3, 2, 4, 4)
    tau, end = torch.tensor([[0.5, 0.25, 0.0]]), torch.tensor([[1.0, 0.75, 0.5]])
    latents = interpolate(data, noise, tau)
    latents = euler_step(latents, velocity_target(data, noise), tau, end)
    torch.testing.assert_close(latents, interpolate(data, noise, end))
    torch.testing.assert_close(latents[:, 0], data[:, 0])


def test_frames_of_weight_zero_carry_no_loss_or_gradient():
    prediction = torch.randn(1, 3, 2, 4, 4, requires_grad=True)
    loss = flow_matching_loss(prediction, torch.randn(1, 3, 2, 4, 4), torch.tensor([[0.0, 1, 2]]))
    loss.sum().backward()
    assert loss[0, 0] == 0
    assert torch.all(prediction.grad[0, 0] == 0)
    assert torch.any(prediction.grad[0, 1] != 0)


def test_guidance_extrapolates_from_the_empty_prompt_in_one_batch():
    calls = []

    def model(latents, tau, text):
        calls.append(latents.shape[0])
        return latents * 0 + text["t"][0][:, :, None, None]

    latents, tau = torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 3)
    text, null = text_of(5.0, 7.0), text_of(1.0)
    velocity = guided_velocity(model, latents, tau, text, null, 3.0)
    assert velocity[:, 0, 0, 0, 0].tolist() == [1 + 3 * (5 - 1), 1 + 3 * (7 - 1)]
    assert torch.all(guided_velocity(model, latents, tau, text, None, 1.0)[1] == 7)
    assert calls == [4, 2]
