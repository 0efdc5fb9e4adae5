"""Operators and rules inside torch.func.vmap are those of each sample."""

import pytest
import torch
from torch.func import vmap

import gradsurgery as gs
from gradsurgery import ops
from tests.inputs import gaussian, signed

CALLS = {
    "gramian": lambda rows: gs.gramian(rows),
    "gramian of blocks": lambda rows: gs.gramian([rows, rows[:, :2]], per="tensor"),
    "combine": lambda rows: gs.combine(rows, rows[:, 0]),
    "combine blocks": lambda rows: gs.combine([rows, rows[:, :2]], rows[:, 0])[1],
    "project_out": lambda rows: gs.project_out(rows[0], rows[1:]),
    "orthonormalize": lambda rows: gs.orthonormalize(rows)[1],
    "harmonize": lambda rows: gs.harmonize(rows[0], rows[1])[0],
    "projection_weights": lambda rows: ops.projection_weights(rows @ rows.mT, rows[:, 0])[0],
    "cone_weights": lambda rows: ops.cone_weights(rows @ rows.mT, rows[None, :, 0])[0],
    "bargaining_weights": lambda rows: ops.bargaining_weights(rows @ rows.mT),
    "conflict_averse_weights": lambda rows: ops.conflict_averse_weights(rows @ rows.mT, 0.5),
    "eigen": lambda rows: ops.eigen(rows @ rows.mT)[0],
    "UPGrad": lambda rows: gs.UPGrad()(rows),
    "MGDA of blocks": lambda rows: gs.MGDA()({"a": rows, "b": rows[:, :2]})["b"],
    "OrthoGrad weights": lambda rows: gs.OrthoGrad().weights(rows @ rows.mT),
    "Mean weights": lambda rows: gs.Mean().weights(rows @ rows.mT),
}


@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_a_loop(name, impl):
    rows = torch.stack([signed(gaussian(4, 9)) + 0.3 for _ in range(3)])
    expected = torch.stack([CALLS[name](sample) for sample in rows])
    torch.testing.assert_close(vmap(CALLS[name])(rows), expected)
    last = rows.movedim(0, -1)
    torch.testing.assert_close(vmap(CALLS[name], in_dims=2)(last), expected)


def test_what_is_shared_is_not_looped_over(impl):
    rows, weights = gaussian(4, 9), gaussian(3, 4)
    found = vmap(gs.combine, in_dims=(None, 0))(rows, weights)
    torch.testing.assert_close(found, weights @ rows)


def test_gradients_flow_through_vmap(impl):
    rows = torch.stack([gaussian(3, 5) for _ in range(2)]).requires_grad_()
    (found,) = torch.autograd.grad(vmap(gs.gramian)(rows).sum(), rows)
    torch.testing.assert_close(found, 2 * rows.sum(1, keepdim=True).expand_as(rows))


def test_names_the_row_that_is_not_finite(impl):
    rows = torch.ones(3, 2, 4, dtype=torch.float64)
    rows[1, 1, 2] = torch.nan
    with pytest.raises(gs.NonFiniteError, match="rows: row 1 is not finite"):
        vmap(gs.gramian)(rows)
    with pytest.raises(gs.NonFiniteError, match="gramian is not finite in row"):
        vmap(gs.UPGrad().weights)(rows @ rows.mT)
