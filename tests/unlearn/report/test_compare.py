"""Runs put side by side: what may be merged, what may not, and what the page says."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradsurgery.cli import main
from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.digits.job import DigitsConfig, DigitsJob
from gradsurgery.unlearn.jobs.yaml import to_yaml
from gradsurgery.unlearn.report.compare import load, merge, render
from gradsurgery.unlearn.training.config import update
from tests.unlearn.tiny import finished, tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the class task that differ in method, seed, options and share of the retain set."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {
        "first": tiny(),
        "later": tiny(method=("neggrad",), first_seed=1),
        "slower": tiny(method=("neggrad",), neggrad={"steps": 3, "lr": 1e-5}),
        "few": tiny(method=("neggrad",), retain_fraction=[0.1]),
    }
    for name, config in kinds.items():
        finished(folder / name, config)
    return folder


def values(summary, name, key="test"):
    return summary["columns"][name][key]["values"]


def test_seeds_are_merged_and_methods_put_side_by_side(runs):
    (merged,) = merge(load([runs / "first", runs / "later"]))
    assert merged["seeds"] == [0, 1]
    assert list(merged["columns"]) == ["original", "retrain", "neggrad", "finetune"]
    assert merged["column_seeds"]["neggrad"] == [0, 1]
    assert merged["column_seeds"]["finetune"] == [0]
    later = json.loads((runs / "later/summary.json").read_text())
    assert values(merged, "neggrad")[1] == values(later, "neggrad")[0]
    assert values(merged, "neggrad", "gap_mean")[1] == values(later, "neggrad", "gap_mean")[0]
    assert list(merged["forget_sets"]) == ["0", "1"]


def written(folder, seeds, gaps, options="", **changes):
    """A finished run by its summary and options alone."""
    folder.mkdir()
    entry = {"mean": 0.5, "std": None, "values": gaps}
    names = ("original", "retrain", "neggrad")
    summary = {
        "job": "digits",
        "task": "class",
        "seeds": seeds,
        "forget_sets": {str(s): {"sha256": f"{s:064x}", "samples": 9, "class": s} for s in seeds},
        "columns": {name: dict.fromkeys(("gap_mean", "seconds"), entry) for name in names},
        **changes,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(to_yaml(tiny()) + options)
    return folder


def test_every_seed_keeps_its_own_numbers(tmp_path):
    runs = [
        written(tmp_path / "a", [4, 3], [0.4, 0.3]),
        written(tmp_path / "b", [1, 3], [0.1, 0.9]),
    ]
    (merged,) = merge(load(runs))
    assert merged["seeds"] == [1, 3, 4]
    gaps = values(merged, "neggrad", "gap_mean")
    found = dict(zip(merged["column_seeds"]["neggrad"], gaps, strict=True))
    assert found == {4: 0.4, 3: 0.3, 1: 0.1}  # of a seed that two runs have, the first
    assert merged["columns"]["neggrad"]["gap_mean"]["mean"] == pytest.approx(0.8 / 3)


def test_one_seed_of_one_kind_counts_once(runs):
    (merged,) = merge(load([runs / "first", runs / "first/../first"]))
    assert merged["column_seeds"]["neggrad"] == [0]
    (alone,) = merge(load([runs / "first"]))
    summary = json.loads((runs / "first/summary.json").read_text())
    assert merged["columns"] == alone["columns"] == summary["columns"]


def test_other_options_are_a_column_of_their_own(runs):
    (merged,) = merge(load([runs / "first", runs / "slower"]))
    names = ["original", "retrain", "neggrad+first", "finetune", "neggrad+slower"]
    assert list(merged["columns"]) == names
    slower = json.loads((runs / "slower/summary.json").read_text())
    distances = [values(merged, f"neggrad+{run}", "kl_forget") for run in ("first", "slower")]
    assert distances[1] == values(slower, "neggrad", "kl_forget") != distances[0]


def test_shares_of_the_retain_set_make_a_sweep(runs, tmp_path, capsys):
    main(["compare", str(runs / "first"), str(runs / "few"), "--out", str(tmp_path / "page.html")])
    out = capsys.readouterr().out
    assert out.index("comes closest to Retrain") < out.index("With all of the retain set")
    assert out.index("With all of the retain set") < out.index("With 10 % of the retain set\n")
    assert out.splitlines()[-1] == f"page {tmp_path / 'page.html'}"
    page = (tmp_path / "page.html").read_text()
    assert page.index("comes closest to Retrain") < page.index("<table>")
    assert "With fewer samples to keep" in page
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|<script|<link""", page)


def test_seeds_that_differ_are_said(runs, capsys):
    main(["compare", str(runs / "first"), str(runs / "later")])
    out = capsys.readouterr().out
    assert "Not every method ran on the same seeds" in out
    assert re.search(r"^NegGrad .*  2$", out, re.MULTILINE)
    assert re.search(r"^Finetune .*  1$", out, re.MULTILINE)


def test_tasks_stand_one_below_the_other(runs, tmp_path):
    finished(tmp_path / "other", tiny("random", ("neggrad",)))
    loaded = load([tmp_path / "other", runs / "first"])
    summaries = merge(loaded)
    assert [summary["task"] for summary in summaries] == ["class", "random"]
    page = render(summaries, loaded)
    assert page.index("Unlearning one digit") < page.index("Unlearning random digits")


def test_runs_that_cannot_be_compared_are_all_named_in_one_error(runs, tmp_path, capsys):
    digit = tmp_path / "digit"
    finished(digit, tiny(method=("neggrad",), forget_class=7))
    (tmp_path / "half").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, (runs / "first", digit, tmp_path / "half"))])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "have different data splits: with task class and seed 0 they forget other" in line
    assert str(digit) in line and str(runs / "first") in line
    assert f"{tmp_path / 'half'} is not a finished run: it has no summary.json" in line


def test_other_splits_of_other_seeds_are_refused_too(runs, tmp_path):
    finished(tmp_path / "a", tiny("random", ("neggrad",), random_percent=5.0))
    finished(tmp_path / "b", tiny("random", ("neggrad",), random_percent=1.0, first_seed=1))
    with pytest.raises(InputError, match=r"b differs from .*a: random_percent was 5.0, is 1.0"):
        load([tmp_path / "a", tmp_path / "b"])


def test_originals_trained_otherwise_are_refused(runs, tmp_path):
    config = update(tiny(method=("neggrad",)), {"training": {"steps": 13}})
    finished(tmp_path / "longer", config)
    with pytest.raises(InputError, match=r"longer differs from .*training.steps was 12, is 13"):
        load([runs / "first", tmp_path / "longer"])


@dataclass
class OtherConfig(DigitsConfig):
    folder: Path | None = None
    device: str = "cpu"
    size: int = 8


class OtherJob(DigitsJob):
    name = "other"
    Config = OtherConfig


@pytest.fixture
def two_jobs(monkeypatch):
    jobs = {"digits": DigitsJob, "other": OtherJob}
    monkeypatch.setattr(registry, "names", lambda: list(jobs))
    monkeypatch.setattr(registry, "find", lambda name: jobs[name]())


def test_runs_of_two_jobs_are_refused(two_jobs, tmp_path):
    runs = [
        written(tmp_path / "a", [0], [0.1]),
        written(tmp_path / "b", [0], [0.1]),
        written(tmp_path / "c", [0], [0.1], job="other"),
        written(tmp_path / "d", [0], [0.1], job="other", task="random"),
    ]
    wrong = (
        r"compare: .*/c is a run of other, .*/a is one of digits; .*/d is a run of other, [^;]*$"
    )
    with pytest.raises(InputError, match=wrong):
        load(runs)
    merged = merge(load(runs[2:]))
    assert [(summary["job"], summary["task"]) for summary in merged] == [
        ("other", "class"),
        ("other", "random"),
    ]
    assert "<h1>Unlearning other: runs compared</h1>" in render(merged, load(runs[2:]))


def test_runs_on_other_data_are_refused(tmp_path):
    one = {"title": "cats", "images": 100}
    runs = [
        written(tmp_path / "a", [0], [0.1], data=one),
        written(tmp_path / "b", [1], [0.1], data=one),
        written(tmp_path / "c", [2], [0.1], data={**one, "images": 99}),
        written(tmp_path / "d", [3], [0.1]),
    ]
    (merged,) = merge(load(runs[:2]))
    assert merged["data"] == one
    with pytest.raises(InputError, match=r"c differs from .*a: data: images was 100, is 99$"):
        load([runs[0], runs[2]])
    with pytest.raises(InputError, match=r"d differs from .*a: data: title was cats, is None, "):
        load([runs[0], runs[3]])


def test_what_a_job_alone_asks_for_must_be_the_same_and_where_things_are_need_not(
    two_jobs, tmp_path
):
    runs = [
        written(tmp_path / "a", [0], [0.1], job="other"),
        written(tmp_path / "b", [1], [0.1], "device: cuda\n", job="other"),
        written(tmp_path / "c", [2], [0.1], "size: 9\n", job="other"),
    ]
    (first, _) = load(runs[:2])
    assert list(first.decisive) == ["forget_class", "random_percent", "size", "training"]
    with pytest.raises(InputError, match=r"c differs from .*a: size was 8, is 9$"):
        load([runs[0], runs[2]])


def test_a_page_that_cannot_be_written_is_one_line(runs, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(runs / "first"), "--out", "/dev/null/page.html"])
    assert caught.value.code == 2
    assert "--out: cannot write to /dev/null" in capsys.readouterr().err
