"""What goes wrong on one rank: all raise, all are as before, and the next step is a good one."""

import os
import re
import time
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradsurgery as gs
from gradsurgery.buffers import Buffers
from gradsurgery.capture.plane import Plane
from gradsurgery.capture.uses import Use
from gradsurgery.collect import Added
from gradsurgery.ranks import table
from gradsurgery.ranks.gramian import Exchange
from gradsurgery.ranks.slices import Slices
from gradsurgery.ranks.tiles import Tiles
from tests.models import state_of
from tests.ranks.cases import share, whole
from tests.ranks.processes import run

BAD = {2: 0, 3: 1}  # of each number of ranks, the one that fails
SHARES = {2: ((3, 2), (2, 4)), 3: ((1, 2, 2), (2, 3, 1))}


class Boom(Exception):
    pass


class Network(nn.Module):
    """A buffer counts its forward passes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layers(x)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def data(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(4, (size,), generator=generator)}


def batches(rule, seed, rank=None, ranks=2):
    """All samples, or those of one rank."""
    forget, other = SHARES[ranks]
    parts = {"forget": forget, "retain": other} if "forget" in rule.roles else {"batch": other}
    made = {}
    for k, (part, sizes) in enumerate(parts.items()):
        batch = data(sum(sizes), 10 * seed + k)
        made[part] = batch if rank is None else share(batch, sizes, rank)
    return made


def _raises(error):
    def fail(*args, **options):
        raise error

    return fail


def _losses(change):
    """A loss that is changed on the rank that fails."""

    @contextmanager
    def broken(surgeon, given):
        given["loss"] = lambda model, batch: change(model, batch)
        yield

    return broken


def _patched(*places):
    """Attributes of classes that raise, (class, name, error)."""

    @contextmanager
    def broken(surgeon, given):
        with ExitStack() as stack:
            for kind, name, error in places:
                stack.enter_context(patch.object(kind, name, _raises(error)))
            yield

    return broken


def _given(**changed):
    @contextmanager
    def broken(surgeon, given):
        given.update(changed)
        yield

    return broken


def _nan_row(model, batch):
    """Finite losses; the gradient of the last sample is NaN."""
    losses, out = loss(model, batch), model(batch["x"])
    steep = (out * 0).sum(1).abs().sqrt()
    return losses + steep * torch.arange(1 - len(steep), 1).eq(0)


def _in_forward(model, batch):
    handle = model.layers[1].register_forward_hook(_raises(Boom("deep inside")))
    try:
        return loss(model, batch)
    finally:
        handle.remove()


def _after(model, batch):
    loss(model, batch)
    raise Boom("after the forward pass")


@contextmanager
def _hook(surgeon, given):
    handle = surgeon.model.layers[2].weight.register_post_accumulate_grad_hook(
        _raises(Boom("in a hook"))
    )
    yield
    handle.remove()


def _stepping(moves):
    """The optimizer of this rank alone runs code of the user's, which raises."""

    @contextmanager
    def broken(surgeon, given):
        optimizer = surgeon.optimizer

        def step():
            if moves:
                type(optimizer).step(optimizer)
            raise Boom("in the optimizer")

        optimizer.step = step
        yield
        del optimizer.step

    return broken


def _optimizer_hook(when):
    @contextmanager
    def broken(surgeon, given):
        register = getattr(surgeon.optimizer, f"register_step_{when}_hook")
        handle = register(_raises(Boom("in a hook of the optimizer")))
        yield
        handle.remove()

    return broken


@contextmanager
def _frozen(surgeon, given):
    surgeon.model.layers[0].bias.requires_grad_(False)
    yield
    surgeon.model.layers[0].bias.requires_grad_(True)


@contextmanager
def _infinite_grad(surgeon, given):
    given["call"] = "backward"
    grad = surgeon.model.get_parameter("layers.0.weight").grad
    surgeon.model.get_parameter("layers.0.weight").grad = torch.full_like(grad, float("inf"))
    yield
    surgeon.model.get_parameter("layers.0.weight").grad = grad


@contextmanager
def _bad_scale(surgeon, given):
    given["call"], given["scale"] = "backward", 2.0
    yield


def _tasks(model, batch):
    return torch.stack([loss(model, batch), loss(model, batch) * 2], 1)


OOM = torch.OutOfMemoryError("CUDA out of memory")
# by name: what breaks on one rank, and what the others then raise, and say
CASES = {
    "NaN row": (_losses(_nan_row), gs.NonFiniteError, "row . is not finite: .*layers"),
    "loss that is not finite": (
        _losses(lambda m, b: loss(m, b) * float("nan")),
        gs.NonFiniteError,
        "losses: row 0 is not finite: nan",
    ),
    "empty batch": (_given(retain=data(0, 0)), gs.InputError, "retain is empty"),
    "batch of a wrong type": (_given(forget="text"), gs.InputError, "forget must hold tensors"),
    "losses [B, 1]": (_losses(lambda m, b: loss(m, b)[:, None]), gs.InputError, "one value per s"),
    "no loss": (_given(loss=None), gs.InputError, "loss must be a function"),
    "detached": (_losses(lambda m, b: loss(m, b).detach()), gs.InputError, ""),
    "before the forward pass": (_losses(_raises(Boom("early"))), gs.RankError, "Boom: early"),
    "in the forward pass": (_losses(_in_forward), gs.RankError, "Boom: deep inside"),
    "after the forward pass": (_losses(_after), gs.RankError, "Boom: after the forward"),
    "memory, filling": (_patched((Slices, "fill", OOM)), gs.RankError, "out of memory"),
    "memory, forming": (
        _patched((Use, "write_rows", OOM)),
        gs.RankError,
        "out of memory",
    ),
    "memory, numbers": (_patched((Exchange, "_of", OOM)), gs.RankError, "out of memory"),
    "memory, entries": (_patched((Exchange, "_entry", OOM)), gs.RankError, "out of memory"),
    "memory, tiles": (_patched((Tiles, "gramian", OOM)), gs.RankError, "out of memory"),
    "memory, filling tiles": (_patched((Tiles, "fill", OOM)), gs.RankError, "out of memory"),
    "rows in order": (_patched((Added, "_in_order", OOM)), gs.RankError, "out of memory"),
    "before all": (_patched((Buffers, "__init__", OOM)), gs.RankError, "out of memory"),
    "rule": (_patched((gs.OrthoGrad, "solve", Boom("a rule"))), gs.RankError, "Boom: a rule"),
    "rule, refining": (
        _patched((gs.OrthoGrad, "_mix", Boom("a rule"))),
        gs.RankError,
        "Boom: a rule",
    ),
    "update": (_patched((Plane, "update", OOM)), gs.RankError, "out of memory"),
    "hook of a gradient": (_hook, gs.RankError, "Boom: in a hook"),
    "optimizer, first": (_stepping(False), gs.RankError, "Boom: in the optimizer"),
    "optimizer, moved": (_stepping(True), gs.RankError, "Boom: in the optimizer"),
    "before the optimizer": (_optimizer_hook("pre"), gs.RankError, "Boom: in a hook of"),
    "after the optimizer": (_optimizer_hook("post"), gs.RankError, "Boom: in a hook of"),
    "frozen": (_frozen, gs.InputError, "train different parameters, as layers.0.bias"),
    "step and backward": (_given(call="backward"), gs.InputError, "is at (step|backward)"),
    "scale": (_bad_scale, gs.InputError, "scale: ranks have different ones"),
    "infinite .grad": (_infinite_grad, gs.NonFiniteError, "the update of layers.0.weight overf"),
    "losses [B, T]": (_losses(_tasks), gs.InputError, r"one shape for batch, got \[B"),
    "rule of formed rows": (
        _patched((gs.GradDrop, "_edit", Boom("a rule"))),
        gs.RankError,
        "Boom: a rule",
    ),
}
RULES = {
    "losses [B, T]": gs.UPGrad,
    "rule of formed rows": gs.GradDrop,
    "rule, refining": lambda: gs.OrthoGrad(refine=2),
    "infinite .grad": lambda: gs.OrthoGrad(granularity="tensor"),
}
# where all say one thing, the rank that it is about has no error of its own
SHARED = ("frozen", "step and backward", "scale", "losses [B, T]")
BOTH_BACKWARD = ("scale", "infinite .grad")
# where tiles are what is to be chosen
TILES = (1e30, 1.0)
SPEEDS = {"memory, tiles": TILES, "memory, filling tiles": TILES}


def _state(model, optimizer, rule):
    return {**state_of(model, optimizer), **{f"rule.{k}": v for k, v in rule._state.items()}}


def _changed(before, after):
    names = [name for name in {**before, **after} if (name in before) != (name in after)]
    both = [name for name in before if name in after]
    same = lambda a, b: torch.equal(a, b) if torch.is_tensor(a) else a == b  # noqa: E731
    return names + [name for name in both if not same(before[name], after[name])]


def _surgeon(rule, rank=None, optimizer=torch.optim.AdamW, **options):
    model = Network()
    group = None if rank is None else dist.group.WORLD
    made = optimizer(model.parameters(), lr=1e-2)
    return gs.Surgeon(model, made, rule, process_group=group, **options)


def _said(call):
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error), str(error), time.monotonic() - start
    return None


def _failed(name, rank, ranks):
    """What the failing step said, what it changed, and parameters after the next one."""
    broken, *_ = CASES[name]
    rule = RULES.get(name, gs.OrthoGrad)()
    surgeon = _surgeon(rule, rank)
    surgeon.step(loss=loss, **batches(rule, 0, rank, ranks))
    surgeon.model.get_parameter("layers.0.weight").grad = torch.ones(20, 6).double()
    given = {"loss": loss, **batches(rule, 1, rank, ranks)}
    if name in BOTH_BACKWARD:
        given["call"] = "backward"
    before = _state(surgeon.model, surgeon.optimizer, rule)
    with ExitStack() as stack:
        if rank == BAD[ranks]:
            stack.enter_context(broken(surgeon, given))
        call = getattr(surgeon, given.pop("call", "step"))
        said = _said(lambda: call(**given))
    changed = _changed(before, _state(surgeon.model, surgeon.optimizer, rule))
    surgeon.step(loss=loss, **batches(rule, 2, rank, ranks))
    return said, changed, whole(surgeon.model)


# what one rank begins with that others have not, and what all say


def _turned(surgeon):
    with torch.no_grad():
        for parameter in surgeon.model.parameters():  # whose norms stay
            parameter.copy_(parameter.flip(0))


def _frozen_unlike(surgeon):
    surgeon.model.get_parameter("layers.0.weight").requires_grad_(False)[0] += 1


def _remembers(surgeon):
    surgeon.rule._draw(3, lambda generator: torch.rand(1, generator=generator))


def _stepped_before(surgeon):
    surgeon.step(loss=loss, **batches(surgeon.rule, 9))


def _of_the_rule(rule):
    def change(surgeon):
        surgeon.rule = rule

    return change


def _options(**options):
    return lambda surgeon: surgeon.optimizer.param_groups[0].update(options)


def _projects(surgeon):
    surgeon.project = gs.OWM(surgeon.model)


def _observes_alone(surgeon):
    surgeon.project.observe(data(2, 5), loss, process_group=False)


UNLIKE = {
    "another rule": (gs.PCGrad, _of_the_rule(gs.UPGrad()), "rule: rank 0 and rank 1 have differ"),
    "an option": (gs.GradDrop, _of_the_rule(gs.GradDrop(leak=0.5)), "rule: rank 0 and rank 1"),
    "what a rule remembers": (gs.GradDrop, _remembers, "rule: what it remembers, draws, differs"),
    "weights": (gs.PCGrad, _turned, "parameter layers.0.weight differs between rank 0 and rank 1"),
    "frozen weights": (gs.PCGrad, _frozen_unlike, "parameter layers.0.weight differs"),
    "the learning rate": (gs.PCGrad, _options(lr=0.5), "have different ones: lr of group 0"),
    "observations": (gs.PCGrad, _observes_alone, "project: rank 0 and rank 1 have observed diff"),
    "projection": (gs.PCGrad, _projects, "project: rank 0 and rank 1 have different ones"),
}


def _unlike(name, rank, ranks):
    """What the first step said, what it changed, and what it said where all are alike."""
    make, change, _ = UNLIKE[name]
    surgeon = _surgeon(make(), rank)
    if name == "frozen weights":
        surgeon.model.get_parameter("layers.0.weight").requires_grad_(False)
    if name == "observations":
        surgeon.project = gs.NullSpace(surgeon.model)
        surgeon.project.observe(data(2, 4), loss, process_group=dist.group.WORLD)
    if rank == 1:
        change(surgeon)
    before = _state(surgeon.model, surgeon.optimizer, surgeon.rule)
    said = _said(lambda: surgeon.step(loss=loss, **batches(surgeon.rule, 0, rank, ranks)))
    changed = _changed(before, _state(surgeon.model, surgeon.optimizer, surgeon.rule))
    return said, changed


@pytest.mark.parametrize("name", UNLIKE)
def test_ranks_that_begin_unlike(every, name):
    _, found = every
    for each in found:
        said, changed = each[name]
        assert said[0] is gs.InputError
        assert re.search(UNLIKE[name][2], said[1]), said[1]
        assert not changed


def _failed_add(rank, ranks):
    """One rank's `add` raises; the others hear of it in `backward`, and keep what they added."""
    rule = gs.OrthoGrad()
    surgeon = _surgeon(rule, rank)
    surgeon.add(loss=loss, **batches(rule, 0, rank, ranks))
    if rank == BAD[ranks]:
        said = _said(lambda: surgeon.add(loss=_raises(Boom("in add")), forget=data(2, 3)))
    else:
        said = _said(surgeon.backward)
    info = surgeon.backward()
    surgeon.optimizer.step()
    return said, info.gramian, whole(surgeon.model)


def test_an_error_in_add_is_told_where_the_others_meet_next(every):
    ranks, found = every
    rule = gs.OrthoGrad()
    alone = _surgeon(rule)
    info = alone.step(loss=loss, **batches(rule, 0, ranks=ranks))
    for rank, each in enumerate(found):
        said, gramian, parameters = each["add"]
        if rank == BAD[ranks]:
            assert said[:2] == (Boom, "in add")
        else:
            assert said[:2] == (gs.RankError, f"rank {BAD[ranks]}: Boom: in add")
        torch.testing.assert_close(gramian, info.gramian, rtol=1e-12, atol=0)
        for key, value in whole(alone.model).items():
            torch.testing.assert_close(parameters[key], value, rtol=0, atol=1e-10)


def _overflowed(rank, ranks):
    """Whether each of three steps was skipped, and what became of the scale; the second overflows
    on one rank."""
    rule, scaler = gs.OrthoGrad(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    surgeon = _surgeon(rule, rank, scaler=scaler)
    found, before = [], None
    for step in range(3):
        large = step == 1 and rank == BAD[ranks]
        factor = 1e306 if large else 1.0
        before = _state(surgeon.model, surgeon.optimizer, rule)
        info = surgeon.step(
            loss=lambda m, b, c=factor: loss(m, b) * c, **batches(rule, step, rank, ranks)
        )
        moved = _changed(before, _state(surgeon.model, surgeon.optimizer, rule))
        found.append((info.skipped, scaler.get_scale(), [n for n in moved if n != "model.calls"]))
    return found, whole(surgeon.model)


def test_rows_that_overflow_on_one_rank(every):
    _, found = every
    for each in found:
        steps, parameters = each["scaler"]
        assert [skipped for skipped, *_ in steps] == [False, True, False]
        assert [scale for _, scale, _ in steps] == [2.0**10, 2.0**9, 2.0**9]
        assert not steps[1][2]
        for name, value in parameters.items():
            assert torch.equal(value, found[0]["scaler"][1][name])


def _stepped_alone(rank, ranks):
    """The optimizer's memory ends on one rank: it is alone with that, until all meet again."""
    rule = gs.OrthoGrad()
    surgeon, said = _surgeon(rule, rank), []
    for step in range(2):
        short = patch.object(torch.optim.AdamW, "_init_group", _raises(OOM))
        with short if step == 0 and rank == BAD[ranks] else ExitStack():
            call = lambda s=step: surgeon.step(loss=loss, **batches(rule, s, rank, ranks))  # noqa: E731
            said.append(_said(call))
    return said


def test_replicas_that_parted(every):
    ranks, found = every
    for rank, each in enumerate(found):
        first, second = each["alone"]
        assert (first and first[0]) is (torch.OutOfMemoryError if rank == BAD[ranks] else None)
        assert second[0] is gs.InputError
        assert "differs between" in second[1]


def _dies(rank, folder):
    """One rank is interrupted in a step, and gone: the others do not wait for ever."""
    rule = gs.OrthoGrad()
    surgeon = _surgeon(rule, rank)
    surgeon.step(loss=loss, **batches(rule, 0, rank, 3))

    def lost(model, batch):
        raise KeyboardInterrupt

    def gone():
        try:
            surgeon.step(loss=lost, **batches(rule, 1, rank, 3))
        except KeyboardInterrupt:
            (folder / "interrupted").touch()
            os._exit(0)

    good = batches(rule, 1, rank, 3)
    said = _said(lambda: gone() if rank == 1 else surgeon.step(loss=loss, **good))
    torch.save(said, folder / f"said {rank}")
    os._exit(0)  # there is no group to be left in good order


def test_a_rank_that_dies_ends_the_others(tmp_path):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError):  # no rank came to its end
        run(_dies, 3, tmp_path, tmp_path)
    assert time.monotonic() - start < 40
    assert (tmp_path / "interrupted").exists()
    for rank in (0, 2):
        said = torch.load(tmp_path / f"said {rank}", weights_only=False)
        assert said[0] is gs.RankError
        assert "does not answer" in said[1]


def _every(rank, ranks):
    counted, found = table.SPEED["cpu"], {}
    for name in CASES:
        table.SPEED["cpu"] = SPEEDS.get(name, counted)
        found[name] = _failed(name, rank, ranks)
    table.SPEED["cpu"] = counted
    for name in UNLIKE:
        found[name] = _unlike(name, rank, ranks)
    found["add"] = _failed_add(rank, ranks)
    found["scaler"] = _overflowed(rank, ranks)
    found["alone"] = _stepped_alone(rank, ranks)
    return found


@pytest.fixture(scope="module", params=sorted(BAD))
def every(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return request.param, run(_every, request.param, folder, request.param)


@pytest.mark.parametrize("name", CASES)
def test_what_fails_on_one_rank(every, name):
    ranks, found = every
    _, kind, message = CASES[name]
    for rank, each in enumerate(found):
        said, changed, _ = each[name]
        assert said is not None
        assert not changed
        assert said[2] < 20
        own = rank == BAD[ranks] and name not in SHARED
        wanted = message.partition("Boom: ")[2] or message if own else message
        assert re.search(wanted, said[1]), said[1]
        if own:
            assert issubclass(
                said[0], (Boom, torch.OutOfMemoryError) if kind is gs.RankError else kind
            )
        else:
            assert said[0] is kind
            assert re.search(r"rank \d", said[1]) or name == "scale", said[1]
        if not own and name not in SHARED:
            assert said[1].startswith(f"rank {BAD[ranks]}: ")
    rule = RULES.get(name, gs.OrthoGrad)()
    alone = _surgeon(rule)
    for seed in (0, 2):
        alone.step(loss=loss, **batches(rule, seed, ranks=ranks))
    for key, value in whole(alone.model).items():
        for each in found:
            torch.testing.assert_close(each[name][2][key], value, rtol=0, atol=1e-10)
            assert torch.equal(each[name][2][key], found[0][name][2][key])
