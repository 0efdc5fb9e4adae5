"""Sharded models in loops, in 16 bits, with adapters, and what ranks are told of each other."""

from contextlib import nullcontext, suppress
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import gradsurgery as gs
from tests.ranks.cases import data, loss, share, whole
from tests.ranks.processes import run
from tests.ranks.test_sharded import Network, composed, sharded_blocks

HALVES = (2, 2)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def made(rank, network=Network, wrap=sharded_blocks):
    """A model, sharded on a rank and whole in one process."""
    model = network()
    return model if rank is None else wrap(model)


def part(rank, seed, sizes=HALVES):
    batch = data(sum(sizes), seed)
    return batch if rank is None else share(batch, sizes, rank)


def both(rank, seed):
    return {"forget": part(rank, seed), "retain": part(rank, seed + 100, (1, 3))}


# what one process does as two ranks do


def between_plain_steps(rank, wrap=sharded_blocks):
    model = made(rank, wrap=wrap)
    optimizer = adamw(model)
    surgeon, seen = gs.Surgeon(model, optimizer, gs.OrthoGrad()), []
    for step in range(2):
        with torch.no_grad():  # leaves the root whole
            seen.append(loss(model, data(2, 99)).double().sum())
        loss(model, part(rank, step)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        loss(model, part(rank, step))  # no backward pass follows
        surgeon.step(loss=loss, **both(rank, 10 + step))
        _assert_at_rest(model, rank)
    loss(model, part(rank, 5)).mean().backward()
    optimizer.step()
    return whole(model), torch.stack(seen)


def _assert_at_rest(model, rank):
    """Nothing is whole but what is used, and nothing is left in what is gathered."""
    assert all(p.grad is None for p in model.parameters())
    if rank is None or not isinstance(model, FSDPModule):
        return
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for each in group.fsdp_params:
                    assert each._unsharded_param.untyped_storage().nbytes() == 0
                    assert each._unsharded_param.grad is None


def in_a_loop_of_ones_own(rank):
    model = made(rank)
    optimizer = adamw(model)
    surgeon, norms = gs.Surgeon(model, optimizer, gs.OrthoGrad()), []
    for step in range(2):
        optimizer.zero_grad()
        surgeon.add(loss=loss, **both(rank, step))
        surgeon.add(loss=loss, retain=part(rank, step + 40, (3, 1)))
        surgeon.backward(2.0)
        surgeon.backward(0.5, loss=loss, **both(rank, step + 60))  # to what is there
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        optimizer.step()
    return whole(model), torch.stack(norms)


def with_shares_that_come_and_go(rank):
    model = made(rank)
    surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad())
    for sizes in ((2, 0), (1, 3)):
        mine = part(rank, sum(sizes), sizes)
        surgeon.add(loss=loss, **({} if mine is None else {"batch": mine}))
    info = surgeon.step()
    return whole(model), info.gramian


def _steps(**options):
    def scenario(rank):
        model = made(rank)
        surgeon = gs.Surgeon(model, adamw(model), gs.OrthoGrad(), **options)
        infos = []
        for step in range(2):
            mine = {"forget": part(rank, step, (4, 1)), "retain": part(rank, step + 20, (1, 3))}
            infos.append(surgeon.step(loss=loss, **mine))
        return whole(model), infos[-1].gramian

    return scenario


def _stepped_by(optimizer):
    def scenario(rank):
        model = made(rank)
        surgeon = gs.Surgeon(model, optimizer(model), gs.UPGrad())
        infos = [surgeon.step(loss=loss, batch=part(rank, step)) for step in range(2)]
        return whole(model), infos[-1].gramian

    return scenario


def _adapted():
    from peft import LoraConfig, inject_adapter_in_model

    model = Network()
    options = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    return inject_adapter_in_model(options, model).double()


def adapters(rank):
    model = made(rank, _adapted)
    surgeon = gs.Surgeon(model, adamw(model), gs.OrthoGrad())
    infos = [surgeon.step(loss=loss, **both(rank, step)) for step in range(3)]
    return whole(model), infos[-1].gramian


def a_parameter_left_out(rank):
    model = made(rank, wrap=lambda m: fully_shard(m, ignored_params={m.learned}))
    surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad())
    info = surgeon.step(loss=loss, batch=part(rank, 3))
    return whole(model), info.gramian


def a_mesh_of_one_rank(rank):
    model = made(rank, wrap=lambda m: sharded_blocks(m, mesh=_mesh_of_one()))
    surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad())
    info = [surgeon.step(loss=loss, batch=data(4, step)) for step in range(2)][-1]
    return whole(model), info.gramian


def _mesh_of_one():
    return init_device_mesh("cpu", (2, 1), mesh_dim_names=("apart", "together"))["together"]


def _static(model):
    return composed(model, static_graph=True)


SAME = {
    "between plain steps": between_plain_steps,
    "between those of replicate": lambda rank: between_plain_steps(rank, _static),
    "in a loop of one's own": in_a_loop_of_ones_own,
    "with shares that come and go": with_shares_that_come_and_go,
    "micro-batches": _steps(micro_batch=2),
    "rows held": _steps(micro_batch=1, hold="rows"),
    "together": _steps(together=True),
    "stored": _steps(rows="stored"),
    "adapters": adapters,
    "a parameter left out": a_parameter_left_out,
    "a mesh of one rank": a_mesh_of_one_rank,
    "momentum": _stepped_by(lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)),
    "fused": _stepped_by(lambda m: adamw(m, fused=True)),
    "one by one": _stepped_by(lambda m: adamw(m, foreach=False)),
}


# 16 bits, to their rounding


def in_float32():
    return Network(torch.float32)


def _mixed(model, **options):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy, **options)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    return fully_shard(model, mp_policy=policy, **options)


def mixed(rank, **options):
    """The update of float32 parameters that passes have in bfloat16."""
    model = _mixed(in_float32(), **options)
    before = whole(model)
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=1.0), gs.OrthoGrad())
    info = surgeon.step(loss=loss, **both(rank, 3))
    return {name: p - before[name] for name, p in whole(model).items()}, info.gramian


def _halved():
    """The Gramian of a model in bfloat16."""
    model = Network(torch.bfloat16)
    surgeon = gs.Surgeon(model, adamw(model), gs.OrthoGrad())
    return surgeon.step(loss=loss, **both(None, 3)).gramian


def scaled(rank):
    """Steps with a scaler, then one whose rows overflow on the last rank."""
    model = made(rank, in_float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad(), scaler=scaler)
    for step in range(2):
        surgeon.step(loss=loss, batch=part(rank, step))
    after, scale = whole(model), 1 if rank == 0 else 3e38
    info = surgeon.step(loss=lambda m, b: loss(m, b) * scale, batch=part(rank, 3))
    assert info.skipped and scaler.get_scale() == 2.0**7
    assert all(torch.equal(p, after[name]) for name, p in whole(model).items())
    return after


# what ranks are told


def said(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def _told(rank):
    model = made(rank)
    optimizer = adamw(model)
    surgeon = gs.Surgeon(model, optimizer, gs.UPGrad())

    def step(loss=loss, **batches):
        surgeon.step(loss=loss, **(batches or {"batch": part(rank, 5)}))

    step()
    told, before = {}, (whole(model), _state(optimizer))

    def refused(name, call):
        told[name] = said(call)
        surgeon.discard()
        same = all(torch.equal(p, before[0][name]) for name, p in whole(model).items())
        assert same and all(map(torch.equal, _state(optimizer), before[1])), name

    def uneven():
        for _ in range(2 - rank):
            surgeon.add(loss=loss, batch=part(rank, 1))
        surgeon.backward()

    def raising(model, batch):
        losses = loss(model, batch)
        assert rank == 0, "mine"
        return losses

    def on_rank_1(*_):
        assert rank == 0, "a hook's"

    refused("uneven adds", uneven)
    refused("no batch", lambda: surgeon.add(loss=loss))
    refused("a loss", lambda: step(raising))
    refused("NaN", lambda: step(lambda m, b: loss(m, b) * (1 - rank / (1 - rank or float("nan")))))
    refused("an argument", lambda: step(batch=part(rank, 1) if rank == 0 else {"x": 3}))
    refused("no loss", lambda: step(loss if rank == 0 else None))
    handle = optimizer.register_step_post_hook(on_rank_1)
    refused("the optimizer", step)
    handle.remove()
    handle = model.tokens.weight.register_post_accumulate_grad_hook(on_rank_1)
    refused("a hook", step)
    handle.remove()
    told["after all"] = said(step)
    return told | _refused(rank)


def _state(optimizer):
    values = (v for entries in optimizer.state.values() for v in entries.values())
    return [v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for v in values]


def _refused(rank):
    model = made(rank)
    meshes = init_device_mesh("cpu", (2, 1), mesh_dim_names=("samples", "columns"))

    def surgeon(model, **options):
        surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad(), **options)
        surgeon.step(loss=loss, batch=part(rank, 1))

    def other_replicas():
        model = Network()
        model.mix.bias.data += rank
        fully_shard(model.blocks[1])
        return model

    def columns():
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        model = Network()
        parallelize_module(model.blocks[0].up, meshes["columns"], ColwiseParallel())
        return sharded_blocks(model, mesh=meshes["samples"])

    def two_meshes():
        model = Network()
        fully_shard(model.blocks[0], mesh=meshes["columns"])
        fully_shard(model.blocks[1], mesh=meshes["samples"])
        return model

    def left_behind():
        """No other rank has the shards that one rank's optimizer did not move."""
        model = made(rank)
        surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), gs.UPGrad())
        short = patch.object(torch.optim.SGD, "_init_group", side_effect=torch.OutOfMemoryError)
        with short if rank == 1 else nullcontext(), suppress(torch.OutOfMemoryError):
            surgeon.step(loss=loss, batch=part(rank, 1))
        surgeon.step(loss=loss, batch=part(rank, 2))

    other = fully_shard(nn.Linear(3, 3))
    outside = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    return {
        "own group": said(lambda: surgeon(model, process_group=dist.group.WORLD)),
        "other group": said(lambda: surgeon(model, process_group=meshes["columns"])),
        "alone": said(lambda: surgeon(model, process_group=False)),
        "projected": said(lambda: surgeon(model, project=gs.OWM(Network()))),
        "other replicas": said(lambda: surgeon(other_replicas())),
        "columns": said(lambda: surgeon(columns())),
        "two meshes": said(lambda: surgeon(two_meshes())),
        "outside": said(lambda: gs.Surgeon(model, outside, gs.UPGrad())),
        "left behind": said(left_behind),
    }


TOLD = {
    "uneven adds": ("InputError: rank 1 is at backward, rank 0 at add", "rank 0 is at add, rank 1"),
    "no batch": ("InputError: add: no batch was given",) * 2,
    "a loss": ("RankError: rank 1: AssertionError: mine", "AssertionError: mine"),
    "NaN": ("NonFiniteError: rank 1: losses: row 0 is", "NonFiniteError: losses: row 0 is"),
    "an argument": ("InputError: rank 1: batch must hold", "InputError: batch must hold"),
    "no loss": ("InputError: rank 1: loss must be a function", "InputError: loss must be a f"),
    "the optimizer": ("RankError: rank 1: AssertionError: a hook's", "AssertionError: a hook's"),
    "a hook": ("RankError: rank 1: AssertionError: a hook's", "AssertionError: a hook's"),
    "after all": ("accepted",) * 2,
    "own group": ("accepted",) * 2,
    "other group": ("process_group: fully_shard and replicate have their own",) * 2,
    "alone": ("model is spread over several processes or devices by fully_shard",) * 2,
    "projected": ("is no parameter of the model that project holds",) * 2,
    "other replicas": ("model: parameter mix.bias differs between rank 0 and rank 1",) * 2,
    "columns": ("model: parameter blocks.0.up.weight is placed as",) * 2,
    "two meshes": ("are on different meshes",) * 2,
    "left behind": ("optimizer: its last step failed on rank 1 and not on rank 0, whose sha",) * 2,
    "outside": ("['params'][18] is spread over several processes or devices by DTensor",) * 2,
}


def _work(rank):
    found = {name: scenario(rank) for name, scenario in SAME.items()}
    halves = mixed(rank), mixed(None, mesh=_mesh_of_one()), scaled(rank)
    return found, halves, _told(rank)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """What each of two ranks found."""
    return run(_work, 2, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", SAME)
def test_as_in_one_process(name, every):
    expected, seen = SAME[name](None)
    for each, _, _ in every:
        torch.testing.assert_close(each[name][0], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(each[name][1], seen, rtol=1e-12, atol=0)


def test_mixed_precision(every):
    for _, ((update, gramian), (alone, of_one), _), _ in every:
        assert all(p.dtype == torch.float32 for p in update.values())
        for name, expected in alone.items():
            assert (update[name] - expected).norm() <= 0.01 * expected.norm(), name
            assert torch.equal(update[name], every[0][1][0][0][name]), name
        for expected in (of_one, _halved()):
            assert (gramian - expected).abs().max() <= 0.01 * expected.abs().max()


def test_scaler(every):
    expected = scaled(None)
    for _, (_, _, found), _ in every:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_told(every):
    for rank, (_, _, told) in enumerate(every):
        for name, messages in TOLD.items():
            assert messages[rank] in told[name], name
