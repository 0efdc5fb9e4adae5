"""The command that makes the tables of docs/results.md, on one seed and hardly any steps."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gradsurgery.errors import InputError
from gradsurgery.unlearn.training.config import update
from tests.unlearn.tiny import JOB

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts/results.py"
SMALL = ("--", "--method", "orthograd", "neggrad", "--training.steps=12")
SMALL += ("--orthograd.steps=2", "--neggrad.steps=2")


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_go_between_the_marks_and_a_second_run_does_nothing_twice(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- results -->\nafter\n")
    command = [sys.executable, str(SCRIPT), "--tasks", "class", "--seeds", "2"]
    command += ["--out", str(tmp_path / "runs"), "--docs", str(page), *SMALL]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    assert "2 of 2 done" in process.stdout
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    order = [
        "## One digit",
        "### With all of the retain set",
        "### With 10 % of the retain set",
        "### With 5 % of the retain set",
        "### Choices within OrthoGrad, with 10 %",
        "OrthoGrad, off their mean",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    header = (
        "| | gap | over chance | behind | nearer | forget | retain | test | forgotten | attack |"
    )
    assert f"{header} seconds |" in text
    assert text.count("| Original (do nothing) |") == text.count("| Retrain, other seed |") == 4
    apart = JOB.tuned["class"]["orthograd"].get("granularity") == "tensor"
    tuned = "off each sample, " + ("each tensor" if apart else "whole model")
    assert f"| OrthoGrad, as it is: {tuned} |" in text
    # one original and two retrained models serve all of a seed
    models = [path.name for path in (tmp_path / "runs/class-seed1/models").iterdir()]
    assert sorted(name for name in models if "orthograd" not in name and "neggrad" not in name) == [
        "seed1-original.safetensors",
        "seed1-retrain+other seed.safetensors",
        "seed1-retrain.safetensors",
    ]
    assert len(models) == 3 + 2 * 3 + 2  # two methods with three shares, two choices changed

    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    assert "steps" not in process.stdout
    assert page.read_text() == text


def test_what_is_ablated_are_options_that_exist(results):
    for label, method, changes in results.ABLATIONS:
        for task in JOB.tasks:
            update(JOB.defaults(task), {method: changes}).check()
        assert label and len(changes) == 1


def test_a_page_without_marks_is_named(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- results -->\n")
    with pytest.raises(InputError, match=r"--docs: .*page.md must hold <!-- results --> twice"):
        results.insert(page, "tables")
    assert page.read_text() == "<!-- results -->\n"
