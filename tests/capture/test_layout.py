"""Where samples lie in a tensor."""

import math

import pytest
import torch

from gradsurgery.capture.layout import Layout
from gradsurgery.capture.row_numbers import RowNumbers

SHAPES = [
    (),
    (1,),
    (6,),
    (2, 3),
    (3, 2),
    (6, 4),
    (2, 6, 4),
    (2, 3, 4),
    (3, 2, 2, 2),
    (0, 3),
    (2, 0),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_beside_a_tensor_are_those_of_its_elements(shape):
    for count in (1, 2, 3, 6):
        rows = torch.arange(count).flip(0) - 1
        for stride in range(1, max(2, math.prod(shape) + 1)):
            layout = Layout(stride, RowNumbers(rows))
            beside = layout.beside(shape)
            assert beside.dim() == len(shape)
            assert torch.equal(beside.expand(shape), layout.elements(shape))
