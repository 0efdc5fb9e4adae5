"""What pages show, and that it is text whatever it holds."""

import ast
import json
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from gradsurgery.cli import main
from gradsurgery.unlearn.jobs.base import Texts
from gradsurgery.unlearn.jobs.digits.job import DigitsJob
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.report import page as pages
from gradsurgery.unlearn.report import plots
from gradsurgery.unlearn.report.page import page
from gradsurgery.unlearn.report.pictures import of_steps
from gradsurgery.unlearn.report.render import figures

FOLDER = Path(pages.__file__).parent
MARKUP = "<script src=x>\"'&amp; \x1b[31m\u202egnp"
SHOWN = "&lt;script src=x&gt;&#34;&#39;&amp;amp; \\x1b[31m\\u202egnp"


@pytest.fixture
def summary(kinds):
    return json.loads((kinds / "finished/summary.json").read_text())


def test_what_a_job_says_is_text_on_every_page(copied, monkeypatch, tmp_path):
    path = copied("finished")
    said = Texts(*(f"{name} {MARKUP}" for name in Texts._fields))
    monkeypatch.setattr(DigitsJob, "texts", lambda *_: said)
    main(["report", str(path)])
    main(["compare", str(path), "--out", str(tmp_path / "page.html")])
    for file in (path / "report.html", tmp_path / "page.html"):
        text = file.read_text()
        assert "<script" not in text and not re.search("[\x1b\u202e]", text)
        for name in ("title", "forgotten", "real", "doubts", "price"):
            assert f"{name} &lt;script src=x&gt;&#34;&#39;&amp;amp; \\x1b[31m\\u202egnp" in text, (
                name
            )


def test_html_is_in_templates_alone_and_none_of_it_unescaped():
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"<[a-zA-Z/!]", node.value), (file.name, node.value)
    templates = sorted(file.name for file in (FOLDER / "templates").iterdir())
    assert "report.html.jinja" in templates and "style.css" in templates
    for name in templates:
        text = (FOLDER / "templates" / name).read_text()
        assert not re.search(r"\|\s*safe|autoescape|Markup", text), name
    assert pages.PAGES.autoescape is True


def test_a_template_says_what_it_was_not_given():
    with pytest.raises(UndefinedError, match="'tasks' is undefined"):
        page("compare", "heading", paths=[], not_measured="")


def test_facts_of_data_and_model_are_shown(copied):
    path = copied("finished")
    facts = {"title": MARKUP, "weights": "", "parameters": 1234}
    with RunDirectory(path) as directory:
        found = directory.summary()
        found["forget_sets"]["0"]["file"] = MARKUP
        directory.write_json("summary.json", {**found, "data": facts})
    main(["report", str(path)])
    text = (path / "report.html").read_text()
    assert "<script" not in text
    table = text.partition("<h3>Data and model</h3>")[2].partition("</table>")[0]
    assert re.findall(r"<tr><td>(.*?)</td><td class=\"text\">(.*?)</td>", table) == [
        ("title", SHOWN),
        ("parameters", "1234"),
    ]


def test_large_figures_are_what_the_mean_gap_is_made_of(summary):
    shown = {card.lines[0]: card for card in figures(summary, "neggrad")}
    assert list(shown) == [
        "accuracy: forget set",
        "accuracy: retain set",
        "accuracy: test",
        "accuracy: test, forgotten class",
        "membership attack",
    ]
    columns = summary["columns"]
    value, retrain, original = (
        f"{columns[name]['retain']['mean']:.3f}" for name in ("neggrad", "retrain", "original")
    )
    card = shown["accuracy: retain set"]
    assert card == (value, ["accuracy: retain set", f"Retrain {retrain}", f"Original {original}"])


def test_pictures_are_of_what_was_measured(summary):
    """Another job's probe measures other things."""
    records = [
        {"seed": 0, "method": name, "step": step, "forget_loss": 0.5 + step, "forget_accuracy": 0.5}
        for name in ("original", "retrain", "neggrad")
        for step in (0, 1)
    ]
    galleries = of_steps(summary, 1.0, plots.by_stage(records), [])
    assert [gallery.heading for gallery in galleries] == ["Over the steps"]
    assert [picture.caption for picture in galleries[0].pictures] == [
        "Mean loss on the forget set: unlearning raises it."
    ]
