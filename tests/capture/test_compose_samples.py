"""Samples that are moved, picked, cut up, or computed with each other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from tests.capture.oracle import BATCH, agrees, batch, energy, entropy, labels, loop, mlp, refused

X = batch()
WORDS = batch(4, 3, 5)
IMAGES = batch(3, 2, 6, 6)


def on(model, forward):
    agrees(model, lambda: forward(model))


def hidden(model, x=X):
    return model[1](model[0](x))


# moved: rows follow their samples


@pytest.mark.parametrize(
    "move",
    [
        lambda h: h[torch.tensor([3, 0, 5, 1, 4, 2])],
        lambda h: h.index_select(0, torch.tensor([2, 1, 0, 5, 5, 3])),
        lambda h: h.flip(0),
        lambda h: h.roll(2, 0),
        lambda h: h[h[:, 0].argsort()],
        lambda h: h[X[:, 0] > 0],
        lambda h: h[X.sum(1) > 0][:, 2:],
        lambda h: torch.cat([h[4:], h[:4]]),
        lambda h: torch.stack(list(h.unbind())[::-1]),
        lambda h: h.t()[None].transpose(1, 2)[0],
        lambda h: h.gather(1, torch.arange(14).view(2, 7).repeat(3, 1).clamp(max=6)),
        lambda h: h.reshape(2, 3, 7).transpose(0, 1).reshape(6, 7),
    ],
)
def test_moved(move):
    model = mlp()
    head = nn.Linear(7, 4).double()
    model.append(head)

    def forward():
        h = move(hidden(model))
        return energy(F.linear(h, head.weight[:, : h.shape[1]], head.bias))

    agrees(model, forward)


def test_permuted_batch():
    model = mlp()
    agrees(model, lambda: entropy(model(X[torch.randperm(BATCH)])))


def test_repeated_samples():
    """Losses of copies of a sample, summed and one by one."""
    model = mlp()
    copies = lambda: energy(model[2](hidden(model).repeat_interleave(3, 0)))  # noqa: E731
    agrees(model, lambda: copies().view(BATCH, 3).sum(1))
    agrees(model, copies, warns=["0.weight, 0.bias.*ExpandBackward0"])
    agrees(model, lambda: energy(model(X.repeat_interleave(3, 0))).view(BATCH, 3).sum(1))
    agrees(model, lambda: energy(model(X.repeat(2, 1))).view(2, BATCH).sum(0))
    agrees(
        model,
        lambda: energy(model(X.repeat(2, 1))),
        groups=torch.arange(BATCH).repeat(2),
    )


def test_scattered_into_a_fresh_tensor():
    places = torch.stack([torch.randperm(9)[:4] for _ in range(BATCH)])
    rows = torch.tensor([1, 3, 5, 0, 2, 7])

    def put(model):
        out = torch.zeros(8, 4, dtype=torch.float64)
        out[rows] = model(X)
        return energy(out)

    zeros = torch.zeros(BATCH, 9, dtype=torch.float64)
    on(mlp(), lambda m: energy(zeros.scatter(1, places, m(X))))
    on(mlp(), lambda m: energy(zeros.scatter_add(1, places, m(X))))
    on(mlp(), lambda m: energy(zeros[:, :4].index_add(0, rows % 3, m(X))))
    on(mlp(), put)


def test_assigned_slice_by_slice():
    def forward(model):
        h = model(WORDS)
        out = torch.zeros(4, 3, 4, dtype=torch.float64)
        out[:, 1:] = h[:, :-1]
        out[:, 0] = 2 * h[:, 2]
        return energy(out)

    on(mlp(), forward)


def test_masked_tokens():
    mask = batch(4, 3, seed=3) > 0
    mask[:, 0] = True

    def normalised(model):
        losses = F.cross_entropy(model(WORDS).transpose(1, 2), labels(4, 12).view(4, 3),
                                 reduction="none")  # fmt: skip
        return (losses * mask).sum(1) / mask.sum(1)

    def ignored(model):
        target = labels(4, 12).view(4, 3).masked_fill(~mask, -100)
        return F.cross_entropy(model(WORDS).transpose(1, 2), target, reduction="none").sum(1)

    def picked(model):
        """Tokens that are not padding alone go through the model."""
        owner = torch.arange(4)[:, None].expand(4, 3)[mask]
        zero = torch.zeros(4, dtype=torch.float64)
        return zero.index_add(0, owner, energy(model(WORDS[mask])))

    for forward in (normalised, ignored, picked):
        on(mlp(), forward)


def test_patches():
    layer = nn.Linear(18, 18).double()

    def forward(model):
        patches = F.unfold(IMAGES, 3, padding=1).transpose(1, 2)
        return energy(F.fold(model(patches).transpose(1, 2), (6, 6), 3, padding=1))

    on(layer, forward)
    on(layer, lambda m: energy(m(IMAGES.unfold(2, 3, 3).unfold(3, 3, 3).flatten(2)[..., :18])))


def test_time_before_samples():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = nn.GRU(5, 4, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.cells(x)[0]).square().sum((0, 2))

    on(Recurrent().double(), lambda m: m(WORDS.transpose(0, 1)))


def test_elements_selected_by_a_mask():
    """Rows of single elements: no dimension holds the samples, and what is below is got slowly."""
    model = mlp()
    agrees(
        model,
        lambda: torch.masked_select(model(X), X[:, :4] > 0).square(),
        warns=["0.weight.*AddmmBackward0"],
    )


# computed with each other: refused by name, or exact


def centred(model):
    h = hidden(model)
    return energy(model[2](h - h.mean(0)))


def contrastive(model):
    z = model(X)
    return F.cross_entropy(z @ z.T, torch.arange(BATCH), reduction="none")


def mixed_up(model):
    h = hidden(model)
    return energy(model[2](torch.where(X[:, :1] > 0, h, h.roll(1, 0))))


@pytest.mark.parametrize(
    ("forward", "operation"),
    [
        (lambda m: energy(m(X).softmax(0)), "SoftmaxBackward0"),
        (lambda m: energy(m(X).log_softmax(0)), "LogSoftmaxBackward0"),
        (lambda m: energy(m(X).cumsum(0)), "CumsumBackward0"),
        (centred, "SubBackward0"),
        (contrastive, "MmBackward0"),
        (mixed_up, "WhereBackward0"),
    ],
)
def test_coupled(forward, operation):
    model = mlp()
    refused(model, lambda: forward(model), operation, "0.weight", "0.bias")


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm(affine):
    """Only what lies below it has no rows; in evaluation mode all has."""
    model = mlp(middle=[nn.BatchNorm1d(7, affine=affine, dtype=torch.float64)])
    forward = lambda: entropy(model(X))  # noqa: E731
    refused(model, forward, "BatchNorm", ": 0.weight, 0.bias|^0.weight, 0.bias:")
    with gs.tape(model) as tape:
        losses = forward()
    with pytest.raises(gs.InputError, match=r"1 \(BatchNorm1d\) in training mode"):
        tape.jacobian(losses)
    model.eval()
    agrees(model, forward)


def test_batch_norm_of_the_input():
    """Nothing is below it: no parameter couples samples."""
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    agrees(model, lambda: entropy(model(X)))


def test_only_parameters_above():
    model = mlp(middle=[nn.BatchNorm1d(7, dtype=torch.float64)])
    with gs.tape(model, parameters=list(model[-1].parameters())) as tape:
        losses = entropy(model(X))
    jacobian = tape.jacobian(losses)
    rows = loop(entropy(model(X)), model)
    torch.testing.assert_close(
        jacobian.materialize(), torch.cat([r.flatten(1) for r in rows[-2:]], 1)
    )


def test_sorted_column_by_column():
    """Only relabels, but each column its own way."""
    model = mlp()
    agrees(model, lambda: energy(model(X).sort(0)[0]), warns=["AddmmBackward0"])


def test_shared_by_all_rows():
    """What all losses use, and none has a part in of its own, has exact rows like a parameter."""
    model = nn.ModuleList([mlp(), mlp()])
    agrees(model[0], lambda: energy(model[0](X).mean(0) - X[:, :4]))

    def towers():
        return F.cross_entropy(model[0](X) @ model[1](X).T, torch.arange(BATCH), reduction="none")

    agrees(model, towers)


# parameters of single samples


class Offsets(nn.Module):
    """A parameter with a row for each sample."""

    def __init__(self, size, shared):
        super().__init__()
        self.offsets = nn.Parameter(torch.randn(size, 5))
        self.net, self.shared = mlp(), shared

    def forward(self, x):
        offsets = self.offsets
        if self.shared == "sum":
            return energy(self.net(x + offsets + offsets.sum(0)))
        if self.shared == "neighbours":
            both = [x[i] + offsets[i] + offsets[i + 1] for i in range(len(x))]
            return torch.stack([self.net(row).sum() for row in both])
        if self.shared == "weighted":
            return offsets[:, 0].softmax(0) * energy(self.net(x + offsets))
        return energy(self.net(x + offsets[: len(x)]))


@pytest.mark.parametrize("shared", ["", "sum", "neighbours"])
def test_parameter_per_sample(shared):
    model = Offsets(BATCH + (shared == "neighbours"), shared).double()
    agrees(model, lambda: model(X))


def test_weights_over_samples():
    model = Offsets(BATCH, "weighted").double()
    refused(model, lambda: model(X), "SoftmaxBackward0", "offsets")
