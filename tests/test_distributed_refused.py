"""Models and optimizers spread over ranks are refused by name; one rank alone steps if told to."""

import json
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import BuiltinCommHookType, FileStore
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


def _flat_parts(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def _split(model):
    from torch.distributed.pipelining import SplitPoint, pipeline

    half = {"2": SplitPoint.BEGINNING}
    return pipeline(model, mb_args=(torch.randn(2, 5),), split_spec=half)


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


def _averaging(model):
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    return PostLocalSGDOptimizer(sgd(model), PeriodicModelAverager(2))


def _hooked(model):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model = _ddp(model)
    model.register_comm_hook(None, fp16_compress_hook)
    return model


def _hooked_inside(model):
    model = _ddp(model)
    model._register_builtin_comm_hook(BuiltinCommHookType.FP16_COMPRESS)
    return model


def _joined(model):
    from torch.distributed.algorithms.join import Join

    model = _ddp(model)
    with Join([model]):
        return model


# what communicates in a forward pass or a loss


def _by_torch(x):
    return torch.distributed.nn.functional.all_reduce(x)


def _gathered(x):
    return torch.stack(torch.distributed.nn.functional.all_gather(x)).sum(0)


def _functional(x):
    return torch.distributed._functional_collectives.all_reduce(x, "sum", dist.group.WORLD)


def _summed(x):
    dist.all_reduce(x)
    return x


class OwnSum(torch.autograd.Function):
    """As models have it that are split by hand."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return _summed(x.clone())

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


class OwnCopy(torch.autograd.Function):
    """Which communicates in the backward pass alone."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        import torch.distributed as ranks

        grad = grad.clone()
        ranks.all_reduce(grad)
        return grad


class Counted(torch.autograd.Function):
    """Which asks who it is, and communicates with nobody."""

    @staticmethod
    def forward(ctx, x):
        return x * (dist.get_rank() + 1)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * (dist.get_rank() + 1)


def _written(x):
    x = x * 1
    dist.all_reduce(x)
    return x


def _measured(x):
    with torch.no_grad():
        mean = x.mean()
        dist.all_reduce(mean)
        each = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(each, x)
    return x


class Split(nn.Module):
    def __init__(self, passes):
        super().__init__()
        self.inside, self.passes = network(), passes

    def forward(self, x):
        return self.passes(self.inside(x))


BY_HAND = {
    "by torch": (_by_torch, "_AllReduce passes tensors between ranks"),
    "gathered": (_gathered, "_AllGather passes tensors between ranks"),
    "functional": (_functional, "all_reduce passes tensors between ranks"),
    "own sum": (OwnSum.apply, "OwnSum.* passes tensors between ranks"),
    "own copy": (OwnCopy.apply, "OwnCopy passes tensors between ranks"),
    "counted": (Counted.apply, "accepted"),
}
ROWS = {
    "Surgeon": lambda model: _surgeon(model).step(batch=data(), loss=loss),
    "mean": lambda model: _surgeon(model).step(batch=data(), loss=_mean_loss),
    "tape": lambda model: _taped(model),
    "check": lambda model: _checked(model),
    "stored": lambda model: gs.DenseJacobian.from_model(model, data(), loss),
    "stored mean": lambda model: gs.DenseJacobian.from_model(model, data(), loss, rows="mean"),
}


IN_PLACE = {
    "written": (_written, "loss: allreduce passes tensors between ranks"),
    "measured": (_measured, "accepted"),
}


def _surgeon(model):
    return gs.Surgeon(model, sgd(model), gs.Mean(), process_group=False)


def _mean_loss(model, batch):
    return loss(model, batch)[:, None].expand(-1, 2)


def _taped(model):
    with gs.tape(model) as tape:
        losses = loss(getattr(model, "module", model), data())
    tape.jacobian(losses)


def _checked(model):
    refused = gs.check(model, data(), loss=loss).refused
    if refused is not None:
        raise gs.InputError(refused)


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
    "FSDP, parameters kept": (_flat_parts, "model is spread .* by FullyShardedDataPa.*fully_shard"),
    "Pipe": (_split, "model is spread .* by Pipe"),
    "DDP inside": (lambda m: nn.Sequential(_ddp(m)), "model: 0 is spread .* by DistributedDataP"),
    "replicate": (_composed, "model is spread .* by replicate"),
    "DTensor": (_tensor, r"model: parameter 0\.weight is spread .* by DTensor"),
}
OPTIMIZERS = {"zero": _zero, "averaging": _averaging}
DDP = {
    "DDP with a hook": _hooked,
    "DDP with a hook of its own": _hooked_inside,
    "DDP, joined": _joined,
}
# by the tape and by the check, with the rows of all ranks
SERVED = ("DDP", "fully_shard", "a layer of fully_shard", "replicate")
ENTRIES = {
    "Surgeon": lambda model: gs.Surgeon(model, sgd(model), gs.Mean(), process_group=False),
    "tape": lambda model: _taped(model),
    "check": lambda model: gs.check(model, data(), loss=loss),
    "stored": lambda model: gs.DenseJacobian.from_model(model, data(), loss),
}


def _stepped_by(model, optimizer):
    gs.Surgeon(model, optimizer, gs.Mean(), process_group=False)


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
    for kind, make in OPTIMIZERS.items():
        told[kind] = _said(lambda make=make: _stepped_by(model, make(model)))
    for kind, wrap in DDP.items():
        made = wrap(network())
        told[kind] = _said(lambda made=made: gs.Surgeon(made, sgd(made), gs.Mean()))
    made = _ddp(network())
    surgeon = gs.Surgeon(made, sgd(made), gs.Mean())
    made._register_builtin_comm_hook(BuiltinCommHookType.FP16_COMPRESS)
    told["DDP, hooked later"] = _said(lambda: surgeon.step(batch=data(), loss=loss))
    for kind, (passes, _) in BY_HAND.items():
        for name, entry in ROWS.items():
            made = Split(passes)
            told[f"{kind}, {name}"] = _said(lambda entry=entry, m=made: entry(m))
    for name in ("tape", "check", "stored"):
        told[f"unwrapped, {name}"] = _said(lambda name=name: ENTRIES[name](network()))
    for kind, (passes, _) in IN_PLACE.items():
        told[kind] = _said(lambda passes=passes: ROWS["Surgeon"](Split(passes)))
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
    **{f"{kind}, {name}": "accepted" for kind in SERVED for name in ("tape", "check")},
    "DDP, Surgeon": "process_group: DistributedDataParallel has its own",
    "DTensor, Surgeon": "process_group: parallelize_module has its own",
    "unwrapped": "torch.distributed runs 2 ranks: pass process_group=.*WORLD",
    "ranks come later": "torch.distributed runs 2 ranks",
    "wrapped later": "optimizer holds no parameter of the model: make it after fully_shard",
    "alone": "accepted",
    "zero": "optimizer is spread .* by ZeroRedundancyOptimizer",
    "averaging": "optimizer is spread .* by PostLocalSGDOptimizer",
    "DDP with a hook": "communication hook, fp16_compress_hook",
    "DDP with a hook of its own": "communication hook, .*FP16_COMPRESS",
    "DDP, hooked later": "communication hook, .*FP16_COMPRESS",
    "DDP, joined": "Join context",
    **{f"{kind}, {name}": BY_HAND[kind][1] for kind in BY_HAND for name in ROWS},
    **{kind: said for kind, (_, said) in IN_PLACE.items()},
    "counted, stored": "Function Counted has no setup_context",
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


class ColumnParallelLinear(nn.Linear):
    """As Megatron's, which is not installed here either."""

    __module__ = "megatron.core.tensor_parallel.layers"


def _with_columns(model):
    model[0] = ColumnParallelLinear(5, 7)
    return model


def _partitioned(model):
    model[2].weight.ds_id = 0
    return model


def _sliced(model):
    model[2].weight.tensor_model_parallel = True
    return model


@pytest.mark.parametrize(
    "wrap,message",
    [
        (nn.DataParallel, "model is spread .* by DataParallel"),
        (lambda m: nn.Sequential(nn.Flatten(), Engine(m)), "model: 1 is spread .* by Engine"),
        (_with_columns, "model: 0 is spread .* by ColumnParallelLinear"),
        (_sliced, r"model: parameter 2\.weight is spread .* by Megatron's tensor parallelism"),
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
