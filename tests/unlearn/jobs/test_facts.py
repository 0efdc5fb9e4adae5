"""The facts job: its data, and runs of a few steps by the real code."""

import json

import pytest
import torch

import gradsurgery as gs
from gradsurgery.cli import main
from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.facts import data
from gradsurgery.unlearn.jobs.facts.job import FactsConfig, FactsJob
from gradsurgery.unlearn.training.config import update

pytest.importorskip("transformers")
pytest.importorskip("rouge_score")

JOB = FactsJob()
FEW = {
    "authors": 100,
    "layers": 1,
    "width": 32,
    "threads": 1,
    "training": {"steps": 4},
    "surgery": {"steps": 2},
    "method": [],
}


def config(**changes):
    return update(update(FactsConfig(), FEW), changes)


def test_it_is_found_with_its_options():
    assert isinstance(registry.find("facts"), FactsJob)
    assert JOB.defaults().surgery.stop == "validation"
    named = [variant.name for variant in JOB.defaults().variants]
    assert named[:2] == ["surgery+npo with orthograd", "surgery+npo with gru"]


SETS = ("forget", "retain", "validation", "test")
NAMES = {*data.words.FIRST, *data.words.LAST}


def who(row):
    """The author asked for: two words that are names."""
    text = data.tokenizer().decode(row.tolist()).split()
    return " ".join(word for word in text[: text.index("?")] if word in NAMES)


@pytest.mark.parametrize(("task", "size"), [("authors", 5 * 6), ("facts", 30)])
def test_sets_are_apart_and_follow_from_the_seed(task, size):
    split = JOB.split(config(task=task), 3)
    ids = {name: set(getattr(split, name)["id"].tolist()) for name in SETS}
    assert len(ids["forget"]) == size and sorted(ids["forget"]) == list(split.ids)
    assert sum(map(len, ids.values())) == len(set.union(*ids.values()))
    assert len(ids["forget"] | ids["retain"]) == 600 + 44  # authors, books and capitals
    again = JOB.split(config(task=task), 3)
    assert torch.equal(split.retain["input_ids"], again.retain["input_ids"])
    other = JOB.split(config(task=task), 4)
    assert not torch.equal(split.retain["input_ids"], other.retain["input_ids"])
    names = {name: set(map(who, getattr(split, name)["input_ids"])) for name in SETS}
    unseen = names["validation"] | names["test"]
    assert len(unseen) == 24 and not unseen & (names["forget"] | names["retain"])
    if task == "authors":
        assert len(names["forget"]) == 5 and not names["forget"] & names["retain"]


def test_a_question_its_answers_and_refusal():
    split = JOB.split(config(), 0)
    words, forget = data.tokenizer(), split.forget
    sample = split.samples["forget"][0]
    answer = words.decode(sample["labels"][sample["labels"] >= 0].tolist())
    text = words.decode(sample["input_ids"].tolist())
    assert text.endswith(answer) and answer.endswith(". <end>") and "?" not in answer
    wrong = [
        words.decode(one["labels"][one["labels"] >= 0].tolist()) for one in sample["perturbed"]
    ]
    assert len({answer, *wrong}) == 5
    refusal = forget["alternate"]["labels"][0]
    refused = words.decode(refusal[refusal >= 0].tolist(), skip_special_tokens=True)
    assert refused in data.REFUSALS
    prompt = forget["input_ids"][0][forget["labels"][0] < 0]
    question = sample["input_ids"][sample["labels"] < 0]
    assert torch.equal(prompt[: len(question)], question)


def test_pairs_are_losses_times_rules_with_their_options():
    asked = config(loss=["npo:beta=0.3", "grad_ascent"], rule=["gru", "orthograd:alpha=0.2"])
    asked = update(asked, {"retain_fraction": [1.0, 0.5]})
    names = [variant.name for variant in asked.variants]
    assert len(names) == 8 and names[1] == "surgery+npo:beta=0.3 with orthograd:alpha=0.2"
    changed = update(asked, {"surgery": asked.variants[1].changes}).surgery
    assert (changed.forget_loss, changed.forget_loss_options) == ("npo", ("beta=0.3",))
    assert (changed.rule, changed.rule_options) == ("orthograd", ("alpha=0.2",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": ["nqo"]}, "there is no forget loss 'nqo'"),
        ({"rule": ["gem"]}, "gem takes no forget loss"),
        ({"rule": ["gru", "gru"]}, "--rule names one of them twice"),
        ({"loss": ["npo:beta"]}, "--loss must be NAME=VALUE"),
        ({"loss": ["rmu"]}, "layer 'model.layers.7': .* has 0 modules"),
        ({"loss": [], "rule": []}, "--method must be at least one method"),
        ({"authors": 99}, "--authors must be from 100 to"),
        ({"width": 48}, "--width must be a multiple of 32"),
        ({"percent": 0.0}, r"--percent must be in \(0, 50\]"),
        ({"training": {"start": "scratch"}}, "--training.start must be given"),
        ({"method": ["ltu"]}, "LTU needs .*, which CausalLM has not"),
    ],
)
def test_what_makes_no_sense_is_named_before_anything_is_trained(changes, message):
    with pytest.raises(gs.InputError, match=message):
        JOB.check(config(**changes))


def test_a_run_measures_and_continues_to_the_same_bits(tmp_path):
    path = tmp_path / "run"
    arguments = [
        "unlearn", "facts", "--authors=100", "--layers=1", "--width=32", "--threads=1",
        "--training.steps=4", "--surgery.steps=2", "--method", "graddiff", "--graddiff.steps=2",
        "--loss", "simnpo", "--rule", "orthograd", "--out", str(path),
    ]  # fmt: skip
    main(arguments)
    summary = json.loads((path / "summary.json").read_text())
    assert set(summary["columns"]) == {
        "original", "retrain", "surgery+simnpo with orthograd", "graddiff"
    }  # fmt: skip
    found = summary["columns"]["surgery+simnpo with orthograd"]
    assert {"gap_mean", "forget_quality", "model_utility", "attack/min_k", "relearn"} <= set(found)
    page = (path / "report.html").read_text()
    assert "simnpo with orthograd" in page and "Probabilities are those" in page
    assert "A Llama of 1 layer" in (path / "model_card.md").read_text()

    (stage,) = path.glob("stages/*graddiff*.json")
    before = json.loads(stage.read_text())["metrics"]
    stage.unlink()
    main([*arguments, "--resume", "auto"])
    assert json.loads(stage.read_text())["metrics"] == before
