"""Methods on a model that fully_shard split over two ranks are those of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from gradsurgery.unlearn import METHODS, Finetune, Retrain, unlearning
from gradsurgery.unlearn.methods.surgery import SurgeryTrainer
from gradsurgery.unlearn.objectives.causal_lm import CausalLM
from tests.language import tiny
from tests.ranks.cases import whole
from tests.ranks.processes import run
from tests.unlearn.test_ranks import (
    ALL,
    METHOD,
    SIZES,
    network,
    own_loss,
    said,
    samples,
    trainer_of,
)

SHARDED = [name for name in ALL if ALL[name].sharded]
COPIED = [name for name in ALL if not ALL[name].sharded]
GIVEN = {**METHOD, "retrain": {"start": "given"}}
CASES = [
    (name, size, None)
    for name in SHARDED
    for size in SIZES
    if size == "uneven" or name in METHODS or name == "retrain"
]
CASES += [(name, "uneven", 2) for name in ("neggradplus", "random_label", "surgery")]


def made(rank, *more, parted=None):
    """A network, in shards on a rank and whole in one process."""
    model = network(*more)
    if parted is not None:
        parted(model)
    if rank is not None:
        fully_shard(model[0])
        fully_shard(model)
    return model


def freezing(model):
    model[0].bias.requires_grad_(False)


def seen(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def accuracy(model):
    """A forward pass that no backward pass follows."""
    batch = samples(6, 8)
    with torch.no_grad():
        right = model(batch["image"]).argmax(1) == batch["label"]
    return {"forget_accuracy": float(right.double().mean())}


def trained(rank, name, size, micro_batch=None, model=None, **more):
    """Where a method ends, and its records."""
    model = made(rank) if model is None else model
    options = {**GIVEN.get(name, {}), "micro_batch": micro_batch, **more}
    trainer = trainer_of(ALL[name], model, sizes=SIZES[size], **options)
    trainer.probe = accuracy
    records = seen(trainer.fit())
    return whole(model), records


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, tiny.WORDS, (count, 7), generator=generator)
    labels = torch.where(torch.arange(7) < 2, -100, ids)
    mask, places = torch.ones_like(ids), torch.arange(count) + 100 * seed
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "id": places}


def language(rank):
    """A loss that needs the original's log-probabilities."""
    model = tiny.made()
    if rank is not None:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    options = {"rule": "gru", "forget_loss": "npo", "forget_batch": 3, "retain_batch": 4}
    config = SurgeryTrainer.Config(steps=3, lr=0.5, optimizer="sgd", **options)
    sets = {"forget": texts(7, 1), "retain": texts(9, 2)}
    trainer = SurgeryTrainer(model, CausalLM(), **sets, config=config)
    return whole(trainer.run()), []


OTHERS = {
    "frozen": lambda rank: trained(
        rank, "orthograd", "uneven", model=made(rank, parted=freezing), schedule="cosine"
    ),
    "language": language,
}


def resumed(rank, name, *more):
    """A run with dropout, and one that goes on from its middle, by the first rank's state."""
    torch.manual_seed(rank)
    ends = []
    first = trainer_of(ALL[name], made(rank, *more), **GIVEN.get(name, {}))
    steps = first.fit()
    next(steps)
    next(steps)
    accuracy(first.model)  # leaves the root whole
    state = [first.state_dict()]
    dist.broadcast_object_list(state, 0)
    list(steps)
    ends.append(whole(first.model))
    torch.manual_seed(9)
    second = trainer_of(ALL[name], made(rank, *more), **GIVEN.get(name, {}))
    second.load_state_dict(state[0])
    second.run()
    ends.append(whole(second.model))
    again = network(*more)
    again.load_state_dict(state[0]["model"])  # an ordinary one
    return ends


def raising(rank):
    """A function that fails in its second step, and what it leaves."""
    net, calls = made(rank), []

    def broken(model, batch):
        calls.append(None)
        if len(calls) > 3 and rank == 1:
            raise ZeroDivisionError("a loss that fails")
        return own_loss(model, batch)

    def call():
        sets = {"retain_loader": samples(24, 2), "forget_loader": samples(12, 1)}
        unlearning(net, **sets, method="orthograd", loss=broken, steps=5, lr=0.1)

    return said(call), whole(net)


def refused(rank):
    wrong = {name: lambda kind=ALL[name]: trainer_of(kind, made(rank)) for name in COPIED}
    ranks = dist.new_group([0, 1])
    return {name: said(call) for name, call in wrong.items()} | {
        "retrain": said(lambda: trainer_of(Retrain, made(rank))),
        "group": said(lambda: trainer_of(Finetune, made(rank), group=ranks)),
        "alone": said(lambda: trainer_of(Finetune, made(rank), group=False)),
    }


def work(rank):
    found = {case: trained(rank, *case) for case in CASES}
    found |= {name: scenario(rank) for name, scenario in OTHERS.items()}
    found["resumed"] = [
        resumed(rank, "neggradplus", nn.Dropout(0.3)),
        resumed(rank, "gru"),
        resumed(rank, "salun"),
    ]
    found["raising"], found["refused"] = raising(rank), refused(rank)
    return found


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """What each rank found."""
    return run(work, 2, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=str)
def test_a_method_on_shards_is_one_process(every, case):
    state, records = OTHERS[case](None) if case in OTHERS else trained(None, *case)
    for found in every:
        ours, told = found[case]
        for name, value in state.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10)
            assert torch.equal(ours[name], every[0][case][0][name]), name
        for mine, theirs in zip(told, records, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_a_resumed_method_is_the_same_bit_for_bit(every):
    for found in every:
        for first, again in found["resumed"]:
            assert all(torch.equal(again[name], value) for name, value in first.items())


def test_an_error_of_one_rank_leaves_the_network_as_it_was_given(every):
    told = ("RankError", "rank 1: ZeroDivisionError: a loss that fails")
    for found, wanted in zip(every, (told, ("ZeroDivisionError", told[1][27:])), strict=True):
        assert found["raising"][0] == wanted
        for name, value in network().state_dict().items():
            assert torch.equal(found["raising"][1][name], value), name


REFUSED = {
    **dict.fromkeys(COPIED, "model: it is in fully_shard, and "),
    "retrain": "start = scratch: the model is in fully_shard",
    "group": "process_group: fully_shard and replicate have their own",
    "alone": "model is spread over several processes or devices by fully_shard",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_whole_model_is_refused_by_name(every, name):
    for found in every:
        kind, message = found["refused"][name]
        assert kind == "InputError"
        assert message.startswith(REFUSED[name])
