"""`gradsurgery bench` as people use it: a run, one compared with it, and every kind of nonsense."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gradsurgery.bench.cases import OURS, SIZES, all_cases
from gradsurgery.bench.record import read
from gradsurgery.bench.report import ratio, spread
from gradsurgery.cli import main

ROOT = Path(__file__).parents[2]
TINY = ("--size", "tiny", "--device", "cpu", "--threads", "1")


def bench(*arguments, cwd):
    """Run the command as a user does, in a folder whose settings of pytest must not matter."""
    (cwd / "conftest.py").write_text("raise RuntimeError('conftest.py was read')")
    (cwd / "pytest.ini").write_text("[pytest]\naddopts = --nonsense\n")
    return subprocess.run(
        [sys.executable, "-m", "gradsurgery", "bench", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "--nonsense"},
        capture_output=True,
        text=True,
        timeout=400,  # of a machine that does other work; 20 s of one that does not
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of everything in small, and what it said."""
    folder = tmp_path_factory.mktemp("bench")
    process = bench(*TINY, "--profile", cwd=folder)
    assert process.returncode == 0, process.stderr
    out = folder / "runs/bench-1"
    return SimpleNamespace(
        out=out,
        cwd=folder,
        lines=process.stdout.splitlines(),
        errors=process.stderr,
        record=read(out / "bench.json", "test"),
        markdown=(out / "table.md").read_text(encoding="utf-8"),
        page=(out / "report.html").read_text(encoding="utf-8"),
    )


def test_a_run_leaves_a_directory_and_nothing_else(measured):
    assert {path.name for path in measured.out.iterdir()} == {
        *("bench.json", "table.md", "report.html", "traces")
    }
    left = {path.name for path in measured.cwd.iterdir()}
    assert left == {"runs", "conftest.py", "pytest.ini"}
    lines = measured.errors.splitlines()
    assert not [line for line in lines if "ActivityProfilerHandler" not in line]  # torch's own


def test_everything_was_measured(measured):
    names = [case.name for case in all_cases(SIZES["tiny"])]
    assert [entry.name for entry in measured.record.benchmarks] == names
    assert not measured.record.failed and not measured.record.left_out
    assert len(measured.record.group("steps")) == 4


def test_errors_and_memory_stand_beside_every_time(measured):
    for entry in measured.record.benchmarks:
        assert entry.ours.seconds and entry.ours.rounds >= 3
        assert entry.ours.error is not None and entry.ours.error < 1e-5
        for name, taken in entry.extra_info.contenders.items():
            assert taken.seconds, (entry.name, name, taken.failure)
            assert taken.floor or name == "TorchJD" or taken.error is not None
            assert sys.platform != "linux" or taken.memory is not None


def test_the_baselines_are_there(measured):
    by = {name: set() for name in ("steps", "operators", "rules")}
    for group, names in by.items():
        for entry in measured.record.group(group):
            names.update(entry.extra_info.contenders)
    assert by["steps"] >= {OURS, "plain step", "vmap(grad) + QR"}
    assert by["operators"] >= {OURS, "J @ J.T", "w @ J", "torch.linalg.qr", "one read"}
    assert by["rules"] >= {OURS, "plain PyTorch"}
    if importlib.util.find_spec("torchjd"):
        assert "TorchJD autogram" in by["steps"] and "TorchJD" in by["rules"]


def test_the_table_has_the_numbers_of_the_json(measured):
    entry = measured.record.group("operators")[0]
    theirs = entry.extra_info.contenders["J @ J.T"]
    rows = measured.markdown.splitlines()
    place = next(k for k, row in enumerate(rows) if row.startswith(f"| {entry.name} |"))
    assert f"| {OURS} | {spread(entry.ours)} |" in rows[place]
    assert f"| J @ J.T | {spread(theirs)} | {ratio(entry.ratio('J @ J.T'))}" in rows[place + 1]


def test_conditions_are_stated(measured):
    machine = measured.record.machine_info
    assert machine.threads == 1
    for text in (measured.markdown, measured.page):
        assert f"{machine.processor}, 1 thread; torch {machine.torch}" in text
        assert f"reads {machine.read_gbps:.0f} GB/s" in text


def test_the_page_needs_no_other_file(measured):
    assert measured.page.count("data:image/svg+xml;base64,") >= 9
    assert not re.search(r"""(?:src|href)=["'](?!data:)|<script|@import|url\(""", measured.page)
    order = ["plain steps (", "Steps: time and memory", "Roofline", "Rules", "The machine"]
    places = [measured.page.index(text) for text in order]
    assert places == sorted(places)


def test_what_is_slower_is_said(measured):
    """Tiny rows: plain torch wins, and every way of telling the result says so."""
    lost = [
        (entry, name)
        for entry in measured.record.benchmarks
        for name, taken in entry.extra_info.contenders.items()
        if name != OURS and not taken.floor and (entry.ratio(name) or 1) < 1
    ]
    assert lost
    after = measured.markdown.split("## Where gradsurgery is slower")[1].split("\n## ")[0]
    for entry, name in lost:
        assert f"| {entry.name} | {name} | " in after
        told = [line for line in measured.lines if line.startswith(f"slower: {entry.name}, ours ")]
        assert any(f", {name} " in line and ratio(entry.ratio(name)) in line for line in told)
    assert after.count("\n|") == len(lost) + 2


def test_profile_writes_traces_that_open(measured):
    traces = sorted((measured.out / "traces").glob("*.json"))
    assert len(traces) == 2 * len(measured.record.group("steps"))
    for path in traces:
        assert json.loads(path.read_text())["traceEvents"]
        assert "CPU" in path.with_suffix(".txt").read_text()


def test_compare_says_what_changed(measured, tmp_path):
    """An earlier run, twice as slow, with another number of threads."""
    old = json.loads((measured.out / "bench.json").read_text())
    for entry in old["benchmarks"]:
        for taken in entry["extra_info"]["contenders"].values():
            taken["seconds"], taken["spread"] = 1000 * taken["seconds"], 0.0
    old["machine_info"]["threads"] = 7
    (tmp_path / "old.json").write_text(json.dumps(old))
    options = ("--only", "operators", "--compare", "old.json", "--out", "new")
    process = bench(*TINY, *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    new = read(tmp_path / "new/bench.json", "test")
    assert {entry.extra_info.group for entry in new.benchmarks} == {"operators"}
    count = len(new.benchmarks)
    told = f"gradsurgery became faster in {count} and slower in 0 of {count} pieces of work"
    for text in (
        process.stdout,
        (tmp_path / "new/table.md").read_text(encoding="utf-8"),
        (tmp_path / "new/report.html").read_text(encoding="utf-8"),
    ):
        assert told in text
    for name in ("table.md", "report.html"):
        text = (tmp_path / "new" / name).read_text(encoding="utf-8")
        assert "Not the same conditions: threads: then 7, now 1." in text


def fails(capsys, *arguments):
    """The one line an invocation in this process ends with."""
    with pytest.raises(SystemExit) as caught:
        main(["bench", *map(str, arguments)])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("gradsurgery: error: ")


OTHER = ROOT / "benchmarks/results/cpu/fresh.json"  # pytest-benchmark's too, of other benchmarks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes: must be above 0, got 0"),
        (["--minutes", "nan"], "--minutes: must be above 0, got nan"),
        (["--minutes", "five"], "bench: argument --minutes: invalid float value: 'five'"),
        (["--threads", "0"], "--threads: must be 1 at least, got 0"),
        (["--device", "abacus"], "--device: abacus is not here"),
        (["--device", "meta"], "--device: meta has no values"),
        (["--size", "huge"], "bench: argument --size: invalid choice: 'huge'"),
        (["--only", "walks"], "bench: argument --only: invalid choice: 'walks'"),
        (["--benchmark-json=x"], "bench: unrecognized arguments: --benchmark-json=x"),
        (["--compare", "none.json"], "--compare: cannot read none.json: No such file"),
        (["--compare", "text.json"], "--compare: text.json is no bench.json of gradsurgery bench"),
        (["--compare", str(OTHER)], "is no bench.json of gradsurgery bench: Object missing"),
        (["--out", "."], "--out: cannot make .: File exists"),
        (["--out", "text.json/x"], "--out: cannot make text.json/x: Not a directory"),
    ],
)
def test_nonsense_is_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("not json")
    assert message in fails(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["text.json"]


@pytest.mark.parametrize("missing", ["pytest_benchmark", "matplotlib"])
def test_a_missing_package_is_named_with_how_to_get_it(missing, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    name = missing.replace("_", "-")
    expected = f'bench needs {name}, which is not installed: pip install "gradsurgery[bench]"'
    assert fails(capsys) == expected


def test_the_package_itself_does_not_load_it():
    code = (
        "import sys, gradsurgery.cli, gradsurgery.unlearn; "
        "print([name for name in sys.modules if name.startswith('gradsurgery.bench')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n"
