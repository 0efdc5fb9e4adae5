"""Each loss is its definition, values and gradients, however its batch is padded."""

import copy

import pytest
import torch

from gradsurgery import language
from tests.language import oracles
from tests.language.tiny import LONGER, REFUSALS, SAMPLES, batch, made, moved

EXACT = {"atol": 1e-12, "rtol": 1e-12}
PADDINGS = [("right", 0), ("left", 0), ("right", 4), ("left", 3)]
padded = pytest.mark.parametrize(("side", "extra"), PADDINGS)


def frozen(original):
    return language.Frozen(original)


def cases():
    """By name: the samples, the loss of an original, and its definition of a sample's number."""
    by_model = {"layer": "layers.0"}

    def on(definition, samples=SAMPLES, **options):
        return lambda model, original, k: definition(model, samples[k], **options)

    def beside(definition, **options):
        return lambda model, original, k: definition(model, original, SAMPLES[k], **options)

    def both(definition, **options):
        return lambda model, original, k: definition(
            model, original, SAMPLES[k], REFUSALS[k], **options
        )

    forget, retain = language.forget_loss, language.retain_loss
    of = frozen
    return {
        "nll": (lambda o: retain("nll"), on(oracles.nll)),
        "grad_ascent": (lambda o: forget("grad_ascent"), on(oracles.nll)),
        "wga": (lambda o: forget("wga"), on(oracles.wga, beta=1)),
        "wga 0.5": (lambda o: forget("wga", beta=0.5), on(oracles.wga, beta=0.5)),
        "satimp": (lambda o: forget("satimp"), on(oracles.satimp, beta1=5, beta2=1)),
        "satimp 2": (
            lambda o: forget("satimp", beta1=0.5, beta2=2),
            on(oracles.satimp, beta1=0.5, beta2=2),
        ),
        "npo": (lambda o: forget("npo", reference=of(o)), beside(oracles.npo, beta=0.1)),
        "npo 2": (lambda o: forget("npo", reference=of(o), beta=2), beside(oracles.npo, beta=2)),
        "simnpo": (lambda o: forget("simnpo"), on(oracles.simnpo, beta=4.5, delta=0)),
        "simnpo 1": (
            lambda o: forget("simnpo", beta=1, delta=0.5),
            on(oracles.simnpo, beta=1, delta=0.5),
        ),
        "dpo": (lambda o: forget("dpo", reference=of(o)), both(oracles.dpo, beta=0.1)),
        "idk_nll": (lambda o: forget("idk_nll"), on(oracles.nll, REFUSALS)),
        "undial": (lambda o: forget("undial", reference=of(o)), beside(oracles.undial, beta=10)),
        "undial 1": (
            lambda o: forget("undial", reference=of(o), beta=1),
            beside(oracles.undial, beta=1),
        ),
        "ceu 0": (lambda o: forget("ceu", skip=0), on(oracles.ceu, skip=0)),
        "pdu": (lambda o: forget("pdu"), on(oracles.pdu)),
        "raul": (lambda o: forget("raul"), on(oracles.raul)),
        "rmu": (
            lambda o: forget("rmu", layer="layers.0"),
            on(oracles.rmu, layer=0, scale=2, seed=0),
        ),
        "rmu 1": (
            lambda o: forget("rmu", layer="layers.1", scale=5, seed=3),
            on(oracles.rmu, layer=1, scale=5, seed=3),
        ),
        "rmu retain": (
            lambda o: retain("rmu", reference=of(o), **by_model),
            beside(oracles.rmu_retain, layer=0),
        ),
        "kl": (lambda o: retain("kl", reference=of(o)), beside(oracles.kl)),
    }


CASES = cases()


def given(side="right", extra=0, which=None):
    which = range(len(SAMPLES)) if which is None else which
    one = batch([SAMPLES[k] for k in which], side, extra)
    return {**one, "alternate": batch([REFUSALS[k] for k in which], side, extra, ids=False)}


def assert_same(model, losses, expected):
    """Of losses [B], and of the gradients of a weighted sum of them."""
    torch.testing.assert_close(losses, expected, **EXACT)
    weights = torch.randn(losses.shape, dtype=losses.dtype)
    mine, theirs = (
        torch.autograd.grad(values @ weights, list(model.parameters()), materialize_grads=True)
        for values in (losses, expected)
    )
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@padded
@pytest.mark.parametrize("name", CASES)
def test_is_its_definition(name, side, extra):
    make, definition = CASES[name]
    original = made()
    model = moved(original)
    losses = make(original)(model, given(side, extra))
    assert losses.shape == (len(SAMPLES),)
    expected = torch.stack([definition(model, original, k) for k in range(len(SAMPLES))])
    assert_same(model, losses, expected)


@padded
def test_ceu_leaves_the_first_token_of_an_answer_out(side, extra):
    model = made()
    losses = language.forget_loss("ceu")(model, batch(LONGER, side, extra))
    assert_same(model, losses, torch.stack([oracles.ceu(model, s, 1) for s in LONGER]))


@pytest.mark.parametrize("name", CASES)
def test_a_sample_alone_has_the_loss_that_it_has_in_any_batch(name):
    make, _ = CASES[name]
    original = made()
    loss, model = make(original), moved(original)
    alone = torch.cat([loss(model, given(which=[k])) for k in range(len(SAMPLES))])
    for side, extra in PADDINGS:
        together = loss(model, given(side, extra, which=[4, 1, 0, 3, 2]))
        torch.testing.assert_close(together, alone[[4, 1, 0, 3, 2]], **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_token_of_a_text_does_not_count(side):
    # raw text: all of it has labels, and padding has what precedes no token of it
    texts = [([], prompt + answer) for prompt, answer in SAMPLES]
    model = made()
    losses = language.NLL()(model, batch(texts, side))
    expected = [
        oracles.mean([-oracles.log_p(z, y) for z, y in oracles.tokens(model, text, first=1)])
        for text in texts
    ]
    assert_same(model, losses, torch.stack(expected))


def test_labels_of_padding_do_not_count():
    model, padding = made(), batch(SAMPLES)
    labels = padding["labels"].where(padding["attention_mask"] == 1, 0)  # as of pad tokens copied
    losses = language.NLL()(model, {**padding, "labels": labels})
    torch.testing.assert_close(losses, language.NLL()(model, batch(SAMPLES)), **EXACT)


FORGET = {
    name: CASES[name][0]
    for name in CASES
    if name.split()[0] in language.FORGET and name.split()[0] not in ("rmu", "idk_nll")
}


@pytest.mark.parametrize("name", FORGET)
def test_a_step_along_its_direction_makes_answers_less_likely(name):
    original = made()
    learned = torch.optim.Adam(original.parameters(), lr=0.02)
    for _ in range(60):
        learned.zero_grad()
        language.NLL()(original, given()).sum().backward()
        learned.step()
    loss, model = FORGET[name](original), copy.deepcopy(original)
    before = language.NLL()(model, given()).mean()
    sign = -1 if loss.objective == "raise" else 1
    grads = torch.autograd.grad(sign * loss(model, given()).mean(), list(model.parameters()))
    size = sum(grad.square().sum() for grad in grads).sqrt()
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter -= 0.01 * grad / size
    assert language.NLL()(model, given()).mean() > before * (1 + 1e-3)


def test_directions():
    raised = {name for name, kind in language.FORGET.items() if kind.objective == "raise"}
    assert raised == {"grad_ascent", "wga", "satimp"}
    assert {kind.objective for kind in language.RETAIN.values()} == {"lower"}


def test_an_opposite_is_raised_where_the_loss_is_lowered():
    model, loss = made(), language.forget_loss("raul")
    opposite = language.raised(loss)
    assert (loss.objective, opposite.objective) == ("lower", "raise")
    torch.testing.assert_close(opposite(model, given()), -loss(model, given()))
    climbed = language.forget_loss("wga", as_published=True)
    assert language.raised(climbed) is climbed
    back = language.Opposite(loss=climbed)
    assert back.objective == "lower"
    torch.testing.assert_close(back(model, given()).losses, -climbed(model, given()).losses)
    assert not opposite.needs_reference
    assert language.raised(language.NPO(reference=language.LogProbs())).needs_reference


def test_raul_is_log_v_at_most():
    model = made()
    with torch.no_grad():
        model.head.weight *= 1e4
    losses = language.RAUL()(model, given())
    bound = torch.tensor(113.0).double().log()
    assert (losses <= bound + 1e-12).all()
    assert (losses > 0.99 * bound).any()
