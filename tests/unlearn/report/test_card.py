"""What a model card says, and that it is text whatever it holds."""

import json
import re

import pytest

from gradsurgery.unlearn.jobs.base import Texts
from gradsurgery.unlearn.jobs.digits.job import DigitsJob
from gradsurgery.unlearn.report.card import model_card
from tests.unlearn.broken import config

MARKUP = "<script src=x> [a](http://b.c) | `d` \x1b[31m\u202egnp\n# e"


@pytest.fixture
def summary(kinds):
    return json.loads((kinds / "finished/summary.json").read_text())


def test_what_a_job_says_is_text_on_a_card(summary, monkeypatch):
    said = {name: f"{name} {MARKUP}" for name in Texts._fields}
    code = "model = 1\n```\n# a heading\n`````\n<b>"
    monkeypatch.setattr(DigitsJob, "texts", lambda *_: Texts(**{**said, "loading": code}))
    before, fence, rest = model_card(config(), summary, 0, "neggrad").partition("``````python\n")
    inside, fence, after = rest.partition("\n``````\n")
    assert fence and inside == code
    without = re.sub(r"\\.", "", before + after)
    assert not re.search("<|\\]\\(|http:|\n# e|[\x1b\u202e]", without)
    for name in ("card_title", "model", "forgotten", "real", "doubts"):
        assert f"{name} \\<script" in before + after


def test_a_card_speaks_of_its_own_seed(summary):
    summary["seeds"].append(1)
    summary["forget_sets"]["1"] = {**summary["forget_sets"]["0"], "class": 7, "samples": 99}
    for column in summary["columns"].values():
        for entry in column.values():
            entry["values"] *= 2
    assert "- every training sample of digit 7 (99 samples), seed 1" in model_card(
        config(), summary, 1, "neggrad"
    )


def test_a_card_says_no_doubt_where_there_is_none(summary, monkeypatch):
    plain = DigitsJob().texts(summary)
    assert plain.doubts in model_card(config(), summary, 0, "neggrad")
    monkeypatch.setattr(DigitsJob, "texts", lambda *_: plain._replace(doubts=""))
    assert model_card(config(), summary, 0, "neggrad").endswith("in the retain set.\n")
