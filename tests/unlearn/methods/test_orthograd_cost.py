"""What an OrthoGrad step costs beside a plain one: measured apart from the run, and reported."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from gradsurgery import OrthoGrad, Surgeon
from gradsurgery.unlearn import OrthoGradConfig, OrthoGradTrainer, RetrainConfig
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN, load
from gradsurgery.unlearn.jobs.digits.job import DigitsConfig
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.pipeline import reproducible
from gradsurgery.unlearn.jobs.progress import PlainProgress
from gradsurgery.unlearn.jobs.summary import summarize
from gradsurgery.unlearn.objectives.base import take
from gradsurgery.unlearn.objectives.classification import cross_entropy
from gradsurgery.unlearn.report.render import step_cost
from gradsurgery.unlearn.training.surgical import marked
from tests.unlearn.jobs.test_job import result
from tests.unlearn.tiny import JOB, run


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("precondition", ["none", "optimizer"])
def test_timing_leaves_the_run_as_it_was(optimizer, precondition, problem):
    if (optimizer, precondition) == ("sgd", "optimizer"):
        pytest.skip("the rule refuses this pair")
    problem.model.insert(1, torch.nn.Dropout(0.5))
    ends = []
    for timed in (False, True):
        torch.manual_seed(3)
        model = copy.deepcopy(problem.model)
        config = OrthoGradConfig(
            steps=4, retain_batch=5, forget_batch=4, optimizer=optimizer, precondition=precondition
        )
        trainer = OrthoGradTrainer(
            model, problem.loss, forget=problem.forget, retain=problem.retain, config=config
        )
        for record in trainer.fit():
            if timed and record["step"] == 2:
                model.eval()
                seconds = trainer.step_seconds()
                assert seconds.keys() == {"orthograd", "plain"}
                assert all(0 < value < 60 for value in seconds.values())
                assert not model.training
        ends.append(trainer.state_dict())
        ends[-1].pop("seconds")
    names = [end.pop("names") for end in ends]
    assert names[0] == names[1]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_both_kinds_of_step_see_the_same_samples(problem, monkeypatch):
    seen = {"orthograd": [], "plain": []}

    def loss(model, batch):
        seen[kind[0]].append(batch["image"])
        return problem.loss(model, batch)

    kind = ["plain"]
    step = Surgeon.step

    def watched(self, **arguments):
        kind[0] = "orthograd"
        try:
            return step(self, **arguments)
        finally:
            kind[0] = "plain"

    monkeypatch.setattr(Surgeon, "step", watched)
    config = OrthoGradConfig(retain_batch=5, forget_batch=4)
    trainer = OrthoGradTrainer(
        problem.model, loss, forget=problem.forget, retain=problem.retain, config=config
    )
    before = copy.deepcopy(problem.model.state_dict())
    trainer.step_seconds()
    # the first step with a loss tries it on six samples, together and apart
    steps = [x for x in seen["orthograd"] if len(x) == 9]
    assert len(seen["plain"]) == len(steps) > 1
    assert [len(x) for x in seen["orthograd"] if len(x) != 9] == [6, 3, 3]
    for a, b in zip(seen["plain"], steps, strict=True):
        assert a.shape == (9, 6) and torch.equal(a, b)
    torch.testing.assert_close(dict(problem.model.state_dict()), dict(before), rtol=0, atol=0)


def test_capped_losses_of_the_digits_need_no_stored_row():
    """A use without a rule would warn, which is an error here."""
    torch.manual_seed(0)
    data, model = load("mislabeled", seed=0), DigitsCNN().double()
    some = torch.arange(6)
    samples = [take(part, some) for part in (data.forget, data.retain)]
    samples = [{**part, "image": part["image"].double()} for part in samples]
    batches = [marked(samples[0], True), marked(samples[1], False)]
    forget, retain = samples
    config = OrthoGradConfig(forget_ceiling=2.3)
    trainer = OrthoGradTrainer(model, cross_entropy, forget=forget, retain=retain, config=config)
    ends = []
    with reproducible(1):
        for way in ({}, {"rows": "stored"}):
            twin = copy.deepcopy(model)
            surgeon = Surgeon(
                twin, torch.optim.SGD(twin.parameters(), lr=0.1), OrthoGrad(alpha=0.4), **way
            )
            info = surgeon.step(forget=batches[0], retain=batches[1], loss=trainer._capped_loss)
            assert info.forget_loss is not None
            assert info.forget_loss <= 2.3
            ends.append(list(twin.parameters()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.fixture
def results():
    """Of two seeds; OrthoGrad steps of 30 and 36 ms beside plain ones of 10 and 9."""
    times = ({"orthograd": 0.03, "plain": 0.01}, {"orthograd": 0.036, "plain": 0.009})
    return [
        {**result(seed, name, 0.5, 0.5, 1.0), **({"step_seconds": timed} if ours else {})}
        for seed, timed in enumerate(times)
        for name, ours in (("original", False), ("retrain", False), ("orthograd", True))
    ]


CONFIG = DigitsConfig(task="class", method=("orthograd",))
TRAINED = ("original", "retrain")


def summary_of(results, *names):
    forget_sets = {str(seed): {} for seed in sorted({one["seed"] for one in results})}
    return summarize(JOB, "class", results, forget_sets, names or (*TRAINED, "orthograd"))


def test_the_summary_has_both_times_of_every_seed(results):
    step = summary_of(results)["step"]["seconds"]
    assert step["orthograd"]["values"] == [0.03, 0.036]
    assert step["plain"]["mean"] == pytest.approx(0.0095)


def test_the_report_shows_both_times_and_their_ratio(results):
    summary = summary_of(results)
    cards = step_cost(summary)
    # (30 / 10 + 36 / 9) / 2
    assert [card.value for card in cards] == ["33.00 ms", "9.50 ms", "3.50 times"]
    assert "± 4.24 ms" in cards[0].lines
    one = step_cost(summary_of(results[:3]))
    assert one[2].value == "3.00 times"
    assert not any("±" in line for card in one for line in card.lines)


@pytest.mark.parametrize("without", [0, 1])
def test_a_run_without_the_times_has_a_report_all_the_same(without, results):
    """Stages finished by an older version."""
    del results[3 * without + 2]["step_seconds"]
    summary = summary_of(results)
    assert "step" not in summary
    assert step_cost(summary) == []
    other = summary_of(results, *TRAINED)
    assert step_cost(other) == []


def test_the_job_times_orthograd_alone(tmp_path):
    config = replace(
        CONFIG,
        method=("orthograd", "neggrad"),
        seeds=1,
        training=RetrainConfig(steps=1),
        orthograd=OrthoGradConfig(steps=1, retain_batch=8, forget_batch=8),
    )
    config.neggrad.steps = 1
    with RunDirectory(tmp_path) as directory:
        summary = run(config, directory, PlainProgress())
        stages = {r["method"]: r for r in directory.results()}
    assert [name for name, stage in stages.items() if "step_seconds" in stage] == ["orthograd"]
    assert summary["step"]["seconds"]["plain"]["values"] == [
        stages["orthograd"]["step_seconds"]["plain"]
    ]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
