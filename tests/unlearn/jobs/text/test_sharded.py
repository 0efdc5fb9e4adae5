"""The text job on a model that is dealt out over two processes is that of one process."""

import os

import pytest
import torch

from gradsurgery.cli import main
from gradsurgery.errors import InputError
from gradsurgery.unlearn.command import parse, run_job
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.text.job import TextJob
from gradsurgery.unlearn.methods.surgery import SurgeryTrainer
from tests.ranks.processes import run
from tests.unlearn.jobs.text.made import arguments, given
from tests.unlearn.test_ranks import failing, said

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("rouge_score")
files = pytest.importorskip("safetensors.torch")

__all__ = ["given"]
# of peft, by what transformers is to rename
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
PAIR = "surgery+npo with orthograd"


def options(given, name):
    """Of an adapter, of one on weights in 16 bits, and of all weights beside a retrained model."""
    if name == "adapter":
        return ["--lora", 4]
    if name == "narrow":
        return ["--lora", 4, "--dtype", "bfloat16", "--surgery.retain-loss", "kl", "--relearn=0"]
    more = ["--holdout", given / "holdout.jsonl", "--retrain-model", given / "retrained"]
    few = ["--graddiff.steps=2", "--graddiff.lr=1e-2", "--orthograd.steps=2"]
    few += ["--graddiff.optimizer=sgd"]  # Adam divides rounding by a gradient that is nearly none
    return ["--lora", 0, *more, "--method", "graddiff", "orthograd", *few]


def job(given, out, *more):
    """As on the command line, but what it raises is raised."""
    line = arguments(given, "--out", out, "--fully-shard", *more, steps=3)
    run_job(TextJob(), parse(TextJob(), line[2:]))


def work(rank, given, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    for name in ("adapter", "narrow", "whole"):
        job(given, folder / name, *options(given, name))
    more = [*options(given, "whole"), "--checkpoint-every=1"]
    with failing(SurgeryTrainer, 2):
        first = said(lambda: job(given, folder / "again", *more))
    job(given, folder / "again", *more, "--resume", "auto")
    copies = said(lambda: job(given, folder / "copies", "--method", "scrub"))
    return first, copies


@pytest.fixture(scope="module")
def every(given, tmp_path_factory):
    """What each process said, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("sharded")
    return run(work, 2, folder, given, folder, seconds=200), folder


def weights(path):
    return {each.name: files.load_file(each) for each in sorted((path / "models").iterdir())}


@pytest.mark.parametrize("name", ["adapter", "whole"])
def test_a_job_is_that_of_one_process(every, given, name, tmp_path):
    line = arguments(given, "--out", tmp_path / "one", *options(given, name), steps=3)
    main(line)
    ours, alone = RunDirectory(every[1] / name), RunDirectory(tmp_path / "one")
    close = {"rel": 1e-3, "abs": 1e-3}
    for mine, theirs in zip(ours.results(), alone.results(), strict=True):
        assert mine["method"] == theirs["method"]
        assert mine["metrics"] == pytest.approx(theirs["metrics"], **close), mine["method"]
    wanted = weights(alone.path)
    for file, tensors in weights(ours.path).items():
        for key, value in tensors.items():
            torch.testing.assert_close(value, wanted[file][key], rtol=1e-5, atol=1e-5)


def test_what_it_ends_with_is_whole(every, given):
    for name in ("adapter", "narrow", "whole"):
        saved, path = weights(every[1] / name)[f"seed0-{PAIR}.safetensors"], every[1] / name
        if name == "whole":
            made = transformers.AutoModelForCausalLM.from_pretrained(path / "model")
            assert type(made) is transformers.LlamaForCausalLM
        else:
            base = transformers.AutoModelForCausalLM.from_pretrained(given / "model")
            made = peft.PeftModel.from_pretrained(base, path / "model")
        found = made.state_dict()
        assert all(torch.equal(found[key], value) for key, value in saved.items())
        told = (path / "model_card.md").read_text()
        assert "LlamaForCausalLM" in told and "FSDP" not in told


def test_a_job_goes_on_where_it_stopped(every):
    for first, _ in every[0]:
        assert first == ("ArithmeticError", "stopped")
    whole, again = (weights(every[1] / name) for name in ("whole", "again"))
    for file, tensors in whole.items():
        assert all(torch.equal(again[file][key], value) for key, value in tensors.items()), file


def test_what_is_not_served_is_named(every, given, tmp_path):
    for _, copies in every[0]:
        assert copies[0] == "InputError"
        assert copies[1].startswith("--method scrub: model: it is in fully_shard, and SCRUB needs")
    with pytest.raises(InputError, match="--fully-shard is for several processes, and there is"):
        job(given, tmp_path / "alone")
