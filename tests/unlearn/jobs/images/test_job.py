"""The images job from end to end: every task, resumed, with a model and weights of one's own."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gradsurgery.cli import main
from gradsurgery.errors import InputError
from gradsurgery.unlearn.command import open_directory, parse
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.images.job import ImagesJob
from gradsurgery.unlearn.jobs.images.networks import network
from gradsurgery.unlearn.jobs.pipeline import Run
from gradsurgery.unlearn.jobs.progress import PlainProgress
from gradsurgery.unlearn.methods.retrain import reset_parameters
from gradsurgery.unlearn.report import compare
from tests.unlearn.broken import numbers
from tests.unlearn.jobs.images.made import arrays, finished, saved, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("data"))


def weights(path, seed=1):
    """A checkpoint of the small CNN for these images; its tensors."""
    torch.manual_seed(seed)
    found = network("cnn", 1, (8, 8), 3).state_dict()
    save_file(found, path)
    return found


def test_runs_of_other_seeds_go_into_one_table(tmp_path, data):
    paths = [tmp_path / "first", tmp_path / "later"]
    for seed, path in enumerate(paths):
        finished(path, tiny(data, first_seed=seed, second_retrain=False))
    (merged,) = compare.merge(compare.load(paths))
    assert merged["seeds"] == [0, 1]
    assert len(merged["columns"]["neggrad"]["gap_mean"]["values"]) == 2


@pytest.mark.parametrize("task", ["random", "class", "mislabeled", "confusion", "memorized"])
def test_every_task_ends_with_a_report(tmp_path, data, task):
    summary = finished(tmp_path / "run", tiny(data, task, percent=None))
    columns = summary["columns"]
    assert list(columns) == ["original", "retrain", "retrain+other seed", "neggrad"]
    assert ("repaired" in columns["neggrad"]) == (task in ("mislabeled", "confusion"))
    assert ("test_forgotten" in columns["neggrad"]) == (task == "class")
    assert 0 <= columns["neggrad"]["gap_mean"]["mean"] <= 1
    page = (tmp_path / "run/report.html").read_text()
    assert ImagesJob().texts(summary).title.replace("'", "&#39;") in page
    assert "made.npz" in page
    card = (tmp_path / "run/model_card.md").read_text()
    loading = card.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(loading.replace('"model.safetensors"', f'"{tmp_path}/run/model.safetensors"'), names)
    assert names["model"](torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_named_samples_are_forgotten(tmp_path, data):
    (tmp_path / "ids.txt").write_text("3\n7\n")
    summary = finished(tmp_path / "run", tiny(data, "ids", ids=str(tmp_path / "ids.txt")))
    assert summary["forget_sets"]["0"]["samples"] == 2
    assert summary["forget_sets"]["0"]["sha256"] == (
        "adc0d2b391a5218d93c900f87226ce222fca03d61ee5537620d45450d86a10ea"
    )


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(tmp_path, data, monkeypatch):
    config = tiny(data, checkpoint_every=2, neggrad={"steps": 6, "forget_batch": 8})
    finished(tmp_path / "whole", config)
    log = RunDirectory.log

    class Killed(BaseException):
        pass

    def dies(directory, stage, record):
        log(directory, stage, record)
        if (stage[1], record["step"]) == ("neggrad", 5):
            raise Killed

    monkeypatch.setattr(RunDirectory, "log", dies)
    with pytest.raises(Killed):
        finished(tmp_path / "killed", config)
    monkeypatch.undo()
    finished(tmp_path / "killed", config)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def test_a_run_is_not_continued_with_other_data(tmp_path):
    path = saved(tmp_path)
    config, job = tiny(path), ImagesJob()
    with RunDirectory(tmp_path / "run") as directory:
        open_directory(directory, config, job.facts(config))
        open_directory(directory, config, ImagesJob().facts(config))
        images, labels = arrays(seed=1)
        np.savez(path, images=images, labels=labels)
        with pytest.raises(InputError, match=r"started with other options: data.data_sha256 was"):
            open_directory(directory, config, ImagesJob().facts(config))


def test_a_run_is_not_continued_with_other_samples_to_forget(tmp_path, data):
    ids = tmp_path / "ids.txt"
    ids.write_text("3\n7\n")
    config = tiny(data, "ids", ids=str(ids))
    finished(tmp_path / "run", config)
    ids.write_text("7\n# the same\n3\n")
    finished(tmp_path / "run", config)
    ids.write_text("3\n8\n")
    with pytest.raises(InputError, match=r"started with other options: data\.forget_sha256 was"):
        finished(tmp_path / "run", config)


def test_a_summary_without_its_data_is_damaged(tmp_path, data, capsys):
    finished(tmp_path / "run", tiny(data))
    content = json.loads((tmp_path / "run/summary.json").read_text())
    del content["data"]["parameters"], content["checksum"]
    RunDirectory(tmp_path / "run").write_json("summary.json", content)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run")])
    assert "summary.json is damaged: data has no parameters" in capsys.readouterr().err


def test_a_checkpoint_is_the_original_as_it_is(tmp_path, data):
    found = weights(tmp_path / "given.safetensors")
    config = tiny(data, checkpoint=str(tmp_path / "given.safetensors"))
    summary = finished(tmp_path / "run", config)
    assert summary["columns"]["original"]["steps"]["mean"] == 0
    model = ImagesJob().model(config)
    RunDirectory(tmp_path / "run").load_model(model, (0, "original"))
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    RunDirectory(tmp_path / "run").load_model(model, (0, "retrain"))
    assert not torch.equal(model.get_parameter("head.3.weight"), found["head.3.weight"])
    assert "The original is a checkpoint" in (tmp_path / "run/report.html").read_text()


def test_retrain_does_not_begin_at_a_checkpoint_that_is_the_original(tmp_path, data):
    """It would know the forget set."""
    weights(tmp_path / "given.safetensors")
    config = tiny(data, checkpoint=str(tmp_path / "given.safetensors"))
    with RunDirectory(tmp_path / "run") as directory:
        run = Run(ImagesJob(), config, directory, PlainProgress())
        fresh = run.fresh(0, "retrain")
    found = load_file(tmp_path / "given.safetensors")
    assert not torch.equal(fresh.get_parameter("head.3.weight"), found["head.3.weight"])


def test_training_starts_at_a_checkpoint_where_that_is_asked_for(tmp_path, data):
    found = weights(tmp_path / "given.safetensors")
    start = {"checkpoint": str(tmp_path / "given.safetensors"), "checkpoint_is": "start"}
    config = tiny(data, "mislabeled", **start, training={"steps": 1, "lr": 1e-9})
    summary = finished(tmp_path / "run", config)
    assert summary["columns"]["original"]["steps"]["mean"] == 1
    model = ImagesJob().model(config)
    for stage in ("original", "retrain"):
        RunDirectory(tmp_path / "run").load_model(model, (0, stage))
        torch.testing.assert_close(dict(model.state_dict()), dict(found), atol=1e-6, rtol=0)


def test_a_model_of_ones_own_needs_no_reset_parameters(tmp_path, data, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.w = nn.Parameter(torch.randn(64, classes) / 8)\n"
        "    def forward(self, images):\n"
        "        return images.flatten(1) @ self.w\n"
        "def make(classes, size):\n"
        "    assert size == (8, 8)\n"
        "    return Own(classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    config = tiny(data, model="mine:make", training={"steps": 3})
    finished(tmp_path / "run", config)
    stored = ImagesJob().model(config)
    directory = RunDirectory(tmp_path / "run")
    directory.load_model(stored, (0, "original"))
    first = stored.w.detach().clone()
    directory.load_model(stored, (0, "retrain"))
    assert not torch.allclose(first, stored.w, atol=0.05)  # drawn apart


SHARING = {
    "shares_all": "made = old",
    "shares_weights": "made[2].weight = old[2].weight",
    "shares_statistics": "made[1].running_mean = old[1].running_mean",
}


@pytest.mark.parametrize("module", SHARING)
def test_a_model_that_is_not_new_each_time_is_refused(tmp_path, data, monkeypatch, module):
    """Original and Retrain would be one model, or share a part of it."""
    (tmp_path / f"{module}.py").write_text(
        "from torch import nn\n"
        "def new():\n"
        "    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))\n"
        "old = new()\n"
        "def make():\n"
        "    made = new()\n"
        f"    {SHARING[module]}\n"
        "    return made\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--model {module}:make: .* is the same tensor in two"):
        ImagesJob().check(tiny(data, model=f"{module}:make"))


def test_a_checkpoint_of_batch_norm_has_a_count(tmp_path, data, monkeypatch):
    """A tensor without dimensions, in the checksum of the weights."""
    (tmp_path / "normed.py").write_text(
        "from torch import nn\n"
        "def make(classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    weights = network("normed:make", 1, (8, 8), 3).state_dict()
    torch.save(weights, tmp_path / "normed.pt")
    given = {"model": "normed:make", "checkpoint": str(tmp_path / "normed.pt")}
    config, job = tiny(data, **given), ImagesJob()
    first = job.facts(config)["weights_sha256"]
    weights["1.num_batches_tracked"] += 1
    torch.save(weights, tmp_path / "normed.pt")
    assert job.facts(config)["weights_sha256"] != first


def test_a_checkpoint_with_batch_norm_is_the_original(tmp_path, data, monkeypatch):
    """Its count of batches is a number alone, an integer."""
    (tmp_path / "normed.py").write_text(
        "from torch import nn\n"
        "def make(classes):\n"
        "    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.save(network("normed:make", 1, (8, 8), 3).state_dict(), tmp_path / "given.pt")
    config = tiny(data, model="normed:make", checkpoint=str(tmp_path / "given.pt"))
    summary = finished(tmp_path / "run", config)
    assert summary["columns"]["original"]["steps"]["mean"] == 0
    assert len(summary["data"]["weights_sha256"]) == 64


def test_the_card_says_what_pixels_the_model_takes(tmp_path, data):
    finished(tmp_path / "run", tiny(data, mean=[0.25], std=[0.5]))
    card = (tmp_path / "run/model_card.md").read_text()
    assert "pixels in \\[0, 1\\], less (0.25), over (0.5)" in card


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("random", {"forget_class": "1"}, "--task must be class where --forget-class is given, go"),
        ("random", {"confused": ["0", "1"]}, "--task must be confusion where --confused is given"),
        ("random", {"ids": "x"}, "--task must be ids where --ids is given, got random"),
        ("ids", {}, "--ids must be a file with --task ids, got none"),
        ("confusion", {"confused": ["1", "1"]}, "--confused must be two classes, got 1, 1"),
        ("random", {"percent": 0.0}, r"--percent must be in \(0, 100\), got 0"),
        ("class", {"percent": 5.0}, "--task must be random, memorized, mislabeled or confusion"),
        ("random", {"std": [0.0]}, r"--std must be positive numbers, got \(0\)"),
        ("random", {"mean": [float("nan")]}, r"--mean must be in \[0, 1\], .* got \(nan\)"),
        ("random", {"mean": [124.0]}, r"--mean must be in \[0, 1\], as pixels are, got \(124\)"),
        ("random", {"std": [float("inf")]}, r"--std must be positive numbers, got \(inf\)"),
        ("random", {"mean": [0.1, 0.2]}, "--mean must be one number for each of 1 channels, got 2"),
        ("random", {"device": "tpu:7"}, "--device: tpu:7 is not here"),
        ("random", {"device": "meta"}, "--device: meta has no values to train"),
        ("random", {"device": "cuda:9"}, "--device: cuda:9 is not here"),
        (
            "random",
            {"model": "resnet50"},
            "--model must be one of cnn, cnn-narrow, resnet18, resnet18-narrow, vit",
        ),
        ("mislabeled", {"checkpoint": "x.pt"}, "--checkpoint: with --task mislabeled the original"),
        ("random", {"checkpoint": "x.pt", "shadows": 2}, "--shadows are trained as the original"),
        ("random", {"checkpoint": "x.pt"}, "--checkpoint: x.pt is not there"),
        ("random", {"checkpoint_is": "start"}, "--checkpoint must be given to be the start, got "),
        (
            "random",
            {"checkpoint": "x", "checkpoint_is": "start", "training": {"start": "scratch"}},
            "--training.start: scratch draws weights anew and would leave --checkpoint unused",
        ),
        ("random", {"std": [1e-40]}, "--std must be so large that images divided by it are finite"),
        ("random", {"device": "privateuseone"}, "--device: privateuseone is not here"),
    ],
)
def test_nonsense_names_its_option(data, task, changes, message):
    job = ImagesJob()
    with pytest.raises(InputError, match=message):
        job.check(tiny(data, task, **changes))


def test_data_that_are_not_there_leave_no_run_directory(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["unlearn", "images", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert f"--data: {tmp_path}/no is not there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_images_are_made_what_a_checkpoint_wants(data):
    job, plain = ImagesJob(), ImagesJob()
    split = job.split(tiny(data, mean=[0.25], std=[0.5]), 0)
    expected = (plain.split(tiny(data), 0).test["image"] - 0.25) / 0.5
    torch.testing.assert_close(split.test["image"], expected)


def test_copies_of_a_sample_to_forget_are_refused_or_allowed(tmp_path):
    images, labels = arrays()
    images[7], images[4] = images[1], images[1]  # all of class 1
    np.savez(tmp_path / "twice.npz", images=images, labels=labels)
    (tmp_path / "ids.txt").write_text("1\n")
    config = tiny(tmp_path / "twice.npz", "ids", ids=str(tmp_path / "ids.txt"))
    with pytest.raises(InputError, match="--duplicates: with seed 0, 1 of 1 samples to forget hav"):
        finished(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    allowed = tiny(tmp_path / "twice.npz", "ids", ids=str(tmp_path / "ids.txt"), duplicates="allow")
    finished(tmp_path / "allowed", allowed)
    assert (
        "Copies of forgotten samples were let stay"
        in (tmp_path / "allowed/report.html").read_text()
    )


def test_options_come_from_the_command_line(tmp_path, data):
    job = ImagesJob()
    given = ["--task", "confusion", "--confused", "0", "2", "--data", str(data), "--size", "16"]
    config = parse(job, [*given, "--mean", "0.5", "--neggrad.steps", "2"]).job
    assert (config.task, config.confused, config.size) == ("confusion", ("0", "2"), 16)
    assert (config.mean, config.neggrad.steps, config.data) == ((0.5,), 2, data)
    assert config.training.start == "given"
    config = job.resolved(config)
    job.check(config)
    with RunDirectory(tmp_path / "run") as directory:
        directory.write_options("config.yaml", config)
    again = parse(job, ["--config", str(tmp_path / "run/config.yaml")]).job
    assert again == config


def test_epochs_make_steps_unless_those_are_given(data):
    job = ImagesJob()
    few = {"training": {"steps": 0, "retain_batch": 32}}
    assert job.resolved(tiny(data, epochs=3, **few)).training.steps == 6  # 86 samples: 2 batches
    assert job.resolved(job.resolved(tiny(data, epochs=3, **few))).training.steps == 6
    assert job.resolved(tiny(data)).training.steps == 12
    with pytest.raises(InputError, match=r"--epochs must be 20 where --training.steps is given"):
        job.resolved(tiny(data, epochs=3))
    with pytest.raises(InputError, match=r"--epochs must be at most 2\^31, got 1000"):
        job.resolved(tiny(data, epochs=10**30, training={"steps": 0}))
    with pytest.raises(InputError, match=r"--training.retain-batch must be at least 1, got 0"):
        job.resolved(tiny(data, training={"steps": 0, "retain_batch": 0}))


def test_shadows_and_a_search_run(tmp_path, data, monkeypatch):
    from gradsurgery.unlearn.jobs import tune as search

    monkeypatch.setattr(search, "SEEDS", (105,))
    config = tiny(data, "confusion", shadows=2, tune=1, neggrad={"steps": 2})
    job = ImagesJob()
    with RunDirectory(tmp_path / "run") as directory:
        open_directory(directory, config, job.facts(config))
        run = Run(job, config, directory, PlainProgress())
        best = search.tune(run)
        summary = Run(job, best, directory, PlainProgress()).complete()
    assert 0 <= summary["columns"]["neggrad"]["ulira"]["mean"] <= 1
    assert json.loads((tmp_path / "run/tuning.jsonl").read_text())["method"] == "neggrad"


@pytest.mark.parametrize("model", ["cnn", "vit", "resnet18"])
def test_every_network_can_be_drawn_anew(data, model):
    """As Bad Teacher does, and Retrain from scratch."""
    config = tiny(data, model=model)
    first = ImagesJob().model(config)
    before = [parameter.clone() for parameter in first.parameters() if parameter.dim() > 1]
    reset_parameters(first, seed=5)
    after = [parameter for parameter in first.parameters() if parameter.dim() > 1]
    assert not any(map(torch.equal, before, after))
