"""DenseJacobian: the rows autograd gives one at a time, and what may be done with them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import gradsurgery as gs
from gradsurgery import DenseJacobian
from tests.models import MODELS, assert_same_state, classification, make, state_of


def one_by_one(model, batch, loss):
    """{name: [B, *p.shape]}: a backward per sample, a batch of one each."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: [] for name in named}
    for i in range(gs.jacobian.batch_size(batch)):
        sample = pytree.tree_map(lambda leaf, i=i: leaf[i : i + 1], batch)
        grads = torch.autograd.grad(
            loss(model, sample).sum(), list(named.values()), allow_unused=True
        )
        for (name, parameter), grad in zip(named.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(parameter) if grad is None else grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 32])
def test_rows_are_the_gradients_of_single_samples(name, chunk_size, impl):
    model, batch, loss = make(name)
    jacobian = DenseJacobian.from_model(model, batch, loss, chunk_size=chunk_size)
    expected = one_by_one(model, batch, loss)
    assert jacobian.names == list(expected)
    assert jacobian.m == 5
    assert jacobian.sizes == [rows[0].numel() for rows in expected.values()]
    for block, (tensor, rows) in zip(jacobian.blocks, expected.items(), strict=True):
        assert (block - rows).abs().max() <= 1e-10, tensor
    torch.testing.assert_close(jacobian.losses, loss(model, batch).detach(), rtol=1e-12, atol=1e-12)

    whole = torch.cat([rows.reshape(5, -1) for rows in expected.values()], 1)
    torch.testing.assert_close(jacobian.materialize(), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(jacobian.gramian(), whole @ whole.mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(jacobian.row_norms(), whole.norm(dim=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_row_is_the_gradient_of_the_mean_loss(name):
    model, batch, loss = make(name)
    mean = DenseJacobian.from_model(model, batch, loss, rows="mean")
    samples = DenseJacobian.from_model(model, batch, loss)
    assert mean.m == 1
    assert mean.names == samples.names
    for row, rows in zip(mean.blocks, samples.blocks, strict=True):
        torch.testing.assert_close(row[0], rows.mean(0), rtol=0, atol=1e-10)
    assert mean.losses.item() == pytest.approx(samples.losses.mean().item(), rel=1e-12)


def test_rows_carry_no_factor_of_the_batch():
    # the gradient of sample 0 is the same whatever else is in the batch
    model, batch, loss = make("mlp", size=8)
    alone = DenseJacobian.from_model(model, tuple(leaf[:1] for leaf in batch), loss)
    together = DenseJacobian.from_model(model, batch, loss)
    torch.testing.assert_close(alone.materialize()[0], together.materialize()[0])


def test_tied_weights_are_one_parameter_with_the_sum_of_uses():
    model, batch, loss = make("tied attention")
    jacobian = DenseJacobian.from_model(model, batch, loss)
    assert jacobian.names.count("embedding.weight") == 1
    assert "head.weight" not in jacobian.names


def test_frozen_parameters_are_left_out_and_unused_ones_are_zero():
    model, batch, loss = make("partial")
    jacobian = DenseJacobian.from_model(model, batch, loss)
    assert not any(name.startswith("frozen") for name in jacobian.names)
    rows = dict(zip(jacobian.names, jacobian.blocks, strict=True))
    assert not rows["unused.weight"].any()
    assert rows["scale"].shape == (5,)
    assert rows["scale"].any()


def test_only_the_parameters_asked_for():
    model, batch, loss = make("mlp")
    whole = DenseJacobian.from_model(model, batch, loss)
    part = DenseJacobian.from_model(model, batch, loss, parameters=[model[2].bias, model[0].weight])
    assert part.names == ["0.weight", "2.bias"]
    assert torch.equal(part.blocks[1], whole.blocks[3])


def test_dropout_draws_for_each_sample():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1, bias=False)).double()
    batch = torch.ones(6, 64).double()
    rows = DenseJacobian.from_model(model, batch, lambda m, x: m(x)[:, 0]).blocks[0][:, 0]
    assert set(rows.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row.tolist()) for row in rows}) == 6


@pytest.mark.parametrize("rows", ["samples", "mean"])
def test_nothing_is_left_on_the_model(rows):
    model, batch, loss = make("cnn in eval")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, grads = state_of(model), [p.grad for p in model.parameters()]
    keys = set(vars(model))
    jacobian = DenseJacobian.from_model(model, batch, loss, rows=rows)
    assert_same_state(before, state_of(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert set(vars(model)) == keys
    assert not any(
        m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules()
    )
    assert not any(block.requires_grad for block in jacobian.blocks)
    assert not jacobian.losses.requires_grad


@pytest.mark.parametrize("rows", ["samples", "mean"])
def test_works_where_gradients_are_off(rows):
    model, batch, loss = make("mlp")
    expected = DenseJacobian.from_model(model, batch, loss, rows=rows).materialize()
    with torch.no_grad():
        found = DenseJacobian.from_model(model, batch, loss, rows=rows).materialize()
    assert torch.equal(found, expected)


# what is done with rows


def dense():
    return DenseJacobian({"w": torch.randn(3, 2, 2).double(), "b": torch.randn(3).double()})


def test_names_come_from_the_mapping_or_from_positions():
    assert dense().names == ["w", "b"]
    assert DenseJacobian([torch.ones(2, 3), torch.ones(2)]).names == ["0", "1"]
    single = DenseJacobian(torch.ones(2, 3))
    assert (single.names, single.sizes, single.m) == (["0"], [3], 2)


def test_combine_is_a_weighted_sum(impl):
    jacobian, weights = dense(), torch.randn(3).double()
    for update, block in zip(jacobian.combine(weights), jacobian.blocks, strict=True):
        torch.testing.assert_close(update, torch.einsum("i,i...->...", weights, block))
    per_tensor = torch.randn(2, 3).double()
    for update, block, w in zip(
        jacobian.combine(per_tensor), jacobian.blocks, per_tensor, strict=True
    ):
        torch.testing.assert_close(update, torch.einsum("i,i...->...", w, block))


def test_gramian_per_tensor_adds_up(impl):
    jacobian = dense()
    each = jacobian.gramian(per="tensor")
    assert each.shape == (2, 3, 3)
    torch.testing.assert_close(each.sum(0), jacobian.gramian())


def test_metric_weights_the_inner_products(impl):
    jacobian = dense()
    metric = [torch.rand(2, 2).double(), torch.rand(()).double()]
    flat = torch.cat([metric[0].flatten(), metric[1].flatten()])
    rows = jacobian.materialize()
    torch.testing.assert_close(jacobian.gramian(metric=metric), rows * flat @ rows.mT)
    each = jacobian.gramian(per="tensor", metric=metric)
    torch.testing.assert_close(each.sum(0), rows * flat @ rows.mT)
    torch.testing.assert_close(
        each[1], metric[1] * jacobian.blocks[1] * jacobian.blocks[1][:, None]
    )


def test_products_are_of_every_row_with_a_vector(impl):
    jacobian = dense()
    vectors = [torch.randn(2, 2).double(), torch.randn(()).double()]
    products = jacobian.products(vectors)
    assert products.shape == (2, 3)
    flat = torch.cat([v.flatten() for v in vectors])
    torch.testing.assert_close(products.sum(0), jacobian.materialize() @ flat)
    torch.testing.assert_close(products[1], jacobian.blocks[1] * vectors[1])


def test_products_are_summed_in_float64():
    rows = torch.tensor([[1.0, 1e-8, -1.0]])  # float32 would lose the middle one
    products = DenseJacobian([rows]).products([torch.ones(3)])
    assert products.dtype == torch.float64
    assert products.item() == pytest.approx(1e-8)


@pytest.mark.parametrize("shapes", [[(2, 2)], [(2, 2), (1,)], [(4,), ()]], ids=str)
def test_products_need_vectors_like_the_parameters(shapes):
    with pytest.raises(
        gs.InputError, match=r"vectors must be like the parameters, \[\[2, 2\], \[\]"
    ):
        dense().products([torch.ones(shape) for shape in shapes])


def test_backward_accumulates_as_autograd_does(impl):
    model, batch, loss = make("partial")
    weights = torch.randn(5).double()
    jacobian = DenseJacobian.from_model(model, batch, loss)
    (loss(model, batch) @ weights).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    jacobian.backward(weights)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("unused"):
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)
        if not parameter.requires_grad:
            assert parameter.grad is None
    # a second time adds, in place: a view of .grad that someone holds sees it
    held = model.used.weight.grad
    jacobian.backward(2 * weights)
    assert model.used.weight.grad is held
    torch.testing.assert_close(held, 3 * expected["used.weight"], rtol=1e-10, atol=1e-12)
    assert not held.requires_grad


def test_a_backward_that_fails_changes_nothing(impl):
    model, batch, loss = make("mlp")
    jacobian = DenseJacobian.from_model(model, batch, loss)
    jacobian.backward(torch.ones(5).double())
    before = state_of(model)
    for weights in (torch.ones(4).double(), torch.full((5,), float("nan")).double()):
        with pytest.raises(gs.InputError, match="weights must be"):
            jacobian.backward(weights)
        assert_same_state(before, state_of(model))


def test_backward_needs_parameters():
    with pytest.raises(gs.InputError, match="made without parameters"):
        dense().backward(torch.ones(3))


def test_parameters_must_have_the_shapes_of_the_rows():
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(
        gs.InputError, match=r"parameters have shapes \[\[3\]\], blocks .* \[\[2\]\]"
    ):
        DenseJacobian([torch.ones(4, 2)], parameters=[parameter])


# what has no rows of its own


@pytest.mark.parametrize("rows", ["samples", "mean"])
@pytest.mark.parametrize(
    "loss,message",
    [
        (
            lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            r"one value per sample, \[[15]\], got \[\]; use",
        ),
        (lambda m, b: m(b[0]), r"one value per sample, \[[15]\], got \[[15], 3\]"),
        (
            lambda m, b: F.cross_entropy(m(b[0]), b[1]).item(),
            "loss must return a Tensor, got float",
        ),
    ],
    ids=["reduced", "a matrix", "a number"],
)
def test_refuses_a_loss_that_is_not_per_sample(loss, message, rows):
    model, batch, _ = make("mlp")
    if rows == "samples" and "float" in message:
        pytest.skip("torch itself refuses .item() under vmap")
    with pytest.raises(gs.InputError, match=message):
        DenseJacobian.from_model(model, batch, loss, rows=rows)


def test_refuses_a_loss_cut_off_from_the_parameters():
    model, batch, loss = make("mlp")
    with pytest.raises(gs.InputError, match="loss does not depend on the model's parameters"):
        DenseJacobian.from_model(model, batch, lambda m, b: loss(m, b).detach(), rows="mean")


@pytest.mark.parametrize(
    "norm,x",
    [
        (nn.BatchNorm1d(5), torch.randn(4, 5)),
        (nn.BatchNorm1d(5, track_running_stats=False).eval(), torch.randn(4, 5)),
        (nn.SyncBatchNorm(5), torch.randn(4, 5)),
    ],
)
def test_refuses_normalization_over_the_batch_by_name(norm, x):
    model = nn.Sequential(nn.Linear(5, 5), nn.Sequential(norm))
    with pytest.raises(
        gs.InputError, match=rf"^1\.0 \({type(norm).__name__}\) normalizes over the"
    ):
        DenseJacobian.from_model(model, (x, torch.zeros(4).long()), classification)


def test_serves_batch_norm_in_eval():
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).double().eval()
    batch = torch.randn(4, 5).double(), torch.arange(4)
    jacobian = DenseJacobian.from_model(model, batch, classification)
    for block, rows in zip(
        jacobian.blocks, one_by_one(model, batch, classification).values(), strict=True
    ):
        torch.testing.assert_close(block, rows)


@pytest.mark.parametrize(
    "batch,message",
    [
        ((torch.ones(4, 5), torch.zeros(3).long()), r"different batch sizes: \[3, 4\]"),
        ((torch.ones(0, 5), torch.zeros(0).long()), "batch is empty"),
        (torch.tensor(1.0), r"leading batch dimension, got a tensor of shape \[\]"),
        (None, "leading batch dimension, got None"),
        ((torch.ones(4, 5), [1, 2, 3, 4]), "leading batch dimension, got 1"),
        ((), "batch holds no tensor"),
    ],
    ids=["ragged", "empty", "scalar", "None", "list", "nothing"],
)
def test_refuses_what_is_no_batch(batch, message):
    with pytest.raises(gs.InputError, match=message):
        DenseJacobian.from_model(make("mlp")[0], batch, classification)


def test_refuses_a_model_without_trainable_parameters():
    model, batch, loss = make("mlp")
    with pytest.raises(gs.InputError, match="no parameter to differentiate"):
        DenseJacobian.from_model(model.requires_grad_(False), batch, loss)


@pytest.mark.parametrize("options", [{"rows": "sample"}, {"chunk_size": 0}])
def test_refuses_unknown_options(options):
    with pytest.raises(gs.InputError, match=r"(rows|chunk_size) must be"):
        DenseJacobian.from_model(*make("mlp"), **options)


def test_names_the_row_that_is_not_finite(impl):
    model, (x, y), loss = make("mlp")
    x[3, 1] = float("nan")
    with pytest.raises(gs.NonFiniteError, match="row 3 is not finite"):
        DenseJacobian.from_model(model, (x, y), loss).gramian()


@pytest.mark.parametrize("rows", ["samples", "mean"])
def test_refuses_a_loss_that_was_detached(rows):
    model, batch = torch.nn.Linear(3, 2), (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))

    def detached(model, batch):
        return torch.nn.functional.cross_entropy(
            model(batch[0]).detach(), batch[1], reduction="none"
        )

    with pytest.raises(gs.InputError, match="loss does not depend on the model's parameters"):
        gs.DenseJacobian.from_model(model, batch, detached, rows=rows)

    # a loss that is flat at this point is another matter
    flat = gs.DenseJacobian.from_model(
        model, batch, lambda model, batch: model(batch[0]).relu().sum(1) * 0, rows=rows
    )
    assert not flat.materialize().any()
