"""Training on two ranks is that of one process on the batches of both."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradsurgery as gs
from gradsurgery.language import GradAscent
from tests.language.tiny import made
from tests.ranks.processes import run

transformers = pytest.importorskip("transformers")

# what follows needs transformers, and comes after the look for it
import accelerate  # noqa: E402

from gradsurgery.integrations.open_unlearning.registry import surgery_of  # noqa: E402
from tests.integrations.trainers import (  # noqa: E402
    CASES,
    CLIP,
    RETAIN,
    TASKS,
    arguments,
    assert_same,
    llama,
    losses_of,
    plain,
    samples,
    steps_of,
    trainer_of,
)

RANKS, EPOCHS = 2, 2
# size of a rank's batch, and batches in a step; 7 samples to forget make 3 pairs a rank an epoch
SIZES = {"one by one": (1, 2), "last batch shorter": (2, 1)}
NAMES = ("npo", "ascent", "average", "tokens", "answers", "tasks raised")
SEEN = ("forget_loss", "retain_loss", "cosine_mean", "conflict_rate")


def launched(rank):
    """What a launcher says to a process, and accelerate not knowing of any before."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def ours(rank, model, folder, name, size=(1, 2), *, checkpoint=None, **args):
    launched(rank)
    rule, forget, retain, options = CASES[name]
    each, parts = size
    trainer = trainer_of(
        model,
        folder,
        rule=copy.deepcopy(rule),
        forget_loss=forget,
        retain_loss=retain,
        forget_dataset=samples(7, 1, alternate=name == "answers"),
        args={
            "per_device_train_batch_size": each,
            "gradient_accumulation_steps": parts,
            "max_grad_norm": CLIP,
            "ddp_backend": "gloo",
            **args,
        },
        **options,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    return trainer


def found_of(trainer):
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    rule = trainer._steps.parts.rule.state_dict()
    return {"state": trainer.model.state_dict(), "logs": logs, "rule": rule}


def resumed(rank, folder):
    """A whole run, and one that goes on from the middle of it."""
    args = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
    model = lambda: llama(attention_dropout=0.2)  # noqa: E731
    whole = ours(rank, model(), folder / "whole", "average", **args)

    def gone_on(step):
        torch.manual_seed(99)
        checkpoint = str(folder / f"whole/checkpoint-{step}")
        return ours(rank, model(), folder / "again", "average", checkpoint=checkpoint, **args)

    if transformers.__version__ < "5":  # from the middle of an epoch it is refused on each rank
        with pytest.raises(gs.InputError, match="leaves out the last, shorter step"):
            gone_on(3)
        return found_of(whole), found_of(gone_on(2))
    return found_of(whole), found_of(gone_on(3))


def in_a_loop(rank):
    """accelerate's model and optimizer in a loop of one's own, as on the page of steps."""
    launched(rank)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())
    for step in parts_of(rank):
        with accelerator.accumulate(model):
            surgeon.add(**step, loss=GradAscent())
            if accelerator.sync_gradients:
                surgeon.backward()
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return {"state": accelerator.unwrap_model(model).state_dict()}


def parts_of(rank=None):
    """Micro-batches of a rank, or those of all ranks; two are a step."""
    for step in steps_of(EPOCHS, 2, ranks=RANKS):
        if rank is None:
            yield step
        else:
            yield {
                part: {name: entry[rank::RANKS] for name, entry in batch.items()}
                for part, batch in step.items()
            }


def registered(rank, folder):
    """open-unlearning's trainer, each rank drawing refusals of its own."""
    launched(rank)
    torch.manual_seed(rank)
    refusals = samples(7, int(torch.randint(1000, ())), alternate=True)
    data = [{"original": s, "alternate": s["alternate"]} for s in refusals]
    sets = SimpleNamespace(forget=data, retain=RETAIN)
    trainer = surgery_of(transformers.Trainer)(
        model=made(),
        args=arguments(folder, ddp_backend="gloo", max_steps=2, remove_unused_columns=False),
        train_dataset=sets,
        rule="gru",
        forget_loss={"name": "dpo", "beta": 0.2},
    )
    trainer.train()
    return {"state": trainer.model.state_dict(), "forget": trainer.train_dataset.forget}


def fails(rank, folder):
    """What each raises where the loss of the second rank does."""

    class Broken(GradAscent):
        def __call__(self, model, batch):
            if rank == 1:
                raise ZeroDivisionError("a loss that fails")
            return super().__call__(model, batch)

    launched(rank)
    trainer = trainer_of(
        made(),
        folder,
        rule="orthograd",
        forget_loss=Broken(),
        args={"gradient_accumulation_steps": 2, "ddp_backend": "gloo"},
    )
    try:
        trainer.train()
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        dist.barrier()
    return None


def work(rank, folder):
    found = {
        (name, size): found_of(ours(rank, made(), folder / "plain", name, SIZES[size]))
        for name in NAMES
        for size in SIZES
    }
    found["resumed"] = resumed(rank, folder)
    found["loop"] = in_a_loop(rank)
    found["registered"] = registered(rank, folder / "registered")
    found["fails"] = fails(rank, folder / "fails")
    return found


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    return run(work, RANKS, folder, folder, seconds=200)


def alike(every, key, other):
    """Raise unless both ranks ended where another model is, at the same bits."""
    for found in every:
        model = copy.deepcopy(other)
        model.load_state_dict(found[key]["state"])
        assert_same(model, other)
        for name, value in every[0][key]["state"].items():
            assert torch.equal(found[key]["state"][name], value), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_on_two_ranks_is_one_process(every, name, size):
    rule, _, _, options = CASES[name]
    each, parts = SIZES[size]
    data = samples(7, 1, alternate=name == "answers")
    model = made()
    losses = losses_of(name, model, data)
    retain = options.get("retain_per_forget", 1)
    steps = list(steps_of(EPOCHS, each * parts * RANKS, data, each=retain, ranks=RANKS))
    assert [len(step["forget"]["id"]) for step in steps] == [4, 2, 4, 2]
    infos, norms = plain(model, TASKS.get(name, rule), steps, *losses)
    alike(every, (name, size), model)
    for found in every:
        logs = found[name, size]["logs"]
        assert logs or found is not every[0]  # the first rank's are those that are shown
        assert [entry["grad_norm"] for entry in logs] == pytest.approx(norms, rel=1e-9)
        for entry, info in zip(logs, infos, strict=True):
            seen = {**info.to_dict(), "cosine_mean": float(info.cosines.mean())}
            for key in SEEN:
                assert entry[key] == pytest.approx(seen[key], rel=1e-9), key


def test_a_resumed_run_is_the_same_bit_for_bit(every):
    for found in every:
        whole, again = found["resumed"]
        for name, value in whole["state"].items():
            assert torch.equal(again["state"][name], value), name
        for name, value in whole["rule"].items():
            assert torch.equal(again["rule"][name], value), name


def test_a_loop_of_ones_own_under_accelerate(every):
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())
    for number, step in enumerate(parts_of(), 1):
        surgeon.add(**step, loss=GradAscent())
        if number % 2 == 0:
            surgeon.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    alike(every, "loop", model)


def test_open_unlearning_has_the_first_ranks_other_answers_on_all(every):
    first, second = (found["registered"] for found in every)
    assert first["forget"] == second["forget"]
    for name, value in first["state"].items():
        assert torch.equal(second["state"][name], value), name


def test_an_error_of_one_rank_ends_both(every):
    assert every[1]["fails"] == ("ZeroDivisionError", "a loss that fails")
    kind, message = every[0]["fails"]
    assert kind == "RankError"
    assert message == "rank 1: ZeroDivisionError: a loss that fails"
