"""Everything a step is made of, on several ranks: as in one process on the samples of all."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradsurgery as gs
from gradsurgery.ranks import table
from tests.ranks.cases import Network, data, loss, share, whole
from tests.ranks.networks import (
    Checkpointed,
    Convolutions,
    Counting,
    Experts,
    Learned,
    Odd,
    OneMatrix,
    Rows,
    Turned,
    Viewed,
    adapted,
    classified,
    digits,
    factored,
    faint,
    in_bfloat16,
    mixture,
    next_tokens,
    normed,
    of_outputs,
    ordered,
    repeated,
    small,
    some_zero,
    tasks,
    weighted,
    weighted_rarely,
    widely_scaled,
)
from tests.ranks.processes import run

TILES, ROWS = "tiles", "rows"


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-1)


@dataclass
class Case:
    """What is stepped on one process and on several."""

    rule: Any = gs.OrthoGrad
    network: Any = Network
    loss: Any = loss
    data: Any = data  # (size, seed)
    sizes: dict = field(default_factory=lambda: {"forget": (2, 3), "retain": (3, 2)})
    options: dict = field(default_factory=dict)
    alone: dict | None = None  # options in one process, if others
    how: Any = None  # (surgeon, loss, parts, rank): the step
    optimizer: Any = adamw
    wrap: Any = None
    project: Any = None  # of the wrapped model
    observed: tuple = (2, 1)  # samples of each rank
    speed: Any = None  # TILES or ROWS, where one of these is to be chosen
    steps: int = 2
    close: tuple = (1e-12, 1e-10)  # of Gramians, of parameters
    buffers: bool = False  # whether these are those of one process, too


# ways to step


def adds(surgeon, loss, parts, rank):
    """Micro-batches of unequal number and size; one rank's first retain, then forget."""
    for part in sorted(parts, reverse=bool(rank)):
        batch = parts[part]
        size = 0 if batch is None else len(batch["x"])
        for at in range(0, size, 1 + (rank or 0)):
            piece = {name: value[at : at + 1 + (rank or 0)] for name, value in batch.items()}
            surgeon.add(loss=loss, **{part: piece})
    return surgeon.step()


def listed(surgeon, loss, parts, rank):
    cut = {
        part: batch
        and [{k: v[at : at + 1] for k, v in batch.items()} for at in range(len(batch["x"]))]
        for part, batch in parts.items()
    }
    return surgeon.step(loss=loss, **cut)


def backwards(surgeon, loss, parts, rank):
    info = surgeon.backward(loss=loss, **parts)
    surgeon.optimizer.step()
    surgeon.optimizer.zero_grad()
    return info


RETAIN = {"forget": (2, 3), "retain": (3, 2), "memory": (1, 2)}
BATCH = {"batch": (3, 2)}
NONE = {"forget": (4, 0), "retain": (5, 0)}
DIGITS = {"network": Rows, "loss": classified, "data": digits}
WIDE = {"close": (1e-5, 1e-5)}
ROUGH = {"close": (3e-2, 1e-2), "optimizer": sgd}

CASES = {
    "plain": Case(),
    "add": Case(how=adds),
    "add, a rank with none": Case(how=adds, sizes=NONE),
    "add, one kind each": Case(how=adds, sizes={"forget": (4, 0), "retain": (0, 5)}),
    "a rank with none": Case(sizes=NONE),
    "the first with none": Case(sizes={"forget": (0, 3), "retain": (0, 4)}),
    "lists": Case(how=listed),
    "backward": Case(how=backwards),
    "micro_batch": Case(options={"micro_batch": 1}),
    "micro_batch 2": Case(options={"micro_batch": 2}, sizes={"forget": (2, 5), "retain": (6, 2)}),
    **{f"hold {h}": Case(how=adds, options={"hold": h}) for h in ("pairs", "rows", "auto")},
    "together": Case(options={"together": True}, **DIGITS),
    "stored": Case(options={"rows": "stored"}, **DIGITS),
    "stored, added": Case(options={"rows": "stored"}, alone={}, how=adds, **DIGITS),
    "stored, none": Case(options={"rows": "stored"}, sizes=NONE, **DIGITS),
    "stored, mean": Case(
        rule=partial(gs.OrthoGrad, retain="mean"), options={"rows": "stored"}, **DIGITS
    ),
    "mixed rows": Case(rule=gs.PCGrad, sizes=BATCH, **DIGITS),
    "tasks": Case(rule=gs.UPGrad, sizes=BATCH, network=Rows, loss=tasks, data=digits),
    "tasks, added": Case(
        rule=gs.UPGrad, sizes=BATCH, network=Rows, loss=tasks, data=digits, how=adds
    ),
    "tasks, none": Case(
        rule=gs.UPGrad, sizes={"batch": (0, 4)}, network=Rows, loss=tasks, data=digits
    ),
    "tasks and memory": Case(
        rule=gs.GEM, sizes={"batch": (3, 2), "memory": (0, 3)}, network=Rows, loss=tasks,
        data=digits,
    ),
    "token means": Case(loss=weighted),
    "token means, added": Case(loss=weighted, how=adds),
    "token means of retain": Case(
        rule=partial(gs.OrthoGrad, retain="mean"), loss=weighted, how=adds
    ),
    "few token means": Case(loss=weighted_rarely, sizes={"forget": (4, 1), "retain": (3, 1)}),
    "few token means, added": Case(
        loss=weighted_rarely, sizes={"forget": (4, 1), "retain": (3, 1)}, how=adds
    ),
    "memory": Case(sizes=RETAIN),
    "memory, added": Case(sizes=RETAIN, how=adds),
    "memory of one": Case(sizes={**RETAIN, "memory": (0, 2)}),
    "learned weights": Case(**{**DIGITS, "loss": Learned}),
    "learned weights, none": Case(sizes=NONE, **{**DIGITS, "loss": Learned}),
    "odd parameters": Case(**{**DIGITS, "network": Odd}),
    "odd parameters, none": Case(sizes=NONE, **{**DIGITS, "network": Odd}),
    "odd parameters, tensor": Case(
        rule=partial(gs.OrthoGrad, granularity="tensor"), **{**DIGITS, "network": Odd}
    ),
    "LoRA": Case(**{**DIGITS, "network": adapted}),
    "checkpoints": Case(**{**DIGITS, "network": Checkpointed}),
    "convolutions": Case(
        network=Convolutions, loss=classified, data=partial(digits, width=16)
    ),
    "convolutions by rows": Case(
        network=Convolutions, loss=classified, data=partial(digits, width=16), speed=ROWS
    ),
    "autocast": Case(
        network=partial(Rows, torch.float32), loss=in_bfloat16, data=digits, **ROUGH
    ),
    "bfloat16": Case(network=partial(Rows, torch.bfloat16), loss=classified, data=digits, **ROUGH),
    "bfloat16, tokens": Case(network=partial(Network, torch.bfloat16), **ROUGH),
    "float16": Case(network=partial(Rows, torch.float16), loss=classified, data=digits, **ROUGH),
    "experts": Case(**{**DIGITS, "network": partial(Experts, False)}),
    "experts in a stack": Case(**{**DIGITS, "network": partial(Experts, True)}),
    "experts in a stack, tiles": Case(
        speed=TILES, **{**DIGITS, "network": partial(Experts, True)}
    ),
    "turned": Case(**{**DIGITS, "network": Turned}),
    "turned, tiles": Case(speed=TILES, **{**DIGITS, "network": Turned}),
    "turned, rows": Case(speed=ROWS, rule=gs.PCGrad, sizes=BATCH, **{**DIGITS, "network": Turned}),
    **{
        f"viewed, {rule.__name__}, {way}": Case(
            rule=rule, sizes=sizes, speed=speed, how=how,
            **{**DIGITS, "network": Viewed, "data": ordered},
        )
        for way, speed, how in (("tiles", TILES, None), ("rows", ROWS, adds))
        for rule, sizes in ((gs.OrthoGrad, Case().sizes), (gs.PCGrad, BATCH))
    },
    "weight norm": Case(**{**DIGITS, "network": normed}),
    "weight norm, none": Case(sizes=NONE, **{**DIGITS, "network": normed}),
    "weight norm, refined": Case(
        rule=partial(gs.OrthoGrad, refine=1, granularity="tensor"),
        **{**DIGITS, "network": normed},
    ),
    "weight norm, GradDrop": Case(rule=gs.GradDrop, sizes=BATCH, **{**DIGITS, "network": normed}),
    **{
        f"mixture, {experts}, {way}": Case(
            network=partial(mixture, experts), loss=next_tokens, sizes=sizes, speed=speed,
            optimizer=sgd, **WIDE,
        )
        for experts in ("eager", "grouped_mm")
        for way, speed, sizes in (
            ("counted", None, {"forget": (2, 1), "retain": (1, 2)}),
            ("tiles, none", TILES, {"forget": (2, 0), "retain": (3, 0)}),
            ("rows", ROWS, {"forget": (2, 1), "retain": (1, 2)}),
        )
    },
    "convolutions, none": Case(
        network=Convolutions, loss=classified, data=partial(digits, width=16), sizes=NONE,
        how=adds, options={"hold": "rows"},
    ),
    "GradDrop": Case(rule=gs.GradDrop, sizes=BATCH),
    "GradDrop of tasks": Case(rule=gs.GradDrop, sizes=BATCH, network=Rows, loss=tasks, data=digits),
    "SignAgreement": Case(rule=partial(gs.SignAgreement, threshold=0.5), sizes=BATCH),
    "TrimmedMean": Case(rule=gs.TrimmedMean, sizes=BATCH),
    "preconditioned": Case(rule=partial(gs.OrthoGrad, precondition="optimizer"), steps=3),
    "preconditioned, tiles": Case(
        rule=partial(gs.OrthoGrad, precondition="optimizer"), steps=3, speed=TILES
    ),
    "refined": Case(rule=partial(gs.OrthoGrad, refine=2)),
    "refined, tensors": Case(
        rule=partial(gs.OrthoGrad, refine=1, granularity="tensor", small_tensors="leave")
    ),
    "modules": Case(rule=partial(gs.OrthoGrad, granularity="module")),
    **{
        f"{name}, {way}": Case(
            rule=rule, sizes=sizes, network=partial(Rows, torch.float32), loss=factored,
            data=made, speed=speed, optimizer=partial(torch.optim.SGD, lr=lr), **WIDE,
        )
        for way, speed in {"tiles": TILES, "rows": ROWS}.items()
        for name, rule, sizes, made, lr in (
            ("scales of all sizes", gs.Mean, BATCH, widely_scaled, 1e-31),
            ("small rows", gs.OrthoGrad, {"forget": (2, 3), "retain": (3, 2)}, small, 1e28),
        )
    },
    **{
        f"faint products, {way}": Case(
            rule=gs.PCGrad, sizes=BATCH, network=OneMatrix, loss=factored, data=faint, speed=way,
            **WIDE,
        )
        for way in (TILES, ROWS)
    },
    "zero rows": Case(network=Rows, loss=factored, data=some_zero),
    "repeated rows": Case(**{**DIGITS, "data": repeated}),
    "null space": Case(project=gs.NullSpace, **DIGITS),
    "null space, one rank's": Case(project=gs.NullSpace, observed=(0, 3), **DIGITS),
    "OWM": Case(project=partial(gs.OWM, alpha=1e-3, others="leave"), **DIGITS),
    "OWM of DDP": Case(project=gs.OWM, wrap=nn.parallel.DistributedDataParallel, **DIGITS),
    "counts of DDP": Case(
        wrap=nn.parallel.DistributedDataParallel, **{**DIGITS, "network": Counting}
    ),
}  # fmt: skip


def _stepped(name, rank=None):
    """Parameters, buffers and infos of one process, or of a rank."""
    case = CASES[name]
    if case.speed == TILES:  # where nothing but what is sent counts
        table.SPEED["cpu"] = 1e30, 1.0
    elif case.speed == ROWS:
        table._tiles = lambda *_: None
    model = case.network()
    wrapped = model if case.wrap is None or rank is None else case.wrap(model)
    group = dist.group.WORLD if rank is not None and case.wrap is None else None
    lost = case.loss() if isinstance(case.loss, type) else case.loss
    held = [p for p in model.parameters() if p.requires_grad]
    held += [lost.sizes] if isinstance(lost, Learned) else []
    options = case.alone if rank is None and case.alone is not None else case.options
    if case.project is not None:
        options = {**options, "project": case.project(wrapped)}
        batch = case.data(sum(case.observed), 90)
        mine = batch if rank is None else share(batch, case.observed, rank)
        options["project"].observe(mine, of_outputs, process_group=group)
    surgeon = gs.Surgeon(wrapped, case.optimizer(held), case.rule(), process_group=group, **options)
    infos = []
    for step in range(case.steps):
        parts = {}
        for k, (part, sizes) in enumerate(case.sizes.items()):
            batch = case.data(sum(sizes), 10 * step + k)
            parts[part] = batch if rank is None else share(batch, sizes, rank)
        if case.how is None or rank is None:
            info = surgeon.step(loss=lost, **parts)
        else:
            info = case.how(surgeon, lost, parts, rank)
        infos.append((info.gramian, info.to_dict()))
    values = whole(model)
    if isinstance(lost, Learned):
        values["sizes"] = lost.sizes.detach().clone()
    return values, {n: b.clone() for n, b in model.named_buffers()}, infos


def _every(rank):
    """Of each case what this rank found, or said."""
    found = {}
    for name in CASES:
        found[name] = _found(name, rank)
    for name, (call, _) in REFUSED.items():
        with pytest.raises(gs.InputError) as caught:
            call()
        found[name] = str(caught.value)
    found["own buffers"] = _buffers_of_its_own(rank)
    return found


def _found(name, rank=None):
    counted, best = table.SPEED["cpu"], table._tiles
    try:
        return _stepped(name, rank)
    except gs.InputError as error:  # all ranks raise, and go on together
        return f"{type(error).__name__}: {error}"
    finally:
        table.SPEED["cpu"], table._tiles = counted, best


# what is not served on several ranks, and what the error says


def _surgeon(model, **options):
    held = [p for p in model.parameters() if p.requires_grad]
    return gs.Surgeon(model, torch.optim.SGD(held, lr=0.1), gs.Mean(), **options)


def _calls_the_wrapper():
    model = nn.parallel.DistributedDataParallel(Rows())
    lost = lambda _, batch: classified(model, batch)  # noqa: E731
    _surgeon(model).step(batch=digits(2, 0), loss=lost)


def _sync_batch_norm():
    model = nn.Sequential(nn.Linear(6, 4), nn.SyncBatchNorm(4)).double()
    _surgeon(model, process_group=dist.group.WORLD).step(batch=digits(2, 0), loss=classified)


def _observes_without_a_group():
    gs.OWM(Rows()).observe(digits(2, 0), of_outputs)


def _observes_nothing():
    gs.OWM(Rows()).observe(None, of_outputs, process_group=dist.group.WORLD)


def _observes_other_parameters():
    model = Rows()
    if dist.get_rank() == 1:
        model.layers[0].weight.requires_grad_(False)
    gs.OWM(model).observe(digits(2, 0), of_outputs, process_group=dist.group.WORLD)


def _is_flat_on_one():
    def lost(model, batch):
        return of_outputs(model, batch) * (dist.get_rank() == 0)

    gs.OWM(Rows()).observe(digits(2, 0), lost, process_group=dist.group.WORLD)


REFUSED = {
    "loss calls the wrapper": (_calls_the_wrapper, "loss calls the DistributedDataParallel"),
    "SyncBatchNorm": (_sync_batch_norm, "model: 1 is a SyncBatchNorm in training mode"),
    "observe without a group": (_observes_without_a_group, "runs 2 ranks: pass process_group"),
    "observe nothing": (_observes_nothing, "batch must be given on one rank at least"),
    "observe others": (_observes_other_parameters, "train different parameters, as layers.0.weig"),
    "observe flat losses": (_is_flat_on_one, "loss is flat on the data observed"),
}


def _buffers_of_its_own(rank):
    """Those of DDP that leaves them alone, and those of a plain replica."""
    found = []
    for options in ({"broadcast_buffers": False}, None):
        model = Counting()
        group = dist.group.WORLD if options is None else None
        wrapped = (
            model if options is None else nn.parallel.DistributedDataParallel(model, **options)
        )
        surgeon = _surgeon(wrapped, process_group=group)
        surgeon.step(batch=digits(2, rank), loss=classified)
        found.append(torch.equal(model.last, digits(2, rank)["x"][0, :2]))
    return found


def _in_a_group_of_two(rank):
    """The last two of three ranks step together, the first alone; a mesh is a group, too."""
    from torch.distributed.device_mesh import init_device_mesh

    group = dist.new_group([1, 2])
    mesh = init_device_mesh("cpu", (3,))
    alone, together, all_three, said = Rows(), Rows(), Rows(), None
    _surgeon(alone, process_group=False).step(batch=digits(2, rank), loss=classified)
    if rank:
        surgeon = _surgeon(together, process_group=group)
        surgeon.step(batch=share(digits(5, 9), (0, 3, 2), rank), loss=classified)
        try:
            bad = digits(2, 0) if rank == 1 else "text"
            surgeon.step(batch=bad, loss=classified)
        except gs.InputError as error:
            said = str(error)
    _surgeon(all_three, process_group=mesh).step(
        batch=share(digits(5, 9), (1, 2, 2), rank), loss=classified
    )
    return whole(alone), whole(together), whole(all_three), said


def test_groups_of_some_ranks(tmp_path):
    found = run(_in_a_group_of_two, 3, tmp_path)
    expected, first = Rows(), Rows()
    _surgeon(expected).step(batch=digits(5, 9), loss=classified)
    _surgeon(first).step(batch=digits(2, 0), loss=classified)
    for rank, (alone, together, all_three, said) in enumerate(found):
        for name, value in whole(expected).items():
            for each in (all_three, together) if rank else (all_three,):
                torch.testing.assert_close(each[name], value, rtol=0, atol=1e-12)
        if rank == 0:
            assert all(torch.equal(alone[name], value) for name, value in whole(first).items())
        else:
            assert ("rank 2: " in said) == (rank == 1)
            assert "batch must hold tensors" in said


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return run(_every, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_parts_are_those_of_one_process(every, name):
    case, found = CASES[name], [each[name] for each in every]
    gramian, parameters = case.close
    values, _, infos = _found(name)
    for each in found:
        assert not isinstance(each, str), each
        for (gram, seen), (expected, wanted) in zip(each[2], infos, strict=True):
            norms = expected.diagonal().sqrt()
            assert gram.shape == expected.shape
            assert ((gram - expected).abs() <= gramian * norms[:, None] * norms + 1e-300).all()
            for key in wanted.keys() - {"seconds"}:
                close = {"rtol": 10 * gramian, "atol": 10 * gramian}
                assert_same(key, seen[key], wanted[key], close)
        for key, value in values.items():
            largest = float(value.abs().max()) if value.numel() else 0.0
            close = {"rtol": 0, "atol": parameters * max(1.0, largest)}
            torch.testing.assert_close(each[0][key], value, **close, msg=partial(_named, key))
            assert torch.equal(each[0][key], found[0][0][key]), key


def _named(key, message):
    return f"{key}: {message}"


def assert_same(key, one, other, close):
    if one is None or isinstance(one, (bool, str)) or key == "frozen":
        assert one == other, key
    else:
        one, other = torch.tensor(one), torch.tensor(other)
        torch.testing.assert_close(one, other, equal_nan=True, msg=partial(_named, key), **close)


def test_buffers_of_ddp_are_those_of_its_first_rank(every):
    first, second = (each["counts of DDP"][1] for each in every)
    assert first["calls"] > 0
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_buffers_that_nobody_keeps_alike(every):
    assert [each["own buffers"] for each in every] == [[True, True]] * 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served(every, name):
    for each in every:
        assert REFUSED[name][1] in each[name]
