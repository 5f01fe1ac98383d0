"""Which device to work on, and how to get there."""

from __future__ import annotations

import torch
from torch import Tensor

from streamdit.errors import UserError


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the best one there is.

    Raises:
        UserError: if it cannot be used.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device} cannot be used ({reason}); try cpu") from None
    return chosen


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a fresh CPU tensor to `device` without making the host wait for what runs there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
