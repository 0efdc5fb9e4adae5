"""What one pass says of each sample: by hand, by definition, and the same however it is batched."""

import math

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery import language
from gradsurgery.language import metrics
from tests.language.tiny import LONGER, SAMPLES, WORDS, batch, log_p, made, tokens

SPLITS = {
    "whole": ("right", 0, [[0, 1, 2, 3, 4]]),
    "left": ("left", 0, [[0, 1, 2, 3, 4]]),
    "alone": ("right", 0, [[0], [1], [2], [3], [4]]),
    "more padding": ("right", 7, [[4, 2], [0, 1, 3]]),
    "more on the left": ("left", 5, [[3], [2, 1], [4, 0]]),
    "twice": ("left", 1, [[0, 1, 2], [2, 3, 4], [0]]),
}


def learned():
    """A model that knows some of the tokens, and not all."""
    model = made()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(12):
        optimizer.zero_grad()
        language.NLL()(model, batch(SAMPLES)).sum().backward()
        optimizer.step()
    return model


MODEL = learned()


def batches(name, samples=SAMPLES):
    side, extra, split = SPLITS[name]
    for places in split:
        one = batch([samples[place] for place in places], side, extra, ids=False)
        yield {**one, "id": 50 + torch.tensor(places)}


def definition(model, sample, k, published):
    """A token at a time, from the text alone."""
    each = tokens(model, sample)
    losses = [-log_p(z, y).item() for z, y in each]
    known = each[:-1] if published else each
    right = [all(z[y] >= other for other in z) for z, y in known]
    normalized = []
    for z, y in known:
        p = [math.exp(log_p(z, v)) for v in range(WORDS)]
        mean = sum(one * math.log(one) for one in p)
        square = sum(one * (math.log(one) - mean) ** 2 for one in p)
        normalized.append((math.log(p[y]) - mean) / math.sqrt(square))
    n = len(known)
    lowest = max(1, math.floor(k * n))
    prefixes = [k for k in range(n + 1) if all(right[k:])]
    prefix = min(prefixes[0], n - 1) if published else prefixes[0]
    return (
        sum(losses) / len(losses),
        len(losses),
        sum(right) / n,
        1 - prefix / n,
        sum(sorted(losses[:n])[-lowest:]) / lowest,
        -sum(sorted(normalized)[:lowest]) / lowest,
    )


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("k", [0.4, 1.0])
def test_scores_are_their_definitions_in_any_batches(name, k):
    found = metrics.token_scores(MODEL, batches(name), k=k)
    assert len(found) == len(SAMPLES)
    for place, sample in enumerate(SAMPLES):
        with torch.no_grad():
            expected = definition(MODEL, sample, k, False)
        assert found[50 + place] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    shares = [one.memorization for one in found.values()]
    assert 0 < sum(shares) < len(shares)  # neither all nor nothing is known


@pytest.mark.parametrize("side", ["left", "right"])
def test_published_scores_leave_the_last_token_out(side):
    found = metrics.token_scores(MODEL, batch(LONGER, side), as_published=True)
    for place, sample in enumerate(LONGER):
        with torch.no_grad():
            expected = definition(MODEL, sample, 0.4, True)
        assert found[50 + place] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    with pytest.raises(gs.InputError, match=r"sample 1 \(id 51\) has one label token"):
        metrics.token_scores(MODEL, batch(SAMPLES), as_published=True)


YES, NO = True, False


@pytest.mark.parametrize(
    ("right", "share", "strength", "published"),
    [
        # after the first two tokens all is right: k = 2 of n = 4
        ([YES, NO, YES, YES], 3 / 4, 1 - 2 / 4, 1 - 2 / 4),
        ([YES, YES, YES, YES], 1, 1, 1),
        # the last is wrong: k = n, and public code stops at n - 1
        ([YES, YES, YES, NO], 3 / 4, 0, 1 / 4),
        ([NO, NO], 0, 0, 1 / 2),
        ([YES], 1, 1, 1),
        ([NO], 0, 0, 1),
    ],
)
def test_what_is_known_by_heart_by_hand(right, share, strength, published):
    known = torch.tensor(right)
    assert metrics.exact_memorization(known) == share
    assert metrics.extraction_strength(known) == strength
    assert metrics.extraction_strength(known, as_published=True) == published


def test_min_k_by_hand():
    # the lowest floor(0.4 * 5) = 2 of them are -4 and -3
    values = torch.tensor([-1.0, -4.0, -2.0, -3.0, -0.5])
    assert metrics.min_k(values, 0.4) == 3.5
    assert metrics.min_k(values, 1.0) == 2.1
    assert metrics.min_k(values, 0.01) == 4.0  # one at least
    with pytest.raises(gs.InputError, match="without a label token"):
        metrics.min_k(values[:0])


class Says(nn.Module):
    """The same logits [V] at every place, and how often it was asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = nn.Parameter(torch.as_tensor(logits)), 0

    def forward(self, input_ids, attention_mask=None):
        assert not (self.training or torch.is_grad_enabled())
        self.calls += 1
        return self.logits.expand(*input_ids.shape, -1)


def answers(*texts):
    """A prompt of one token, and answers of one length."""
    ids = torch.tensor([[0, *text] for text in texts])
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) == 0, -100)}


def test_one_pass_by_hand():
    # p = (0.8, 0.2), and of log p mean m, deviation sqrt(0.8 * 0.2) log 4 = 0.4 log 4:
    # (log 0.8 - m) / s = 0.2 log 4 / (0.4 log 4) = 0.5, and (log 0.2 - m) / s = -2
    model = Says(torch.tensor([0.8, 0.2], dtype=torch.float64).log())
    found = metrics.token_scores(model, answers([0, 0, 1, 0], [0, 0, 0, 0]), k=0.5)
    loss = -(3 * math.log(0.8) + math.log(0.2)) / 4
    assert found[0] == pytest.approx(
        (loss, 4, 3 / 4, 1 / 4, -(math.log(0.2) + math.log(0.8)) / 2, (2 - 0.5) / 2), rel=1e-12
    )
    assert found[1] == pytest.approx((-math.log(0.8), 4, 1, 1, -math.log(0.8), -0.5), rel=1e-12)
    assert model.calls == 1
    assert model.training
    # geometric means: (0.8^3 0.2)^(1/4), and 0.8
    probability = metrics.probability(found)
    assert list(probability.values()) == pytest.approx([(0.8**3 * 0.2) ** 0.25, 0.8], rel=1e-12)


def test_perplexity_is_over_tokens_and_adds_up():
    # 4 tokens of which 3 have 0.8, then 2 of 0.2: no mean of the samples' perplexities
    model = Says(torch.tensor([0.8, 0.2], dtype=torch.float64).log())
    parts = [
        metrics.token_scores(model, {**one, "id": torch.tensor([k])})
        for k, one in enumerate([answers([0, 0, 1, 0]), answers([1, 1])])
    ]
    expected = math.exp(-(3 * math.log(0.8) + 3 * math.log(0.2)) / 6)
    assert metrics.perplexity(metrics.merged(*parts)) == pytest.approx(expected, rel=1e-12)
    sums = metrics.token_sums(parts[0]) + metrics.token_sums(parts[1])
    assert sums.number == 6
    assert metrics.perplexity_of(sums) == pytest.approx(expected, rel=1e-12)
    assert metrics.perplexity_of(metrics.Sums(1e6, 1)) == math.inf


def test_logits_of_minus_infinity_and_certainty_have_finite_scores():
    logits = torch.tensor([0.0, -80.0, -math.inf])
    found = metrics.token_scores(Says(logits), answers([0, 0, 0, 1]))[0]
    assert found.loss == 20  # 80 nats on one of four tokens
    assert all(map(math.isfinite, found))
    assert found.memorization == 3 / 4
    impossible = metrics.token_scores(Says(logits), answers([0, 2]))[0]
    assert impossible.loss == math.inf
    assert metrics.probability({0: impossible}) == {0: 0}


def test_bfloat16_models_are_scored_in_float32():
    logits = torch.randn(50)
    found = metrics.token_scores(Says(logits.bfloat16()), answers([3, 4]))[0]
    exact = metrics.token_scores(Says(logits.bfloat16().double()), answers([3, 4]))[0]
    assert found == pytest.approx(exact, rel=1e-5)


def test_samples_that_come_twice_count_once():
    whole = metrics.token_scores(MODEL, batches("whole"))
    twice = metrics.token_scores(MODEL, batches("twice"))
    mean = metrics.Sums.of(metrics.losses(whole)).mean
    assert metrics.Sums.of(metrics.losses(twice)).mean == pytest.approx(mean, rel=1e-12)
    asked = [([5, 9], [7]), ([4, 9], [7])]  # one answer to two questions
    for samples in (SAMPLES[:2], asked):
        with pytest.raises(gs.InputError, match="id 7 is of two samples"):
            metrics.token_scores(MODEL, {**batch(samples), "id": torch.tensor([7, 7])})


def test_samples_without_ids_are_numbered():
    parts = [batch(SAMPLES[:2], ids=False), batch(SAMPLES[2:], ids=False)]
    found = metrics.token_scores(MODEL, parts)
    whole = metrics.token_scores(MODEL, batch(SAMPLES))
    assert list(found) == [0, 1, 2, 3, 4]
    for place in range(len(SAMPLES)):
        assert found[place] == pytest.approx(whole[50 + place], rel=1e-12)
    with pytest.raises(gs.InputError, match="some batches have ids and some have none"):
        metrics.token_scores(MODEL, [parts[0], batch(SAMPLES[2:])])


def masked(place):
    given = batch(SAMPLES)
    given["labels"][place] = -100
    return given


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "batches hold no sample"),
        (masked(3), {}, r"labels of sample 3 \(id 53\) are all masked"),
        ({**batch(SAMPLES), "id": torch.zeros(5)}, {}, r"id of a batch must be integers \[5\]"),
        ([3], {}, "batch must be a mapping with labels, got int"),
        (batch(SAMPLES), {"k": 0}, r"k must be in \(0, 1\], got 0"),
        (batch(SAMPLES), {"k": math.nan}, "k must be a number, got nan"),
    ],
)
def test_what_is_refused(given, options, message):
    with pytest.raises(gs.InputError, match=message):
        metrics.token_scores(MODEL, given, **options)


def test_a_model_that_says_nan_is_named_with_the_sample():
    model = made()
    with torch.no_grad():
        model.words.weight[100] = math.nan  # in the answer of sample 3 alone
    with pytest.raises(gs.NonFiniteError, match=r"of sample 3 \(id 53\) are NaN"):
        metrics.token_scores(model, batch(SAMPLES))


def test_packed_batches_have_a_score_for_each_document():
    from tests.language.test_head import model_of

    model = model_of()
    row = torch.randint(3, 60, (1, 12))
    positions = torch.cat([torch.arange(length) for length in (5, 4, 3)])[None]
    packed = {"input_ids": row, "labels": row, "position_ids": positions}
    alone = [{"input_ids": part, "labels": part} for part in row.split([5, 4, 3], 1)]
    expected = [one.loss for each in alone for one in metrics.token_scores(model, each).values()]
    for ids in ({}, {"id": torch.arange(3)}, {"id": torch.arange(3)[None]}):
        found = metrics.token_scores(model, {**packed, **ids})
        assert [one.loss for one in found.values()] == pytest.approx(expected, abs=1e-12)
