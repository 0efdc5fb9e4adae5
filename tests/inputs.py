"""Families of matrices, memory layouts and block lists that the operators are tested on."""

import numpy as np
import torch

SHAPES = [
    (1, 1),
    (2, 7),
    (8, 1000),
    (3, 0),
    (0, 5),
    (0, 0),
    (1, 4099),
    (5, 3),
    (33, 129),
    (17, 2053),
]  # [m, n]

# shapes [m, *p.shape] of the blocks of one Jacobian: scalars, empty tensors, 4-d kernels
BLOCKS = [
    [(3,)],
    [(3, 4), (3,), (3, 0), (3, 2, 5)],
    [(1, 2, 3, 3, 1), (1,), (1, 1)],
    [(0, 4), (0,), (0, 2, 2)],
    [(7, 0), (7, 0, 3)],
    [(5, 13, 11), (5, 11), (5, 701), (5,), (5, 1, 257)],
]


def gaussian(m, n):
    return torch.randn(m, n, dtype=torch.float64)


def with_condition(m, n, condition):
    """Rows whose singular values fall from 1 to 1 / condition, in equal ratios."""
    left = torch.linalg.qr(gaussian(m, m)).Q
    right = torch.linalg.qr(gaussian(n, m)).Q
    values = torch.logspace(
        0, -torch.tensor(float(condition)).log10().item(), m, dtype=torch.float64
    )
    return left * values @ right.mT


def kahan(m, n, angle):
    """Each row far from the span of those before, all together near dependent.

    Condition 8e5 for m = 16, angle 0.8, with no row nearer than 7e-3; 1e6 for 48, 1.3, and 0.17.
    """
    sine, cosine = torch.tensor([angle], dtype=torch.float64).sin(), torch.tensor(angle).cos()
    triangle = torch.eye(m, dtype=torch.float64) - cosine * torch.ones(m, m).triu(1)
    q = torch.linalg.qr(gaussian(n, m)).Q.mT
    return (sine ** torch.arange(m)[:, None] * triangle).mT @ q


def near_duplicate(m, n, distance):
    """Gaussian rows, the last one a relative `distance` away from the first."""
    rows = gaussian(m, n)
    away = rows[-1] / rows[-1].norm() * rows[0].norm()
    rows[-1] = rows[0] + distance * away
    return rows


def duplicate(m, n):
    """Every row twice, the second time in a row and scaled otherwise."""
    return gaussian((m + 1) // 2, n).repeat_interleave(2, 0)[:m] * torch.arange(1, m + 1)[:, None]


def zero_rows(m, n):
    """Gaussian, but every other row, the first included, is zero."""
    return gaussian(m, n) * (torch.arange(m) % 2)[:, None]


def parallel(m, n):
    """Multiples of one row, of both signs."""
    return torch.linspace(-2, 3, m, dtype=torch.float64)[:, None] * gaussian(1, n)


def graded(m, n):
    """Gaussian directions of norms from 1e-12 to 1e12."""
    return gaussian(m, n) * torch.logspace(-12, 12, m, dtype=torch.float64)[:, None]


def alike(m, n):
    """Positive rows that share most of what they are, as gradients of one class do."""
    return 1 + 0.1 * gaussian(m, n)


FAMILIES = {
    "gaussian": gaussian,
    "condition 1e2": lambda m, n: with_condition(m, n, 1e2),
    "condition 1e4": lambda m, n: with_condition(m, n, 1e4),
    **{
        f"near duplicate {d}": lambda m, n, d=d: near_duplicate(m, n, d)
        for d in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    },
    "duplicate": duplicate,
    "zero rows": zero_rows,
    "parallel": parallel,
    "graded": graded,
    "alike": alike,
    "all zero": lambda m, n: torch.zeros(m, n, dtype=torch.float64),
}


def signed(rows):
    """Each row as it is or negated, at random: rows that conflict."""
    return rows * (2.0 * torch.randint(2, (len(rows), 1)) - 1)


def opposed(m, n):
    """Gaussian, but the last row is a negative multiple of the first."""
    rows = gaussian(m, n)
    rows[-1] = -2 * rows[0]
    return rows


def half_space(m, n):
    """Gaussian rows that agree in the first column alone: no positive sum of them vanishes."""
    rows = gaussian(m, n)
    rows[:, 0] = rows[:, 0].abs() + 0.5
    return rows


# rows that conflict, of each family, and more of them than columns
CONFLICTING = {
    **{name: lambda make=make: signed(make(6, 97)) for name, make in FAMILIES.items()},
    "opposed": lambda: opposed(6, 97),
    "12 of 5 columns": lambda: gaussian(12, 5),
    "12 duplicates of 5 columns": lambda: signed(duplicate(12, 5)),
    "12 in a half space of 5 columns": lambda: half_space(12, 5),
    "12 opposed of 5 columns": lambda: opposed(12, 5),
}


def _offset(rows):
    """Not aligned to a vector: the storage begins one element before the first row."""
    storage = torch.cat([rows.new_zeros(1), rows.flatten()])
    return storage[1:].view(rows.shape)


LAYOUTS = {
    "contiguous": lambda rows: rows.contiguous(),
    "transposed": lambda rows: rows.mT.contiguous().mT,
    "every third column": lambda rows: rows.repeat_interleave(3, 1)[:, 1::3],
    "rows apart": lambda rows: torch.cat([rows, rows], 1)[:, : rows.shape[1]],
    "unaligned": _offset,
    "one row expanded": lambda rows: rows[:1].expand(rows.shape) if len(rows) else rows,
    "one column expanded": lambda rows: rows[:, :1].expand(rows.shape) if rows.shape[1] else rows,
}


def blocks_of(shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def as_matrix(blocks):
    """The blocks of a Jacobian as one float64 matrix, by the plainest way."""
    return torch.cat(
        [block.double().reshape(len(block), block.shape[1:].numel()) for block in blocks], 1
    )


def exact_gramian(rows):
    """J Jᵀ in 80-bit arithmetic where it is affordable: torch's own float64 product is off by
    1e-13 for ten thousand equal values, more than the kernels are."""
    rows = rows.detach().double()
    if rows.shape[0] ** 2 * rows.shape[1] > 1 << 24:
        return rows @ rows.mT
    wide = rows.numpy().astype(np.longdouble)
    return torch.from_numpy(np.einsum("ik,jk->ij", wide, wide).astype(np.float64))


def same_values(actual, expected):
    """Bit for bit, NaN included."""
    return actual.dtype == expected.dtype and torch.equal(
        actual.nan_to_num(1.2345), expected.nan_to_num(1.2345)
    )


def vanishing(m, n):
    """Rows of which a positive combination, its weights 1 to m, vanishes."""
    rows = gaussian(m, n)
    weights = torch.arange(1.0, m + 1, dtype=torch.float64)
    rows[-1] = -(weights[:-1] @ rows[:-1]) / weights[-1]
    return rows


# what the rules are tested on: conflicting, aligned, dependent, zero, of any scale
CONFLICTS = {
    "conflicting": lambda m, n: signed(gaussian(m, n)),
    "alike": alike,
    "condition 1e4": lambda m, n: signed(with_condition(m, max(m, n), 1e4)),
    "duplicate": duplicate,
    "zero rows": lambda m, n: signed(zero_rows(m, n)),
    "graded": lambda m, n: signed(graded(m, n)),
    "tiny": lambda m, n: 1e-12 * signed(gaussian(m, n)),
    "huge": lambda m, n: 1e12 * signed(gaussian(m, n)),
    "unequal": lambda m, n: (
        signed(gaussian(m, n)) * 10.0 ** -torch.arange(0.0, 6.1, 6 / m)[:m, None]
    ),
    "opposed": opposed,
    "vanishing": vanishing,
}
