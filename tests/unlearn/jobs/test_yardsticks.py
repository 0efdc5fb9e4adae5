"""The two yardsticks of a gap: doing nothing, and another Retrain."""

import json

import pytest
import torch

from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN, load
from gradsurgery.unlearn.jobs.digits.job import DigitsConfig
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.pipeline import reproducible
from gradsurgery.unlearn.jobs.progress import PlainProgress
from gradsurgery.unlearn.jobs.stages import AGAIN
from gradsurgery.unlearn.report.compare import load as loaded
from gradsurgery.unlearn.report.compare import merge
from gradsurgery.unlearn.report.tables import main_table
from gradsurgery.unlearn.report.verdict import in_retrains, ranking, sentences
from gradsurgery.unlearn.training.seeds import derived
from tests.unlearn.tiny import finished, run, tiny, trainer


def made(seeds=None, **gaps):
    """A summary of columns and their mean gaps, a value a seed (neggrad__1: with a tenth)."""
    once = {"mean": 1.0, "std": None, "values": [1.0]}
    columns = {
        name.replace("__", "@0.").replace("again", AGAIN): {
            "seconds": once,
            "gap_mean": {"mean": sum(values) / len(values), "std": 0.1, "values": values},
        }
        for name, values in gaps.items()
    }
    columns["retrain"] = {"seconds": once}
    known = {} if seeds is None else {"column_seeds": {"retrain": [], **seeds}}
    count = range(len(gaps["original"]))
    return {"job": "digits", "task": "class", "seeds": [*count], "columns": columns, **known}


def rows(summary, fraction=1.0):
    header, found = main_table(summary, fraction)
    return {row.title: dict(zip(header, map(str, row.cells), strict=True)) for row in found}


@pytest.fixture
def summary():
    return made(
        original=[0.04, 0.08, 0.06, 0.06],
        again=[0.01, 0.03, 0.02, 0.02],
        finetune=[0.01, 0.05, 0.03, 0.03],  # always 0.03 nearer than nothing
        scrub=[0.05, 0.07, 0.01, 0.098],  # nearer by 0.003 on average, at times farther
        ssd=[0.04, 0.08, 0.06, 0.06],  # left the model as it was
        gru=[0.2, 0.08, 0.06, 0.06],
    )


def test_gaps_are_told_in_units_of_the_one_between_two_retrains(summary):
    found = {name: in_retrains(summary, name) for name in ("original", AGAIN, "finetune", "gru")}
    assert found == pytest.approx({"original": 3.0, AGAIN: 1.0, "finetune": 1.5, "gru": 5.0})
    shown = rows(summary)
    assert [
        shown[name]["over chance"] for name in ("Original (do nothing)", "Retrain", "Finetune")
    ] == [
        "3.0",
        "",
        "1.5",
    ]
    assert shown["Retrain, other seed"]["gap"] == "0.020 ± 0.100"


def test_there_is_no_unit_where_two_retrains_are_alike_or_only_one_is():
    same = made(original=[0.1, 0.1], again=[0.0, 0.0], finetune=[0.1, 0.0])
    assert in_retrains(same, "finetune") is None
    assert rows(same)["Finetune"]["over chance"] == ""
    one = made(original=[0.1, 0.1], finetune=[0.1, 0.0])
    assert in_retrains(one, "finetune") is None
    assert "over chance" not in rows(one)["Finetune"]


def test_units_and_leads_are_over_the_seeds_that_both_have():
    found = made(
        {"original": [0, 1], AGAIN: [1, 2], "finetune": [2, 1], "scrub": [3]},
        original=[0.9, 0.5],
        again=[0.1, 0.2],
        finetune=[0.6, 0.3],
        scrub=[0.1],
    )
    assert in_retrains(found, "finetune") == pytest.approx(0.9 / 0.3)
    assert in_retrains(found, "original") == pytest.approx(0.5 / 0.1)
    assert in_retrains(found, "scrub") is None
    places = {place.name: place.nearer for place in ranking(found, 1.0)}
    assert places["finetune"] == pytest.approx((0.2, None, 1))
    assert places["scrub"] is None


def test_a_method_no_nearer_than_doing_nothing_is_marked_in_the_table(summary):
    shown = {name: row["nearer"] for name, row in rows(summary).items()}
    assert shown == {
        "Original (do nothing)": "",
        "Retrain": "",
        "Retrain, other seed": "",
        "Finetune": "0.030 ± 0.000",
        "SCRUB": "0.003 ± 0.059 (tie)",
        "SSD": "no nearer",
        "GRU": "no nearer",
    }


def test_and_in_words(summary):
    (text,) = sentences(summary)
    assert "Finetune comes closest to Retrain: 3.0 points away" in text
    assert (
        "Doing nothing leaves the original model 6.0 points away; Retrain of another seed is 2.0 "
        "points away, by chance alone. SSD and GRU are no nearer to Retrain than doing nothing. "
        "These seeds cannot tell SCRUB from doing nothing."
    ) in text
    one = made(original=[0.1] * 3, finetune=[0.0] * 3, ssd=[0.2] * 3, neggrad__1=[0.1] * 3)
    whole, tenth = sentences(one)
    assert "SSD is no nearer to Retrain than doing nothing." in whole
    assert "another seed" not in whole and "cannot tell" not in whole
    assert tenth.endswith("No method is nearer to Retrain than doing nothing.")


def test_two_seeds_do_not_say_that_they_cannot_tell():
    text = " ".join(sentences(made(original=[0.1, 0.1], finetune=[0.0, 0.19])))
    assert "cannot tell" not in text and "no nearer" not in text


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    path = tmp_path_factory.mktemp("twice") / "run"
    config = tiny("random", ("neggrad",), second_retrain=True, shadows=2)
    return path, config, finished(path, config)


def test_a_second_retrain_is_of_other_weights_and_another_order(twice):
    path, config, summary = twice
    assert list(summary["columns"]) == ["original", "retrain", AGAIN, "neggrad"]
    data, model = load("random", 0), DigitsCNN()
    with reproducible(1):
        trainer(config, data, derived(0, "shadow", 0), "retrain", model).run()
    stored, first = DigitsCNN(), DigitsCNN()
    RunDirectory(path).load_model(stored, (0, AGAIN))
    RunDirectory(path).load_model(first, (0, "retrain"))
    for name, value in stored.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert not torch.equal(stored.head[1].weight, first.head[1].weight)
    assert summary["columns"][AGAIN]["gap_mean"]["mean"] > 0
    assert summary["columns"][AGAIN]["kl_test"]["mean"] > 0


def test_it_is_the_first_shadow_and_trained_once(twice, tmp_path):
    """The attack's numbers are those of a run without it."""
    _, _, summary = twice
    alone = finished(tmp_path / "run", tiny("random", ("neggrad",), shadows=2))
    assert AGAIN not in alone["columns"]
    for key in ("ulira", "ulira_auc"):
        assert summary["columns"]["neggrad"][key] == alone["columns"]["neggrad"][key]
    lines = [json.loads(x) for x in (twice[0] / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["method"] == AGAIN and line["step"] == 12 for line in lines) == 1


def test_it_is_resumed_to_the_same_bits(twice, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    _, _, summary = twice
    config = tiny("random", ("neggrad",), second_retrain=True, shadows=2, checkpoint_every=4)
    log = RunDirectory.log

    def dies(directory, stage, record):
        log(directory, stage, record)
        if (stage[1], record["step"]) == (AGAIN, 9):
            raise Killed

    with monkeypatch.context() as patch, RunDirectory(tmp_path) as directory:
        patch.setattr(RunDirectory, "log", dies)
        with pytest.raises(Killed):
            run(config, directory, PlainProgress())
    with RunDirectory(tmp_path) as directory:
        again = run(config, directory, PlainProgress())
    for key in ("forget", "retain", "test", "mia", "gap_mean", "kl_forget"):
        assert again["columns"][AGAIN][key] == summary["columns"][AGAIN][key], key


def test_pages_and_merged_runs_have_it(twice):
    path, _, summary = twice
    page = (path / "report.html").read_text()
    for text in ("Original (do nothing)", "Retrain, other seed", "over chance", "by chance alone"):
        assert text in page, text
    assert "Retrain, other seed" in (path / "model_card.md").read_text()
    (merged,) = merge(loaded([path]))
    assert merged["columns"][AGAIN] == summary["columns"][AGAIN]


def test_jobs_of_images_train_it_unless_told_not_to():
    assert DigitsConfig().second_retrain
    for name in registry.names():
        job = registry.find(name)
        config = job.Config()
        assert config.second_retrain == (name in ("digits", "images")), name
        if name == "digits":
            assert job.trained(config) == ("original", "retrain", AGAIN)
            config.second_retrain = False
            assert job.trained(config) == ("original", "retrain")
