"""Losses by name, and what is said of a wrong one."""

import pytest

import gradsurgery as gs
from gradsurgery.language import DPO, FORGET, RETAIN, LogProbs, forget_loss, retain_loss


def test_a_loss_by_name_has_the_options_given():
    loss = forget_loss("simnpo", beta=2.5, delta=0.1)
    assert (type(loss).__name__, loss.beta, loss.delta) == ("SimNPO", 2.5, 0.1)
    assert FORGET["idk_dpo"] is FORGET["altpo"] is FORGET["dpo"] is DPO


@pytest.mark.parametrize("make, known", [(forget_loss, FORGET), (retain_loss, RETAIN)])
def test_an_unknown_name_is_told_with_those_known(make, known):
    with pytest.raises(gs.InputError, match="loss 'nqo'; there are ") as raised:
        make("nqo")
    assert all(name in str(raised.value) for name in known)
    with pytest.raises(gs.InputError, match=r"loss \['nll'\]"):
        make(["nll"])


def test_unknown_options_are_told_together_with_those_known():
    message = r"^simnpo has no option gamma, bta; it has beta, delta, as_published$"
    with pytest.raises(gs.InputError, match=message):
        forget_loss("simnpo", gamma=1, beta=2, bta=1)


def test_losses_that_need_the_original_say_so():
    every = {**{f"retain {k}": v for k, v in RETAIN.items()}, **FORGET}
    needing = {name for name, kind in every.items() if kind.needs_reference}
    assert needing == {"npo", "dpo", "idk_dpo", "altpo", "undial", "retain kl", "retain rmu"}
    needs = r"needs the original's {}: reference= must be {}, got {}$"
    with pytest.raises(
        gs.InputError,
        match=needs.format("log-probabilities", "LogProbs or Frozen or WithoutAdapter", None),
    ):
        forget_loss("npo")
    for make, name in ((forget_loss, "undial"), (retain_loss, "kl"), (retain_loss, "rmu")):
        with pytest.raises(
            gs.InputError, match=needs.format("model", "Frozen or WithoutAdapter", "LogProbs")
        ):
            make(name, reference=LogProbs())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("simnpo", {"beta": 0}, "beta of SimNPO must be positive, got 0"),
        ("simnpo", {"beta": "1"}, "beta of SimNPO must be a number, got '1'"),
        ("simnpo", {"delta": float("nan")}, "delta of SimNPO must be a number, got nan"),
        ("wga", {"beta": -1}, "beta of WGA must be 0 or more, got -1"),
        ("satimp", {"beta2": -0.5}, "beta2 of SatImp must be 0 or more, got -0.5"),
        ("ceu", {"skip": 1.5}, "skip of CEU must be a whole number, got 1.5"),
        ("rmu", {"scale": -2}, "scale of RMU must be 0 or more, got -2"),
        ("rmu", {"seed": True}, "seed of RMU must be a whole number, got True"),
        ("rmu", {"layer": 7}, "layer of RMU must be text, got int"),
        ("npo", {"reference": LogProbs(), "beta": -1}, "beta of NPO must be positive, got -1"),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(gs.InputError, match=message):
        forget_loss(name, **options)
