"""A vocabulary that is read as an embedding and multiplied with as a head."""

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.capture import paths
from gradsurgery.capture.row_numbers import RowNumbers

VOCABULARY, WIDTH = 23, 6


class Tied(nn.Module):
    """Reads the vocabulary at every token, multiplies with it at the first `head` of them."""

    def __init__(self, head, padding):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.body, self.head = nn.Linear(WIDTH, WIDTH), head

    def forward(self, ids):
        x = torch.tanh(self.body(self.embed(ids).cumsum(1)))
        return (x[:, : self.head] @ self.embed.weight.mT).log_softmax(-1)


def losses_of(net, ids):
    return net(ids)[..., 3].square().mean(1)


@pytest.mark.parametrize("groups", [None, [0, 0, 0, 0, 1, 2], [0, 1, 2, 2, 2, 2]])
@pytest.mark.parametrize("head", [1, 4, 7])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("path", ["", "factored", "direct"])
def test_gramian_and_update(path, padding, head, groups, monkeypatch):
    monkeypatch.setenv("GRADSURGERY_PATH", path)
    monkeypatch.setattr(paths, "PICKED", 100)  # several steps
    net = Tied(head, padding).double()
    ids = torch.randint(0, VOCABULARY, (6, 7))
    ids[0, :3], ids[1] = 2, 5  # the padding, and a token many times
    groups = None if groups is None else torch.tensor(groups)
    with gs.tape(net) as tape:
        losses = losses_of(net, ids)
    jacobian = tape.jacobian(losses, groups=groups)

    rows = torch.zeros(jacobian.m, sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    for k, loss in enumerate(losses_of(net, ids)):
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        rows[k if groups is None else groups[k]] += torch.cat([g.flatten() for g in grads])
    torch.testing.assert_close(jacobian.gramian(), rows @ rows.mT, rtol=1e-11, atol=1e-13)
    weights = torch.linspace(-1, 2, jacobian.m).double()
    jacobian.backward(weights)
    update = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(update, weights @ rows, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e15])
def test_small_and_large_gradients_keep_their_products(size):
    left, right = size * torch.randn(3, 4, 9), torch.randn(3, 4, 5)
    ids, grads = torch.randint(9, (2, 6)), size * torch.randn(2, 6, 5)
    head = paths.MatrixUse(left, right, RowNumbers(torch.arange(3)))
    picked = paths.EmbeddingUse(ids, grads, RowNumbers(torch.arange(2)), 9)
    planes = torch.zeros(2, 9, 5, dtype=torch.float64)
    for plane, rows, values in zip(planes, ids, grads.double(), strict=True):
        plane.index_add_(0, rows, values)
    exact = (left.double().mT @ right.double()).flatten(1) @ planes.flatten(1).mT
    torch.testing.assert_close(paths.pairs_of(head, picked), exact, rtol=1e-5, atol=size**2 * 1e-5)


def test_the_tokens_meet_by_hand():
    # two samples of a vocabulary of 3 x 2. G: row 0 gets (1, 2), row 2 gets (3, 0) of sample 0;
    # row 2 gets (1, 1), twice, of sample 1. E: sample 0 picked row 2 with (5, 6), sample 1 nothing
    left = torch.tensor([[[1.0, 0, 0], [0, 0, 1.0]], [[0, 0, 1.0], [0, 0, 1.0]]])
    right = torch.tensor([[[1.0, 2], [3, 0]], [[1, 1], [1, 1]]])
    head = paths.MatrixUse(left, right, RowNumbers(torch.arange(2)))
    picked = paths.EmbeddingUse(
        torch.tensor([[2], [-1]]),
        torch.tensor([[[5.0, 6]], [[7, 8]]]),
        RowNumbers(torch.arange(2)),
        3,
    )
    # <G_0, E_0> = 3 * 5, <G_1, E_0> = 2 * (5 + 6)
    assert paths.pairs_of(head, picked).tolist() == [[15, 0], [22, 0]]
    assert paths.pairs_of(picked, head).tolist() == [[15, 22], [0, 0]]
