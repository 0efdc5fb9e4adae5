"""One call has the metrics of TOFU, each that of its own function, for any size of batches."""

import functools
import math
import re
from pathlib import Path

import pytest
import torch

import gradsurgery as gs
from gradsurgery.language import metrics

pytest.importorskip("transformers")
from tests.language.metrics.writing import END, Tokenizer, llama, sample, taught

FORGET = [([5, 6], [7, 8, END]), ([9], [10, 11, END]), ([12, 13], [14, END])]
RETAIN = [([20], [21, 22, END]), ([23, 24], [25, END])]
HOLDOUT = [([30, 31], [32, 33, END]), ([34], [35, 36, END])]


def asked(pairs, paraphrase=True):
    """With one wrong answer more from sample to sample."""
    found = []
    for k, (prompt, answer) in enumerate(pairs):
        others = [sample(prompt, [15 + j, 16, END]) for j in range(k + 1)]
        more = {"paraphrased": sample(prompt, [*answer[:-1], 17, END])} if paraphrase else {}
        found.append({**sample(prompt, answer), "perturbed": others, **more})
    return found


@functools.cache
def models():
    everything = [sample(*pair) for pair in FORGET + RETAIN]
    return taught(llama(), everything, 25), taught(llama(), everything[3:], 25)


SETS = {
    "forget": asked(FORGET),
    "retain": asked(RETAIN),
    "real_authors": asked(RETAIN, paraphrase=False),
    "world_facts": asked(RETAIN[:1], paraphrase=False),
    "holdout": [sample(*pair) for pair in HOLDOUT],
}


def report(size=2, **options):
    model, retrained = models()
    given = {"tokenizer": Tokenizer(), "retrained": retrained, "gradients": True}
    given |= {**SETS, **options}
    return metrics.evaluate(model, batch_size=size, max_new_tokens=5, **given)


def loss(model, one):
    ids, labels = one["input_ids"], one["labels"]
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[1:]).item()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_a_report_is_what_its_metrics_are():
    model, retrained = models()
    found = report()

    def ratios(model, samples):
        right = [loss(model, one.get("paraphrased", one)) for one in samples]
        wrong = [mean(loss(model, other) for other in one["perturbed"]) for one in samples]
        return [math.exp(-w) / math.exp(-r) for r, w in zip(right, wrong, strict=True)]

    def among(one):
        wrong = sum(math.exp(-loss(model, other)) for other in one["perturbed"])
        return math.exp(-loss(model, one)) / (math.exp(-loss(model, one)) + wrong)

    expected = {
        "forget/truth_ratio": mean(min(r, 1 / r) for r in ratios(model, SETS["forget"])),
        "forget_quality": 0.1,  # of 3 and 3, one side all below the other: 2 in 6 choose 3
    }
    assert max(ratios(model, SETS["forget"])) < min(ratios(retrained, SETS["forget"]))
    for name in ("forget", "retain"):
        expected[f"{name}/probability"] = mean(math.exp(-loss(model, one)) for one in SETS[name])
    for name in ("real_authors", "world_facts"):
        expected[f"{name}/probability"] = mean(map(among, SETS[name]))
    for name in ("retain", "real_authors", "world_facts"):
        shares = [max(0, 1 - r) for r in ratios(model, SETS[name])]
        expected[f"{name}/truth_ratio"] = mean(shares)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
    nine = [
        found[f"{name}/{metric}"]
        for name in ("retain", "real_authors", "world_facts")
        for metric in ("probability", "rouge_l_recall", "truth_ratio")
    ]
    assert found["model_utility"] == pytest.approx(9 / sum(1 / value for value in nine), rel=1e-9)
    # it knows by heart what it was taught, and never saw the holdout set
    assert found["forget/rouge_l_recall"] == found["forget/extraction"] == 1
    assert {found[f"attack/{name}"] for name in ("loss", "zlib", "min_k", "gradient")} == {1}
    assert found["priv_leak"] < 0
    assert 1 < found["generated_perplexity"] < math.inf


@pytest.mark.parametrize("size", [1, 3, 50])
def test_the_size_of_batches_changes_nothing(size):
    assert report(size) == pytest.approx(report(), rel=1e-12)


def test_what_lacks_data_is_absent():
    model, _ = models()
    found = metrics.evaluate(model, forget=SETS["holdout"])
    assert list(found) == ["forget/extraction", "forget/memorization", "forget/probability"]
    assert set(report(tokenizer=None, holdout=None)) == {
        *(
            f"{name}/{metric}"
            for name in SETS
            if name != "holdout"
            for metric in ("extraction", "memorization", "probability", "truth_ratio")
        ),
        "forget_quality",
    }


def test_a_model_that_writes_nothing_has_no_fluency():
    _, retrained = models()
    mute = taught(llama(), [sample(prompt, [END]) for prompt, _ in FORGET])
    found = metrics.evaluate(
        mute, forget=SETS["forget"], retrained=retrained, tokenizer=Tokenizer(), max_new_tokens=3
    )
    assert math.isnan(found["generated_perplexity"])
    assert found["forget/rouge_l_recall"] == 0


def test_what_is_no_sample_is_named():
    model = llama()
    one = SETS["forget"][0]
    for given, message in (
        ([], "forget: no sample"),
        (one, "forget must be a list of samples, got dict"),
        ([one, 3], r"forget\[1\] must be a mapping, got int"),
        ([{**one, "labels": None}], r"labels of forget\[0\] must be integers \[T\], got NoneType"),
        ([{**one, "perturbed": [{}]}], r"input_ids of answer 0 of forget\[0\] must be"),
        ([one, SETS["holdout"][0]], r"forget\[1\] has no perturbed answer, where others have"),
    ):
        with pytest.raises(gs.InputError, match=message):
            metrics.evaluate(model, forget=given)
    with pytest.raises(gs.InputError, match="batch_size must be 1 or more"):
        metrics.evaluate(model, forget=[one], batch_size=0)


def test_every_name_is_on_the_page():
    page = Path(__file__).resolve().parents[3] / "docs" / "language-metrics.md"
    text = page.read_text(encoding="utf-8")
    assert [name for name in metrics.__all__ if not re.search(rf"\b{name}\b", text)] == []
