"""Damaged run directories and killed jobs: the same numbers, or one line that says why."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from gradsurgery.cli import main
from gradsurgery.unlearn.jobs.directory import RunDirectory
from tests.fuzz.profiles import EFFORT, attack, examples

OPTIONS = (
    "--task=class",
    "--method=neggrad",
    "--threads=1",
    "--seeds=1",
    "--training.steps=12",
    "--neggrad.steps=6",
    "--probe-every=2",
    "--checkpoint-every=2",
)
# what no two runs share; a checksum is of these too
UNLIKE = ("seconds", "seconds_ratio", "memory", "checksum")
SECONDS = 300  # more than any command here takes on a busy machine


def command(*arguments):
    """The command line in this process: its exit code and what it said on standard error."""
    said = io.StringIO()

    def hangs(*_):
        raise TimeoutError(f"{arguments} hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code, said.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return 0, said.getvalue()


def resume(path):
    return command("unlearn", "digits", *OPTIONS, "--out", path, "--resume", "auto")


def numbers(path):
    """What summary.json says, without times."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in UNLIKE}
        return value

    return timeless(json.loads((path / "summary.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module", autouse=True)
def plain_pictures():
    """A picture takes longer than the job: the page is made without them."""
    with pytest.MonkeyPatch.context() as patch:
        if EFFORT == 1:
            patch.setattr(Figure, "savefig", lambda self, file, **_: file.write("<svg></svg>"))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, and one that was interrupted behind a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    assert resume(folder / "finished")[0] == 0
    saved, calls = RunDirectory.save_checkpoint, []

    def interrupted(self, stage, state):
        saved(self, stage, state)
        calls.extend([stage] * (stage[1] == "neggrad"))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", interrupted)
        assert resume(folder / "interrupted")[0] == 130
    return folder


def files(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def flip(path, target, data, random):
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 8])):
        if data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def truncate(path, target, data, random):
    path.write_bytes(data[: random.randrange(len(data) + 1)])


def digit(path, target, data, random):
    """Another digit somewhere: still a file that can be read."""
    places = [k for k, byte in enumerate(data) if chr(byte).isdigit()]
    data = bytearray(data)
    if places:
        k = random.choice(places)
        data[k] = ord("0") + (data[k] - ord("0") + random.randrange(1, 10)) % 10
    path.write_bytes(data)


def insert(path, target, data, random):
    some = [b"\0", b"\xff\xfe", b"\n", b"{", b"]", b"\x1b[31m", b"NaN", b"1e999", b"\0" * 4096]
    k = random.randrange(len(data) + 1)
    path.write_bytes(data[:k] + random.choice(some) + data[k:])


def replace(path, target, data, random):
    others = [b"", b"{}", b"[]", b"null", b"\x80\x04.", b"[1, 2]", b'{"seed": 0}', b"a: &a [*a]\n"]
    path.write_bytes(random.choice(others))


def swap(path, target, data, random):
    """Another file's content."""
    other = random.choice(sorted(p for p in path.parent.iterdir() if p.is_file()))
    path.write_bytes(other.read_bytes())


def remove(path, target, data, random):
    path.unlink()


def link(path, target, data, random):
    """A link to the same content elsewhere, which must stay as it is."""
    target.write_bytes(data)
    path.unlink()
    path.symlink_to(target)


def dangling(path, target, data, random):
    path.unlink()
    path.symlink_to(target.with_name("nothing"))


def pipe(path, target, data, random):
    path.unlink()
    os.mkfifo(path)


def folder(path, target, data, random):
    path.unlink()
    path.mkdir()


DAMAGES = (
    flip, flip, truncate, digit, digit, insert, replace, swap, remove, link, dangling, pipe, folder
)  # fmt: skip


@examples(6)
@given(
    run=st.sampled_from(["finished", "finished", "interrupted"]),
    damage=st.sampled_from(DAMAGES),
    named=st.integers(0, 2**10),
    random=st.randoms(use_true_random=False),
    action=st.sampled_from(["resume", "resume", "report", "compare"]),
)
def test_damaged_directories(runs, tmp_path_factory, run, damage, named, random, action):
    with attack(f"run directory: {action}", may_refuse=False) as example:
        folder = tmp_path_factory.mktemp("damaged")
        path, target = folder / "run", folder / "target"
        shutil.copytree(runs / run, path)
        if run == "interrupted" and action != "resume":
            run = "finished"
            shutil.rmtree(path)
            shutil.copytree(runs / run, path)
        name = files(path)[named % len(files(path))]
        data = (path / name).read_bytes()
        damage(path / name, target, data, random)
        kept = target.read_bytes() if target.exists() else None
        page = folder / "page.html"
        call = {
            "resume": lambda: resume(path),
            "report": lambda: command("report", path),
            "compare": lambda: command("compare", path, "--out", page),
        }
        code, said = call[action]()
        what = f"{damage.__name__} of {name}"
        if kept is not None:
            assert target.read_bytes() == kept, f"{what}: written through the link"
        assert not (folder / "nothing").exists(), f"{what}: written through the link"
        if code == 0:
            assert numbers(path) == numbers(runs / "finished"), f"{what}: other numbers"
            return
        example["refused"] += 1
        lines = said.strip().splitlines()
        assert code == 2, f"{what}: exit code {code}, {said}"
        assert lines[-1].startswith("gradsurgery: error: ") and len(lines) == 1, f"{what}: {said}"
        assert len(lines[0]) < 1000 and lines[0].isprintable(), f"{what}: {said}"
        assert Path(name).name in lines[0] or str(path) in lines[0], f"{what}: {said}"
        shutil.rmtree(folder)


@examples(1)
@given(st.sampled_from(["SIGKILL", "SIGINT", "SIGTERM"]), st.floats(0, 1), st.booleans())
def test_kills(runs, tmp_path_factory, name, moment, twice):
    """A signal at any moment, then --resume auto: the numbers of a run that had none."""
    with attack(f"kills: {name}", may_refuse=False):
        path = tmp_path_factory.mktemp("killed") / "run"
        call = [sys.executable, "-m", "gradsurgery", "unlearn", "digits", *OPTIONS]
        call += ["--out", str(path), "--resume", "auto"]
        for at in (moment, 1 - moment)[: 1 + twice]:
            process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            lines, total = 0, 30
            # by what it has written and not by a clock, so that a busy machine is hit as well
            while process.poll() is None and lines < at * total:
                log = path / "metrics.jsonl"
                lines = log.read_bytes().count(b"\n") if log.exists() else 0
                time.sleep(0.001)
            process.send_signal(getattr(signal, name))
            _, said = process.communicate(timeout=SECONDS)
            assert b"Traceback" not in said, said.decode()
        code, said = resume(path)
        assert code == 0, said
        assert numbers(path) == numbers(runs / "finished")
        ours, theirs = ((p / "models").iterdir() for p in (path, runs / "finished"))
        for a, b in zip(sorted(ours), sorted(theirs), strict=True):
            assert a.name == b.name and a.read_bytes() == b.read_bytes()
