"""The job's arithmetic over seeds, and what is asked of each stage."""

from dataclasses import replace

import pytest
import torch

from gradsurgery.unlearn.digits import DigitsCNN, load
from gradsurgery.unlearn.finish import cell, table
from gradsurgery.unlearn.job import (
    DigitsConfig,
    make_probe,
    make_trainer,
    reproducible,
    stage_seed,
    summarize,
)
from gradsurgery.unlearn.report import told_apart


def result(seed, method, forget, test, seconds):
    measured = {"forget": forget, "retain": 1.0, "test": test, "mia": 0.5}
    return {
        "seed": seed,
        "method": method,
        "metrics": measured,
        "seconds": seconds,
        "steps": 10,
    }


@pytest.fixture
def summary():
    config = DigitsConfig(task="class", method=("neggrad",))
    results = [
        result(0, "original", 1.0, 1.0, 4.0),
        result(0, "retrain", 0.0, 1.0, 4.0),
        result(0, "neggrad", 0.25, 0.75, 1.0),
        result(1, "original", 1.0, 0.5, 4.0),
        result(1, "retrain", 0.0, 0.75, 4.0),
        result(1, "neggrad", 0.75, 0.75, 3.0),
    ]
    return summarize(config, results, {"0": {}, "1": {}})


def test_gap_is_to_retrain_of_the_same_seed(summary):
    neggrad = summary["columns"]["neggrad"]
    assert neggrad["gap_test"]["values"] == [0.25, 0.0]
    assert neggrad["gap_forget"]["values"] == [0.25, 0.75]
    assert neggrad["gap_mean"]["values"] == [0.125, 0.1875]  # over four metrics
    assert "gap_mean" not in summary["columns"]["retrain"]


def test_uis_is_against_the_original_of_the_same_seed(summary):
    # (|1 - 0.75| / 1 + 0.25 / 1) / 2 and (|0.5 - 0.75| / 0.5 + 0.75 / 0.5) / 2
    assert summary["columns"]["neggrad"]["uis"]["values"] == [0.25, 1.0]


def test_cells_show_mean_spread_and_gap(summary):
    neggrad = summary["columns"]["neggrad"]
    assert cell(neggrad, "forget") == "0.500 ± 0.354 (0.500)"
    assert cell(neggrad, "forget", narrow=True) == "0.500\n± 0.354"
    assert cell(neggrad, "seconds") == "2.0 ± 1.4"
    assert cell(neggrad, "steps") == "10"
    assert cell(neggrad, "repaired") == ""
    header, rows = table(summary)
    assert header == ["", "Original", "Retrain", "NegGrad"]
    assert [row[0] for row in rows[:3]] == ["forget set", "retain set", "test"]


def test_all_methods_of_a_seed_see_the_same_order_and_training_its_own():
    data, config = load("random", seed=0), DigitsConfig.for_task("random")
    drawn = {
        name: make_trainer(config, data, 0, name, DigitsCNN()).batches["retain"].seed // 2
        for name in ("original", "retrain", "finetune", "graddiff", "orthograd")
    }
    assert drawn["finetune"] == drawn["graddiff"] == drawn["orthograd"]
    assert len({drawn["original"], drawn["retrain"], drawn["finetune"]}) == 3
    assert stage_seed(0, "original") != stage_seed(1, "original")


def test_the_probe_never_looks_at_test_data():
    data = replace(load("mislabeled", seed=0), test=None)
    found = make_probe(data)(DigitsCNN())
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


def test_methods_are_told_apart_by_paired_differences():
    def columns(other):
        gaps = {"best": [0.01, 0.02, 0.03, 0.04], "other": other}
        return {name: {"gap_mean": {"values": values}} for name, values in gaps.items()}

    # always 0.01 to 0.012 worse, though the seeds differ more than the methods do
    assert told_apart(columns([0.02, 0.032, 0.041, 0.05]), "best", "other")
    assert not told_apart(columns([0.04, 0.0, 0.05, 0.02]), "best", "other")
