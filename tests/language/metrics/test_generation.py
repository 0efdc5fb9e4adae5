"""What a model writes: the continuation alone, the same in any batch; and ROUGE-L of it."""

import math

import pytest
import torch

import gradsurgery as gs
from gradsurgery.language import metrics

pytest.importorskip("transformers")
from tests.language.metrics.writing import END, Tokenizer, llama, sample, taught
from tests.language.tiny import batch

PAIRS = [([5, 6, 7], [8, 9, 10, END]), ([11], [12, END]), ([13, 14], [END]), ([5, 20], [21, 22])]


@pytest.fixture(scope="module")
def model():
    return taught(llama(), [sample(*pair) for pair in PAIRS])


def greedy(model, prompt, most):
    """A token at a time, from the text alone."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        with torch.no_grad():
            following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if following == END:
            break
        ids.append(following)
    return ids[len(prompt) :]


@pytest.mark.parametrize("most", [1, 3, 6])
@pytest.mark.parametrize("which", ["taught", "wild"])
def test_the_continuation_is_greedy_in_any_batch(model, which, most):
    if which == "wild":  # every token and every place changes what it says
        model = llama(initializer_range=1.0)
    model.train()
    for side, extra, places in (("right", 2, [0, 1, 2, 3]), ("left", 0, [3, 1]), ("left", 5, [2])):
        given = batch([PAIRS[place] for place in places], side, extra)
        found = metrics.generated(model, given, Tokenizer(), max_new_tokens=most)
        for place, one in zip(places, found.values(), strict=True):
            prompt, _ = PAIRS[place]
            expected = greedy(model, prompt, most)
            assert one.prompt.tolist() == prompt
            assert one.tokens.tolist() == expected
            assert one.text == Tokenizer().decode(expected, skip_special_tokens=True)
    assert model.training


def test_what_was_taught_is_written_and_nothing_is_an_answer_too(model):
    found = metrics.generated(model, batch(PAIRS), Tokenizer(), max_new_tokens=6)
    assert [one.text for one in found.values()][:3] == ["w8 w9 w10", "w12", ""]
    assert found[52].tokens.shape == (0,)
    assert metrics.rouge_l({52: "w8"}, {52: found[52].text})[52] == (0, 0, 0)


def test_a_batch_without_labels_is_continued_at_its_end(model):
    given = batch([(PAIRS[0][0], [])], ids=False)
    del given["labels"]
    found = metrics.generated(model, given, Tokenizer(), max_new_tokens=6)
    assert found[0].tokens.tolist() == [8, 9, 10]


def test_a_model_set_to_sample_is_greedy_all_the_same(model):
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k = True, 9.0, 7
    try:
        found = metrics.generated(model, batch(PAIRS), Tokenizer(), max_new_tokens=6)
    finally:
        config.do_sample, config.temperature, config.top_k = False, None, None
    assert found[50].tokens.tolist() == [8, 9, 10]


def test_perplexity_of_what_was_written_under_another_model(model):
    other = llama(seed=1)
    written = metrics.generated(model, batch(PAIRS), Tokenizer(), max_new_tokens=6)
    total, number = 0.0, 0
    for one in written.values():
        ids = one.prompt.tolist() + one.tokens.tolist()
        logs = other(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for at in range(len(one.prompt), len(ids)):
            total, number = total - logs[at - 1, ids[at]].item(), number + 1
    said = [one.sample() for one in written.values() if len(one.tokens)]
    scores = {}
    for k, own in enumerate(said):
        given = {name: values[None] for name, values in own.items()}
        scores |= metrics.token_scores(other, {**given, "id": torch.tensor([k])})
    assert metrics.perplexity(scores) == pytest.approx(math.exp(total / number), rel=1e-12)


def test_rouge_by_hand():
    # "the cat sat" and "a cat sat down": the longest common subsequence has 2 words, of 3 that
    # should have been written and 4 that were: recall 2/3, precision 1/2, F1 4/7
    found = metrics.rouge_l({3: "the cat sat"}, {3: "A cat sat down.", 4: "more"})
    assert found == {3: pytest.approx((1 / 2, 2 / 3, 4 / 7), rel=1e-12)}
    # order counts: of "b a" and "a b" one word is common; endings go, unless asked not to
    assert metrics.rouge_l({0: "b a"}, {0: "a b"})[0].recall == 1 / 2
    assert metrics.rouge_l({0: "authors"}, {0: "author"})[0].recall == 1
    assert metrics.rouge_l({0: "authors"}, {0: "author"}, stemmer=False)[0].recall == 0


def test_what_is_refused(model):
    with pytest.raises(gs.InputError, match="written lacks sample id 1"):
        metrics.rouge_l({1: "a"}, {})
    with pytest.raises(gs.InputError, match=r"model must have generate.*got Linear"):
        metrics.generated(torch.nn.Linear(2, 2), batch(PAIRS), Tokenizer())
    with pytest.raises(gs.InputError, match=r"sample 0 \(id 50\) has no prompt"):
        metrics.generated(model, batch([([], [4, 5])]), Tokenizer())
    with pytest.raises(gs.InputError, match="max_new_tokens must be 1 or more, got 0"):
        metrics.generated(model, batch(PAIRS), Tokenizer(), max_new_tokens=0)
