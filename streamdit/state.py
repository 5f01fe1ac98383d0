"""The state of a stream as a file: safetensors, with everything that is no tensor in its header.

Nothing in the file is code, so a state from anywhere can be read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamdit.errors import UserError
from streamdit.text.base import TextStates

FORMAT = "streamdit-state-1"


def save_state(state: Any, path: Path | str) -> Path:
    """Write nested dicts, lists, tuples, tensors, text states and plain values to one file.

    The file appears under its name only when it is complete.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_flatten(state, tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, staging, metadata={"format": FORMAT, "state": header})
    staging.replace(path)
    return path


def load_state(path: Path | str, device: torch.device | str = "cpu") -> Any:
    """Read back what :func:`save_state` wrote, with its tensors on `device`.

    Raises:
        UserError: if the file is missing or is no saved state.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is no saved stream; give a file that Stream.save wrote")
            return _restore(json.loads(metadata["state"]), file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as a saved stream ({error}); give a file that Stream.save wrote"
        ) from None


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON of `value` in which tensors are names; other containers than dicts are tagged."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, TextStates):
        return {"text": _flatten(dict(value), tensors)}
    if isinstance(value, dict):
        return {"dict": {key: _flatten(entry, tensors) for key, entry in value.items()}}
    if isinstance(value, list | tuple):
        tag = "list" if isinstance(value, list) else "tuple"
        return {tag: [_flatten(entry, tensors) for entry in value]}
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value


def _restore(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        tensor: torch.Tensor = file.get_tensor(content)
        return tensor
    if tag == "text":
        return TextStates(_restore(content, file))
    if tag == "dict":
        return {key: _restore(entry, file) for key, entry in content.items()}
    entries = [_restore(entry, file) for entry in content]
    return entries if tag == "list" else tuple(entries)
