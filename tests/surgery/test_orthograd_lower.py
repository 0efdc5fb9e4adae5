"""OrthoGrad of forget losses that training is to lower."""

import pytest
import torch

from gradsurgery import DenseJacobian, OrthoGrad
from tests.surgery.test_orthograd import blocks


def test_a_loss_made_to_forget_is_descended_worked_by_hand(impl):
    # g_u = (1, 1), one retain gradient (2, 0): g⊥ = (0, 1), and the update is α g + (1 - α) g⊥
    rows = torch.tensor([[1.0, 1], [2, 0]], dtype=torch.float64)
    for alpha, expected in ((0, [0, 1]), (0.5, [1, 0.5]), (1, [2, 0])):
        assert OrthoGrad(alpha=alpha, objective="lower")(rows).tolist() == pytest.approx(expected)
    # a row of memory (0, 3, 0) besides: of g_u = (1, 1, 1) there is left g⊥ = (0, 0, 1)
    rows = torch.tensor([[1.0, 1, 1], [2, 0, 0], [0, 3, 0]], dtype=torch.float64)
    update = OrthoGrad(objective="lower")(rows, memory=2)
    assert update.tolist() == pytest.approx([1, 0, 0.5])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"retain": "mean"},
        {"granularity": "tensor", "refine": 1},
        {"granularity": "module", "small_tensors": "leave"},
    ],
    ids=str,
)
def test_lowering_a_loss_is_raising_its_negative(options, impl):
    lowered = blocks(4)
    raised = {
        name: rows * torch.tensor([-1.0, 1, 1, 1]).view(-1, *[1] * (rows.dim() - 1))
        for name, rows in lowered.items()
    }
    found = OrthoGrad(objective="lower", **options).solve(DenseJacobian(lowered))
    expected = OrthoGrad(**options).solve(DenseJacobian(raised))
    signs = torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(found.weights, expected.weights * signs)
    torch.testing.assert_close(found.kept_norm, expected.kept_norm)
