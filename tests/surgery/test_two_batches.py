"""Rules of two independent batches: by hand, against torchjd, as steps, where they lead."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.surgery.two_batches import on_simplex
from tests.inputs import gaussian
from tests.test_step_tasks import batch_of, network, per_task

KINDS = [gs.MoDo, gs.SDMGrad]


# the simplex


def test_points_on_the_simplex_stay_and_others_go_to_the_nearest():
    given = torch.tensor([[0.2, 0.3, 0.5], [1.0, 1.0, 1.0], [2.0, 0.5, -9.0], [0.9, 0.5, 0.0]])
    # of the last: a shift of 0.2 leaves 0.7, 0.3 and no third
    wanted = torch.tensor([[0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3], [1.0, 0, 0], [0.7, 0.3, 0]])
    torch.testing.assert_close(on_simplex(given), wanted)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
@pytest.mark.parametrize("m", [1, 2, 7])
def test_the_nearest_point_by_bisection(m, scale):
    point = scale * gaussian(50, m)
    found = on_simplex(point.view(5, 10, m)).view(50, m)
    low, high = point.amin(1, keepdim=True) - 1, point.amax(1, keepdim=True)
    for _ in range(200):  # of the shift that makes the sum 1
        middle = (low + high) / 2
        above = (point - middle).clamp_min(0).sum(1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    # what is left of large numbers by the shift is their rounding
    atol = 1e-9 if scale <= 1 else 1e-3
    torch.testing.assert_close(found, (point - low).clamp_min(0), rtol=1e-9, atol=atol)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(50).double())


# weights


def halves(a, b):
    return torch.cat([a, b]), slice(len(a), None)


def test_modo_worked_by_hand():
    """J_a = [[1, 0], [0, 2]], J_b = [[1, 0], [1, 1]]: K = J_a J_bᵀ = [[1, 1], [0, 2]].

    From w = (1/2, 1/2): K w = (1, 1), and 0.2 w is (0.1, 0.1): w - 0.25 (1.1, 1.1) goes back to
    w. With J_b the other way round K = [[1, 1], [2, 0]] has rows that differ from their columns.
    """
    a = torch.tensor([[1.0, 0], [0, 2]]).double()
    b = torch.tensor([[1.0, 0], [1, 1]]).double()
    rule = gs.MoDo(gamma=0.25, rho=0.2)
    rows, second = halves(a, b)
    update = rule(rows, second=second)
    torch.testing.assert_close(update, torch.tensor([0.75, 0.75]).double())
    # K' = J_b J_aᵀ = [[1, 0], [1, 2]]: K' w = (1/2, 3/2), w - 0.25 (0.6, 1.6) = (0.35, 0.1)
    rule = gs.MoDo(gamma=0.25, rho=0.2)
    rows, second = halves(b, a)
    weights = rule.weights(rows @ rows.mT, second=second)
    w = torch.tensor([0.625, 0.375]).double()
    torch.testing.assert_close(weights, torch.cat([w, w]) / 2)
    # and on: K' w = (0.625, 1.375), 0.2 w = (0.125, 0.075): (0.4375, 0.0125) + 0.275
    again = rule.weights(rows @ rows.mT, second=second)
    w = torch.tensor([0.7125, 0.2875]).double()
    torch.testing.assert_close(again, torch.cat([w, w]) / 2)


def test_sdmgrad_worked_by_hand():
    """K = [[1, 0], [1, 4]] has s = (1 + 2) / 2; p = (1, 0) and pull 0.5 make w + pull p (1, 1/2).

    K (1, 1/2) / s² = (4/9, 4/3), so that w = (1/2, 1/2) - 0.3 (4/9, 4/3) goes to
    (1/2, 1/2) + 0.3 (4/9, -4/9), and the update's weights are (w + (1/2, 0)) / 1.5.
    """
    a, b = torch.eye(2).double(), torch.tensor([[1.0, 1], [0, 4]]).double()
    assert torch.equal(a @ b.mT, torch.tensor([[1.0, 0], [1, 4]]).double())
    rule = gs.SDMGrad(pull=0.5, preference=[1.0, 0.0], lr=0.3, steps=1)
    rows, second = halves(a, b)
    weights = rule.weights(rows @ rows.mT, second=second)
    w = torch.tensor([0.5 + 0.4 / 3, 0.5 - 0.4 / 3]).double()
    torch.testing.assert_close(rule.state_dict()["weights"], w)
    wanted = (w + torch.tensor([0.5, 0]).double()) / 1.5
    torch.testing.assert_close(weights, torch.cat([wanted, wanted]) / 2)


@pytest.mark.parametrize("m", [2, 3, 6])
@pytest.mark.parametrize(
    "name,options,theirs",
    [
        ("MoDo", {"gamma": 0.02, "rho": 0.3}, {"gamma": 0.02, "rho": 0.3}),
        ("MoDo", {}, {}),
        ("SDMGrad", {}, {}),
        (
            "SDMGrad",
            {"pull": 0.7, "lr": 0.4, "momentum": 0.2, "steps": 5},
            {"lambda_": 0.7, "lr": 0.4, "momentum": 0.2, "n_iter": 5},
        ),
    ],
)
def test_weights_are_those_of_torchjd(name, options, theirs, m):
    aggregation = pytest.importorskip("torchjd.aggregation")
    rule = getattr(gs, name)(**options)
    expected = getattr(aggregation, f"{name}Weighting")(**theirs)
    # theirs divides by s² + 1e-8, which many steps of a large rate would enlarge
    scale = 1e4 if name == "SDMGrad" else 1.0
    shared = gaussian(m, 20)
    # each goes on from its last weights; steps of SDMGrad's default rate enlarge rounding too far
    for _ in range(1 if (name, options) == ("SDMGrad", {}) else 5):
        rows, second = halves(*(scale * (shared + 0.5 * gaussian(m, 20)) for _ in range(2)))
        weights = rule.weights(rows @ rows.mT, second=second)
        wanted = expected(rows[:m] @ rows[m:].mT)
        torch.testing.assert_close(weights, torch.cat([wanted, wanted]) / 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_second_rows_may_be_any(kind):
    a, b = gaussian(3, 9), gaussian(3, 9)
    rows, second = halves(a, b)
    wanted = kind()(rows, second=second)
    mixed = torch.stack([b[0], a[0], a[1], b[1], a[2], b[2]])
    mask = torch.tensor([True, False, False, True, False, True])
    for given in ([0, 3, 5], mask, (5, 3, 0)):
        torch.testing.assert_close(kind()(mixed, second=given), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_second_batch_it_is_the_rows_own_gramian(kind):
    rows = gaussian(3, 9)
    twice, second = halves(rows, rows)
    torch.testing.assert_close(kind()(rows), kind()(twice, second=second))


def test_noise_that_batches_do_not_share_does_not_lead_modo_astray():
    """Noise makes the first of two equal tasks larger in one batch's own Gramian, and the weight
    that makes the update short small; by two batches both tasks count alike on average."""
    shared = torch.eye(2, 60, dtype=torch.float64)
    rule, own = (gs.MoDo(gamma=0.01, rho=0.0) for _ in range(2))
    two, one = [], []
    for step in range(1500):
        a, b = shared.clone(), shared.clone()
        a[0] += torch.randn(60, dtype=torch.float64)
        b[0] += torch.randn(60, dtype=torch.float64)
        rows, second = halves(a, b)
        for found, weights in (
            (two, 2 * rule.weights(rows @ rows.mT, second=second)),
            (one, own.weights(a @ a.mT)),
        ):
            if step >= 300:
                found.append(float(weights[0]))
    assert sum(two) / len(two) == pytest.approx(0.5, abs=0.06)
    assert sum(one) / len(one) < 0.1


def test_modo_comes_to_the_weights_of_mgda():
    rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]]).double()
    rule = gs.MoDo(gamma=0.005, rho=0.0)
    for _ in range(500):
        rule(rows)
    weights = rule.weights(rows @ rows.mT[None])
    torch.testing.assert_close(weights[0], gs.MGDA().weights(rows @ rows.mT))


def test_sdmgrad_comes_to_a_pulled_update_of_least_length():
    rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]]).double()
    rule = gs.SDMGrad(pull=0.3, lr=0.05, steps=300)
    rule(rows)
    w = rule.state_dict()["weights"][0]
    # |Jᵀ (w + 0.15 (1, 1))| over w = (t, 1 - t): -4 (t + .15) + 6 (1.15 - t) = 0
    assert w[0].item() == pytest.approx(0.63)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_begin_anew_for_other_tasks(kind):
    rule = kind()
    rule(gaussian(3, 9))
    assert rule.state_dict()["weights"].shape == (1, 3)
    rows = gaussian(4, 9)
    torch.testing.assert_close(rule(rows), kind()(rows))


def test_opposed_batches_leave_sdmgrads_weights():
    rows, second = halves(torch.eye(2).double(), -torch.eye(2).double())
    rule = gs.SDMGrad()
    rule.weights(rows @ rows.mT, second=second)
    assert rule.state_dict()["weights"].tolist() == [0.5, 0.5]


# steps


def jacobian(model, batch):
    each = per_task(model, batch).mean(0)
    rows = [torch.autograd.grad(e, list(model.parameters()), retain_graph=True) for e in each]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def taken(kind, batches, how="step", **options):
    """Where SGD steps lead that a Surgeon takes, by its several ways."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    surgeon = gs.Surgeon(model, optimizer, kind(), **options)
    for a, b in batches:
        if how == "step":
            info = surgeon.step(batch=a, second=b, loss=per_task)
            assert info.losses.shape == (6,) and info.gramian.shape == (6, 6)
            continue
        for part in (slice(0, 3), slice(3, None)):  # in turns
            surgeon.add(second=tuple(t[part] for t in b), loss=per_task)
            surgeon.add(batch=tuple(t[part] for t in a), loss=per_task)
        surgeon.step()
    return flat(model), surgeon.rule


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_two_jacobians(kind):
    batches = [(batch_of(8), batch_of(6)) for _ in range(4)]
    model, rule = network(), kind()
    for a, b in batches:
        rows, second = halves(jacobian(model, a), jacobian(model, b))
        update = rule(rows, second=second)
        with torch.no_grad():
            nn.utils.vector_to_parameters(flat(model) - 0.05 * update, model.parameters())
    for how, options in (("step", {}), ("step", {"micro_batch": 3}), ("add", {})):
        found, theirs = taken(kind, batches, how, **options)
        torch.testing.assert_close(found, flat(model), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(
            theirs.state_dict()["weights"], rule.state_dict()["weights"], rtol=1e-9, atol=1e-10
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_fails_leaves_the_weights(kind):
    model, rule = network(), kind()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.05), rule)
    surgeon.step(batch=batch_of(4), second=batch_of(4), loss=per_task)
    before, start = rule.state_dict(), copy.deepcopy(model.state_dict())
    wrong = batch_of(4)
    wrong[1][0] = float("nan")
    with pytest.raises(gs.NonFiniteError):
        surgeon.step(batch=batch_of(4), second=wrong, loss=per_task)
    assert torch.equal(rule.state_dict()["weights"], before["weights"])
    assert all(torch.equal(value, start[k]) for k, value in model.state_dict().items())


# what is refused


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_other_tasks_are_named(kind):
    rows = gaussian(5, 9)
    with pytest.raises(gs.InputError, match="second selects 2 of 5 rows; there must be one for"):
        kind()(rows, second=[0, 1])
    with pytest.raises(gs.InputError, match="second=7 is out of range for 5 rows"):
        kind()(rows, second=7)
    surgeon = gs.Surgeon(model := network(), torch.optim.SGD(model.parameters()), kind())
    with pytest.raises(gs.InputError, match=r"takes batch=, got \['second'\]"):
        surgeon.step(second=batch_of(4), loss=per_task)
    with pytest.raises(gs.InputError, match=f"{kind.__name__} has no memory rows"):
        surgeon.step(batch=batch_of(4), memory=batch_of(4), loss=per_task)


def test_other_rules_have_no_second_rows():
    surgeon = gs.Surgeon(model := network(), torch.optim.SGD(model.parameters()), gs.UPGrad())
    with pytest.raises(gs.InputError, match="UPGrad has no second rows"):
        surgeon.step(batch=batch_of(4), second=batch_of(4), loss=per_task)


@pytest.mark.parametrize(
    "kind,options,message",
    [
        (gs.MoDo, {"gamma": 0.0}, "gamma must be above 0, got 0.0"),
        (gs.MoDo, {"rho": -1.0}, "rho must be 0 or more, got -1.0"),
        (gs.SDMGrad, {"pull": -0.1}, "pull must be 0 or more, got -0.1"),
        (gs.SDMGrad, {"lr": 0.0}, "lr must be above 0, got 0.0"),
        (gs.SDMGrad, {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (gs.SDMGrad, {"steps": 0}, "steps must be 1 or more, got 0"),
        (gs.SDMGrad, {"preference": "ab"}, "preference must be finite numbers"),
    ],
)
def test_options_out_of_range_are_named(kind, options, message):
    with pytest.raises(gs.InputError, match=message):
        kind(**options)


def test_preferences_are_one_for_each_task():
    with pytest.raises(gs.InputError, match="preference must have 3 entries, one per row, got 2"):
        gs.SDMGrad(preference=[1.0, 0.0])(gaussian(3, 5))
