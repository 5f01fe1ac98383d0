"""Buffered flow matching: path, target and sampler with one time per frame.

Time runs from noise (tau = 0) to data (tau = 1); every latent frame of the buffer has its own
(arXiv:2507.03745v4, Eqs. 1-6).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from streamdit.text.base import TextStates

VelocityFunction = Callable[[Tensor, Tensor, TextStates], Tensor]
"""`(latents [b, f, C, h, w], tau [b, f], text) -> velocity [b, f, C, h, w]`."""


def per_frame(values: Tensor) -> Tensor:
    """`[b, f]` or `[f]` to a shape that broadcasts over `[b, f, C, h, w]`."""
    return values[..., None, None, None]


def interpolate(data: Tensor, noise: Tensor, tau: Tensor, sigma_min: float = 0.0) -> Tensor:
    """Point on the linear path: `tau X1 + (1 - (1 - sigma_min) tau) X0` (Eqs. 1 and 5).

    Args:
        data: X1, `[b, f, C, h, w]`.
        noise: X0, same shape, standard normal.
        tau: `[b, f]` in 0...1.
        sigma_min: noise left at tau = 1.
    """
    time = per_frame(tau)
    return time * data + (1.0 - (1.0 - sigma_min) * time) * noise


def velocity_target(data: Tensor, noise: Tensor, sigma_min: float = 0.0) -> Tensor:
    """Velocity of the path, `X1 - (1 - sigma_min) X0`, the same at every tau (Eqs. 2 and 6)."""
    return data - (1.0 - sigma_min) * noise


def flow_matching_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error per frame, weighted (Eq. 3).

    Args:
        prediction: `[b, f, C, h, w]`.
        target: same shape.
        weight: `[b, f]`; frames with weight 0 (references) carry no loss.

    Returns:
        `[b, f]` float32: the weighted error of each frame, mean over its voxels.
    """
    error = (prediction.float() - target.float()).square().mean(dim=(2, 3, 4))
    return error * weight


def euler_step(latents: Tensor, velocity: Tensor, tau: Tensor, next_tau: Tensor) -> Tensor:
    """One Euler step from `tau` to `next_tau` (`[b, f]` or `[f]`), frame by frame (Eq. 4)."""
    return latents + per_frame(next_tau - tau) * velocity


def guided_velocity(
    model: VelocityFunction,
    latents: Tensor,
    tau: Tensor,
    text: TextStates,
    null_text: TextStates | None,
    guidance_scale: float | Tensor,
) -> Tensor:
    """Velocity under classifier-free guidance, `u(null) + w (u(text) - u(null))`.

    With w = 1 the model is evaluated once, without the empty prompt; otherwise both halves run as
    one batch of twice the size.

    Args:
        model: velocity function.
        latents: `[b, f, C, h, w]`.
        tau: `[b, f]`.
        text: states of b prompts.
        null_text: states of the empty prompt, batch 1; needed unless w = 1.
        guidance_scale: w, one number or one per frame `[b, f]`.
    """
    if isinstance(guidance_scale, float | int) and guidance_scale == 1.0:
        return model(latents, tau, text)
    assert null_text is not None, "guidance needs the states of the empty prompt"
    both = TextStates.concatenate([text, null_text.expand(text.batch)])
    velocity = model(torch.cat([latents, latents]), torch.cat([tau, tau]), both)
    conditional, unconditional = velocity.chunk(2)
    if isinstance(guidance_scale, Tensor):
        guidance_scale = per_frame(guidance_scale)
    return unconditional + guidance_scale * (conditional - unconditional)
