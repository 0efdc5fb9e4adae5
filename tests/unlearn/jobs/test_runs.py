"""Several unlearning runs of one original: what differs, and what numbers are means over."""

import json

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.base import Variant
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN
from gradsurgery.unlearn.jobs.directory import RunDirectory
from tests.unlearn.tiny import finished, tiny


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    path = tmp_path_factory.mktemp("twice") / "run"
    slower = [Variant("neggrad", 1.0, "slower", {"lr": 1e-6})]
    return path, finished(path, tiny("random", ("neggrad",), runs=2), slower)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    path = tmp_path_factory.mktemp("once") / "run"
    return path, finished(path, tiny("random", ("neggrad",)))


def weights(path, name):
    model = DigitsCNN()
    RunDirectory(path).load_model(model, (0, name))
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def metrics(path, name):
    found = RunDirectory(path).result((0, name))
    assert found is not None
    return found["metrics"]


def test_the_first_is_the_run_that_one_alone_is_and_the_second_another(twice, once):
    first, second = (weights(twice[0], name) for name in ("neggrad", "neggrad#2"))
    assert torch.equal(first, weights(once[0], "neggrad"))
    assert not torch.equal(first, second)
    lines = [json.loads(x) for x in (twice[0] / "metrics.jsonl").read_text().splitlines()]
    one, two = ([x for x in lines if x["method"] == name] for name in ("neggrad", "neggrad#2"))
    assert one[0]["forget_accuracy"] == two[0]["forget_accuracy"]  # of one original
    assert one[1]["forget_loss_batch"] != two[1]["forget_loss_batch"]  # in another order


def test_a_seed_has_the_mean_of_its_runs(twice, once):
    path, summary = twice
    assert list(summary["columns"]) == ["original", "retrain", "neggrad", "neggrad+slower"]
    assert summary["runs"] == 2 and "runs" not in once[1]
    runs = [metrics(path, name) for name in ("neggrad", "neggrad#2")]
    wanted = metrics(path, "retrain")
    column = summary["columns"]["neggrad"]
    for key in ("forget", "test", "mia", "kl_forget"):
        assert column[key]["values"] == [pytest.approx((runs[0][key] + runs[1][key]) / 2)]
    gaps = [abs(each["mia"] - wanted["mia"]) for each in runs]  # not the gap of the mean
    assert column["gap_mia"]["values"] == [pytest.approx(sum(gaps) / 2)]
    original, alone = (each["columns"]["original"] for each in (summary, once[1]))
    assert original["forget"] == alone["forget"] and original["gap_mean"] == alone["gap_mean"]


def test_what_runs_besides_runs_once(twice):
    directory = RunDirectory(twice[0])
    assert directory.result((0, "neggrad+slower")) is not None
    assert directory.result((0, "neggrad+slower#2")) is None


def test_shadows_are_of_the_first_run(tmp_path, once):
    shadows = finished(tmp_path / "run", tiny("random", ("neggrad",), runs=2, shadows=2))
    assert "ulira" in shadows["columns"]["neggrad"]
    names = [path.name for path in (tmp_path / "run/shadows").iterdir()]
    assert names and not any("#" in name for name in names)


@pytest.mark.parametrize("runs", [0, 1001, -1])
def test_how_many_is_checked(runs):
    with pytest.raises(InputError, match="--runs must be from 1 to 1000"):
        tiny(runs=runs).check()
