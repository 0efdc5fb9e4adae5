"""Rows of float64 whose squares float64 does not hold, and norms that the rows' dtype does not."""

import pytest
import torch

import gradsurgery as gs

TINY = [1e-150, 1e-157, 1e-163, 1e-200, 1e-300]
scales = pytest.mark.parametrize("scale", TINY)


def rows_of(m=3, n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, dtype=torch.float64, generator=generator)


def close(a, b, tolerance=1e-12):
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-300)


@scales
@pytest.mark.parametrize("short", [[0, 1, 2], [1]], ids=["all", "one"])
@pytest.mark.parametrize("blocks", [False, True])
def test_project_out_projects_off_rows_of_any_length(scale, short, blocks, impl):
    rows, grad = rows_of(), rows_of(1, seed=1)[0]
    perp, info = gs.project_out(grad, rows, return_info=True)
    rows[short] *= scale
    if blocks:
        rows = [rows[:, :16].view(3, 4, 4), rows[:, 16:16], rows[:, 16:]]
        grad = [grad[:16].view(4, 4), grad[16:16], grad[16:]]
    found, same = gs.project_out(grad, rows, return_info=True)
    found = torch.cat([part.flatten() for part in found]) if blocks else found
    close(found, perp)
    assert same.rank == info.rank == 3
    assert same.max_cosine < 1e-9


@scales
def test_project_out_projects_gradients_of_any_length(scale, impl):
    rows, grad = rows_of(), rows_of(1, seed=1)[0]
    perp, info = gs.project_out(grad, rows, return_info=True)
    found, same = gs.project_out(scale * grad, scale * rows, return_info=True)
    close(found / scale, perp)
    assert float(same.kept_norm) == pytest.approx(float(info.kept_norm), rel=1e-12)


def test_the_shortest_rows_count_beside_the_longest(impl):
    rows, grad = rows_of(), rows_of(1, seed=1)[0]
    expected = gs.project_out(grad, rows)
    factors = torch.tensor([1e-300, 1e150, 1.0], dtype=torch.float64)
    close(gs.project_out(grad, rows * factors[:, None]), expected)
    q, _ = gs.orthonormalize(rows)
    close(gs.orthonormalize(rows * factors[:, None])[0], q)
    f, r = rows[0], rows[1] - 2 * rows[0]
    want = gs.harmonize(f, r, mode="both")
    for a, b in ((1e-300, 1e150), (1e150, 1e-300)):
        found = gs.harmonize(a * f, b * r, mode="both")
        close(found[0] / a, want[0])
        close(found[1] / b, want[1])


def test_zero_rows_stay_zero_rows_beside_short_ones(impl):
    rows, grad = rows_of(), rows_of(1, seed=1)[0]
    expected = gs.project_out(grad, rows[:2])
    rows[2] = 0
    rows[1] *= 1e-200
    found, info = gs.project_out(grad, rows, return_info=True)
    close(found, expected)
    assert info.rank == 2
    zero, info = gs.project_out(torch.zeros_like(grad), rows, return_info=True)
    assert not zero.any()
    assert info.kept_norm == 0


@scales
@pytest.mark.parametrize("mode", ["forget", "retain", "both"])
@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("which", [(1, 0), (0, 1), (1, 1)])
def test_harmonize_edits_gradients_of_any_length(scale, mode, per, which, impl):
    f, r = rows_of(2, seed=2)
    r = r - 2 * f
    parts = lambda g: [g[:16].view(4, 4), g[16:16], g[16:]]  # noqa: E731
    expected = gs.harmonize(parts(f), parts(r), mode=mode, per=per)
    factors = [scale if short else 1.0 for short in which]
    found = gs.harmonize(parts(f * factors[0]), parts(r * factors[1]), mode=mode, per=per)
    for a, b, factor in zip(found, expected, factors, strict=True):
        close(torch.cat([t.flatten() for t in a]) / factor, torch.cat([t.flatten() for t in b]))


@scales
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40), (5, 3)])
def test_orthonormalize_takes_rows_of_any_length(scale, shape, impl):
    rows = rows_of(1, torch.Size(shape).numel()).view(shape)
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    factors = torch.ones(shape[:-1], dtype=torch.float64)
    factors[..., 1] = scale
    found, factor, same = gs.orthonormalize(rows * factors[..., None], return_rank=True)
    close(found, q)
    assert torch.equal(same, rank)
    for i in range(shape[-2]):
        unit = factors.flatten(end_dim=-2)[0, i] if len(shape) > 2 else factors[i]
        close(factor[..., :, i] / unit, r[..., :, i])


@pytest.mark.parametrize(
    ("dtype", "value", "wider"),
    [
        (torch.float16, 3e3, "float"),
        (torch.bfloat16, 1e38, "double"),
        (torch.float32, 1e38, "double"),
    ],
    ids=str,
)
def test_orthonormalize_says_where_r_does_not_fit(dtype, value, wider, impl):
    rows = torch.full((2, 1000), value, dtype=dtype)
    rows[0] = 1
    rows[1, ::2] *= -1
    with pytest.raises(gs.NonFiniteError, match=rf"R does not fit into {dtype}.*norm of row 1"):
        gs.orthonormalize(rows)
    with pytest.raises(gs.NonFiniteError, match=rf"row 1 of matrix \[1\].*rows.{wider}\(\)"):
        gs.orthonormalize(torch.stack([torch.ones_like(rows), rows]))
    _, r = gs.orthonormalize(getattr(rows, wider)())
    assert r.isfinite().all()


@scales
def test_rules_refuse_rows_whose_squares_float64_does_not_hold(scale):
    rows = rows_of()
    rows[1] *= scale
    for given in (rows, [rows[:, :10], rows[:, 10:]]):
        for rule in (gs.UPGrad(), gs.OrthoGrad(), gs.PCGrad(granularity="tensor")):
            with pytest.raises(gs.InputError, match="does not hold the square of row 1: scale it"):
                rule(given)
    rows[1] /= scale
    assert gs.UPGrad()(rows).isfinite().all()
    rows[1] = 0
    assert gs.UPGrad()(rows).isfinite().all()
