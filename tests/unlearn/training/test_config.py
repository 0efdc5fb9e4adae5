"""Options to YAML and back."""

import math

import numpy as np
import pytest
import yaml

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.digits.job import DigitsConfig
from gradsurgery.unlearn.jobs.yaml import read_yaml, to_yaml
from gradsurgery.unlearn.training.config import differences, to_dict, update
from tests.unlearn.tiny import JOB


@pytest.mark.parametrize("task", JOB.tasks)
def test_yaml_round_trip(task):
    config = JOB.defaults(task)
    config.neggrad.forget_ceiling = math.inf
    config.orthograd.rtol = 1e-7
    config.method = ("orthograd", "neggrad")
    assert update(DigitsConfig(), yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("task", JOB.tasks)
def test_chosen_options_are_valid(task):
    JOB.defaults(task).check()


def test_update_leaves_the_original_alone():
    config = DigitsConfig()
    changed = update(config, {"orthograd": {"lr": 0.5}})
    assert changed.orthograd.lr == 0.5
    assert config.orthograd.lr == DigitsConfig().orthograd.lr


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"tsak": "class"}, "tsak is not an option; there are task, method"),
        ({"orthograd": {"alhpa": 1}}, "orthograd.alhpa is not an option"),
        ({"orthograd": 3}, "orthograd must be a section of options, got 3"),
        ({"seeds": "many"}, "seeds must be of type int, got 'many'"),
        ({"seeds": True}, "seeds must be of type int, got True"),
        ({"seeds": 1.5}, "seeds must be of type int, got 1.5"),
        ({"seeds": None}, "seeds must be of type int, got None"),
        ({"task": "klass"}, "task must be one of mislabeled, class, random, got 'klass'"),
        ({"method": ["orthograd", "magic"]}, "method must be one of .*, got 'magic'"),
        ({"orthograd": {"lr": "fast"}}, "orthograd.lr must be of type float, got 'fast'"),
        ({"orthograd": {"lr": True}}, "orthograd.lr must be of type float, got True"),
        ({"orthograd": {"lr": 10**400}}, "orthograd.lr must be of type float, got 1000"),
        ({"seeds": "3"}, "seeds must be of type int, got '3'"),
        ({"method": [["orthograd"]]}, r"method must be one of .*, got \['orthograd'\]"),
    ],
)
def test_nonsense_names_its_key(changes, message):
    with pytest.raises(InputError, match=message):
        update(DigitsConfig(), changes)


def test_numbers_as_people_write_them():
    """1e-3 is a string to YAML 1.1, 1 an integer, and one method needs no list."""
    text = "method: orthograd\northograd: {lr: 1e-3, alpha: 1, rtol: null, forget_ceiling: .inf}"
    config = update(DigitsConfig(), yaml.safe_load(text))
    assert config.method == ("orthograd",)
    assert (config.orthograd.lr, config.orthograd.alpha) == (1e-3, 1.0)
    assert config.orthograd.rtol is None and config.orthograd.forget_ceiling == math.inf


def test_numbers_that_only_python_reads():
    """Neither YAML 1.1 nor JSON has +1e-3, .5e3 or 1_000e-1."""
    text = "neggrad: {lr: +1e-3}\northograd: {alpha: .5e3}\nretain_fraction: [1_000e-3, .5]"
    config = update(DigitsConfig(), yaml.safe_load(text))
    assert (config.neggrad.lr, config.orthograd.alpha) == (1e-3, 500.0)
    assert config.retain_fraction == (1.0, 0.5)


def test_values_of_libraries_become_plain():
    """NumPy's floats and strings are Python's by inheritance, and YAML cannot write them."""
    given = {"lr": np.float64(0.25), "rtol": np.float64(1e-7), "optimizer": np.str_("sgd")}
    changed = update(DigitsConfig(), {"orthograd": given, "retain_fraction": np.float64(0.5)})
    assert changed == update(DigitsConfig(), yaml.safe_load(to_yaml(changed)))
    section = changed.orthograd
    assert (section.lr, section.rtol, section.optimizer) == (0.25, 1e-7, "sgd")
    assert changed.retain_fraction == (0.5,)


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "--config: cannot read .*missing.yaml: No such file"),
        ("a: [1", "--config: .* is not YAML: "),
        ("- a\n- b", "--config: .* must hold options as `name: value` lines"),
        ("", "must hold options"),
    ],
)
def test_unreadable_files_are_named(tmp_path, content, message):
    path = tmp_path / "missing.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_yaml(path)


def test_differences_name_both_sides():
    old = to_dict(DigitsConfig())
    new = to_dict(update(DigitsConfig(), {"seeds": 9, "neggrad": {"lr": 0.25}}))
    before = DigitsConfig()
    assert differences(old, new) == [
        f"seeds was {before.seeds}, is 9",
        f"neggrad.lr was {before.neggrad.lr}, is 0.25",
    ]
    assert differences(old, old) == []
