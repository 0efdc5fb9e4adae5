"""Rows, layouts and scales, drawn."""

import math

import torch
from hypothesis import strategies as st

from tests.inputs import FAMILIES, LAYOUTS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# powers of ten within which rows, and with 300 columns their norms, are normal numbers
SCALES = {
    torch.float64: (-150, 150),
    torch.float32: (-30, 30),
    torch.bfloat16: (-30, 30),
    torch.float16: (-3, 2),
}


@st.composite
def matrices(draw, least=0, most=9, columns=300, dtypes=DTYPES):
    """[m, n] of a family, its rows scaled, some zero or equal, in a layout."""
    seed = draw(st.integers(0, 2**20))
    m = draw(st.integers(least, most))
    n = draw(st.sampled_from([0, 1, 2, 3, 5, 7, 16, 31, 64, 129, columns]))
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(seed)
    family = draw(st.sampled_from(["gaussian", "duplicate", "zero rows", "parallel", "alike"]))
    rows = FAMILIES[family](m, n) if m else torch.zeros(0, n, dtype=torch.float64)
    if draw(st.booleans()) and dtype is not torch.float16:  # rows of very different lengths
        low, high = SCALES[dtype]
        exponents = [draw(st.integers(low, high)) for _ in range(m)]
        rows = rows * torch.tensor([10.0**e for e in exponents], dtype=torch.float64).view(m, 1)
    else:
        rows = rows * 10.0 ** draw(st.integers(*SCALES[dtype]))
    rows = rows.to(dtype)
    layout = draw(st.sampled_from([*LAYOUTS, "negated"]))
    if layout == "negated":
        return negated(rows)
    return LAYOUTS[layout](rows)


def negated(rows):
    """A view whose negative bit is set, as the imaginary part of a conjugate has it."""
    if rows.dtype not in (torch.float32, torch.float64):
        return rows
    return torch.complex(torch.zeros_like(rows), -rows).conj().imag


def in_blocks(rows, cut, vector=False):
    """The same columns as two blocks, the first [m, 1, cut], the second [m, n - cut]."""
    if vector:
        return [rows[:cut].reshape(1, cut), rows[cut:]]
    return [rows[:, :cut].reshape(len(rows), 1, cut), rows[:, cut:]]


def largest(dtype):
    return torch.finfo(dtype).max


def unit(rows):
    """Normalized in float64 without overflow; [m, n], [m] norms."""
    rows = rows.double()
    top = rows.abs().amax(1).clamp(min=1e-308) if rows.shape[1] else rows.new_ones(len(rows))
    scaled = rows / top[:, None]
    norms = scaled.norm(dim=1)
    return torch.where(
        norms[:, None] > 0, scaled / norms.clamp(min=1e-308)[:, None], 0
    ), norms * top


def separated(rows):
    """Rank of the normalized rows; None where a singular value is neither large nor nothing."""
    values = torch.linalg.svdvals(unit(rows)[0])
    if bool(((values > 1e-9) & (values < 1e-3)).any()):
        return None
    return int((values >= 1e-3).sum())


def finite(value):
    return math.isfinite(float(value))
