"""Methods and jobs on two ranks are those of one process on the same batches."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from gradsurgery.ranks import Group
from gradsurgery.unlearn import METHODS, Finetune, NegGradPlus, Retrain, cross_entropy, unlearning
from gradsurgery.unlearn.command import Invocation, open_directory, run_job
from gradsurgery.unlearn.jobs import tune
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.pipeline import Run
from gradsurgery.unlearn.jobs.progress import Silent
from gradsurgery.unlearn.jobs.ranks import check_together, of_first, shared_directory
from tests.ranks.processes import run
from tests.unlearn.tiny import JOB, tiny

ROOT = Path(__file__).resolve().parents[2]
ALL = {
    **METHODS,
    "retrain": Retrain,
    "orthograd held_out": METHODS["orthograd"],
    "graddiff held_out": METHODS["graddiff"],
}
# options of every method, and how many samples a batch has: some give a rank less, or nothing
SIZES = {"uneven": {"forget": 5, "retain": 7}, "one": {"forget": 1, "retain": 3}}
METHOD = {
    "orthograd held_out": {"forget_loss": "held_out"},
    "graddiff held_out": {"forget_loss": "held_out"},
    "surgery": {"rule": "orthograd", "rule_options": ("alpha=0.3",)},
    "ssd": {"alpha": 0.8},  # by which some weights are dampened
    "ltu": {"model_steps": 5, "refresh": 3},
}
JOBS = ("neggradplus",)


def samples(count, seed):
    drawn = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 6, generator=drawn, dtype=torch.float64)
    return {"image": images, "label": torch.randint(0, 3, (count,), generator=drawn)}


def network(*more):
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), *more, nn.Linear(12, 3)).double()


def own_loss(model, batch):
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def trainer_of(kind, model, *, sizes=None, loss=cross_entropy, sets=None, group=None, **options):
    config = kind.Config(**{"steps": 4, "lr": 0.02, **options})
    for name, size in (sizes or SIZES["uneven"]).items():
        if hasattr(config, f"{name}_batch"):
            setattr(config, f"{name}_batch", size)
    sets = sets or {"forget": samples(12, 1), "retain": samples(24, 2), "validation": samples(9, 5)}
    return kind(model, loss, **sets, config=config, seed=3, process_group=group)


def trained(name, size, group=None, **options):
    """Where a method ends, and its records."""
    model = network()
    given = {**METHOD.get(name, {}), **options}
    trainer = trainer_of(ALL[name], model, sizes=SIZES[size], group=group, **given)
    records = list(trainer.fit())
    return model.state_dict(), [{k: v for k, v in r.items() if k != "seconds"} for r in records]


CASES = [(name, size, None) for name in ALL for size in SIZES]
CASES += [(name, "uneven", 2) for name in ("neggradplus", "random_label", "surgery", "ltu")]
CASES += [(f"{name} held_out", "uneven", 2) for name in ("orthograd", "graddiff")]


def said(work):
    """The error of a call, by class and words."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        dist.barrier()
    return None


def refused(rank):
    world = dist.group.WORLD

    def broken(model, batch):
        if rank == 1:
            raise ZeroDivisionError("a loss that fails")
        return own_loss(model, batch)

    def hooked():
        model = network()
        model[0].weight.register_hook(lambda grad: grad.clamp(-1, 1))
        trainer_of(Finetune, model, group=world).run()

    loader = DataLoader([(x, y) for x, y in zip(*samples(24, 2).values(), strict=True)], 4)
    sets = {"forget": samples(12, 1), "retain": loader}
    other = {"forget": samples(12, 1), "retain": samples(24, 2 + rank)}
    normalized = network(nn.BatchNorm1d(12))
    apart = network()
    with torch.no_grad():
        apart[0].weight += rank
    cases = {
        "none": lambda: trainer_of(Finetune, network()),
        "loader": lambda: trainer_of(Finetune, network(), sets=sets, group=world),
        "samples": lambda: trainer_of(Finetune, network(), sets=other, group=world),
        "config": lambda: trainer_of(Finetune, network(), group=world, lr=0.1 + rank),
        "model": lambda: trainer_of(Finetune, apart, group=world),
        "batch norm": lambda: trainer_of(Finetune, normalized, group=world),
        "hook": hooked,
        "loss": lambda: trainer_of(Finetune, network(), loss=broken, group=world).run(),
        "surgeon": lambda: trainer_of(
            METHODS["orthograd"], network(), loss=broken, group=world
        ).run(),
        "function": lambda: unlearning(
            network(), retain_loader=samples(24, 2), forget_loader=samples(12, 1)
        ),
    }
    return {name: said(work) for name, work in cases.items()}


def resumed(rank):
    """A run with dropout, and one that goes on from its middle, by the first rank's state."""
    torch.manual_seed(rank)
    whole = network(nn.Dropout(0.3))
    first = trainer_of(NegGradPlus, whole, group=dist.group.WORLD)
    steps = first.fit()
    next(steps)
    next(steps)
    state = [first.state_dict()]
    dist.broadcast_object_list(state, 0)
    list(steps)
    again = network(nn.Dropout(0.3))
    torch.manual_seed(9)
    second = trainer_of(NegGradPlus, again, group=dist.group.WORLD)
    second.load_state_dict(state[0])
    second.run()
    wrong = said(lambda: trainer_of(NegGradPlus, network(), group=False).load_state_dict(state[0]))
    return whole.state_dict(), again.state_dict(), wrong


def config_of(method=JOBS, **changes):
    few = {name: {"steps": 3, "forget_batch": 9, "retain_batch": 11} for name in JOBS}
    return tiny(method=method, training={"steps": 12, "retain_batch": 33}, **few, **changes)


@contextmanager
def failing(kind, step):
    """A method that fails after so many steps, on all ranks."""
    kept, taken = kind.after_step, []

    def after_step(self):
        taken.append(None)
        if len(taken) == step:
            raise ArithmeticError("stopped")

    kind.after_step = after_step
    try:
        yield
    finally:
        kind.after_step = kept


def completed(config, path, ranks):
    """A run as the command makes it, but for the report: the summary."""
    with shared_directory(path, ranks) as (own, directory):
        of_first(ranks, "options", lambda: open_directory(own, config))
        return Run(JOB, config, directory, Silent(), ranks).complete()


def searched(path, ranks):
    """The options that a search chooses, and what a run with them and shadow models measures."""
    config, kept = config_of(tune=2, shadows=2), tune.draws
    tune.draws = lambda *_: [{"lr": lr, "steps": 3} for lr in (1e-3, 0.1)]
    try:
        with shared_directory(path, ranks) as (own, directory):
            of_first(ranks, "options", lambda: open_directory(own, config))
            run = Run(JOB, config, directory, Silent(), ranks)
            chosen = tune.tune(run)
            replace(run, config=chosen).complete()
            results = {each["method"]: each["metrics"] for each in directory.results()}
            return chosen.neggradplus.lr, results["neggradplus"]
    finally:
        tune.draws = kept


def jobs(folder):
    ranks = Group(dist.group.WORLD)
    searches = searched(folder / "searched", ranks)
    config = config_of(checkpoint_every=1)
    completed(config, folder / "whole", ranks)
    if ranks.rank == 0:  # as if it had come no further than the last method
        shutil.copytree(folder / "whole", folder / "stopped")
        (folder / "stopped/stages/seed0-neggradplus.json").unlink()
    with failing(NegGradPlus, 2):
        stopped = said(lambda: completed(config, folder / "stopped", ranks))
    completed(config, folder / "stopped", ranks)
    wrong = {
        "device": lambda: check_together(SimpleNamespace(device="cuda:0"), ranks),
        "out": lambda: run_job(JOB, Invocation(config_of(), out=folder / "whole")),
    }
    return stopped, {name: said(work) for name, work in wrong.items()}, searches


def work(rank, folder):
    found = {case: trained(*case[:2], dist.group.WORLD, micro_batch=case[2]) for case in CASES}
    found["refused"], found["resumed"] = refused(rank), resumed(rank)
    found["jobs"] = jobs(folder / "jobs")
    return found


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """What each rank found, and the folder of the jobs."""
    folder = tmp_path_factory.mktemp("ranks")
    return run(work, 2, folder, folder, seconds=200), folder / "jobs"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_method_on_two_ranks_is_one_process(every, case):
    state, records = trained(*case[:2], micro_batch=case[2])
    moved = max(float((state[k] - v).abs().max()) for k, v in network().state_dict().items())
    assert moved > 1e-3
    for found in every[0]:
        ours, told = found[case]
        for name, value in state.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10)
            assert torch.equal(ours[name], every[0][0][case][0][name]), name
        for mine, theirs in zip(told, records, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-12)


REFUSED = {
    "none": "torch.distributed runs 2 ranks: pass process_group=",
    "function": "torch.distributed runs 2 ranks: pass process_group=",
    "loader": "retain: a DataLoader on several ranks would give each a batch of its own",
    "samples": "retain: rank 0 and rank 1 have other samples",
    "config": "config: rank 0 and rank 1 differ, Finetune",
    "model": "model: parameter 0.weight differs between rank 0 and rank 1",
    "batch norm": "process_group: 2 (BatchNorm1d) would normalize over a part of the batch",
    "hook": "model: a parameter [12, 6] has a hook",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_ranks_do_not_share_is_refused_by_name(every, name):
    for found in every[0]:
        kind, message = found["refused"][name]
        assert kind == "InputError"
        assert message.startswith(REFUSED[name])


@pytest.mark.parametrize("name", ["loss", "surgeon"])
def test_an_error_of_one_rank_ends_both(every, name):
    first, second = (found["refused"][name] for found in every[0])
    assert second == ("ZeroDivisionError", "a loss that fails")
    assert first == ("RankError", "rank 1: ZeroDivisionError: a loss that fails")


def test_a_resumed_method_is_the_same_bit_for_bit(every):
    for found in every[0]:
        whole, again, wrong = found["resumed"]
        assert all(torch.equal(again[name], value) for name, value in whole.items())
        assert wrong[0] == "InputError"
        assert "it is of 2 ranks, and there are 1" in wrong[1]


def test_a_job_on_two_ranks_is_one_process(every, tmp_path):
    completed(config_of(), tmp_path / "alone", Group())
    alone, ours = (RunDirectory(path) for path in (tmp_path / "alone", every[1] / "whole"))
    wanted, found = alone.results(), ours.results()
    assert [r["method"] for r in found] == [r["method"] for r in wanted]
    for theirs, mine in zip(wanted, found, strict=True):
        assert mine["steps"] == theirs["steps"]
        assert mine["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3, abs=1e-3)
    assert len(ours.records()) == len(alone.records())
    for theirs, mine in zip(alone.records(), ours.records(), strict=True):
        keys = [key for key in theirs if key != "seconds"]
        values = [theirs[key] for key in keys if not isinstance(theirs[key], str)]
        assert [mine[key] for key in keys if not isinstance(mine[key], str)] == pytest.approx(
            values, rel=1e-3, abs=1e-4
        )


def test_a_job_goes_on_where_it_stopped(every):
    for found in every[0]:
        assert found["jobs"][0] == ("ArithmeticError", "stopped")
    whole, again = (RunDirectory(every[1] / name) for name in ("whole", "stopped"))
    for theirs, mine in zip(whole.results(), again.results(), strict=True):
        assert mine["metrics"] == theirs["metrics"]
        assert mine["losses"] == theirs["losses"]


def test_a_search_and_shadow_models_on_two_ranks_are_those_of_one_process(every, tmp_path):
    lr, metrics = searched(tmp_path / "alone", Group())
    assert {"ulira", "ulira_auc"} <= metrics.keys()
    for found in every[0]:
        assert found["jobs"][2][0] == lr
        assert found["jobs"][2][1] == every[0][0]["jobs"][2][1]
        assert found["jobs"][2][1] == pytest.approx(metrics, rel=1e-3, abs=1e-3)


def test_what_jobs_do_not_share_is_refused_by_name(every):
    for found in every[0]:
        kind, text = found["jobs"][1]["device"]
        assert kind == "InputError"
        assert text.startswith("--device: cuda:0 is one for 2 processes")
        kind, text = found["jobs"][1]["out"]
        assert kind == "InputError"
        assert "exists and is not empty" in text


def test_the_command_is_started_by_torchrun(tmp_path):
    out = tmp_path / "run"
    options = ["unlearn", "digits", "--task", "class", "--method", "orthograd", "--seeds", "1"]
    options += ["--training.steps", "6", "--orthograd.steps", "2", "--out", str(out)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node", "2", "-m", "gradsurgery", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert RunDirectory(out).complete
    assert done.stdout.count(f"run directory {out}") == 1
