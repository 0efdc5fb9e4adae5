"""CRMOGM: the recursion, whatever the rule inside, and one state of both."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.inputs import gaussian, signed

INSIDE = {
    "mgda": gs.MGDA,
    "pcgrad": lambda: gs.PCGrad(seed=3),
    "gradvac": lambda: gs.GradVac(beta=0.3),
    "pcd": lambda: gs.PCD(tau=0.3),
    "krum": lambda: gs.Krum(n_byzantine=0),
}
inside = pytest.mark.parametrize("make", INSIDE.values(), ids=INSIDE)


def grams(count, m=4):
    return [rows @ rows.mT for rows in (signed(gaussian(m, 9)) for _ in range(count))]


@inside
@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_is_the_recursion(make, alpha, impl):
    rule, alone = gs.CRMOGM(rule=make(), alpha=alpha), make()
    expected = None
    for gram in grams(4):
        found = alone.weights(gram)
        expected = found if expected is None else alpha * expected + (1 - alpha) * found
        torch.testing.assert_close(rule.weights(gram), expected, rtol=1e-12, atol=1e-14)


def test_begins_with_what_is_given():
    first, second = grams(2, m=2)
    rule, given = gs.CRMOGM(rule=gs.MGDA(), alpha=0.5, initial=[3.0, -1.0]), [3.0, -1.0]
    for gram in (first, second):
        found = gs.MGDA().weights(gram).tolist()
        given = [(a + b) / 2 for a, b in zip(given, found, strict=True)]
        assert rule.weights(gram).tolist() == pytest.approx(given)
    # rows of another number have no weights before
    (other,) = grams(1, m=3)
    with pytest.raises(gs.InputError, match="initial must have 3 entries, one per row, got 2"):
        rule.weights(other)
    rule = gs.CRMOGM(rule=gs.MGDA())
    rule.weights(first)
    torch.testing.assert_close(rule.weights(other), gs.MGDA().weights(other))


@inside
def test_one_state_is_of_both(make):
    rule = gs.CRMOGM(rule=make())
    *seen, last = grams(4)
    for gram in seen:
        rule.weights(gram)
    assert set(rule.state_dict()) == {"weights", *make().remembers}
    resumed, copied = gs.CRMOGM(rule=make()), copy.deepcopy(rule)
    resumed.load_state_dict(rule.state_dict())
    expected = rule.weights(last)
    assert torch.equal(resumed.weights(last), expected)
    assert torch.equal(copied.weights(last), expected)
    rule.load_state_dict({})
    assert torch.equal(rule.weights(seen[0]), gs.CRMOGM(rule=make()).weights(seen[0]))


def test_serves_two_directions_and_memories():
    rows = signed(gaussian(5, 9))
    rule = gs.TwoDirections(rule=gs.CRMOGM(rule=gs.GradVac()), objective="lower")
    pair = torch.stack([rows[0], rows[1:].mean(0)])
    alone = gs.CRMOGM(rule=gs.GradVac())
    for scale in (1.0, -2.0, 3.0):
        turned = torch.tensor([[scale], [1]])
        scaled = torch.cat([scale * rows[:1], rows[1:]])
        torch.testing.assert_close(rule(scaled, forget=0), alone(turned * pair))
    assert set(rule.state_dict()) == {"weights", "draws", "targets"}
    rule = gs.CRMOGM(rule=gs.GEM())
    assert (rule.roles, rule.merges) == (("memory",), ("batch",))
    torch.testing.assert_close(rule(rows, memory=[3, 4]), gs.GEM()(rows, memory=[3, 4]))
    assert gs.CRMOGM().roles == ()


def test_a_step_that_fails_is_not_averaged():
    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square()

    model, rule = nn.Linear(5, 3), gs.CRMOGM(rule=gs.GradVac())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgeon = gs.Surgeon(model, optimizer, rule)
    surgeon.step(batch=(torch.randn(4, 5), torch.randn(4, 3)), loss=loss)
    before = rule.state_dict()

    def fails(*_):
        raise RuntimeError("no step")

    optimizer.register_step_pre_hook(fails)
    with pytest.raises(RuntimeError, match="no step"):
        surgeon.step(batch=(torch.randn(4, 5), torch.randn(4, 3)), loss=loss)
    assert all(torch.equal(rule.state_dict()[name], value) for name, value in before.items())


def test_groups_are_averaged_apart():
    blocks = [[gaussian(3, 6), gaussian(3, 4)] for _ in range(3)]
    rule = gs.CRMOGM(rule=gs.MGDA(), granularity="tensor")
    alone = [gs.CRMOGM(rule=gs.MGDA()) for _ in range(2)]
    for each in blocks:
        for part, other, block in zip(rule(each), alone, each, strict=True):
            torch.testing.assert_close(part, other(block))
    rule.note_columns(["a", "b"])
    with pytest.raises(gs.InputError, match="CRMOGM remembers weights over other parameters"):
        rule.check_columns(["a", "c"])


@pytest.mark.parametrize("initial", [None, [0.5, 0.25, 0.25, 0.0]])
def test_is_torchjds(initial):
    theirs = pytest.importorskip("torchjd.aggregation")
    given = None if initial is None else torch.tensor(initial).double()
    rule = gs.CRMOGM(rule=gs.ConFIG(), alpha=0.6, initial=initial)
    alone = theirs.CRMOGMWeighting(Same(gs.ConFIG()), alpha=0.6, initial_weights=given)
    for gram in grams(4):
        torch.testing.assert_close(rule.weights(gram), alone(gram))


class Same(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, gram):
        return self.rule.weights(gram)


def test_refuses_what_makes_no_sense():
    for call, message in (
        (lambda: gs.CRMOGM(rule="mgda"), "rule must be a rule with weights, got str"),
        (lambda: gs.CRMOGM(rule=gs.GradDrop()), "rule must be a rule with weights, got GradDrop"),
        (lambda: gs.CRMOGM(rule=gs.GRU()), "rule: GRU tells forget rows apart"),
        (lambda: gs.CRMOGM(rule=gs.CRMOGM()), "rule: CRMOGM is smoothed already"),
        (
            lambda: gs.CRMOGM(rule=gs.MGDA(granularity="tensor")),
            "granularity must be given to CRMOGM, not to its MGDA, got tensor",
        ),
        (lambda: gs.CRMOGM(alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(gs.InputError, match=message):
            call()
