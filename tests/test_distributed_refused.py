"""Models and optimizers spread over ranks are refused by name; one rank alone steps if told to."""

import json
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import spawn

import gradsurgery as gs

RANKS = 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def loss(model, batch):
    return model(batch[0]).sub(batch[1]).square().mean(1)


def data():
    return torch.randn(6, 5), torch.randn(6, 4)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _shard(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def _shard_a_layer(model):
    _shard(model[2])
    return model


def _flat(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def _ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def _composed(model):
    from torch.distributed._composable.replicate import replicate

    return replicate(model)


def _tensor(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh))
    return model


def _zero(model):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)


# of each: the model made of a network, and what the error names
WRAPPED = {
    "fully_shard": (_shard, "model is spread .* by fully_shard"),
    "a layer of fully_shard": (_shard_a_layer, "model: 2 is spread .* by fully_shard"),
    "FSDP": (_flat, "model is spread .* by FullyShardedDataParallel"),
    "what FSDP flattened": (
        lambda model: _flat(model).module,
        "model: parameter _flat_param is spread .* by FullyShardedDataParallel",
    ),
    "DDP": (_ddp, "model is spread .* by DistributedDataParallel"),
    "DDP inside": (lambda m: nn.Sequential(_ddp(m)), "model: 0 is spread .* by DistributedDataP"),
    "replicate": (_composed, "model is spread .* by replicate"),
    "DTensor": (_tensor, r"model: parameter 0\.weight is spread .* by DTensor"),
}
ENTRIES = {
    "Surgeon": lambda model: gs.Surgeon(model, sgd(model), gs.Mean(), process_group=False),
    "tape": lambda model: gs.tape(model).__enter__(),
    "check": lambda model: gs.check(model, data(), loss=loss),
    "stored": lambda model: gs.DenseJacobian.from_model(model, data(), loss),
}


def _said(call):
    try:
        call()
    except gs.InputError as error:
        return str(error)
    return "accepted"


def _wrapped_later():
    model = network()
    surgeon = gs.Surgeon(model, sgd(model), gs.Mean(), process_group=False)
    _shard(model)
    surgeon.step(batch=data(), loss=loss)


def _alone():
    model = network()
    before = model[0].weight.detach().clone()
    surgeon = gs.Surgeon(model, sgd(model), gs.Mean(), process_group=False)
    surgeon.step(batch=data(), loss=loss)
    assert not torch.equal(model[0].weight, before)


def _work(rank, folder):
    torch.set_num_threads(1)
    told = {}
    model = network()
    early = gs.Surgeon(model, sgd(model), gs.Mean())  # before there are ranks
    early.step(batch=data(), loss=loss)
    dist.init_process_group(
        "gloo", store=FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS
    )
    for kind, (wrap, _) in WRAPPED.items():
        wrapped = wrap(network())
        for name, entry in ENTRIES.items():
            told[f"{kind}, {name}"] = _said(lambda entry=entry, m=wrapped: entry(m))
    told["unwrapped"] = _said(lambda: gs.Surgeon(model, sgd(model), gs.Mean()))
    told["ranks come later"] = _said(lambda: early.step(batch=data(), loss=loss))
    told["wrapped later"] = _said(_wrapped_later)
    told["alone"] = _said(_alone)
    told["zero"] = _said(lambda: gs.Surgeon(model, _zero(model), gs.Mean(), process_group=False))
    for name in ("tape", "check", "stored"):
        told[f"unwrapped, {name}"] = _said(lambda name=name: ENTRIES[name](network()))
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(told, file)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each call said, on either rank."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_work, args=(str(folder),), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


CALLS = {
    **{f"{kind}, {name}": WRAPPED[kind][1] for kind in WRAPPED for name in ENTRIES},
    "DDP, tape": "accepted",
    "DDP, Surgeon": "process_group: DistributedDataParallel has its own",
    "unwrapped": "torch.distributed runs 2 ranks: pass process_group=.*WORLD",
    "ranks come later": "torch.distributed runs 2 ranks",
    "wrapped later": "model is spread .* by fully_shard",
    "alone": "accepted",
    "zero": "optimizer is spread .* by ZeroRedundancyOptimizer",
    **dict.fromkeys(("unwrapped, tape", "unwrapped, check", "unwrapped, stored"), "accepted"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_ranks_hold_together_is_named(call, told):
    for said in told:
        assert re.search(CALLS[call], said[call]), said[call]


# without ranks


class Engine(nn.Module):
    """As DeepSpeed's, which is not installed here."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module):
        super().__init__()
        self.module = module


def _partitioned(model):
    model[2].weight.ds_id = 0
    return model


@pytest.mark.parametrize(
    "wrap,message",
    [
        (nn.DataParallel, "model is spread .* by DataParallel"),
        (lambda m: nn.Sequential(nn.Flatten(), Engine(m)), "model: 1 is spread .* by Engine"),
        (_partitioned, r"model: parameter 2\.weight is spread .* by DeepSpeed's ZeRO"),
    ],
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_needs_no_ranks_to_be_seen(wrap, message, entry):
    with pytest.raises(gs.InputError, match=message):
        ENTRIES[entry](wrap(network()))


def test_a_wrapper_that_spreads_nothing_is_served():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = network()
    model[0] = checkpoint_wrapper(model[0])
    gs.Surgeon(model, sgd(model), gs.Mean()).step(batch=data(), loss=loss)
