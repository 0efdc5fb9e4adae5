"""Damaged files of a run: one line that names the file, never other numbers, never a traceback."""

import json
import os
import re

import pytest

from gradsurgery.cli import main
from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs import files, tensors
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN
from gradsurgery.unlearn.jobs.directory import CHECKPOINT, RunDirectory
from tests.unlearn.broken import Killed, command, numbers, refused


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def other_digit(data):
    at = re.search(rb"[0-8]", data).start()
    return data[:at] + bytes([data[at] + 1]) + data[at + 1 :]


ANY = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "a bit at the start": lambda data: flipped(data, 0),
    "a bit in the middle": lambda data: flipped(data, len(data) // 2),
    "a bit near the end": lambda data: flipped(data, len(data) - 20),
    "zeros": lambda data: bytes(len(data)),
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "more": lambda data: data + b"more\n",
    "deep": lambda data: b"[" * 50_000,
    "another value": lambda data: b"[1, 2]\n",
    "a large number": lambda data: b'{"seed": ' + b"1" * 6000 + b"}\n",
}
TEXT = {"a digit": other_digit, "a line twice": lambda data: data.splitlines(True)[0] + data}
READ = [
    ("report", "finished", "summary.json"),
    ("report", "finished", "config.yaml"),
    ("report", "finished", "env.json"),
    ("report", "finished", "stages/seed0-neggrad.json"),
    ("compare", "finished", "summary.json"),
    ("compare", "finished", "config.yaml"),
    ("resume", "killed", "config.yaml"),
    ("resume", "killed", "stages/seed0-original.json"),
    ("resume", "killed", CHECKPOINT),
]


@pytest.mark.parametrize("name,kind,file", READ)
def test_damage_is_one_line_that_names_the_file(name, kind, file, copied, kinds, quick, capsys):
    path = copied(kind)
    data = (path / file).read_bytes()
    damages = ANY if file.endswith(".safetensors") else {**ANY, **TEXT}
    for damage, change in damages.items():
        (path / file).write_bytes(change(data))
        line = refused(capsys, command(name, path, kinds))
        assert str(path / file) in line, damage
    (path / file).write_bytes(data)


@pytest.mark.parametrize("at", [0, 7, 20, 200, 5_000, -1])
def test_a_bit_of_a_model_is_noticed_when_it_is_used(at, copied, kinds, quick, capsys):
    path = copied("killed")
    file = path / "models/seed0-original.safetensors"
    data = file.read_bytes()
    file.write_bytes(flipped(data, at % len(data)))
    line = refused(capsys, command("resume", path, kinds))
    assert str(file) in line and "delete stages/seed0-original.json" in line


def test_a_bit_of_a_model_of_a_finished_run_is_noticed(copied, kinds, quick, capsys):
    """No later step reads it, but it is what the run was for."""
    path = copied("finished")
    file = path / "models/seed0-retrain.safetensors"
    file.write_bytes(flipped(file.read_bytes(), 40_000))
    assert f"{file} is damaged" in refused(capsys, command("resume", path, kinds))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 6, 9])
def test_a_kill_between_any_two_files_loses_nothing(
    count, before, copied, kinds, quick, monkeypatch
):
    """Of environment, metrics, checkpoint, model, stage, measured stage, summary, model, card."""
    path, replaced, left = copied("killed"), os.replace, [count]
    monkeypatch.setattr("gradsurgery.unlearn.report.render.render", lambda **_: "page")

    def stays(*_, **__):
        raise OSError

    def dies(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 and before:
            patched.setattr(os, "unlink", stays)  # a kill tidies nothing up
            raise Killed
        replaced(*arguments, **options)
        if left[0] == 0:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dies)
        with pytest.raises(Killed):
            main(command("resume", path, kinds))
    main(command("resume", path, kinds))
    assert numbers(path) == numbers(kinds / "finished")
    assert not any(files.PARTIAL.fullmatch(file.name) for file in path.rglob("*"))


def test_what_the_line_says_to_delete_mends_the_run(copied, kinds, quick, capsys):
    """And the numbers are those of a run that nothing happened to."""
    path = copied("killed")
    for file in ("models/seed0-original.safetensors", "stages/seed0-retrain.json", CHECKPOINT):
        (path / file).write_bytes(other_digit((path / file).read_bytes()))
    arguments = command("resume", path, kinds)
    assert str(path / CHECKPOINT) in refused(capsys, arguments)
    (path / CHECKPOINT).unlink()
    assert "stages/seed0-retrain.json is damaged" in refused(capsys, arguments)
    (path / "stages/seed0-retrain.json").unlink()
    assert "models/seed0-original.safetensors is damaged" in refused(capsys, arguments)
    (path / "stages/seed0-original.json").unlink()
    main(arguments)
    assert numbers(path) == numbers(kinds / "finished")


def test_a_killed_run_goes_on_to_the_same_numbers(copied, kinds, quick):
    path = copied("killed")
    main(command("resume", path, kinds))
    assert numbers(path) == numbers(kinds / "finished")
    assert not (path / CHECKPOINT).exists()


@pytest.mark.parametrize(
    "file", ["stages/seed0-original.json", "models/seed0-original.safetensors"]
)
def test_a_file_in_the_place_of_another_is_noticed(file, copied, kinds, quick, capsys):
    path = copied("killed")
    (path / file).write_bytes((path / file.replace("original", "retrain")).read_bytes())
    assert str(path / file) in refused(capsys, command("resume", path, kinds))


def test_a_model_of_another_run_is_noticed(copied, kinds, quick, capsys):
    """Its own checksum is right, but it is not the one the stage was finished with."""
    path = copied("killed")
    RunDirectory(path).save_model(DigitsCNN(), "models/seed0-original.safetensors")
    line = refused(capsys, command("resume", path, kinds))
    assert "models/seed0-original.safetensors is damaged: it is not the file its stage" in line


LINES = {
    "a digit": other_digit,
    "a line less": lambda data: b"".join(data.splitlines(True)[1:]),
    "a line twice": lambda data: data.splitlines(True)[0] + data,
    "two lines swapped": lambda data: b"".join(
        [data.splitlines(True)[1], data.splitlines(True)[0], *data.splitlines(True)[2:]]
    ),
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "not UTF-8": lambda data: data.replace(b"seed", b"s\xffed", 1),
    "a zero byte": lambda data: data.replace(b"seed", b"s\0ed", 1),
    "deep": lambda data: b"[" * 50_000 + b"\n",
}


@pytest.mark.parametrize("damage", LINES)
@pytest.mark.parametrize("name,kind", [("report", "finished"), ("resume", "killed")])
def test_no_step_of_a_finished_stage_is_missing(name, kind, damage, copied, kinds, quick, capsys):
    path = copied(kind)
    file = path / "metrics.jsonl"
    file.write_bytes(LINES[damage](file.read_bytes()))
    line = refused(capsys, command(name, path, kinds))
    assert f"{file} is damaged" in line and "than stages/seed0-" in line


def test_lines_before_a_checkpoint_are_those_it_was_made_after(copied, kinds, quick, capsys):
    path = copied("killed")
    lines = (path / "metrics.jsonl").read_bytes().splitlines(True)
    at = next(i for i, line in enumerate(lines) if b'"neggrad", "step": 2' in line)
    (path / "metrics.jsonl").write_bytes(b"".join(lines[:at] + lines[at + 1 :]))
    line = refused(capsys, command("resume", path, kinds))
    assert "metrics.jsonl is damaged" in line and CHECKPOINT in line


def test_what_a_loss_of_power_leaves_at_the_end_is_dropped(copied, kinds, quick):
    """Zeros, half a line, a line of a step past the checkpoint: none of them counts."""
    path = copied("killed")
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(bytes(4096) + b'\n{"seed": 0, "method": "neggrad", "step": 9}\n{"seed": 0, "m')
    main(command("resume", path, kinds))
    assert numbers(path) == numbers(kinds / "finished")
    steps = [r["step"] for r in RunDirectory(path).records() if r["method"] == "neggrad"]
    assert steps == list(range(7))


def test_a_damaged_line_of_a_search_says_where_to_cut(tmp_path):
    with RunDirectory(tmp_path) as directory:
        for gap in (0.5, 0.25, 0.125):
            directory.add_trial({"method": "neggrad", "options": {}, "gap": gap})
        assert [trial["gap"] for trial in directory.rewind_tuning()] == [0.5, 0.25, 0.125]
        directory.add_trial({"method": "neggrad", "options": {}, "gap": 0.0})
    file = tmp_path / "tuning.jsonl"
    first, second, *rest = file.read_bytes().splitlines(True)
    for lines in ([first, second.replace(b"25", b"26"), *rest], [first, *rest], [second, *rest]):
        file.write_bytes(b"".join(lines))
        number = 1 if lines[0] is second else 2
        with pytest.raises(InputError, match=f"tuning.jsonl is damaged: line {number}: .* delete"):
            RunDirectory(tmp_path).tuning()
    file.write_bytes(first + second + b'{"half')  # as a kill leaves it
    with RunDirectory(tmp_path) as directory:
        assert [trial["gap"] for trial in directory.rewind_tuning()] == [0.5, 0.25]
        directory.add_trial({"method": "neggrad", "options": {}, "gap": 0.0})
    assert [trial["gap"] for trial in RunDirectory(tmp_path).tuning()] == [0.5, 0.25, 0.0]


WRONG = [
    (("seeds",), "<b>"),
    (("seeds",), []),
    (("seeds", 0), True),
    (("task",), "speech"),
    (("task",), ["class"]),
    (("job",), None),
    (("forget_sets", "0", "sha256"), "<script>alert(1)</script>"),
    (("forget_sets", "0", "samples"), "many"),
    (("forget_sets",), {}),
    (("forget_sets", "0"), {"samples": 3, "sha256": "0" * 64}),
    (("columns",), {}),
    (("columns", "retrain"), {}),
    (("columns", "neggrad", "gap_mean"), 0.5),
    (("columns", "neggrad", "gap_mean", "mean"), "<b>0</b>"),
    (("columns", "neggrad", "gap_mean", "values"), []),
    (("columns", "neggrad", "test", "std"), 1e300),
    (("columns", "neggrad", "test", "values", 0), "1"),
    (("columns", "retrain", "seconds", "mean"), 0),
    (("columns", "neggrad@x"), {}),
]


@pytest.mark.parametrize("keys,value", WRONG)
@pytest.mark.parametrize("name", ["report", "compare"])
def test_wrong_types_with_a_right_checksum_are_named_too(
    name, keys, value, copied, kinds, quick, capsys
):
    path = copied("finished")
    content = json.loads((path / "summary.json").read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    del content["checksum"]
    RunDirectory(path).write_json("summary.json", content)
    line = refused(capsys, command(name, path, kinds))
    assert f"{path / 'summary.json'} is damaged" in line


@pytest.mark.parametrize(
    "change", [{"step": 10**9}, {"step": -1}, {"model": {}}, {"optimizer": 3}, {"rng": None}]
)
def test_a_state_that_no_trainer_has_is_named(change, copied, kinds, quick, capsys):
    path = copied("killed")
    found, text, _ = tensors.read(path, CHECKPOINT)
    content = tensors.unpack(found, text)
    content["trainer"] |= change
    data, _ = tensors.to_bytes(CHECKPOINT, *tensors.pack(content))
    (path / CHECKPOINT).write_bytes(data)
    line = refused(capsys, command("resume", path, kinds))
    assert CHECKPOINT in line or "metrics.jsonl" in line  # it has no lines of such a step


def test_a_missing_stage_is_named(copied, kinds, quick, capsys):
    path = copied("finished")
    (path / "stages/seed0-neggrad.json").unlink()
    assert "has no stages/seed0-neggrad.json" in refused(capsys, command("report", path, kinds))


def test_a_missing_model_is_named_with_its_stage(copied, kinds, quick, capsys):
    path = copied("killed")
    (path / "models/seed0-original.safetensors").unlink()
    line = refused(capsys, command("resume", path, kinds))
    assert "cannot read" in line and "delete stages/seed0-original.json" in line


def test_a_run_of_before_there_were_checksums_is_shown_but_not_continued(
    copied, kinds, quick, capsys
):
    path = copied("finished")
    (path / "config.yaml").write_text((kinds / "options.yaml").read_text().split("# ")[0])
    for name in ("summary.json", "env.json"):
        content = json.loads((path / name).read_text())
        del content["checksum"]
        (path / name).write_text(json.dumps(content))
    main(["report", str(path)])
    assert "of a version that kept no checksums" in capsys.readouterr().err
    line = refused(capsys, command("resume", path, kinds))
    assert "cannot be continued; name another directory" in line


def test_a_file_that_lost_its_checksum_is_damaged(copied, kinds, quick, capsys):
    """A bit in the name of the field must not turn checking off."""
    path = copied("finished")
    for file in ("summary.json", "config.yaml"):
        data = (path / file).read_bytes()
        (path / file).write_bytes(data.replace(b"checksum", b"checksun"))
        assert "it has no checksum" in refused(capsys, command("report", path, kinds))
        (path / file).write_bytes(data)
