"""Options, paths, checksums and states: whatever they hold, right or one short line."""

import os

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs import files, tensors
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.files import DamageError, parse_json
from gradsurgery.unlearn.jobs.progress import PlainProgress
from gradsurgery.unlearn.jobs.shapes import SUMMARY, expect
from gradsurgery.unlearn.jobs.yaml import parse_yaml, read_yaml
from tests.unlearn.broken import refused

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "content,message",
    [
        (BOMB, "has an alias"),
        ("a: &a [*a]", "has an alias"),
        ("seeds: 1\nseeds: 2\n", "has a name twice"),
        ("a: " + "[" * 5000, "is nested too deeply"),
        ("seeds: " + "1" * 6000, "is not YAML"),
        ("seeds: !!int ''", "is not YAML"),
        ("seeds: 2001-99-99", "is not YAML"),
        ("seeds: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("a: b\n" * 60_000, "has 300000 bytes, more than"),
        ("\0", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("task: [class]", "--task must be one of"),
        ("task: {a: 1}", "--task must be one of"),
        ("1: 2", "1 is not an option"),
        ("orthograd: [1]", "orthograd must be a section"),
        ("orthograd: {lr: [[1]]}", "orthograd.lr must be of type float"),
        ("orthograd: {lr: .nan}", "--orthograd.lr must be positive"),
        (f"orthograd: {{lr: {10**400}}}", "orthograd.lr must be of type float"),
        ("seeds: [1, 2]", "seeds must be of type int"),
        ("seeds: 1000000000000", "--seeds must be at most"),
        ("tune: 1000000000000", "--tune must be at most"),
        ("first_seed: " + "9" * 100, "--first-seed must be"),
        ("method: {a: b}", "method must be one of"),
        ("method: " + "m" * 100_000, "method must be one of"),
        ("m" * 50_000 + ": 1", "is not YAML"),
        ("? " + "m" * 50_000 + "\n: 1", "is not an option"),
        ('"\\e[31m": 1', "is not an option"),
    ],
)
def test_any_yaml_is_options_or_one_line(content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "options.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in refused(capsys, ["unlearn", "digits", "--config", str(file)])
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("option", ["--config", "--out"])
@pytest.mark.parametrize("path", ["a" * 5000, "a/" * 3000 + "b", "a\0b", "\udcff" * 300])
def test_paths_no_file_can_have_are_one_line(option, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert option in refused(capsys, ["unlearn", "digits", option, path])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("path", ["a" * 5000, "a\0b"])
def test_reports_of_such_paths_are_one_line(name, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "is not a finished run" in refused(capsys, [name, path])


# -- the parts


def test_any_byte_changed_is_found():
    for name, data in (
        ("a.json", files.to_json({"loss": 0.5, "checksum of": "b" * 64})),
        ("a.yaml", f"seeds: 2\n# checksum: {files.BLANK}\n".encode()),
    ):
        sealed = files.seal(name, data)
        files.check(name, sealed)
        for at in range(len(sealed)):
            for bit in range(8):
                changed = sealed[:at] + bytes([sealed[at] ^ 1 << bit]) + sealed[at + 1 :]
                with pytest.raises(DamageError):
                    files.check(name, changed)
        for length in range(len(sealed)):
            with pytest.raises(DamageError):
                files.check(name, sealed[:length])
        with pytest.raises(DamageError):
            files.check(f"b{name}", sealed)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b'{"a": "\\ud800"}',
        b"\xff",
        b"",
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
)
def test_what_is_hardly_json_is_none(data):
    with pytest.raises(DamageError, match=r"^it is n"):
        parse_json(data)


def test_messages_stay_short_whatever_the_value(tmp_path):
    nested: object = []
    for _ in range(40):
        nested = [nested, nested]
    assert len(brief(nested)) < 130 and len(brief("x" * 10**6)) < 130
    assert len(brief({"x" * 9000: nested})) < 130
    assert len(show("x" * 10**6)) <= 200
    with pytest.raises(DamageError) as caught:
        expect({"job": nested}, SUMMARY)
    assert len(str(caught.value)) < 300
    with pytest.raises(InputError) as refused_by:
        read_yaml(tmp_path / ("n" * 4000))
    assert len(str(refused_by.value)) < 400


def test_a_state_comes_back_as_it_was():
    state = {
        "optimizer": {"state": {0: {"exp_avg": torch.randn(3), "step": torch.tensor(4.0)}}},
        "betas": (0.9, 0.999),
        "rates": [1e-300, float("inf"), 0.1 + 0.2, -0.0],
        "none": None,
        "stopped": False,
        "rng": torch.get_rng_state(),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3, dtype=torch.float64),
        "text": 'a "checksum":"' + "0" * 64 + '" of none',
    }
    data, _ = tensors.to_bytes("x", *tensors.pack(state))
    end = 8 + int.from_bytes(data[:8], "little")
    assert files.check("x", data, end)
    found, text = tensors.pack(state)
    again = tensors.unpack(found, text)
    assert str(again) == str(state) and type(again["betas"]) is tuple
    with pytest.raises(InputError, match="got set"):
        tensors.pack({"a": {1, 2}})


def test_aliases_are_refused_before_anything_is_made_of_them():
    with pytest.raises(DamageError, match="has an alias"):
        parse_yaml(BOMB.encode())


def test_left_over_parts_of_files_are_removed(tmp_path):
    for folder in (tmp_path, tmp_path / "stages"):
        folder.mkdir(exist_ok=True)
        (folder / f".{'0' * 16}.partial").write_text("half")
        (folder / ".mine").write_text("kept")
    with RunDirectory(tmp_path):
        pass
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {".lock", ".mine", "stages/.mine"}
    assert os.listdir(tmp_path / "models") == []


def test_lines_of_progress_are_one_line_each(capsys):
    PlainProgress().say("two\nlines \x1b[31m")
    assert capsys.readouterr().out == "two\\nlines \\x1b[31m\n"
