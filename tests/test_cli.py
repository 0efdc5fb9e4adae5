"""The command line as people use it: a run, a kill, a resume, and every kind of nonsense."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import yaml

from gradsurgery.cli import main
from gradsurgery.unlearn import METHODS
from gradsurgery.unlearn.command import choose_directory, parse
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.progress import PlainProgress, RichProgress, make_progress
from gradsurgery.unlearn.report.tables import print_summary
from tests.unlearn.tiny import JOB

DIGITS = ("unlearn", "digits")
# seconds of training for every stage, through the same code as the real job
TINY = (
    "--threads=1",
    "--seeds=1",
    "--training.steps=20",
    "--orthograd.steps=6",
    "--graddiff.steps=6",
    "--neggrad.steps=6",
    "--finetune.steps=6",
    "--probe-every=3",
    "--checkpoint-every=4",
)
UNLIKE = ("seconds", "seconds_ratio", "memory", "checksum")  # what no two runs share
FOUR = ("--method", "orthograd", "graddiff", "neggrad", "finetune")


def gradsurgery(*arguments, cwd, **options):
    """Run the command line as a user does; the finished process with its text output."""
    return subprocess.run(
        [sys.executable, "-m", "gradsurgery", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", "PYTHONWARNINGS": "error::UserWarning"},
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def numbers(run: Path):
    """All that a run measured, without times and memory, which no two runs share."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in UNLIKE}
        return value

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    models = {path.name: path.read_bytes() for path in sorted((run / "models").iterdir())}
    summary = json.loads((run / "summary.json").read_text())
    return timeless(summary), [timeless(line) for line in lines], models


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run directory made by the command line, and what the command said."""
    folder = tmp_path_factory.mktemp("finished")
    process = gradsurgery("unlearn", "digits", *TINY, *FOUR, cwd=folder)
    assert process.returncode == 0, process.stderr
    return SimpleNamespace(path=folder / "runs/digits-mislabeled-1", process=process, cwd=folder)


def fails(capsys, *arguments, code=2):
    """The one line an invocation in this process ends with."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("gradsurgery: error: ")


def test_a_run_leaves_everything_behind(finished):
    names = {path.name for path in finished.path.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "model.safetensors",
        "model_card.md",
        "models",
        "report.html",
        "stages",
        "summary.json",
    }
    methods = ["original", "retrain", "retrain+other seed", "orthograd", "graddiff"]
    methods += ["neggrad", "finetune"]
    summary = json.loads((finished.path / "summary.json").read_text())
    assert list(summary["columns"]) == methods
    assert len(list((finished.path / "models").iterdir())) == len(methods)
    records = [json.loads(x) for x in (finished.path / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if r["method"] == "orthograd"]
    assert steps == list(range(7))  # 0 is the model as it was given


def test_a_run_prints_plain_lines_and_one_table_into_a_pipe(finished):
    out = finished.process.stdout
    assert "\x1b" not in out and finished.process.stderr == ""
    assert re.search(r"^\w+ comes closest to Retrain: .* points away on average", out, re.MULTILINE)
    header = next(line for line in out.splitlines() if line.startswith(" ") and "gap" in line)
    columns = "gap over chance behind nearer forget true labels retain test attack seconds"
    assert header.split() == columns.split()
    names = ("Retrain", "Retrain, other seed", "OrthoGrad", "GradDiff", "NegGrad", "Finetune")
    for row in (r"Original \(do nothing\)", *names):
        assert re.search(rf"^{row} .* \d\.\d$", out, re.MULTILINE), row
    assert out.splitlines()[-1] == "report runs/digits-mislabeled-1/report.html"


def test_the_model_loads_as_its_card_says(finished):
    model = DigitsCNN()
    model.load_state_dict(safetensors.torch.load_file(finished.path / "model.safetensors"))
    kept = safetensors.torch.load_file(finished.path / "models/seed0-orthograd.safetensors")
    assert torch.equal(model.state_dict()["head.3.bias"], kept["head.3.bias"])
    card = (finished.path / "model_card.md").read_text()
    summary = json.loads((finished.path / "summary.json").read_text())
    assert summary["forget_sets"]["0"]["sha256"] in card
    assert "| | Original | Retrain | Retrain, other seed | OrthoGrad |" in card
    for promise in ("approximate", "certified deletion", "| forget_ceiling |"):
        assert promise in card


def test_config_out_is_config_in(finished, tmp_path):
    """The same numbers from config.yaml alone, and the same config.yaml again."""
    config = finished.path / "config.yaml"
    main([*DIGITS, "--config", str(config), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again/config.yaml").read_text() == config.read_text()
    assert numbers(tmp_path / "again") == numbers(finished.path)


@pytest.mark.parametrize("lines", [10, 47])
def test_a_killed_run_continues_to_the_same_bits(lines, finished, tmp_path):
    """SIGKILL as soon as so many steps are logged: in the original, in OrthoGrad."""
    arguments = (*DIGITS, *TINY, *FOUR, "--out", "run", "--resume", "auto")
    process = subprocess.Popen(
        [sys.executable, "-m", "gradsurgery", *arguments],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run/summary.json").exists()

    resumed = gradsurgery(*arguments, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(tmp_path / "run") == numbers(finished.path)


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before, path = numbers(finished.path), str(finished.path)
    main([*DIGITS, "--config", f"{path}/config.yaml", "--out", path, "--resume", "auto"])
    assert capsys.readouterr().out.count("already done") == 7
    assert numbers(finished.path) == before


def test_resume_finds_the_unfinished_run_with_the_same_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, seeds in ((1, 1), (2, 1), (3, 2)):
        folder = Path(f"runs/digits-mislabeled-{number}")
        folder.mkdir(parents=True)
        config = parse(JOB, [f"--seeds={seeds}"]).job
        RunDirectory(folder).write_options("config.yaml", config)
    auto = parse(JOB, ["--seeds=1", "--resume=auto"])
    assert choose_directory(JOB, auto) == Path("runs/digits-mislabeled-2")
    for name in ("summary.json", "report.html"):
        (tmp_path / "runs/digits-mislabeled-2" / name).touch()
    assert choose_directory(JOB, auto) == Path("runs/digits-mislabeled-1")
    assert choose_directory(JOB, parse(JOB, ["--seeds=1"])) == Path("runs/digits-mislabeled-4")


def test_an_existing_run_is_not_written_over(finished, capsys):
    line = fails(capsys, *DIGITS, "--out", finished.path)
    assert re.fullmatch(
        r"--out: .* exists and is not empty; continue it with --resume auto or .*", line
    )


def test_resuming_with_other_options_is_refused(finished, capsys):
    config = finished.path / "config.yaml"
    arguments = (*DIGITS, "--config", config, "--out", finished.path, "--resume", "auto")
    line = fails(capsys, *arguments, "--neggrad.lr", "0.125")
    assert re.fullmatch(r"--resume: .* other options: neggrad.lr was .*, is 0.125", line)


def test_the_task_decides_the_other_defaults_and_the_user_over_both(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("task: class\northograd: {alpha: 0.125, lr: 0.25}\n")
    job = parse(JOB, ["--config", str(path), "--orthograd.lr", "0.5"]).job
    assert (job.task, job.orthograd.alpha, job.orthograd.lr) == ("class", 0.125, 0.5)
    assert job.graddiff == JOB.defaults("class").graddiff
    assert parse(JOB, []).job == JOB.defaults("mislabeled")
    sweep = parse(JOB, ["--method", "all", "--retain-fraction", "1", "0.1", "0.05"]).job
    assert sweep.fractions == [1.0, 0.1, 0.05]
    assert sweep.methods == list(METHODS)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--task", "speaker"), r"--task must be one of mislabeled, class, random, got speaker"),
        (("--forget-class", "3"), r"--task must be class where --forget-class is given, got mis.*"),
        (("--task", "class", "--forget-class", "11"), r"--forget-class must be a digit from 0 .*"),
        (("--seeds", "0"), r"--seeds must be at least 1, got 0"),
        (("--first-seed", "-1"), r"--first-seed must be in \[0, 2\^31\), got -1"),
        (("--training.steps", "0"), r"--training.steps must be at least 1, got 0"),
        (("--threads", "0"), r"--threads must be from 1 to 1024, got 0"),
        (("--probe-every", "0"), r"--probe-every must be at least 1, got 0"),
        (("--retain-fraction", "1", "0"), r"--retain-fraction must be in \(0, 1\], got 0.0"),
        (("--random-percent", "5"), r"--task must be random where --random-percent is given, .*"),
        (
            ("--task", "random", "--random-percent", "0.01"),
            r"--random-percent must leave at least one of 1257 training samples to forget .*",
        ),
        (("--tune", "-1"), r"--tune must be at least 0, got -1"),
        (
            ("--tune", "2", "--first-seed", "104", "--seeds", "3"),
            r"--first-seed: --tune chooses the options on seeds .*, so .* 105, 106 would .*",
        ),
        (("--orthograd.lr", "nan"), r"--orthograd.lr must be positive and finite, got nan"),
        (("--orthograd.alpha", "2"), r"--orthograd.alpha must be in \[0, 1\], got 2.0"),
        (("--orthograd.rtol", "0"), r"--orthograd.rtol must be positive, got 0.0"),
        (("--graddiff.forget-weight", "-1"), r"--graddiff.forget-weight must be finite and .*"),
        (("--finetune.retain-batch", "0"), r"--finetune.retain-batch must be at least 1, got 0"),
        (("--config", "nowhere.yaml"), r"--config: cannot read nowhere.yaml: No such file .*"),
        (("--out", "/dev/null/run"), r"--out: cannot write to /dev/null/run.*: Not a directory"),
    ],
)
def test_nonsense_is_one_line_that_names_the_option(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert re.fullmatch(message, fails(capsys, *DIGITS, *arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_is_not_one_names_file_and_key(capsys, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("orthograd: {alhpa: 1}\n")
    line = fails(capsys, *DIGITS, "--config", path)
    assert line.startswith(f"--config {path}: orthograd.alhpa is not an option; there are steps")


def test_unknown_jobs_and_options_end_with_code_2(capsys):
    known = "no job named music; there are digits and facts and images and speech and text"
    assert known in fails(capsys, "unlearn", "music")
    with pytest.raises(SystemExit) as caught:
        main([*DIGITS, "--sedes", "3"])
    assert caught.value.code == 2
    assert "--sedes" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path):
    """Files may not grow past 400 kB: a model's 500 kB no longer fit."""
    limit = 400_000
    process = gradsurgery(
        *(*DIGITS, *TINY, "--checkpoint-every=99", "--out=run"),
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 2
    assert re.fullmatch(
        r"gradsurgery: error: --out: cannot write to run.*: File too large", process.stderr.strip()
    )
    assert not list((tmp_path / "run/models").iterdir())


def test_divergence_stops_with_one_line(tmp_path, capsys):
    options = ("--method=neggrad", "--neggrad.lr=1e30", "--neggrad.optimizer=sgd")
    line = fails(capsys, *DIGITS, *TINY, *options, "--out", tmp_path / "run", code=1)
    assert re.match(r"seed 0, neggrad: .* at step \d+ of NegGrad: lower the learning rate", line)
    assert f"The last good checkpoint is kept in {tmp_path}/run" in line


def test_an_interrupt_ends_with_130_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "log", pressed)
        line = fails(
            capsys, *DIGITS, *TINY, "--method=neggrad", "--out", tmp_path / "run", code=130
        )
    assert line == (
        f"interrupted; to continue: gradsurgery unlearn digits --config {tmp_path}/run/config.yaml "
        f"--out {tmp_path}/run --resume auto"
    )
    monkeypatch.setattr(RunDirectory, "require_finished", pressed)
    assert fails(capsys, "report", tmp_path / "run", code=130) == "interrupted"


def test_missing_extras_are_one_line(tmp_path):
    """As on a machine with torch alone: every optional package refuses to be imported."""
    code = (
        "import sys\n"
        "for name in ('tyro', 'sklearn', 'yaml', 'rich', 'matplotlib', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from gradsurgery.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    for arguments, wanted in ((DIGITS, 2), (("doctor",), 0)):
        process = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert process.returncode == wanted, process.stderr
        assert "Traceback" not in process.stderr
        if arguments == DIGITS:
            (line,) = process.stderr.strip().splitlines()
            assert 'pip install "gradsurgery[cli,jobs]"' in line and "tyro" in line


def test_report_is_written_anew_and_stands_alone(finished, capsys):
    report = finished.path / "report.html"
    before = report.read_text()
    report.unlink()
    main(["report", str(finished.path)])
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"report {report}"
    assert "comes closest to Retrain" in out
    page = report.read_text()
    assert page == before
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|<script|<link""", page)


def test_reports_of_runs_before_there_were_so_many_options_and_metrics(finished, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(finished.path, old)
    config = yaml.safe_load((old / "config.yaml").read_text())
    few = ("task", "method", "seeds", "training", "orthograd", "graddiff", "neggrad", "finetune")
    (old / "config.yaml").write_text(yaml.safe_dump({key: config[key] for key in few}))
    summary = json.loads((old / "summary.json").read_text())
    environment = json.loads((old / "env.json").read_text())
    del summary["checksum"], environment["checksum"]  # there were none
    (old / "env.json").write_text(json.dumps(environment))
    known = ("forget", "repaired", "retain", "test", "mia", "uis", "seconds", "steps")
    for column in summary["columns"].values():
        for key in list(column):
            if key.removeprefix("gap_") not in (*known, "mean"):
                del column[key]
    (old / "summary.json").write_text(json.dumps(summary))
    main(["report", str(old)])
    assert "is of a version that kept no checksums" in capsys.readouterr().err
    assert "comes closest to Retrain" in (old / "report.html").read_text()
    main(["compare", str(old), str(finished.path)])
    assert re.search("^OrthoGrad ", capsys.readouterr().out, re.MULTILINE)


def test_report_says_verdict_first_and_settings_last(finished):
    page = (finished.path / "report.html").read_text()
    order = [
        "comes closest to Retrain",
        "The numbers",
        "Forgetting against keeping",
        "Over the steps",
        "Losses of the forget set",
        "Inside OrthoGrad",
        "<h2>Cost",
        "The images are real",
        "no certified deletion",
        "Settings",
    ]
    places = [page.index(text) for text in order]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "path,message",
    [("nowhere", "RUN: nowhere is not a finished run"), (".", "RUN: . is not a finished run")],
)
def test_report_names_what_is_no_run(path, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fails(capsys, "report", path).startswith(message)


def test_doctor_reports(capsys):
    main(["doctor"])
    assert "torch" in capsys.readouterr().out


def test_retrain_alone_is_a_run(tmp_path):
    out = tmp_path / "run"
    options = ("--method=retrain", "--seeds=1", "--task=class", "--forget-class=8", f"--out={out}")
    main([*DIGITS, "--training.steps=20", "--threads=1", *options])
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == ["retrain"]
    assert "there is no unlearning method to judge" in (out / "report.html").read_text()
    assert "digit 8" in (out / "model_card.md").read_text()


def test_bars_and_a_drawn_table_on_a_terminal(monkeypatch, capsys):
    """Standard output that says it is a terminal gets rich's output."""
    assert isinstance(make_progress(), PlainProgress)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = make_progress()
    assert isinstance(progress, RichProgress)
    with progress.stage("seed 0  orthograd", 10, 0) as advance:
        advance(10)
    once = {"mean": 0.5, "std": None, "values": [0.5]}
    column = {"forget": once, "gap_mean": once, "seconds": once}
    names = ("original", "retrain", "ltu@0.1")
    columns = dict.fromkeys(names, column)
    print_summary({"job": "digits", "task": "class", "seeds": [0], "columns": columns})
    out = capsys.readouterr().out
    for text in ("With 10 % of the retain set, LTU ends 50.0 points", "Original", "Retrain"):
        assert text in out
