"""`as_published`: the numbers of public code, which are means over batches."""

import pytest
import torch
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery import language
from tests.language.test_losses import EXACT
from tests.language.tiny import LONGER, SAMPLES, batch, made, moved


def shifted(model, given):
    return model(given["input_ids"], given["attention_mask"])[:, :-1], given["labels"][:, 1:]


def token_losses(model, given):
    """Of all label tokens of a batch, one after the other."""
    logits, labels = shifted(model, given)
    kept = labels != -100
    return F.cross_entropy(logits[kept], labels[kept], reduction="none")


def nll(model, given):
    return token_losses(model, given).mean()


def wga(model, given):
    losses = token_losses(model, given)
    return ((-losses).exp().detach() * losses).mean()


def satimp(model, given):
    losses = token_losses(model, given)
    sure = (-losses).exp().detach()
    return (sure**5 * (1 - sure) * losses).mean()


def ceu(model, given):
    logits, labels = shifted(model, given)
    kept = (labels != -100) & ((given["labels"] != -100).cumsum(1)[:, 1:] > 1)
    logits, labels = logits[kept], labels[kept]
    others = logits.detach().clone()
    others[torch.arange(len(labels)), labels] = -torch.inf
    return F.cross_entropy(logits, others.softmax(1))


def pdu(model, given):
    logits, mask = model(given["input_ids"], given["attention_mask"]), given["labels"] != -100
    return (logits.amax(-1) - logits.mean(-1))[mask].square().mean()


BY_TOKEN = {
    "nll": (language.NLL, nll),
    "grad_ascent": (language.GradAscent, nll),
    "wga": (language.WGA, wga),
    "satimp": (language.SatImp, satimp),
    "ceu": (language.CEU, ceu),
    "pdu": (language.PDU, pdu),
}


TEXTS = [([], prompt + answer) for prompt, answer in LONGER]  # raw: all of it has labels


@pytest.mark.parametrize("samples", [LONGER, TEXTS], ids=["answers", "texts"])
@pytest.mark.parametrize("name", BY_TOKEN)
def test_means_over_the_tokens_of_a_batch(name, samples):
    kind, definition = BY_TOKEN[name]
    model, given = made(), batch(samples)
    found = kind(as_published=True)(model, given)
    assert isinstance(found, gs.WeightedLosses)
    weighted = (found.losses * found.weights).sum() / found.weights.sum()
    expected = definition(model, given)
    torch.testing.assert_close(weighted, expected, **EXACT)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(value, parameters) for value in (weighted, expected)]
    torch.testing.assert_close(*grads, **EXACT)


def undial(model, original, given):
    logits, labels = shifted(model, given)
    theirs = shifted(original, given)[0].detach()
    lowered = theirs - 10 * F.one_hot(labels % theirs.shape[-1], theirs.shape[-1])
    return F.cross_entropy(logits.flatten(0, 1), lowered.flatten(0, 1).softmax(1))


def kl(model, original, given):
    mine, theirs = (
        each(given["input_ids"], given["attention_mask"]).log_softmax(-1)
        for each in (model, original)
    )
    theirs = theirs.detach()
    return (theirs.exp() * (theirs - mine)).sum(-1).mean()


@pytest.mark.parametrize(
    ("kind", "definition"), [(language.UNDIAL, undial), (language.KL, kl)], ids=["undial", "kl"]
)
@pytest.mark.parametrize("extra", [0, 20])
def test_means_over_all_positions(kind, definition, extra):
    original = made()
    model, given = moved(original), batch(SAMPLES, extra=extra)
    found = kind(reference=language.Frozen(original), as_published=True)(model, given).mean()
    expected = definition(model, original, given)
    torch.testing.assert_close(found, expected, **EXACT)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(value, parameters) for value in (found, expected)]
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("kind", [language.UNDIAL, language.KL])
def test_published_means_change_with_padding_and_ours_do_not(kind):
    original = made()
    model = moved(original)
    short, long = batch(SAMPLES), batch(SAMPLES, extra=20)
    for as_published in (False, True):
        loss = kind(reference=language.Frozen(original), as_published=as_published)
        one, other = loss(model, short).mean(), loss(model, long).mean()
        if as_published:
            assert abs(one - other) > 0.01 * one
        else:
            torch.testing.assert_close(one, other, **EXACT)


def test_simnpo_counts_a_first_token_that_nothing_predicts():
    texts = [([], prompt + answer) for prompt, answer in SAMPLES]
    model, given = made(), batch(texts)
    logits, labels = shifted(model, given)
    total = F.cross_entropy(logits.mT, labels, reduction="none").sum(1)
    expected = -2 / 4.5 * F.logsigmoid(4.5 * total / (given["labels"] != -100).sum(1))
    published = language.SimNPO(as_published=True)(model, given)
    torch.testing.assert_close(published, expected, **EXACT)
    assert not torch.allclose(language.SimNPO()(model, given), expected)


@pytest.mark.parametrize("kind", ["rmu", "retain"])
def test_rmu_takes_the_mean_over_dimensions(kind):
    original = made()
    made_of = {"layer": "layers.1", "as_published": True}
    if kind == "rmu":
        published = language.RMU(**made_of)
        ours = language.RMU(layer="layers.1")
    else:
        reference = language.Frozen(original)
        published = language.RMURetain(reference=reference, **made_of)
        ours = language.RMURetain(reference=reference, layer="layers.1")
    model, given = moved(original), batch(SAMPLES)
    torch.testing.assert_close(6 * published(model, given), ours(model, given), **EXACT)


def test_undial_needs_a_token_for_label_minus_100():
    model = torch.nn.Embedding(100, 100).double()

    class Small(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return model(input_ids)

    loss = language.UNDIAL(reference=language.Frozen(Small()), as_published=True)
    small = [([1], [2, 3])]
    with pytest.raises(gs.InputError, match="token V - 100: V is 100"):
        loss(Small(), batch(small))
