"""Where Triton's kernels run in tests: in its interpreter, or on a GPU."""

import pytest
import torch

from tests.conftest import INTERPRETED

DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"

needs_triton = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs a GPU, or the interpreter: make interpret"
)


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setenv("GRADSURGERY_BACKEND", "triton")
    with torch.device(DEVICE):
        yield


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)
