"""The run directory under kills, full disks and company."""

import json
import os

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.directory import (
    RunDirectory,
    fingerprint,
    new_directory,
    numbered,
    write_atomic,
)

STAGE = (0, "neggrad")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_line_cut_short_is_left_out(tmp_path):
    with RunDirectory(tmp_path) as directory:
        directory.log(STAGE, {"step": 1})
        directory.log(STAGE, {"step": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"seed": 0, "met')
    assert [record["step"] for record in RunDirectory(tmp_path).records()] == [1, 2]


def test_rewinding_drops_what_will_be_done_again(tmp_path):
    with RunDirectory(tmp_path) as directory:
        for stage in ((0, "original"), STAGE):
            for step in range(5):
                directory.log(stage, {"step": step})
            if stage != STAGE:
                directory.finish(stage, torch.nn.Linear(2, 2), {})
        directory.save_checkpoint(STAGE, {"step": 2})
        directory.log((1, "original"), {"step": 0})
    with RunDirectory(tmp_path) as directory:
        directory.rewind()
        kept = [(r["method"], r["step"]) for r in directory.records()]
    assert kept == [("original", step) for step in range(5)] + [("neggrad", s) for s in range(3)]


def test_a_checkpoint_is_for_its_own_stage(tmp_path):
    with RunDirectory(tmp_path) as directory:
        directory.save_checkpoint(STAGE, {"step": 2})
        assert directory.checkpoint(STAGE) == {"step": 2}
        assert directory.checkpoint((1, "neggrad")) is None


def test_two_processes_cannot_share_a_run(tmp_path):
    with RunDirectory(tmp_path), pytest.raises(InputError, match="another process is working in"):
        RunDirectory(tmp_path).__enter__()
    with RunDirectory(tmp_path):
        pass


def test_models_come_back(tmp_path):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with RunDirectory(tmp_path) as directory:
        directory.finish(STAGE, model, {"metrics": {}})
        directory.load_model(other, STAGE)
        assert directory.result(STAGE) == {"seed": 0, "method": "neggrad", "metrics": {}}
    assert torch.equal(model.weight, other.weight)


def test_numbers_of_new_directories_go_up(tmp_path):
    assert new_directory(tmp_path, "digits-class") == tmp_path / "digits-class-1"
    for name in ("digits-class-1", "digits-class-12", "digits-class-x", "digits-class-old-3"):
        (tmp_path / name).mkdir()
    assert new_directory(tmp_path, "digits-class") == tmp_path / "digits-class-13"
    assert [p.name for p in numbered(tmp_path, "digits-class")] == [
        "digits-class-12",
        "digits-class-1",
    ]


def test_fingerprint_is_of_the_set():
    """printf '3,7,20' | sha256sum, whatever the order."""
    expected = "426de47cc66410340490d6f0a5156b9d7526536337ea7304fcb598ecb939e02c"
    assert fingerprint([20, 3, 7]) == expected
    assert fingerprint([3, 7, 20]) == expected
    assert fingerprint([3, 7, 21]) != expected


def test_numbers_that_are_none_are_refused(tmp_path):
    with RunDirectory(tmp_path) as directory, pytest.raises(ValueError, match="JSON"):
        directory.log(STAGE, {"loss": float("nan")})
    assert json.dumps(list(RunDirectory(tmp_path).records())) == "[]"
