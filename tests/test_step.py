"""Surgeon: the step taken, what it says of itself, and what it leaves alone."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from tests.models import MODELS, assert_same_state, batch, classification, make, mlp, state_of
from tests.surgery.reference import step as reference_step

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
}


WAYS = {
    "captured": {},
    "a pass each": {"together": False},
    "in parts": {"micro_batch": 2},
    "stored": {"rows": "stored"},
}


@pytest.fixture(params=["captured", "stored"])
def way(request):
    """Options of a Surgeon: rows recorded or explicit."""
    return WAYS[request.param]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_fifty_steps_equal_the_reference(optimizer, alpha, way, impl):
    model = mlp()
    other = copy.deepcopy(model)
    ours, theirs = (OPTIMIZERS[optimizer](m.parameters()) for m in (model, other))
    surgeon = gs.Surgeon(model, ours, gs.OrthoGrad(alpha=alpha), chunk_size=3, **way)
    for _ in range(50):
        forget, retain = batch(4), batch(5)
        surgeon.step(forget=forget, retain=retain, loss=classification)
        reference_step(other, theirs, forget, retain, classification, alpha)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-9


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("refine", [0, 1])
def test_parts_as_small_as_a_sample_give_the_whole_batches_step(granularity, refine):
    start, forget, retain = mlp(), batch(5), batch(4)
    ends = []
    for micro_batch in (None, 1, 3, 5):
        model = copy.deepcopy(start)
        rule = gs.OrthoGrad(granularity=granularity, refine=refine)
        surgeon = gs.Surgeon(
            model, torch.optim.SGD(model.parameters(), lr=0.05), rule, micro_batch=micro_batch
        )
        info = surgeon.step(forget=forget, retain=retain, loss=classification)
        ends.append((torch.cat([p.detach().flatten() for p in model.parameters()]), info))
    for other, info in ends[1:]:
        torch.testing.assert_close(other, ends[0][0])
        torch.testing.assert_close(info.cosines, ends[0][1].cosines)
        assert info.forget_loss == pytest.approx(ends[0][1].forget_loss)
        assert info.rank == ends[0][1].rank


# direction


def losses_of(model, *batches):
    with torch.no_grad():
        return [classification(model, b) for b in batches]


def test_with_alpha_zero_forgetting_rises_and_no_retain_loss_moves(way, impl):
    model, forget, retain = mlp(), batch(6), batch(5)
    before = losses_of(model, forget, retain)
    lr = 1e-4
    surgeon = gs.Surgeon(
        model, torch.optim.SGD(model.parameters(), lr=lr), gs.OrthoGrad(alpha=0), **way
    )
    info = surgeon.step(forget=forget, retain=retain, loss=classification)
    after = losses_of(model, forget, retain)
    rise = (after[0].mean() - before[0].mean()).item()
    assert rise > 0
    # to first order the forget loss rises by lr |g⊥|², every retain loss by nothing
    whole = gs.DenseJacobian.from_model(model, forget, classification, rows="mean").row_norms()
    assert rise == pytest.approx(lr * (info.kept_norm * whole.item()) ** 2, rel=1e-2)
    assert (after[1] - before[1]).abs().max() <= 1e-3 * rise


def test_a_loss_made_to_forget_falls_and_no_retain_loss_moves(way, impl):
    model, forget, retain = mlp(), batch(6), batch(5)
    before = losses_of(model, forget, retain)
    rule = gs.OrthoGrad(alpha=0, objective="lower")
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=1e-4), rule, **way)
    info = surgeon.step(forget=forget, retain=retain, loss=classification)
    after = losses_of(model, forget, retain)
    fall = (before[0].mean() - after[0].mean()).item()
    assert fall > 0
    assert (after[1] - before[1]).abs().max() <= 1e-3 * fall
    # a conflict is a retain loss that the descent would raise
    assert info.conflict_rate == (info.cosines < 0).double().mean().item()


def test_with_alpha_one_it_is_plain_descent_on_the_retain_loss(way, impl):
    model, forget, retain = mlp(), batch(6), batch(5)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    classification(other, retain).mean().backward()
    optimizer.step()
    before = losses_of(model, retain)[0].mean()
    surgeon = gs.Surgeon(
        model, torch.optim.SGD(model.parameters(), lr=0.1), gs.OrthoGrad(alpha=1), **way
    )
    surgeon.step(forget=forget, retain=retain, loss=classification)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert losses_of(model, retain)[0].mean() < before


@pytest.mark.parametrize("name", MODELS)
def test_serves_every_kind_of_model(name, way, impl):
    model, forget, loss = make(name, size=4)
    retain = make(name, size=3)[1]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    before = loss(model, forget).mean().item(), loss(model, retain).detach()
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(alpha=0), **way)
    surgeon.step(forget=forget, retain=retain, loss=loss)
    rise = loss(model, forget).mean().item() - before[0]
    assert rise > 0
    assert (loss(model, retain) - before[1]).abs().max() <= 1e-2 * rise


# what it says


def test_information_is_of_the_gradients_before_the_step(way, impl):
    model, forget, retain = mlp(), batch(6), batch(5)
    rows = gs.DenseJacobian.from_model(model, retain, classification).materialize()
    g_u = gs.DenseJacobian.from_model(model, forget, classification).materialize().mean(0)
    expected = losses_of(model, forget, retain)
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), gs.OrthoGrad(), **way)
    info = surgeon.step(forget=forget, retain=retain, loss=classification)
    assert info.forget_loss == pytest.approx(expected[0].mean().item())
    assert info.retain_loss == pytest.approx(expected[1].mean().item())
    cosines = F.cosine_similarity(rows, g_u[None])
    torch.testing.assert_close(info.cosines, cosines)
    assert info.conflict_rate == pytest.approx((cosines > 0).double().mean().item())
    q = torch.linalg.qr(rows.mT).Q
    assert info.kept_norm == pytest.approx(((g_u - q @ (q.mT @ g_u)).norm() / g_u.norm()).item())
    assert info.rank == 5
    assert info.frozen == []
    assert info.seconds > 0


@pytest.mark.parametrize(
    "rule", [gs.OrthoGrad(), gs.OrthoGrad(retain="mean", granularity="tensor")]
)
def test_information_is_ready_for_json(rule, impl):
    model = mlp()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule)
    info = surgeon.step(forget=batch(2), retain=batch(3), loss=classification)
    read = json.loads(json.dumps(info.to_dict(), allow_nan=False))
    assert read["kept_norm"] == info.kept_norm
    assert read["cosines"] == info.cosines.tolist()
    assert len(read["cosines"]) == (1 if rule.retain == "mean" else 3)


def test_names_the_tensors_it_froze(way, impl):
    model = mlp()
    rule = gs.OrthoGrad(alpha=0, granularity="tensor")
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule, **way)
    bias = model[2].bias.detach().clone()
    info = surgeon.step(forget=batch(2), retain=batch(5), loss=classification)
    assert info.frozen == ["2.bias"]
    assert (model[2].bias - bias).abs().max() <= 1e-12


def test_a_zero_forget_gradient_is_no_conflict(way, impl):
    model = mlp()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), gs.OrthoGrad(), **way)
    loss = lambda m, b: classification(m, b[:2]) * b[2]  # noqa: E731
    info = surgeon.step(
        forget=(*batch(3), torch.zeros(3)), retain=(*batch(3), torch.ones(3)), loss=loss
    )
    assert info.kept_norm == 0
    assert info.cosines.tolist() == [0, 0, 0]
    assert info.conflict_rate == 0


# the optimizer's metric


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_preconditioned_steps_leave_retain_losses_alone(kind, way, impl):
    model = mlp()
    optimizer = kind(model.parameters(), lr=1e-3, betas=(0.0, 0.999), weight_decay=0)
    for _ in range(300):  # statistics as training leaves them
        optimizer.zero_grad()
        classification(model, batch(8)).mean().backward()
        optimizer.step()
    forget, retain = batch(6), batch(5)
    found = {}
    for precondition in (None, "optimizer"):
        twin = copy.deepcopy(model)
        other = kind(twin.parameters(), lr=1e-3, betas=(0.0, 0.999), weight_decay=0)
        other.load_state_dict(optimizer.state_dict())
        rows = gs.DenseJacobian.from_model(twin, retain, classification).materialize()
        start = torch.cat([p.detach().flatten() for p in twin.parameters()])
        surgeon = gs.Surgeon(twin, other, gs.OrthoGrad(alpha=0, precondition=precondition), **way)
        surgeon.step(forget=forget, retain=retain, loss=classification)
        moved = torch.cat([p.detach().flatten() for p in twin.parameters()]) - start
        found[precondition] = (rows @ moved / rows.norm(dim=1) / moved.norm()).abs().max().item()
    # the step's own gradient moves v by a part in a thousand
    assert found["optimizer"] <= 5e-3
    assert found["optimizer"] <= 0.1 * found[None]


def test_the_metric_knows_each_group_its_learning_rate(impl):
    model = mlp()
    groups = [
        {"params": model[0].parameters(), "lr": 1e-2},
        {"params": model[2].parameters(), "lr": 1e-4},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.0, 0.9999))
    for _ in range(100):
        optimizer.zero_grad()
        classification(model, batch(8)).mean().backward()
        optimizer.step()
    forget, retain = batch(6), batch(5)
    rows = gs.DenseJacobian.from_model(model, retain, classification).materialize()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(alpha=0, precondition="optimizer"))
    surgeon.step(forget=forget, retain=retain, loss=classification)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    assert (rows @ moved / rows.norm(dim=1) / moved.norm()).abs().max() <= 2e-2


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adamax(p),
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.RAdam(p),
        lambda p: torch.optim.NAdam(p),
    ],
    ids=["SGD", "Adamax", "Adam", "RMSprop", "RAdam", "NAdam"],
)
def test_refuses_a_metric_it_does_not_know(optimizer):
    model = mlp()
    with pytest.raises(gs.InputError, match="precondition='optimizer' needs Adam or AdamW"):
        gs.Surgeon(model, optimizer(model.parameters()), gs.OrthoGrad(precondition="optimizer"))


# what it leaves alone


def surgeon_of(model, **way):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return gs.Surgeon(model, optimizer, gs.OrthoGrad(), **way), optimizer


def test_grad_is_afterwards_what_it_was_before(way, impl):
    model = mlp()
    surgeon, _ = surgeon_of(model, **way)
    model[0].weight.grad = torch.randn(8, 6).double()
    held, value = model[0].weight.grad, model[0].weight.grad.clone()
    surgeon.step(forget=batch(2), retain=batch(3), loss=classification)
    assert model[0].weight.grad is held
    assert torch.equal(held, value)
    assert model[2].weight.grad is None


def test_no_hook_wrapper_or_attribute_stays_on_the_model(way, impl):
    model, forget, loss = make("cnn in eval")
    keys, attributes = list(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
    surgeon, optimizer = surgeon_of(model, **way)
    surgeon.step(forget=forget, retain=forget, loss=loss)
    assert list(model.state_dict()) == keys
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks)
    assert not optimizer._optimizer_step_pre_hooks
    assert not model.training


def test_parameters_the_optimizer_does_not_hold_stay(way, impl):
    model = mlp()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    before = copy.deepcopy(model)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), **way)
    surgeon.step(forget=batch(2), retain=batch(3), loss=classification)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)


def test_stale_gradients_of_other_parameters_are_not_stepped(way, impl):
    # the optimizer also holds a parameter that is not the model's, and a frozen one
    model, outside = mlp(), nn.Parameter(torch.ones(3).double())
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), outside], lr=0.1)
    outside.grad, model[0].bias.grad = torch.ones(3).double(), torch.ones(8).double()
    bias = model[0].bias.detach().clone()
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), **way)
    surgeon.step(forget=batch(2), retain=batch(3), loss=classification)
    assert torch.equal(outside, torch.ones(3).double())
    assert torch.equal(model[0].bias, bias)
    assert torch.equal(outside.grad, torch.ones(3).double())


def test_an_unused_parameter_is_not_stepped(way, impl):
    # as in ordinary training: no gradient, no weight decay either
    model, forget, loss = make("partial")
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=0.1, weight_decay=0.5)
    before = model.unused.weight.detach().clone()
    gs.Surgeon(model, optimizer, gs.OrthoGrad(), **way).step(
        forget=forget, retain=forget, loss=loss
    )
    assert torch.equal(model.unused.weight, before)


@pytest.mark.parametrize(
    "forget,retain,message",
    [
        (((torch.ones(2, 6), torch.zeros(3))), batch(3), "forget holds tensors of different batch"),
        (batch(3), (torch.ones(0, 6), torch.zeros(0)), "retain is empty"),
        (None, batch(3), r"takes forget= and retain=, got \['retain'\]"),
    ],
    ids=["ragged", "empty", "none"],
)
def test_names_the_batch_that_does_not_fit(forget, retain, message):
    model = mlp()
    surgeon, optimizer = surgeon_of(model)
    before = state_of(model, optimizer)
    with pytest.raises(gs.InputError, match=message):
        surgeon.step(forget=forget, retain=retain, loss=classification)
    assert_same_state(before, state_of(model, optimizer))


def test_refuses_an_optimizer_of_another_model():
    with pytest.raises(gs.InputError, match="no parameter to differentiate"):
        gs.Surgeon(mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1), gs.OrthoGrad())


def test_works_where_gradients_are_off(way, impl):
    model = mlp()
    surgeon, _ = surgeon_of(model, **way)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        surgeon.step(forget=batch(2), retain=batch(3), loss=classification)
    assert not torch.equal(model[0].weight, before)


def test_steps_are_the_same_whatever_the_chunk(impl):
    model = mlp()
    data = batch(4), batch(7)
    found = []
    for chunk_size in (1, 3, 100):
        twin = copy.deepcopy(model)
        surgeon = gs.Surgeon(
            twin,
            torch.optim.SGD(twin.parameters(), lr=0.1),
            gs.OrthoGrad(),
            rows="stored",
            chunk_size=chunk_size,
        )
        surgeon.step(forget=data[0], retain=data[1], loss=classification)
        found.append(twin[0].weight.detach())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-13)
