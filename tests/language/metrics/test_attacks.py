"""Attacks on texts: signs by hand, gradient norms against autograd, and what is refused."""

import math
import zlib

import pytest
import torch

import gradsurgery as gs
from gradsurgery import extras, language
from gradsurgery.language import metrics
from gradsurgery.language.metrics import TokenScores
from tests.language.tiny import SAMPLES, batch, made, tokens


def scores(*losses):
    """Samples of one token each."""
    return {k: TokenScores(loss, 1, 0, 0, loss, loss) for k, loss in enumerate(losses)}


def aucs(members, others, **given):
    return metrics.attack_aucs(
        metrics.attack_scores(scores(*members), **given),
        metrics.attack_scores(scores(*others), **given),
    )


def test_a_member_has_the_lower_loss_by_hand():
    assert aucs([1, 2], [3, 4])["loss"] == 1  # members found, each of them
    assert aucs([3, 4], [1, 2])["loss"] == 0
    # of the pairs 1<2, 1<3, 4>2, 4>3, and a tie of 3 and 3 that counts half: 2.5 of 6
    assert aucs([1, 4, 3], [2, 3])["loss"] == 2.5 / 6
    assert set(aucs([1], [2])) == {"loss", "min_k", "min_k_plus_plus"}


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_equal_sets_cannot_be_told_apart(n):
    same = torch.randn(n).tolist()
    assert set(aucs(same, same[::-1]).values()) == {0.5}


def test_infinite_scores_have_an_order():
    assert aucs([1, 2], [math.inf, 3])["loss"] == 1
    assert aucs([math.inf], [math.inf])["loss"] == 0.5


def test_zlib_counts_bytes_of_utf8():
    texts = {0: "ñandú über 東京", 1: ""}
    found = metrics.attack_scores(scores(2.0, 3.0), texts=texts)["zlib"]
    sizes = [len(zlib.compress(texts[k].encode("utf-8"))) for k in (0, 1)]
    assert sizes[0] > len(zlib.compress(texts[0].encode("latin-1", "ignore")))
    assert found == {0: 2.0 / sizes[0], 1: 3.0 / sizes[1]}


def test_losses_are_compared_with_another_model_s():
    # a member lost 1 nat to the model that never saw it, another sample gained 0.5
    found = metrics.attack_scores(scores(2.0, 2.5), reference=scores(3.0, 2.0))
    assert found["reference"] == {0: -1, 1: 0.5}


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradient_norms_are_those_of_a_backward_pass_each(side):
    model = made()
    model.words.weight.requires_grad_(False)  # as below an adapter
    model.head.weight.grad = before = torch.ones_like(model.head.weight)
    parts = [
        batch(SAMPLES[:3], side, 2),
        {**batch(SAMPLES[3:], side), "id": torch.tensor([53, 54])},
    ]
    found = metrics.gradient_norms(model, parts)
    trained = [p for p in model.parameters() if p.requires_grad]
    for place, sample in enumerate(SAMPLES):
        logits, labels = zip(*tokens(model, sample), strict=True)
        loss = torch.nn.functional.cross_entropy(torch.stack(logits), torch.tensor(labels))
        grads = torch.autograd.grad(loss, trained)
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads))
        assert found[50 + place] == pytest.approx(norm, rel=1e-10)
    assert model.head.weight.grad is before
    assert model.training
    given = metrics.token_scores(model, parts)
    assert metrics.attack_scores(given, gradients=found)["gradient"] == found


def test_members_have_lower_gradients_and_losses_after_training():
    model = made()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    members, others = batch(SAMPLES[:3]), batch(SAMPLES[3:])
    for _ in range(40):
        optimizer.zero_grad()
        language.NLL()(model, members).mean().backward()
        optimizer.step()
    sides = [
        metrics.attack_scores(
            metrics.token_scores(model, given), gradients=metrics.gradient_norms(model, given)
        )
        for given in (members, others)
    ]
    found = metrics.attack_aucs(*sides)
    assert set(found) == {"loss", "min_k", "min_k_plus_plus", "gradient"}
    assert set(found.values()) == {1}


@pytest.mark.parametrize(
    ("auc", "retrained", "leak"),
    [
        (0.5, 0.5, 0),
        (1, 0.5, -100),  # every member found: under-unlearned
        (0, 0.5, 100),  # what was forgotten stands out: over-unlearned
        (0.6, 0.2, 100 * (0.4 - 0.8) / 0.8),
        (0.25, 0, -25),
    ],
)
def test_priv_leak_by_hand(auc, retrained, leak):
    assert metrics.priv_leak(auc, retrained) == pytest.approx(leak, abs=1e-12)


def test_a_retrained_model_that_leaves_nothing_has_no_priv_leak():
    assert math.isnan(metrics.priv_leak(1.0, 1.0))
    assert math.isnan(metrics.priv_leak(0.5, 1.0))
    for pair in ((1.1, 0.5), (0.5, -0.1), (math.nan, 0.5)):
        with pytest.raises(gs.InputError, match="must be"):
            metrics.priv_leak(*pair)


def test_what_attacks_refuse():
    for name in ("texts", "reference", "gradients"):
        with pytest.raises(gs.InputError, match=f"{name} lack sample id 1"):
            metrics.attack_scores(scores(1, 2), **{name: {0: "a"}})
    one = metrics.attack_scores(scores(1, 2))
    with pytest.raises(gs.InputError, match="holdout: no sample"):
        metrics.attack_aucs(one, metrics.attack_scores({}))
    with pytest.raises(gs.InputError, match="loss of sample id 0 of holdout is NaN"):
        metrics.attack_aucs(one, metrics.attack_scores(scores(math.nan)))


def test_a_missing_package_is_an_error_with_its_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras, "import_module", missing)
    for call, needs in (
        (lambda: metrics.rouge_l({0: "a"}, {0: "a"}), "rouge_l needs rouge-score"),
        (lambda: metrics.forget_quality({0: 0.0}, {0: 0.0}), "forget_quality needs scipy"),
        (lambda: aucs([1], [2]), "attack_aucs needs scipy"),
    ):
        with pytest.raises(gs.InputError, match=rf"{needs}: pip install 'gradsurgery\[language\]'"):
            call()
