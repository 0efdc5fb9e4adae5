"""A method is one file: the command line, reports and searches know one more by its file alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gradsurgery
from gradsurgery.unlearn import METHODS, Finetune
from gradsurgery.unlearn.methods import ALL, check_described

FILE = '''
from dataclasses import dataclass

from gradsurgery.unlearn.methods.finetune import Finetune, FinetuneConfig


@dataclass
class SlowlyConfig(FinetuneConfig):
    """Options of Slowly."""

    patience: float = 2.0
    """How much slower."""


class Slowly(Finetune):
    name = "slowly"
    title = "Slow & steady"
    about = "goes on training on retain, slowly"
    paper = "Nobody et al. 2030 (arXiv:3001.00001)"
    color = "#123456"
    space = {"patience": (1.0, 2.0), "steps": (1, 2)}
    Config = SlowlyConfig
'''

SEEN = """
import contextlib, io, json, sys
from pathlib import Path

import gradsurgery
from gradsurgery.cli import main
from gradsurgery.unlearn import METHODS, unlearning
from gradsurgery.unlearn.command import parse
from gradsurgery.unlearn.jobs.digits.job import DigitsConfig
from gradsurgery.unlearn.jobs.tune import draws
from gradsurgery.unlearn.report import labels, methods, plots
from tests.unlearn.tiny import JOB, finished, tiny

text = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
    main(["unlearn", "digits", "--help"])
config = parse(JOB, ["--method", "slowly", "finetune", "--slowly.patience", "3"]).job
summary = finished(Path("run"), tiny(method=("slowly",)))
print(json.dumps({
    "package": gradsurgery.__file__,
    "methods": list(METHODS),
    "help": text.getvalue(),
    "patience": config.slowly.patience,
    "columns": config.methods,
    "color": plots.color("slowly@0.1"),
    "markers": [str(marker) for marker in plots.MARKERS.values()],
    "title": labels.title("slowly"),
    "table": methods.markdown(),
    "draws": draws("slowly", "class", DigitsConfig().slowly, 20),
    "run": list(summary["columns"]),
    "page": Path("run/report.html").read_text(encoding="utf-8"),
}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a copy of the package with one more file says of it."""
    folder = tmp_path_factory.mktemp("more")
    package = Path(gradsurgery.__file__).parent
    shutil.copytree(package, folder / "gradsurgery", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "gradsurgery/unlearn/methods/slowly.py").write_text(FILE)
    os.symlink(Path(__file__).parents[2], folder / "tests")
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "100"}
    command = [sys.executable, "-c", SEEN]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["package"]).parent == folder / "gradsurgery"
    return found


def test_it_is_in_the_registry_after_those_in_order(seen):
    assert seen["methods"] == [*METHODS, "slowly"]
    assert seen["columns"] == ["finetune", "slowly"]


def test_the_command_line_knows_its_name_and_options(seen):
    assert "--slowly.patience" in seen["help"] and "How much slower." in seen["help"]
    assert seen["patience"] == 3.0


def test_reports_know_its_title_color_and_marker(seen):
    assert seen["title"] == "Slow & steady"
    assert seen["color"] == "#123456"
    assert len(set(seen["markers"])) == len(ALL) + 2
    assert seen["run"] == ["original", "retrain", "slowly"]
    assert "Slow &amp; steady" in seen["page"] and "#123456" in seen["page"]


def test_docs_have_its_row(seen):
    row = (
        "| `slowly` | goes on training on retain, slowly | losses "
        "| [Nobody et al. 2030](https://arxiv.org/abs/3001.00001) |"
    )
    assert seen["table"].splitlines()[-1] == row


def test_a_search_draws_from_its_space(seen):
    assert {draw["patience"] for draw in seen["draws"]} == {1.0, 2.0}
    assert {draw["steps"] for draw in seen["draws"]} == {1, 2}
    assert set(seen["draws"][0]) == {"schedule", "patience", "steps"}


def described(**changes):
    fields = {"name": "new", "title": "New", "about": "does it", "color": "#00ff00", **changes}
    return type("New", (Finetune,), fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": ""}, "New has no title of its own"),
        ({"color": ""}, "New has no color of its own"),
        ({"name": "finetune"}, "New and Finetune are both finetune"),
        ({"title": "Finetune"}, "New and Finetune are both Finetune"),
        ({"color": Finetune.color}, f"New and Finetune are both {Finetune.color}"),
        ({"color": "green"}, "New: color must be #rrggbb, got green"),
        ({"name": "New-one"}, "New: name must be lower-case letters, digits and _"),
    ],
)
def test_what_it_lacks_or_shares_is_named(changes, message):
    with pytest.raises(TypeError, match=message):
        check_described([*ALL.values(), described(**changes)])
    check_described([*ALL.values(), described()])
