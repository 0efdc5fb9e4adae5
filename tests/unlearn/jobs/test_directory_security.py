"""A run directory from somebody else: no link followed, nothing run, nothing shown raw.

Whoever wrote the files can have written right checksums too, so these tests do.
"""

import json
import os
import re
import sys

import pytest
from rich.console import Console

from gradsurgery.cli import main
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN
from gradsurgery.unlearn.jobs.directory import CHECKPOINT, RunDirectory, write_atomic
from gradsurgery.unlearn.jobs.progress import RichProgress
from gradsurgery.unlearn.report import plots
from gradsurgery.unlearn.report.card import model_card, plain
from gradsurgery.unlearn.report.labels import title
from gradsurgery.unlearn.report.tables import print_summary
from tests.unlearn.broken import command, config, numbers, refused, replace

MARKUP = "<script src=x onload=alert(1)>"
CODES = "\x1b[31mred\x1b[0m \x9b7m\u202egnp\n[bold]b[/bold] :skull:"


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder", "device", "socket"])
@pytest.mark.parametrize(
    "name,run,file",
    [
        ("report", "finished", "summary.json"),
        ("report", "finished", "config.yaml"),
        ("report", "finished", "stages/seed0-neggrad.json"),
        ("report", "finished", "metrics.jsonl"),
        ("compare", "finished", "summary.json"),
        ("resume", "killed", ".lock"),
        ("resume", "killed", "config.yaml"),
        ("resume", "killed", "env.json"),
        ("resume", "killed", "metrics.jsonl"),
        ("resume", "killed", CHECKPOINT),
        ("resume", "killed", "stages/seed0-original.json"),
        ("resume", "killed", "models/seed0-original.safetensors"),
    ],
)
def test_nothing_but_plain_files_is_opened(
    name, run, file, kind, copied, kinds, quick, tmp_path, capsys
):
    path, victim = copied(run), tmp_path / "victim"
    replace(path / file, kind, victim)
    before = victim.read_bytes() if victim.exists() else None
    line = refused(capsys, command(name, path, kinds))
    assert f"{path / file}: it is a" in line or f"{path / file}: it is not a regular" in line
    assert (victim.read_bytes() if victim.exists() else None) == before


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
@pytest.mark.parametrize("file", ["report.html", "page.html"])
def test_nothing_but_plain_files_is_replaced(file, kind, copied, kinds, quick, tmp_path, capsys):
    """A page for --out is one of the user's, and no link of somebody else's either."""
    path, victim = copied("finished"), tmp_path / "victim"
    write_atomic(path / file, "old")
    replace(path / file, kind, victim)
    before = victim.read_bytes() if victim.exists() else None
    name = "report" if file == "report.html" else "compare"
    more = [] if file == "report.html" else ["--out", str(path / file)]
    line = refused(capsys, [*command(name, path, kinds), *more])
    assert f"cannot write to {path / file}: it is" in line
    assert (victim.read_bytes() if victim.exists() else None) == before


@pytest.mark.parametrize("folder", ["stages", "models"])
@pytest.mark.parametrize("name,run", [("report", "finished"), ("resume", "killed")])
def test_no_folder_of_a_run_is_a_link(name, run, folder, copied, kinds, quick, tmp_path, capsys):
    path = copied(run)
    if (name, folder) == ("report", "models"):
        return  # a report reads no model
    (path / folder).rename(tmp_path / "elsewhere")
    (path / folder).symlink_to(tmp_path / "elsewhere")
    before = sorted(os.listdir(tmp_path / "elsewhere"))
    assert f"{path / folder}: it is a symbolic link" in refused(capsys, command(name, path, kinds))
    assert sorted(os.listdir(tmp_path / "elsewhere")) == before


def test_a_run_directory_may_be_named_by_a_link(copied, kinds, quick, tmp_path):
    """It is the user's own."""
    (tmp_path / "latest").symlink_to(copied("killed"))
    main(command("resume", tmp_path / "latest", kinds))
    assert numbers(tmp_path / "latest") == numbers(kinds / "finished")


def test_the_lock_changes_nothing(tmp_path):
    (tmp_path / ".lock").write_text("kept")
    with RunDirectory(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "kept"


def test_no_name_of_a_new_file_can_be_known(tmp_path, monkeypatch):
    """Where `.file.partial` would be a link, its target was written over."""
    seen = []
    real = os.replace

    def replaced(source, target, **options):
        seen.append(source)
        real(source, target, **options)

    monkeypatch.setattr(os, "replace", replaced)
    for name in ("file", "file", "n" * 255):
        write_atomic(tmp_path / name, "text")
    assert len(set(seen)) == 3
    assert sorted(os.listdir(tmp_path)) == ["file", "n" * 255]


def test_a_pickle_is_never_read(copied, kinds, quick, tmp_path, monkeypatch):
    path = copied("killed")
    (path / CHECKPOINT).rename(path / "checkpoint.pt")
    monkeypatch.setattr("torch.load", None)
    monkeypatch.setattr("pickle.loads", None)
    main(command("resume", path, kinds))
    assert numbers(path) == numbers(kinds / "finished")


def renamed(content, name):
    content["columns"][name] = content["columns"].pop("neggrad")


def injected(path, name):
    """A finished run whose method has another name, in every file and with right checksums."""
    with RunDirectory(path) as directory:
        directory.rewind()
        for record in directory.records():
            if record["method"] == "neggrad":
                plain = {key: record[key] for key in record if key not in ("seed", "method")}
                directory.log((0, name), plain)
        directory.finish(
            (0, name), DigitsCNN(), {**(directory.result((0, "neggrad")) or {}), "method": name}
        )
        summary = directory.summary()
        renamed(summary, name)
        directory.write_json("summary.json", summary)


@pytest.mark.parametrize(
    "name", [MARKUP, f"neggrad+{MARKUP}", f"neggrad+{MARKUP}@0.5", "a$\\frac$"]
)
def test_names_from_files_are_no_markup_of_pages(name, copied, kinds, quick, tmp_path, capsys):
    path = copied("finished")
    injected(path, name)
    main(["report", str(path)])
    main(["compare", str(path), "--out", str(tmp_path / "page.html")])
    for page in (path / "report.html", tmp_path / "page.html"):
        text = page.read_text()
        assert "<script" not in text
        assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert "\x1b" not in capsys.readouterr().out


def test_every_text_of_every_file_is_escaped(copied, monkeypatch):
    """Options, environment and search hold text of any kind."""
    path = copied("finished")
    directory = RunDirectory(path)
    environment = json.loads((path / "env.json").read_text())
    del environment["checksum"]
    environment = dict.fromkeys(environment, MARKUP) | {MARKUP: MARKUP}
    environment["packages"] = {MARKUP: MARKUP}
    directory.write_json("env.json", environment)
    with directory:
        trial = {"method": f"neggrad+{MARKUP}", "options": {MARKUP: MARKUP}, "error": MARKUP}
        directory.add_trial(trial)
        directory.add_trial({"method": MARKUP, "options": {}, "gap": 0.5})
    options = {"task": MARKUP, MARKUP: MARKUP, "training": {MARKUP: MARKUP}, "neggrad": MARKUP}
    monkeypatch.setattr(
        "gradsurgery.unlearn.jobs.checked.to_yaml", lambda _: json.dumps(options) + "\n"
    )
    directory.write_options("config.yaml", None)
    main(["report", str(path)])
    text = (path / "report.html").read_text()
    assert "<script" not in text and text.count("&lt;script src") > 8


@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_shown_without_codes(terminal, copied, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    path = copied("finished")
    content = json.loads((path / "summary.json").read_text())
    renamed(content, f"neggrad+{CODES}")
    print_summary(content)
    out = capsys.readouterr().out
    assert "\x1b[31mred" not in out and not re.search("[\x9b\u202e]", out)  # rich has codes too
    assert "\\x1b[31mred" in out and "[bold]b[/bold]" in out and ":skull:" in out


def test_progress_shows_no_codes(capsys):
    progress = RichProgress()
    progress.console = Console(force_terminal=False, markup=False, emoji=False)
    progress.say(CODES)
    with progress.stage(CODES, 2, 0) as advance:
        advance(1)
    out = capsys.readouterr().out
    assert not re.search("[\x1b\x9b\u202e]", out)
    assert "[bold]b[/bold]" in out


def test_paths_are_shown_without_codes(tmp_path, capsys, kinds):
    line = refused(capsys, ["report", str(tmp_path / CODES)])
    assert "\\x1b[31mred" in line  # and the line is printable: that is looked at for each
    line = refused(capsys, ["unlearn", "digits", "--config", str(tmp_path / CODES)])
    assert "\\x1b[31mred" in line
    line = refused(capsys, ["unlearn", CODES])
    assert "\\x1b[31mred" in line


def test_a_card_has_no_markup_but_its_own(kinds):
    content = json.loads((kinds / "finished/summary.json").read_text())
    name = f"neggrad+[a](http://b.c) | {MARKUP} `c` ![d](e)\n# f"
    renamed(content, name)
    card = model_card(config(), content, 0, name)
    without = re.sub(r"\\.", "", card)
    assert "<" not in without and "](" not in without and "![" not in without
    assert "\n# f" not in card and "http:" not in card
    assert plain("NegGrad+, 0.5") == "NegGrad+, 0.5"


def test_formulas_and_names_of_matplotlib_are_text():
    once = {"mean": 0.5, "std": None, "values": [0.5]}
    columns = {name: {"seconds": once} for name in ("retrain", "neggrad+$\\frac$", "_x+<b>")}
    assert "<svg" in plots.cost(columns, list(columns))


def test_text_for_people_is_one_line_of_characters():
    assert show("a\tb\x00\x7f\x85\u2028\u200b\ud800é±") == (
        "a\\tb\\x00\\x7f\\x85\\u2028\\u200b\\ud800é±"
    )
    assert title("neggrad+\x1b[0m") == "NegGrad, \\x1b[0m"
