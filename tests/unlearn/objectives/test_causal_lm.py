"""Language models as a task: what every method may ask, and any loss with any rule."""

import copy

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import InputError
from gradsurgery.language import KL, NLL, NPO, Frozen, LogProbs
from gradsurgery.unlearn import METHODS, Classification
from gradsurgery.unlearn.methods.surgery import SurgeryTrainer
from gradsurgery.unlearn.objectives.base import take
from gradsurgery.unlearn.objectives.causal_lm import CausalLM, trimmed
from tests.language import tiny
from tests.unlearn.objectives.tasks import OPTIONS

TASK = CausalLM()


def sets(extra=0):
    """Forget and retain samples, each padded to one length, with refusals as other answers."""
    forget = tiny.batch(tiny.SAMPLES[:2], extra=extra)
    forget["alternate"] = tiny.batch(tiny.REFUSALS[:2], extra=extra, ids=False)
    retain = {**tiny.batch(tiny.SAMPLES[2:], extra=extra), "id": torch.arange(3) + 90}
    retain["alternate"] = tiny.batch(tiny.REFUSALS[2:], extra=extra, ids=False)
    return {"forget": forget, "retain": retain}


def test_outputs_are_one_for_each_label_token():
    model = tiny.made()
    batch = sets(extra=3)["forget"]
    found = TASK.outputs(model, batch)
    assert found.labels.tolist() == [7, 11, 3, 8, 10]
    assert found.sample.tolist() == [0, 0, 0, 0, 1]
    expected = [logits for sample in tiny.SAMPLES[:2] for logits, _ in tiny.tokens(model, sample)]
    assert torch.allclose(found.logits, torch.stack(expected), atol=1e-12)
    each = torch.nn.functional.cross_entropy(found.logits, found.labels, reduction="none")
    losses = torch.stack([each[:4].mean(), each[4]])
    assert torch.allclose(TASK.losses(model, batch), losses)


def test_what_no_sample_needs_is_cut_off():
    short, wide = (tiny.batch(tiny.SAMPLES[:3], extra=k) for k in (0, 4))
    wide["alternate"] = tiny.batch(tiny.REFUSALS[:3], extra=2, ids=False)
    wide["position_ids"] = torch.arange(wide["labels"].shape[1])[None]
    found = trimmed(wide)
    assert all(torch.equal(found[name], entry) for name, entry in short.items())
    alone = tiny.batch(tiny.REFUSALS[:3], ids=False)
    assert all(torch.equal(found["alternate"][name], entry) for name, entry in alone.items())
    assert found["position_ids"].shape == (1, short["labels"].shape[1])
    left = tiny.batch(tiny.SAMPLES[:3], side="left", extra=4)  # places may count from its begin
    assert all(torch.equal(trimmed(left)[name], entry) for name, entry in left.items())
    whole = {**wide, "attention_mask": torch.ones(3, 1, 4, 4)}  # a model's own matter
    assert trimmed(whole) is whole
    assert TASK.relabel(wide, torch.Generator())["id"] is wide["id"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_its_steps_or_says_what_it_lacks(name):
    kind, model = METHODS[name], tiny.made()
    config = kind.Config(**{"steps": 2, **OPTIONS.get(name, {})})
    validation = tiny.batch(tiny.SAMPLES[:1])
    arguments = {**sets(extra=2), "config": config, "validation": validation, "overlap": "allow"}
    if lacking := sorted(kind.asks - {"losses", "outputs", "relabel"}):
        with pytest.raises(InputError, match=f"needs {' and '.join(lacking)}, which CausalLM has"):
            kind(model, TASK, **arguments)
        return
    before = copy.deepcopy(model.state_dict())
    kind(model, TASK, **arguments).run()
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())


# the original's divergence from itself is rounding, whose direction says nothing: no projection
@pytest.mark.parametrize(
    ("retain_loss", "rule"), [("own", "orthograd"), ("nll", "orthograd"), ("kl", "sum")]
)
def test_a_loss_with_a_rule_is_the_surgeon_s_step(retain_loss, rule):
    model = tiny.made()
    other, original = copy.deepcopy(model), copy.deepcopy(model)
    given = sets(extra=1)
    named = {"forget_loss": "npo", "retain_loss": retain_loss, "rule": rule}
    named["forget_loss_options"] = ("beta=0.3",)
    if rule == "orthograd":
        named["rule_options"] = ("alpha=0.25",)
    config = SurgeryTrainer.Config(steps=3, optimizer="sgd", lr=0.05, **named)
    SurgeryTrainer(model, TASK, config=config, **given).run()

    made = {
        "orthograd": gs.OrthoGrad(alpha=0.25, objective="lower"),
        "sum": gs.TwoDirections(rule=gs.Sum(), objective="lower"),
    }[rule]
    surgeon = gs.Surgeon(other, torch.optim.SGD(other.parameters(), lr=0.05), made)
    npo = NPO(beta=0.3, reference=LogProbs.of(original, [given["forget"]]))
    retain = KL(reference=Frozen(original)) if retain_loss == "kl" else NLL()
    for _ in range(3):
        surgeon.add(forget=given["forget"], loss=npo)
        surgeon.add(retain=given["retain"], loss=retain)
        surgeon.step()
    for mine, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert (mine - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(("loss", "retain"), [("npo", "own"), ("simnpo", "kl"), ("undial", "nll")])
def test_a_run_goes_on_with_the_original_that_it_began_with(loss, retain):
    options = {"rule": "sum", "forget_loss": loss, "retain_loss": retain, "steps": 4}
    given, config = sets(), SurgeryTrainer.Config(**options)
    whole, model = tiny.made(), tiny.made()
    SurgeryTrainer(whole, TASK, config=config, **given).run()
    first = SurgeryTrainer(model, TASK, config=config, **given)
    steps = iter(first.fit())
    for _ in range(3):  # two steps, after what is measured before them
        next(steps)
    state = first.state_dict()
    moved = copy.deepcopy(model)
    again = SurgeryTrainer(moved, TASK, config=config, **given)  # made of a model that has moved
    again.load_state_dict(state)
    again.run()
    for mine, expected in zip(moved.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, expected)
    name = "forget_original" if loss != "simnpo" else "retain_original"
    broken = copy.deepcopy(state)
    broken["extra"][name] = {}
    with pytest.raises(InputError, match=f"{name} is not that of this loss"):
        again.load_state_dict(broken)


def test_a_raised_loss_goes_up_and_a_ceiling_bounds_it():
    for ceiling, moves in ((float("inf"), True), (0.1, False)):
        model = tiny.made()
        given = sets()
        before = TASK.losses(model, given["forget"])
        assert before.min() > 0.1
        config = SurgeryTrainer.Config(
            steps=1,
            optimizer="sgd",
            lr=0.01,
            rule="gru",
            forget_loss="grad_ascent",
            forget_ceiling=ceiling,
        )
        SurgeryTrainer(model, TASK, config=config, **given).run()
        after = TASK.losses(model, given["forget"]).mean()
        assert (after > before.mean()) == moves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "gem"}, "rule: rule: gem takes no forget loss"),
        ({"rule": "grad"}, "rule: there is no rule 'grad'"),
        ({"rule": "gru", "rule_options": ("beta=1",)}, "rule: gru has no option beta"),
        (
            {"rule_options": ("alpha",)},
            "rule-options must be NAME=VALUE, .*, got alpha",
        ),
        (
            {"forget_loss_options": ("a=1", "a=2")},
            "loss-options must be NAME=VALUE, each name once",
        ),
        ({"forget_loss_options": ("a=1",)}, "forget-loss-options: ascent has none, got .*a=1"),
        ({"forget_loss": "nqo"}, "there is no forget loss 'nqo'"),
        (
            {"forget_loss": "npo", "forget_loss_options": ("beta=-1",)},
            "beta of NPO must be positive",
        ),
        (
            {"forget_loss": "npo", "forget_ceiling": 2.0},
            "forget_ceiling is for losses that are raised",
        ),
        ({"retain_loss": "nlp"}, "there is no retain loss 'nlp'"),
    ],
)
def test_bad_options_are_named(options, message):
    config = SurgeryTrainer.Config(**options)
    with pytest.raises(InputError, match=message):
        SurgeryTrainer(tiny.made(), TASK, config=config, **sets())


def test_classifiers_have_their_own_loss_alone():
    batch = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    given = {"forget": take(batch, slice(0, 2)), "retain": take(batch, slice(2, 4))}
    for options, lacks in (
        ({"forget_loss": "npo"}, "forget_loss"),
        ({"retain_loss": "kl"}, "retain_loss"),
    ):
        config = SurgeryTrainer.Config(**options)
        with pytest.raises(InputError, match=f"needs {lacks}, which Classification has not"):
            SurgeryTrainer(torch.nn.Linear(3, 2), Classification(), config=config, **given)
