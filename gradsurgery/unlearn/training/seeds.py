"""Seeds of their own for each purpose, and code that draws from one and leaves the rest alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^31) for a purpose: two purposes, or two seeds, share no stream of draws."""
    return zlib.crc32("/".join(map(str, (seed, *purpose))).encode()) % 2**31


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators draw from `seed`; the CPU's and the device's come back after."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed reseeds every GPU
        for used in cuda:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(seed)
        yield
