"""The operators on rows of any layout, dtype and scale, against float64."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradsurgery as gs
from tests.fuzz.matrices import in_blocks, largest, matrices, separated, unit
from tests.fuzz.profiles import attack, examples

PROMISE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
BACKENDS = ["torch", "native"]


def unchanged(*tensors):
    """Copies, and a check that the tensors still hold the same bits."""
    copies = [tensor.clone() for tensor in tensors]
    return lambda: all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(tensors, copies, strict=True)
    )


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("GRADSURGERY_BACKEND", request.param)


@examples(20)
@given(matrices(), st.booleans(), st.booleans(), st.integers(0, 300))
def test_gramian(backend, rows, precise, tensors, cut):
    with attack("operators: gramian", may_refuse=False):
        untouched = unchanged(rows)
        given_rows = in_blocks(rows, min(cut, rows.shape[1])) if tensors else rows
        gram = gs.gramian(given_rows, precise=precise)
        directions, norms = unit(rows)
        expected = directions @ directions.mT
        scale = torch.where(norms > 0, 1 / norms, 0)
        error = (gram * scale[:, None] * scale - expected).abs()
        exact = precise or rows.dtype == torch.float64
        assert gram.dtype == torch.float64 and gram.shape == (len(rows), len(rows))
        assert bool((error <= (1e-12 if exact else 2e-6)).all()), float(error.max())
        if tensors:
            both = gs.gramian(given_rows, per="tensor", precise=precise).sum(0)
            apart = (both - gram) * scale[:, None] * scale
            assert bool((apart.abs() <= (1e-12 if exact else 2e-6)).all())
        assert untouched()


@examples(20)
@given(matrices(), st.integers(0, 2**20), st.integers(-20, 20), st.booleans(), st.integers(0, 300))
def test_combine(backend, rows, seed, power, tensors, cut):
    with attack("operators: combine", may_refuse=False):
        torch.manual_seed(seed)
        weights = torch.randn(len(rows)).double() * 10.0**power
        untouched = unchanged(rows, weights)
        cut = min(cut, rows.shape[1])
        wide = rows.double()
        expected = weights @ wide
        size = weights.abs() @ wide.abs()
        info = torch.finfo(rows.dtype)
        call = lambda: gs.combine(in_blocks(rows, cut) if tensors else rows, weights)  # noqa: E731
        if bool((expected.abs() > largest(rows.dtype) * (1 - info.eps)).any()):
            with pytest.raises(gs.NonFiniteError, match="overflows"):
                call()
            return
        found = call()
        found = torch.cat([part.flatten() for part in found]) if tensors else found
        assert found.dtype == rows.dtype
        bound = info.eps * expected.abs() + info.smallest_normal * info.eps + 1e-14 * size
        assert bool(((found.double() - expected).abs() <= bound).all())
        assert untouched()


@examples(30)
@given(matrices(least=1, columns=150), st.integers(0, 2**20), st.booleans(), st.integers(0, 300))
def test_project_out(backend, rows, seed, tensors, cut):
    with attack("operators: project_out", may_refuse=False):
        torch.manual_seed(seed)
        g = torch.randn(rows.shape[1], dtype=torch.float64)
        if seed % 3 == 0:  # partly in the span
            g = g + unit(rows)[0].sum(0) * (seed % 7)
        g = g.to(rows.dtype)
        untouched = unchanged(rows, g)
        cut = min(cut, rows.shape[1])
        grad = in_blocks(g, cut, True) if tensors else g
        blocks = in_blocks(rows, cut) if tensors else rows
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            perp, info = gs.project_out(grad, blocks, return_info=True)
        perp = torch.cat([p.flatten() for p in perp]) if tensors else perp
        assert perp.dtype == g.dtype and untouched()
        directions, _ = unit(rows)
        wide, norm = perp.double(), g.double().norm()
        length = wide.norm()
        cosine = (directions @ wide).abs().max() / length if length > 0 else wide.new_zeros(())
        assert abs(cosine - info.max_cosine) <= 1e-6 + 1e-3 * cosine
        assert cosine <= PROMISE[g.dtype] or caught, float(cosine)
        rank = separated(rows)
        if rank is None:
            return
        assert int(info.rank) == rank
        basis = torch.linalg.svd(directions, full_matrices=False)[2][:rank]
        expected = g.double() - (g.double() @ basis.mT) @ basis
        tolerance = {8: 1e-8, 4: 2e-5, 2: 2e-2}[g.dtype.itemsize]
        assert (wide - expected).norm() <= tolerance * norm + torch.finfo(g.dtype).tiny * len(g)
        if norm > 0:
            kept = float(expected.norm() / norm)
            assert (
                abs(float(info.kept_norm) - kept) <= {8: 1e-8, 4: 1e-5, 2: 1e-2}[g.dtype.itemsize]
            )


@examples(30)
@given(matrices(columns=150), st.sampled_from([(), (2,), (0,), (2, 1)]), st.booleans())
def test_orthonormalize(backend, rows, batch, turned):
    with attack("operators: orthonormalize", may_refuse=False):
        given_rows = rows.expand(*batch, *rows.shape) if batch else rows
        if batch == (2,) and rows.shape[1] > 1 and turned:
            given_rows = torch.stack([rows, rows.flip(1)])
        untouched = unchanged(given_rows)
        q, r, rank = gs.orthonormalize(given_rows, return_rank=True)
        assert q.shape == given_rows.shape and r.shape == (*given_rows.shape[:-1], len(rows))
        assert q.dtype == r.dtype == rows.dtype and untouched()
        eps = torch.finfo(rows.dtype).eps
        for at in range(int(torch.tensor(batch).prod()) if batch else 1):
            shape = (-1, *given_rows.shape[-2:])
            one = given_rows.reshape(shape)[at] if given_rows.numel() else rows
            if not given_rows.numel():
                continue
            one_q = q.reshape(shape)[at].double()
            one_r = r.reshape(-1, len(rows), len(rows))[at].double()
            _, norms = unit(one)
            scale = torch.where(norms > 0, 1 / norms, 0)
            assert bool((one_r.tril(-1) == 0).all())
            # of 16 bits the rounding of q may decide the sign of what is nearly dependent
            noise = eps * norms * len(rows) if eps > 1e-4 else 0 * norms
            assert bool((one_r.diagonal() >= -noise).all())
            columns = one_r * scale  # column i in units of row i's norm
            error = columns.mT @ one_q - one.double() * scale[:, None]
            # a dependent row is left to no more than rtol, 1e-6
            assert bool((error.norm(dim=1) <= 2e-6 + 8 * eps * len(rows)).all())
            used = one_q.norm(dim=1) > 0
            assert int(used.sum()) == int(rank.reshape(-1)[at])
            apart = one_q[used] @ one_q[used].mT - torch.eye(int(used.sum()))
            known = separated(one)
            if known is not None:
                assert int(used.sum()) == known
                bound = 8 * eps * (len(rows) + 1) if rows.dtype.itemsize < 8 else 1e-10
                assert bool((apart.abs() <= bound).all()), float(apart.abs().max())


@examples(20)
@given(
    matrices(least=2, most=2),
    st.sampled_from(["forget", "retain", "both"]),
    st.sampled_from(["model", "tensor"]),
    st.integers(0, 300),
    st.booleans(),
)
def test_harmonize(backend, rows, mode, per, cut, tensors):
    with attack("operators: harmonize", may_refuse=False):
        untouched = unchanged(rows)
        cut = min(cut, rows.shape[1])
        f, r = rows
        pair = [in_blocks(side, cut, True) for side in (f, r)] if tensors else [f, r]
        parts = [slice(0, cut), slice(cut, None)] if tensors and per == "tensor" else [slice(None)]
        new = []
        for a, b in ((f, r), (r, f)):
            edited = []
            for part in parts:
                (x, y), (n, k) = unit(torch.stack([a[part], b[part]]))
                cosine = x @ y
                edited.append(n * (x - cosine.clamp(max=0) * y) if k > 0 else n * x)
            new.append(torch.cat(edited))
        if mode == "forget":
            new[1] = r.double()
        if mode == "retain":
            new[0] = f.double()
        top = largest(rows.dtype)
        if any(bool((side.abs() > top * 0.99).any()) for side in new):
            return
        found = gs.harmonize(*pair, mode=mode, per=per)
        assert untouched()
        for side, expected, original in zip(found, new, (f, r), strict=True):
            side = torch.cat([part.flatten() for part in side]) if tensors else side
            tolerance = {8: 1e-12, 4: 1e-5, 2: 2e-2}[rows.dtype.itemsize]
            least = torch.finfo(rows.dtype).smallest_normal * len(side)
            error = (side.double() - expected).norm()
            assert error <= tolerance * unit(original[None])[1][0] + least


@examples(15)
@given(matrices(most=12))
def test_diagnose(backend, rows):
    with attack("operators: diagnose", may_refuse=False):
        gram = gs.gramian(rows, precise=True)
        found = gs.diagnose(gram)
        directions, norms = unit(rows)
        torch.testing.assert_close(found.norms, norms, rtol=1e-9, atol=0)
        assert bool(((found.cosines - directions @ directions.mT).abs() <= 1e-9).all())
        pairs = len(rows) * (len(rows) - 1) / 2
        negative = (found.cosines.triu(1) < 0).sum()
        assert found.conflict_rate == (float(negative / pairs) if pairs else 0)
        assert len(found.to_dict()["conflicts"]) == int(negative)
        rank = separated(rows) if len(rows) else 0
        assert rank is None or found.rank == rank
        assert -1e-9 <= found.effective_rank <= len(rows) + 1e-6
        assert str(found)
        blocks = in_blocks(rows, rows.shape[1] // 2)
        stored = gs.diagnose(gs.DenseJacobian(blocks))
        assert bool(((stored.cosines - found.cosines).abs() <= 1e-9).all())


@examples(15)
@given(matrices(least=1), st.integers(1, 8), st.integers(0, 2**20), st.booleans())
def test_stored_rows(backend, rows, at, seed, tensors):
    with attack("operators: DenseJacobian, concat", may_refuse=False):
        at = min(at, len(rows))
        cut = rows.shape[1] // 3
        split = lambda part: in_blocks(part, cut) if tensors else part  # noqa: E731
        whole = gs.DenseJacobian(split(rows))
        parts = [gs.DenseJacobian(split(part)) for part in (rows[:at], rows[at:])]
        together = gs.concat(parts)
        assert together.m == len(rows)
        directions, norms = unit(rows)
        size = norms[:, None] * norms
        for gram in (whole.gramian(), together.gramian(), whole.gramian(per="tensor").sum(0)):
            assert bool(((gram - size * (directions @ directions.mT)).abs() <= 1e-12 * size).all())
        assert torch.equal(whole.materialize(), rows)
        torch.testing.assert_close(whole.row_norms(), norms, rtol=1e-9, atol=0)
        torch.manual_seed(seed)
        vectors = [torch.randn(block.shape[1:], dtype=rows.dtype) for block in whole.blocks]
        products = whole.products(vectors).sum(0)
        flat = torch.cat([vector.flatten() for vector in vectors]).double()
        bound = 1e-12 * norms * flat.norm() + 1e-300
        assert bool(((products - norms * (directions @ flat)).abs() <= bound).all())
        metric = [vector.abs().float().to(rows.dtype) for vector in vectors]
        measured = whole.gramian(metric=metric)
        weighted = directions * torch.cat([w.flatten() for w in metric]).double()
        expected = weighted @ directions.mT
        scale = torch.where(norms > 0, 1 / norms, 0)
        tolerance = {8: 1e-11, 4: 1e-4, 2: 5e-2}[rows.dtype.itemsize]
        largest_weight = max([float(w.max()) for w in metric if w.numel()], default=0.0)
        error = (measured * scale[:, None] * scale - expected).abs()
        assert bool((error <= tolerance * largest_weight + 1e-12).all())
