"""U-LiRA of the digits job: shadow models of the run's own kind."""

import json
from contextlib import nullcontext

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs import shadows
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN, load
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.pipeline import Run, reproducible
from gradsurgery.unlearn.metrics.klom import kloms
from gradsurgery.unlearn.metrics.ulira import logit_confidence, u_lira
from gradsurgery.unlearn.report.render import not_measured
from gradsurgery.unlearn.training.seeds import derived
from tests.unlearn.tiny import JOB, finished, tiny, trainer


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    path = tmp_path_factory.mktemp("attacked") / "run"
    config = tiny("random", ("neggrad",), shadows=2, retain_fraction=[1.0, 0.1])
    return path, config, finished(path, config)


def test_every_unlearned_model_is_attacked_and_no_other(attacked):
    path, _, summary = attacked
    columns = summary["columns"]
    assert [name for name in columns if "ulira" in columns[name]] == ["neggrad", "neggrad@0.1"]
    for name in ("neggrad", "neggrad@0.1"):
        assert 0 <= columns[name]["ulira"]["mean"] <= 1
        assert 0 <= columns[name]["ulira_auc"]["mean"] <= 1
    page = (path / "report.html").read_text()
    assert "AUC of U-LiRA" in page and "shadow models, U-LiRA" not in page
    assert "shadow models, U-LiRA" in not_measured([{"columns": {"neggrad": {}}}])


def test_it_is_the_attack_on_models_trained_alike(attacked):
    """The numbers of a run again, from trainers alone."""
    _, config, summary = attacked
    data = load("random", 0)

    def confidences(seed, name):
        model = DigitsCNN()
        if name == "neggrad":
            trainer(config, data, seed, "original", model).run()
        trainer(config, data, seed, name, model).run()
        with torch.no_grad():
            return logit_confidence(model.eval()(data.forget["image"]), data.forget["label"])

    with reproducible(1):
        found = {
            name: [confidences(derived(0, "shadow", k), name) for k in range(2)]
            for name in ("neggrad", "retrain")
        }
        observed = torch.stack([confidences(0, "neggrad"), confidences(0, "retrain")])
    forgotten = torch.tensor([[True], [False]]).expand(observed.shape)
    both = torch.stack(found["neggrad"]), torch.stack(found["retrain"])
    exact = u_lira(*both, observed, forgotten)
    # the run's own models are of one more seed, on either side
    near = kloms(*(torch.cat([side, own[None]]) for side, own in zip(both, observed, strict=True)))
    exact |= {key.replace("normal", "normal_forget"): value for key, value in near.items()}
    assert {"klom_normal_forget", "klom_normal_forget_p95"} <= set(exact)
    assert {key: summary["columns"]["neggrad"][key]["mean"] for key in exact} == exact


def test_klom_is_of_every_set_and_of_doing_nothing_too(attacked):
    path, _, summary = attacked
    keys = [f"klom_normal_{side}" for side in ("forget", "retain", "test")]
    for name in ("original", "neggrad", "neggrad@0.1"):
        for key in keys:
            assert summary["columns"][name][key]["mean"] >= 0
            assert key + "_p95" in summary["columns"][name]
    assert not any(key.startswith("klom") for key in summary["columns"]["retrain"])
    # three models a side are too few for histograms
    assert "klom_forget" not in summary["columns"]["neggrad"]
    assert "KLoM of normal fits, forget set" in (path / "report.html").read_text()


def test_a_run_goes_on_with_the_shadows_it_has(attacked, monkeypatch):
    path, config, _ = attacked
    kept = {file.name: file.read_bytes() for file in (path / "shadows").iterdir()}
    assert sorted(name for name in kept if name.endswith(".safetensors")) == [
        "seed0-original-0.safetensors",
        "seed0-original-1.safetensors",
    ]
    before = json.loads((path / "stages/seed0-neggrad.json").read_text())
    monkeypatch.setattr(shadows, "_model", None)  # not one is made again
    with RunDirectory(path) as directory:
        again = shadows.compare(
            Run(JOB, config, directory, Silent()), load("random", 0), (0, "neggrad")
        )
    assert {"ulira", "ulira_auc", "klom_normal_forget", "klom_normal_test_p95"} <= set(again)
    assert again == {key: before["metrics"][key] for key in again}


class Silent:
    def say(self, text):
        pass

    def stage(self, label, total, done):
        return nullcontext(lambda step: None)


@pytest.mark.parametrize("count", [-1, 1, 1001])
def test_a_number_that_makes_no_spread_is_refused(count):
    with pytest.raises(InputError, match=f"shadows must be 0, or 2 to 1000, got {count}"):
        tiny(shadows=count).check()
