"""The job's arithmetic over seeds, and what is asked of each stage."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn import METHODS
from gradsurgery.unlearn.jobs.base import Variant
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN, load
from gradsurgery.unlearn.jobs.digits.job import DigitsConfig, DigitsJob
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.pipeline import reproducible
from gradsurgery.unlearn.jobs.progress import PlainProgress
from gradsurgery.unlearn.jobs.stages import parts, stage_name
from gradsurgery.unlearn.jobs.summary import summarize
from gradsurgery.unlearn.metrics.accuracy import accuracy
from gradsurgery.unlearn.report.labels import NAMES, title
from gradsurgery.unlearn.report.plots import COLORS, MARKERS
from gradsurgery.unlearn.report.tables import behind, cell, full_table, lines, main_table
from gradsurgery.unlearn.report.verdict import Place, ranking, sentences
from gradsurgery.unlearn.training.config import update
from gradsurgery.unlearn.training.seeds import derived
from tests.unlearn.tiny import JOB, finished, run, tiny, trainer


def result(seed, method, forget, test, seconds):
    measured = {"forget": forget, "retain": 1.0, "test": test, "mia": 0.5, "mia_auc": 0.1 * seed}
    return {
        "seed": seed,
        "method": method,
        "metrics": measured,
        "seconds": seconds,
        "steps": 10,
    }


@pytest.fixture
def summary():
    results = [
        result(0, "original", 1.0, 1.0, 4.0),
        result(0, "retrain", 0.0, 1.0, 4.0),
        result(0, "neggrad", 0.25, 0.75, 1.0),
        result(1, "original", 1.0, 0.5, 4.0),
        result(1, "retrain", 0.0, 0.75, 4.0),
        result(1, "neggrad", 0.75, 0.75, 3.0),
    ]
    return summarize(JOB, "class", results, {"0": {}, "1": {}}, ["original", "retrain", "neggrad"])


def ranked(**gaps):
    """A summary of methods (with __ for @0.) and their gaps, a value a seed."""
    seeds = len(gaps["neggrad"])
    columns = {
        name.replace("__", "@0."): {
            "gap_mean": {"mean": sum(values) / len(values), "std": 0.1, "values": values},
            "seconds": {"mean": 1.0, "std": None, "values": [1.0]},
        }
        for name, values in {"original": [0.5] * seeds, "retrain": [0.0] * seeds, **gaps}.items()
    }
    return {"task": "class", "seeds": list(range(seeds)), "columns": columns}


def test_gap_is_to_retrain_of_the_same_seed(summary):
    neggrad = summary["columns"]["neggrad"]
    assert neggrad["gap_test"]["values"] == [0.25, 0.0]
    assert neggrad["gap_forget"]["values"] == [0.25, 0.75]
    assert neggrad["gap_mean"]["values"] == [0.125, 0.1875]  # over four metrics
    assert "gap_mean" not in summary["columns"]["retrain"]


def test_only_accuracies_and_the_attack_on_the_loss_enter_the_mean_gap(summary):
    assert JOB.compared == ("forget", "repaired", "retain", "test", "test_forgotten", "mia")
    neggrad = summary["columns"]["neggrad"]
    assert "mia_auc" in neggrad and "gap_mia_auc" not in neggrad


def test_uis_is_against_the_original_of_the_same_seed(summary):
    # (|1 - 0.75| / 1 + 0.25 / 1) / 2 and (|0.5 - 0.75| / 0.5 + 0.75 / 0.5) / 2
    assert summary["columns"]["neggrad"]["uis"]["values"] == [0.25, 1.0]


def test_a_job_without_tuned_options_has_those_of_its_methods():
    class Elsewhere(DigitsJob):
        """No tuned.yaml lies beside this file."""

    assert Elsewhere().defaults("class") == update(DigitsConfig(), {"task": "class"})
    assert JOB.defaults("class") != update(DigitsConfig(), {"task": "class"})


def test_a_method_that_takes_no_step_says_why(tmp_path, capsys):
    stop = {"steps": 3, "stop": "target", "target": 1.0}
    with RunDirectory(tmp_path / "run") as directory:
        config = tiny(method=("finetune",), training={"steps": 1}, finetune=stop)
        run(config, directory, PlainProgress())
    said = [line for line in capsys.readouterr().out.splitlines() if "takes no step" in line]
    assert len(said) == 1 and said[0].startswith("seed 0  finetune")
    assert said[0].endswith("as low as --finetune.stop target asks for")


def test_there_is_no_uis_of_an_original_that_is_never_right():
    """It is relative to that accuracy; all else is told."""
    results = [result(0, name, 1.0, 0.0, 1.0) for name in ("original", "retrain", "neggrad")]
    found = summarize(JOB, "class", results, {"0": {}}, ["original", "retrain", "neggrad"])
    assert not any("uis" in column for column in found["columns"].values())
    assert found["columns"]["neggrad"]["gap_mean"]["values"] == [0.0]


def test_tug_of_war_is_against_retrain_of_the_same_seed(summary):
    # (1 - 0.25) (1 - 0.25) and (1 - 0.75) (1 - 0)
    assert summary["columns"]["neggrad"]["tow"]["values"] == pytest.approx([0.5625, 0.25])


def test_tables_have_methods_down_and_every_metric_in_groups(summary):
    neggrad = summary["columns"]["neggrad"]
    metrics = {metric.key: metric for metric in JOB.metrics}
    assert str(cell(neggrad, metrics["forget"])) == "0.500 ± 0.354"
    assert str(cell(neggrad, metrics["seconds"])) == "2.0 ± 1.4"
    assert str(cell(neggrad, metrics["steps"])) == "10"
    assert str(cell(neggrad, metrics["repaired"])) == ""
    header, rows = main_table(summary, 1.0)
    assert header == ["gap", "nearer", "forget", "retain", "test", "attack", "seconds"]
    assert [row.title for row in rows] == ["Original (do nothing)", "Retrain", "NegGrad"]
    assert str(rows[1].cells[0]) == ""
    text = lines(header, rows)
    assert re.search("Retrain +0.000 ± 0.000", text[2])
    groups = full_table(summary, 1.0)
    assert list(groups) == ["Accuracy", "Distance to Retrain", "Membership", "Cost"]
    assert [row.name for row in groups["Membership"]] == ["mia", "mia_auc"]


def test_the_best_comes_first_and_ties_are_named():
    summary = ranked(
        neggrad=[0.02, 0.032, 0.041, 0.05],  # always 0.01 to 0.012 worse than the best
        finetune=[0.01, 0.02, 0.03, 0.04],
        graddiff=[0.04, 0.0, 0.05, 0.02],  # at times better
        neggrad__1=[0.3, 0.3, 0.3, 0.3],
    )
    places = ranking(summary, 1.0)
    assert [place.name for place in places] == ["finetune", "graddiff", "neggrad"]
    assert [place.behind.told_apart for place in places] == [False, False, True]
    assert places[2].behind.mean == pytest.approx(0.01075)
    assert places[2].behind.reach == pytest.approx(3.182446 * 4.787e-4, rel=1e-4)
    first, second = sentences(summary)
    assert "Finetune comes closest to Retrain: 2.5 points away on average" in first
    assert "(GradDiff 2.8, NegGrad 3.6); these seeds cannot tell GradDiff from it." in first
    assert second.startswith("With 10 % of the retain set, NegGrad ends 30.0 points from Retrain")
    assert str(behind(places[0])) == "best"
    assert str(behind(places[2])) == "0.011 ± 0.002"


def test_two_seeds_say_nothing_of_ties():
    summary = ranked(neggrad=[0.1, 0.1], finetune=[0.0, 0.0])
    assert [place.behind.told_apart for place in ranking(summary, 1.0)] == [None, None]
    assert "cannot tell" not in sentences(summary)[0]
    assert behind(Place("neggrad", 0.1)) == ("", "", False)


def test_names_of_stages_say_method_variant_and_fraction():
    for stage in [
        ("ltu", 1.0, ""),
        ("ltu", 0.05, ""),
        ("ltu", 0.1, "a, b"),
        ("ltu", 1.0, "x"),
        ("ltu", 1.0, "a # of x"),
        ("ltu", 0.1, "x#2"),
    ]:
        method, fraction, variant = stage
        for number in (1, 2, 10):
            found = parts(stage_name(method, fraction, variant, number))
            assert found == (method, variant, fraction, number)
    assert stage_name("ltu", 1.0) == "ltu"
    assert title(stage_name("ltu", 0.1, "first order")) == "LTU, first order"


def test_every_method_has_options_a_name_and_a_look():
    config = DigitsConfig()
    for name, kind in METHODS.items():
        assert type(getattr(config, name)) is kind.Config
        assert name in NAMES
        assert name in MARKERS
    assert len(COLORS) == len(set(COLORS.values())) == len(set(MARKERS.values()))
    assert replace(config, method=("all",)).methods == list(METHODS)
    assert config.methods == ["orthograd", "ltu", "graddiff", "finetune"]


def test_all_methods_of_a_seed_see_the_same_order_and_training_its_own():
    data, config = load("random", seed=0), JOB.defaults("random")
    drawn = {
        name: trainer(config, data, 0, name, DigitsCNN()).batches["retain"].seed // 2
        for name in ("original", "retrain", "finetune", "graddiff", "orthograd", "graddiff@0.5")
    }
    unlearned = [drawn[name] for name in ("finetune", "graddiff", "orthograd", "graddiff@0.5")]
    assert len(set(unlearned)) == 1
    assert len({drawn["original"], drawn["retrain"], drawn["finetune"]}) == 3
    assert derived(0, "original") != derived(1, "original")


def test_methods_get_a_share_of_the_retain_set_and_training_all_of_it():
    data, config = load("class", seed=0), tiny()
    sizes = {
        name: len(trainer(config, data, 0, name, DigitsCNN()).data["retain"]["label"])
        for name in ("original", "retrain", "finetune", "finetune@0.1")
    }
    everything = len(data.retain["label"])
    assert sizes == {
        "original": everything + len(data.forget["label"]),
        "retrain": everything,
        "finetune": everything,
        "finetune@0.1": sizes["finetune@0.1"],
    }
    assert sizes["finetune@0.1"] == pytest.approx(everything / 10, abs=5)


def test_weights_that_are_given_are_drawn_by_the_seed():
    """With --training.start given no method draws them anew."""
    one, again, other = (JOB.model(DigitsConfig(), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not torch.equal(one["head.1.weight"], other["head.1.weight"])


def test_retain_accuracy_is_over_all_of_the_retain_set():
    """A model that knows only the samples it was given is wrong on the others."""
    data = load("random", seed=0)

    class Always(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.full((len(images),), 3), 10).float()

    share = (data.retain["label"] == 3).double().mean().item()
    assert JOB.evaluate(Always(), data)["retain"] == pytest.approx(share)
    retain = replace(data, retain={key: value[:1] for key, value in data.retain.items()})
    assert JOB.evaluate(Always(), retain)["retain"] != pytest.approx(share)


def test_a_sweep_is_one_run_with_a_column_a_share(tmp_path):
    config = tiny(method=("finetune",), retain_fraction=[0.1, 1.0])
    summary = finished(tmp_path, config)
    assert list(summary["columns"]) == ["original", "retrain", "finetune", "finetune@0.1"]
    stage = json.loads((tmp_path / "stages/seed0-finetune@0.1.json").read_text())
    assert stage["retain_samples"] == 3 * 64
    model = DigitsCNN().eval()
    RunDirectory(tmp_path).load_model(model, (0, "finetune@0.1"))
    assert stage["metrics"]["retain"] == accuracy(model, load("class", seed=0).retain)
    page = (tmp_path / "report.html").read_text()
    for text in ("With all of the retain set", "With 10 % of the retain set", "fewer samples"):
        assert text in page
    for key in (
        "kl_forget",
        "js_test",
        "activation_test",
        "mia_entropy",
        "informed",
        "informed_auc",
        "probe_forget",
        "relearn",
        "tow",
    ):
        assert key in summary["columns"]["finetune@0.1"], key
    assert summary["columns"]["original"]["kl_test"]["mean"] > 0
    assert "kl_test" not in summary["columns"]["retrain"]


def test_variants_are_stages_with_other_options(tmp_path):
    config = tiny(method=("neggrad",))
    changed = [Variant("neggrad", 1.0, "no steps", {"steps": 0})]
    summary = finished(tmp_path, config, changed)
    columns = summary["columns"]
    assert columns["neggrad+no steps"]["steps"]["mean"] == 0
    assert columns["neggrad+no steps"]["forget"] == columns["original"]["forget"]
    assert columns["neggrad"]["steps"]["mean"] == 3
    other = [Variant("neggrad", 1.0, "no steps", {"steps": 1})]
    with (
        RunDirectory(tmp_path) as directory,
        pytest.raises(InputError, match="holds neggrad"),
    ):
        run(config, directory, PlainProgress(), other)


def test_a_stage_killed_before_it_was_measured_is_measured(tmp_path):
    config = tiny(method=("neggrad",))
    summary = finished(tmp_path, config)
    name = "stages/seed0-neggrad.json"
    stage = json.loads((tmp_path / name).read_text())
    del stage["metrics"], stage["losses"], stage["checksum"]
    RunDirectory(tmp_path).write_json(name, stage)
    with RunDirectory(tmp_path) as directory:
        assert run(config, directory, PlainProgress()) == summary


def test_every_method_runs_in_the_job(tmp_path):
    names = list(METHODS)
    config = tiny("mislabeled", names, retain_fraction=[0.05])
    summary = finished(tmp_path, config)
    assert list(summary["columns"]) == ["original", "retrain", *(f"{n}@0.05" for n in names)]
    for name in names:
        column = summary["columns"][f"{name}@0.05"]
        assert 0 <= column["gap_mean"]["mean"] <= 1, name
        assert math.isfinite(column["seconds"]["mean"])
    card = (tmp_path / "model_card.md").read_text()
    assert "- method: OrthoGrad, with 5 % of the retain set" in card
    kept = (tmp_path / "models/seed0-orthograd@0.05.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == kept


def test_too_few_forget_samples_for_an_attack_have_none(tmp_path):
    summary = finished(tmp_path, tiny("random", ("neggrad",), random_percent=0.2))
    assert summary["forget_sets"]["0"]["samples"] == 3
    assert "mia" not in summary["columns"]["neggrad"]
    assert summary["columns"]["neggrad"]["gap_mean"]["mean"] >= 0


def test_the_probe_never_looks_at_test_data():
    data = replace(load("mislabeled", seed=0), test=None)
    found = JOB.probe(data)(DigitsCNN())
    assert sorted(found) == [
        "forget_accuracy",
        "forget_loss",
        "repaired_accuracy",
        "retain_accuracy",
        "retain_loss",
        "validation_accuracy",
    ]


def test_torch_settings_come_back():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError), reproducible(1):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"retain_fraction": [0.0]}, r"--retain-fraction must be in \(0, 1\], got 0.0"),
        ({"retain_fraction": [1.0, 1.5]}, r"--retain-fraction must be in \(0, 1\], got 1.5"),
        ({"retain_fraction": []}, r"--retain-fraction must be at least one share, got none"),
        ({"probe_every": 10**30}, r"--probe-every must be at most 2\^31, got 1000"),
        ({"training": {"steps": 10**30}}, r"--training.steps must be less than 2\^63, got 1000"),
        ({"training": {"lr": 1e300}}, r"--training.lr must be positive and finite, got 1e\+300"),
        ({"tune": -1}, r"--tune must be at least 0, got -1"),
        ({"random_percent": 5.0}, r"--task must be random where --random-percent is given, got cl"),
    ],
)
def test_nonsense_names_its_option(changes, message):
    with pytest.raises(InputError, match=message):
        update(tiny(), changes).check()


def test_shares_are_sorted_and_named_once():
    assert tiny(retain_fraction=[0.1, 1.0, 0.1]).fractions == [1.0, 0.1]
