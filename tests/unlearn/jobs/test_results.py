"""The command that makes the tables of docs/results.md, on one seed and hardly any steps."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.images.job import ImagesJob
from gradsurgery.unlearn.training.config import update
from tests.unlearn.jobs.images.made import arrays
from tests.unlearn.jobs.images.test_idx import put

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts/results.py"
SMALL = ("--", "--method", "orthograd", "neggrad", "--training.steps=12")
SMALL += ("--orthograd.steps=2", "--neggrad.steps=2")


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["results"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def make(*options, more=()):
    command = [sys.executable, str(SCRIPT), *map(str, options), *SMALL, *more]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return process.stdout


def in_order(text, parts):
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_tables_go_between_the_marks_and_a_second_run_does_nothing_twice(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- results -->\nafter\n")
    command = ["--only", "digits-class", "--seeds", 2, "--out", tmp_path / "runs", "--docs", page]
    assert "2 of 2 done" in make(*command)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    header = (
        "| | gap | over chance | behind | nearer | forget | retain | test | forgotten | attack |"
    )
    in_order(
        text, ["## Digits: one digit", "comes closest to Retrain", header, "Besides:", "| KL to"]
    )
    assert text.count("| Original (do nothing) |") == text.count("| Original |") == 1
    # one original and two retrained models serve all of a seed
    models = [path.name for path in (tmp_path / "runs/digits-class-seed1/models").iterdir()]
    assert sorted(models) == [
        "seed1-neggrad@0.1.safetensors",
        "seed1-original.safetensors",
        "seed1-orthograd@0.1.safetensors",
        "seed1-retrain+other seed.safetensors",
        "seed1-retrain.safetensors",
    ]
    assert "steps" not in make(*command)
    assert page.read_text() == text


def test_images_have_ablations_shares_shadows_and_pictures(tmp_path):
    for part, count in (("train", 300), ("t10k", 60)):
        images, labels = arrays(count, 10, 28)
        put(tmp_path / f"{part}-images-idx3-ubyte", images)
        put(tmp_path / f"{part}-labels-idx1-ubyte", labels)
    page = tmp_path / "page.md"
    page.write_text("<!-- results -->\n<!-- results -->\n")
    (tmp_path / "pictures").mkdir()
    command = ["--only", "images-random", "--seeds", 1, "--data", tmp_path, "--docs", page]
    few = ("--train-samples=200", "--shadows=2")
    make(*command, "--out", tmp_path / "runs", more=few)
    order = [
        "## Fashion-MNIST: 90 of 900",
        "| OrthoGrad |",
        "Besides:",
        "### Choices within OrthoGrad",
        "| OrthoGrad, as it is |",
        "### With less and less to keep",
        "| | 100 % | 30 % | 10 % | 3 % | 1 % |",
        "### Of an ensemble of eight models more",
        "| | KLoM, forget set |",
    ]
    in_order(page.read_text(), order)
    for name in ("shares", "pareto"):
        assert (tmp_path / f"pictures/results-{name}.svg").read_text().startswith("<?xml")


def test_what_is_ablated_are_options_that_exist(results):
    for tasks, label, method, changes in results.ABLATIONS:
        for task in tasks:
            config = update(ImagesJob().defaults(task), {method: changes})
            getattr(config, method).check(method)
        assert label and changes


def test_a_page_without_marks_is_named(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- results -->\n")
    with pytest.raises(InputError, match=r"--docs: .*page.md must hold <!-- results --> twice"):
        results.insert(page, "tables")
    assert page.read_text() == "<!-- results -->\n"
