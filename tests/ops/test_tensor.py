"""How the compiled module borrows a torch.Tensor (csrc/tensor.h), and what it refuses."""

import pytest
import torch

from gradsurgery import _C, InputError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda base: base,
        lambda base: base.T,
        lambda base: base[1:, ::2],
        lambda base: base[0, 0],
        lambda base: base[:0],
        lambda base: torch.nn.Parameter(base),
    ],
    ids=["plain", "transposed", "strided", "scalar", "empty", "parameter"],
)
def test_borrows_what_torch_holds(make, dtype):
    tensor = make(torch.zeros(5, 7, dtype=dtype))
    seen = _C.describe(tensor)
    assert seen["shape"] == list(tensor.shape)
    assert f"torch.{seen['dtype']}" == str(dtype)
    assert seen["device"] == "cpu"
    if tensor.numel():
        assert seen["strides"] == list(tensor.stride())
        assert seen["address"] == tensor.data_ptr()


@pytest.mark.parametrize(
    "value,message",
    [
        (3, "expected a torch.Tensor, got int"),
        ([1.0], "expected a torch.Tensor, got list"),
        (torch.ones(2, dtype=torch.int32), "int64, got torch.int32"),
        (torch.ones(2, dtype=torch.complex64), "int64, got torch.complex64"),
        (torch.ones((1,) * 9), "at most 8 dimensions, got 9"),
        (torch.ones(3, device="meta"), "expected a strided tensor with memory: .*meta"),
        (torch.ones(3).to_sparse(), "expected a strided tensor with memory"),
    ],
    ids=["int", "list", "integer dtype", "complex", "nine dimensions", "meta", "sparse"],
)
def test_rejects_what_kernels_cannot_read(value, message):
    with pytest.raises(InputError, match=message):
        _C.describe(value)
