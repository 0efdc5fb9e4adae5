"""What a message of the command line says to do helps, at once; and what is harmless goes on."""

import json
import os
import shutil
import threading

import pytest

from gradsurgery.cli import main
from gradsurgery.unlearn.command import choose_directory, parse
from gradsurgery.unlearn.jobs.directory import CHECKPOINT, RunDirectory
from tests.unlearn.broken import command, numbers, refused
from tests.unlearn.tiny import JOB


def remade(path, line):
    """Delete what the line says, so that a resume makes it again."""
    told = line.split("other lines than ")[1].split(" made with")[0]
    removed = []
    for name in told.replace(" and ", ", ").split(", "):
        for file in path.glob(name.split(" ")[0]):
            file.unlink()
            removed.append(str(file.relative_to(path)))
    return removed


STAGES = ["stages/seed0-original.json", "stages/seed0-retrain.json"]


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_log_names_at_once_all_that_must_be_made_again(lost, copied, kinds, quick, capsys):
    path = copied("killed")
    if lost:
        (path / "metrics.jsonl").unlink()
    else:
        (path / "metrics.jsonl").write_bytes(b"\n")
    line = refused(capsys, command("resume", path, kinds))
    assert ("is lost: there are" if lost else "is damaged: it has") in line
    assert sorted(remade(path, line)) == sorted([*STAGES, CHECKPOINT])
    main(command("resume", path, kinds))
    assert numbers(path) == numbers(kinds / "finished")


def test_one_stage_is_named_alone(copied, kinds, quick, capsys):
    path = copied("killed")
    lines = (path / "metrics.jsonl").read_bytes().splitlines(True)
    kept = [line for line in lines if b'"retrain"' not in line]
    (path / "metrics.jsonl").write_bytes(b"".join(kept))
    line = refused(capsys, command("resume", path, kinds))
    assert "than stages/seed0-retrain.json was made with; delete that, not metrics.jsonl," in line
    assert remade(path, line) == STAGES[1:]
    main(command("resume", path, kinds))
    assert numbers(path) == numbers(kinds / "finished")


def test_many_stages_are_one_pattern(copied, capsys):
    path = copied("finished")
    directory = RunDirectory(path)
    for seed in range(1, 9):
        content = json.loads((path / STAGES[0]).read_text())
        del content["checksum"]
        directory.write_json(f"stages/seed{seed}-original.json", {**content, "seed": seed})
    line = refused(capsys, ["report", str(path)])
    assert "than stages/*.json (8 of 11) were made with; delete those" in line


@pytest.mark.parametrize("kind", ["damaged", "lost", "folder"])
def test_what_is_said_of_an_environment_helps(kind, copied, kinds, quick, capsys):
    path = copied("finished")
    file = path / "env.json"
    file.unlink()
    if kind == "damaged":
        file.write_text("{}")
    elif kind == "folder":
        file.mkdir()
    line = refused(capsys, ["report", str(path)])
    assert f"--out {path} --resume auto writes it anew" in line
    assert ("delete it" in line) == (kind != "lost")
    if kind != "lost":
        shutil.rmtree(file) if kind == "folder" else file.unlink()
    main(command("resume", path, kinds))
    main(["report", str(path)])
    assert numbers(path) == numbers(kinds / "finished")


def test_a_damaged_run_of_others_does_not_stop_a_search(kinds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wanted = ["--config", str(kinds / "options.yaml"), "--resume", "auto"]
    for number in (1, 2, 3):
        shutil.copytree(kinds / "killed", f"runs/digits-class-{number}")
    damaged = tmp_path / "runs/digits-class-3/config.yaml"
    damaged.write_bytes(damaged.read_bytes().replace(b"steps: 6", b"steps: 7"))
    (tmp_path / "runs/digits-class-2/config.yaml").unlink()
    (tmp_path / "runs/digits-class-2/config.yaml").mkdir()
    assert str(choose_directory(JOB, parse(JOB, wanted))) == "runs/digits-class-1"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line, number in zip(lines, (3, 2), strict=True):
        start = "gradsurgery: warning: passed over: --resume: "
        assert line.startswith(start) and f"runs/digits-class-{number}/config.yaml" in line
    (tmp_path / "runs/digits-class-1/env.json").write_text("{}")  # which is not looked at
    assert str(choose_directory(JOB, parse(JOB, wanted))) == "runs/digits-class-1"


@pytest.mark.parametrize("name", ["pages", ".", "..", "link"])
def test_a_page_in_the_place_of_a_folder_is_refused_first(
    name, kinds, tmp_path, monkeypatch, capsys
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    os.mkdir("pages")
    os.symlink("pages", "link")
    line = refused(capsys, ["compare", str(kinds / "finished"), "--out", name])
    page = os.path.join("" if name == "." else name, "compare.html")
    assert line == (
        f"--out: cannot write to {name}: it is a directory; name a file, such as {page}"
    )
    assert capsys.readouterr().out == "" and not os.listdir("pages")
    main(["compare", str(kinds / "finished"), "--out", page])
    assert os.path.getsize(page) > 1000


def test_a_command_in_the_place_of_a_job_is_named(capsys):
    line = refused(capsys, ["unlearn", "compare", "a", "--out", "b"])
    assert line == (
        "unlearn has no job named compare; there are digits and facts and images and speech and "
        "text; compare is a command: gradsurgery compare"
    )


OPTIONS = "task: class\nseeds: 7\n"


def test_options_may_come_through_a_link(tmp_path):
    (tmp_path / "options.yaml").write_text(OPTIONS)
    (tmp_path / "link.yaml").symlink_to("options.yaml")
    assert parse(JOB, ["--config", str(tmp_path / "link.yaml")]).job.seeds == 7


@pytest.mark.parametrize("named", [True, False], ids=["fifo", "/dev/fd"])
def test_options_may_come_through_a_pipe(named, tmp_path):
    if named:
        path = tmp_path / "pipe"
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_text, args=(OPTIONS,))
        writer.start()
        assert parse(JOB, ["--config", str(path)]).job.seeds == 7
        writer.join()
        return
    reading, writing = os.pipe()
    os.write(writing, OPTIONS.encode())
    os.close(writing)
    assert parse(JOB, [f"--config=/dev/fd/{reading}"]).job.seeds == 7
    os.close(reading)


def test_what_never_ends_is_read_up_to_a_limit(capsys, tmp_path):
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in ("/dev/zero", str(tmp_path / "zero")):
        line = refused(capsys, ["unlearn", "digits", "--config", path])
        assert line == f"--config: cannot read {path}: it has more than 67108864 bytes"


def test_options_of_a_folder_or_of_a_lost_link_are_one_line(capsys, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    line = refused(capsys, ["unlearn", "digits", "--config", str(tmp_path)])
    assert line == f"--config: cannot read {tmp_path}: it is a directory"
    line = refused(capsys, ["unlearn", "digits", "--config", str(tmp_path / "link")])
    assert line.startswith(f"--config: cannot read {tmp_path / 'link'}: No such file")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_those_of_a_run_are_a_plain_file(kind, copied, tmp_path, capsys):
    """It may be somebody else's: a pipe would be waited for."""
    file = copied("killed") / "config.yaml"
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    else:
        (tmp_path / "options.yaml").write_text(OPTIONS)
        file.symlink_to(tmp_path / "options.yaml")
    line = refused(capsys, ["unlearn", "digits", "--config", str(file)])
    assert f"--config: cannot read {file}: it is" in line
