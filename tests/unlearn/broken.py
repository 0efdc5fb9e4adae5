"""Run directories to be broken: a finished one, and one killed in the middle of a stage."""

import contextlib
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from gradsurgery.cli import main
from gradsurgery.unlearn.command import Invocation, open_directory
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.progress import PlainProgress
from gradsurgery.unlearn.report.finish import finish
from tests.unlearn.tiny import run, tiny

LONGEST = 850  # characters of an error line
TIMED = ("seconds", "seconds_ratio", "memory", "checksum", "step")


class Killed(BaseException):
    pass


def config():
    few = {"steps": 6}
    return tiny(
        method=("neggrad",), neggrad=few, training={"steps": 4}, checkpoint_every=2, probe_every=2
    )


def make(path, monkeypatch=None):
    """A finished run, or with a monkeypatch one killed after step 5 of neggrad."""
    options, log = config(), RunDirectory.log

    def dies(directory, stage, record):
        log(directory, stage, record)
        if (stage[1], record["step"]) == ("neggrad", 5):
            raise Killed

    if monkeypatch is not None:
        monkeypatch.setattr(RunDirectory, "log", dies)
    with RunDirectory(path) as directory, contextlib.suppress(Killed):
        open_directory(directory, options)
        finish(options, directory, run(options, directory, PlainProgress()))
    if monkeypatch is not None:
        monkeypatch.undo()


def command(name, path, kinds):
    """The arguments of a command on a run directory."""
    if name == "resume":
        options = ["--config", kinds / "options.yaml", "--out", path, "--resume", "auto"]
        return [str(each) for each in ("unlearn", "digits", *options)]
    return [name, str(path)]


def parsed(job, arguments):
    """What `parse` makes of the resume of `command`, a second sooner."""
    return Invocation(config(), Path(arguments[3]), "auto")


def refused(capsys, arguments, code=2):
    """The one line, not too long, that an invocation ends with; one that hangs is stopped."""

    def stop(*_):
        raise Killed("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    try:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == code
    assert line.startswith("gradsurgery: error: ") and len(line) < LONGEST
    assert line.isprintable()
    return line.removeprefix("gradsurgery: error: ")


def numbers(path):
    """What a run found, without times, and its models."""

    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if key not in TIMED}
        return value

    models = {file.name: file.read_bytes() for file in (path / "models").iterdir()}
    return timeless(json.loads((path / "summary.json").read_text())), models


def replace(path, kind, elsewhere):
    """Put something in the place of a file that is no plain file."""
    content = path.read_bytes()
    path.unlink()
    if kind == "link":
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)
    elif kind == "dangling link":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket must be short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
