"""What every test of capture shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Of tensors this small; `threads` puts the number back. tests/ops is about several."""
    torch.set_num_threads(1)
