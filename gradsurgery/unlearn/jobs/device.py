"""Where the models of a job are trained."""

from __future__ import annotations

import torch

from gradsurgery.errors import InputError
from gradsurgery.text import show


def check_device(device: str) -> None:
    """Raise `InputError` unless models can be trained on what --device names."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = show(str(error).splitlines()[0], 200)
        raise InputError(f"--device: {show(device, 80)} is not here: {reason}") from None
    if torch.device(device).type == "meta":
        raise InputError("--device: meta has no values to train")
