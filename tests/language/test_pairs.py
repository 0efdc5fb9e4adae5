"""Any forget loss with any rule: by names, and each in its direction."""

import copy

import pytest
import torch

import gradsurgery as gs
from gradsurgery.language import (
    FORGET,
    NLL,
    Frozen,
    GradAscent,
    LogProbs,
    SimNPO,
    forget_loss,
    rule_for,
)
from gradsurgery.language.pairs import refused
from gradsurgery.surgery import RULES
from tests.language import tiny

TAKEN = [name for name, kind in RULES.items() if not refused(kind)]
NEEDED = {"constant": {"values": [0.5, 2.0]}, "gdrgma": {"mix": 0.5}}
RAISED, LOWERED = GradAscent(), SimNPO()


def test_which_rules_take_a_forget_loss():
    assert set(RULES) - set(TAKEN) == {
        "gem", "agem", "graddrop", "signagreement", "trimmedmean", "krum"
    }  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_a_loss_moves_the_way_it_is_meant_to(name):
    """Rows at right angles, (2, 0) to forget and (0, 1) to retain: descending the update raises
    the one or lowers it, and lowers the other."""
    rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    up = rule_for(name, RAISED, **NEEDED.get(name, {}))(rows, forget=0)
    down = rule_for(name, LOWERED, **NEEDED.get(name, {}))(rows, forget=0)
    assert up[0] < -1e-6 and down[0] > 1e-6
    # SalUn moves half of the values, those of f, and GRU nothing but f
    least = 0 if name in ("salun", "gru") else 1e-6
    assert up[1] >= least and down[1] >= least
    assert torch.allclose(up * torch.tensor([-1, 1]), down)


@pytest.mark.parametrize("name", TAKEN)
def test_a_raised_loss_is_its_negative_lowered(name):
    torch.manual_seed(1)
    rows = torch.randn(4, 9, dtype=torch.float64)
    turned = rows * torch.tensor([-1, 1, 1, 1]).unsqueeze(1)
    up = rule_for(name, RAISED, **NEEDED.get(name, {}))(rows, forget=0)
    down = rule_for(name, LOWERED, **NEEDED.get(name, {}))(turned, forget=0)
    assert (up - down).abs().max() <= 1e-12


def test_two_tasks_are_worked_by_hand():
    """PCGrad on f = (-1, 0), raised, and r = (1, 1), the mean of (1, 0) and (1, 2). <f, r> = -1:
    f - (-1/2) r = (-1/2, 1/2) and r - (-1) f = (0, 1) are without conflict; their sum."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    rule = rule_for("pcgrad", RAISED, reduction="sum")
    assert rule == gs.TwoDirections(rule=gs.PCGrad(reduction="sum"), objective="raise")
    assert torch.allclose(rule(rows, forget=0), torch.tensor([-0.5, 1.5], dtype=torch.float64))


def test_what_a_rule_of_two_tasks_remembers_goes_with_it():
    rows = torch.randn(5, 2, 8, dtype=torch.float64)
    whole = rule_for("gradvac", RAISED)
    updates = [whole(each, forget=0) for each in rows]
    first, second = rule_for("gradvac", RAISED), rule_for("gradvac", RAISED)
    for each in rows[:3]:
        first(each, forget=0)
    assert first.state_dict()
    second.load_state_dict(first.state_dict())
    found = [copy.deepcopy(second)(rows[3], forget=0), *(second(e, forget=0) for e in rows[3:])]
    assert torch.equal(found[0], found[1])
    assert all(torch.equal(a, b) for a, b in zip(found[1:], updates[3:], strict=True))


def test_tensors_apart():
    torch.manual_seed(0)
    blocks = [torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)]
    apart = rule_for("mgda", RAISED, granularity="tensor")(blocks, forget=0)
    for block, found in zip(blocks, apart, strict=True):
        alone = rule_for("mgda", RAISED)([block], forget=0)[0]
        assert torch.allclose(found, alone)


@pytest.mark.parametrize("loss", FORGET)
@pytest.mark.parametrize("rule", ["orthograd", "gru", "ngdiff", "blur", "pcgrad", "upgrad", "sago"])
def test_every_loss_takes_a_step_with_every_kind_of_rule(loss, rule):
    model = tiny.made()
    samples = tiny.LONGER
    batch = tiny.batch(samples)
    batch["alternate"] = tiny.batch(tiny.REFUSALS[: len(samples)], ids=False)
    options = {
        "npo": {"reference": LogProbs.of(model, [batch])},
        "undial": {"reference": Frozen(copy.deepcopy(model))},
        "rmu": {"layer": "layers.1"},
    }
    options |= dict.fromkeys(("dpo", "idk_dpo", "altpo"), options["npo"])
    forget = forget_loss(loss, **options.get(loss, {}))
    alpha = {"alpha": 0.0} if rule == "orthograd" else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    surgeon = gs.Surgeon(model, optimizer, rule_for(rule, forget, **alpha))
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    slope = torch.autograd.grad(forget(model, batch).mean(), parameters, allow_unused=True)
    surgeon.add(forget=batch, loss=forget)
    surgeon.add(retain=tiny.batch(tiny.SAMPLES[2:3]), loss=NLL())
    surgeon.step()
    changes = [(p - old) for p, old in zip(parameters, before, strict=True)]
    moved = sum((c * s).sum() for c, s in zip(changes, slope, strict=True) if s is not None)
    if rule == "orthograd":  # what is left of f at right angles to others is still along f
        assert moved > 0 if forget.objective == "raise" else moved < 0
    assert moved != 0


BAD = [
    ("orthogard", {}, "there is no rule 'orthogard'; there are orthograd, pcgrad"),
    (["gru"], {}, r"there is no rule \['gru'\]"),
    ("gem", {}, "rule: gem takes no forget loss: it learns without opposing a memory"),
    ("graddrop", {}, "rule: graddrop takes no forget loss: it knows no forget rows"),
    ("gru", {"beta": 1}, "gru has no option beta; it has momentum, granularity, precondition$"),
    ("gru", {"objective": "lower"}, "no option objective; .*; its objective is the loss's$"),
    ("pcgrad", {"alpha": 1}, "pcgrad has no option alpha; it has reduction, seed"),
    (
        gs.GRU(),
        {},
        "GRU has objective='raise', and SimNPO is to be lowered: give",
    ),
    (gs.GRU(), {"momentum": 0.1}, "the rule is made already"),
    (gs.UPGrad(), {}, r"UPGrad lowers all its rows: take TwoDirections\(rule=UPGrad"),
    (gs.AGEM(), {}, "rule: AGEM takes no forget loss"),
]


@pytest.mark.parametrize(("rule", "options", "message"), BAD)
def test_what_does_not_go_together_is_named(rule, options, message):
    with pytest.raises(gs.InputError, match=message):
        rule_for(rule, LOWERED, **options)


def test_bad_rules_of_two_tasks_are_named():
    for rule, message in [
        (gs.GRU(), "GRU tells forget rows apart"),
        (gs.AGEM(), "AGEM is of a memory"),
        (gs.TrimmedMean(trim=1), "rule must be a rule with weights, got TrimmedMean"),
        (gs.PCGrad(granularity="tensor"), "granularity must be given to TwoDirections"),
    ]:
        with pytest.raises(gs.InputError, match=message):
            gs.TwoDirections(rule=rule)
    with pytest.raises(gs.InputError, match="loss must be a LanguageLoss, got 'npo'"):
        rule_for("gru", "npo")
