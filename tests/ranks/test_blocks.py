"""Blocks of a sharded model: whole only while they are used, however unlike the ranks' passes."""

import gc
import weakref
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import gradsurgery as gs
from gradsurgery.capture.hooks import others as others_made
from gradsurgery.ranks.blocks import Blocks
from tests.ranks.cases import data, share, whole
from tests.ranks.processes import run
from tests.ranks.test_sharded_steps import adamw, said


class Block(nn.Module):
    """Reads a weight before another block is called within, and uses it after that."""

    def __init__(self, inner=None):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.inner, self.note = inner, None

    def forward(self, x):
        weight, bias = self.down.weight, self.down.bias
        hidden = self.up(x).tanh()
        if self.inner is not None:
            x = x + self.inner(x)
        if self.note is not None:
            note = self.note
            note()
            hidden.register_hook(lambda _: note())
        return x + nn.functional.linear(hidden, weight, bias)


class Network(nn.Module):
    """Blocks one after another, one within another, one beside, and one that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(30, 8)
        self.blocks = nn.ModuleList([Block(), Block(), Block(Block()), Block(), Block()])
        self.beside, self.head = Block(), nn.Linear(8, 30, bias=False)
        self.double()

    def forward(self, x):
        hidden = self.tokens(x)
        beside = self.beside(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.blocks[0](hidden) + beside)


def sharded(**options):
    model = Network()
    for block in reversed(list(model.modules())):  # what is within another first
        if isinstance(block, Block):
            fully_shard(block, **options)
    return fully_shard(model)


def loss(model, batch):
    logits = model(batch["x"])
    return nn.functional.cross_entropy(logits.mT, batch["y"], reduction="none").mean(1)


def mine(rank, seed, sizes=(4, 2)):
    batch = data(sum(sizes), seed)
    return batch if rank is None else share(batch, sizes, rank)


def stepped(rank, loss=loss, sharded=sharded, **options):
    """Parameters and the last Gramian of steps; ranks have unlike numbers of passes."""
    model = Network() if rank is None else sharded()
    surgeon = gs.Surgeon(model, adamw(model), gs.OrthoGrad(), **options)
    infos = [
        surgeon.step(loss=loss, forget=mine(rank, step), retain=mine(rank, step + 50, (1, 3)))
        for step in range(3)
    ]
    return whole(model), infos[-1].gramian


def other_ways(model, batch):
    """Ranks call blocks in other orders, and read weights without calling their modules."""
    hidden, order = model.tokens(batch["x"]), [model.blocks[3], model.beside]
    order = order[::-1] if dist.is_initialized() and dist.get_rank() == 1 else order
    found = {block: block(hidden) for block in order}
    hidden = found[model.beside] * found[model.blocks[3]]
    hidden = hidden @ model.blocks[4].up.weight.T @ model.blocks[1].up.weight
    logits = model.head(hidden)
    return nn.functional.cross_entropy(logits.mT, batch["y"], reduction="none").mean(1)


def read_early(model, batch):
    """Weights that are all read before one is used, and a function that takes NaN for a value."""
    weights = [block.up.weight for block in model.blocks]
    share = sum((weight > 0).double().mean() + weight.square().mean() for weight in weights)
    return share * loss(model, batch)


class Recurrent(nn.Module):
    """Whose layer has its weights in a list, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)
        self.layer = nn.GRU(8, 8, batch_first=True)
        self.double()

    def forward(self, x):
        return self.head(self.layer(self.tokens(x))[0])


def recurrent(rank):
    model = Recurrent()
    if rank is not None:
        fully_shard(model.layer)
        fully_shard(model)
    surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad())
    infos = [surgeon.step(loss=loss, batch=mine(rank, step)) for step in range(2)]
    return whole(model), infos[-1].gramian


def with_torch_func(model, batch):
    taken = torch.func.grad(lambda x: x.square().sum())(batch["y"].double())
    return loss(model, batch) + 0 * taken.mean(1)


SAME = {
    "nested": {},
    "micro-batches": {"micro_batch": 1},
    "rows held": {"micro_batch": 2, "hold": "rows"},
    "stored": {"rows": "stored"},
    "in other ways": {"loss": other_ways},
    "read early": {"loss": read_early},
    "torch.func": {
        "loss": with_torch_func,
        "sharded": lambda: sharded(reshard_after_forward=False),
    },
}


def _held(rank):
    """The most parameters that have values at once, in passes, beside those of the root."""
    model, held = sharded(), []

    def note():
        parts = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
        with_values = [
            part for part in parts if part.up._parameters.copy()["weight"].stride() != (0, 0)
        ]
        held.append(len(with_values))

    for block in model.modules():
        if isinstance(block, Block):
            block.note = note
    surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad())
    for step in range(2):
        surgeon.step(loss=loss, batch=mine(rank, step))
    return max(held), len(held)


def _handles(rank):
    """How many hooks a step seems to have made: where it did, the next one looks through memory."""
    made = []
    for model in (sharded(), nn.parallel.DistributedDataParallel(Network())):
        surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad())
        surgeon.step(loss=loss, batch=mine(rank, 3))
        before = others_made()
        surgeon.step(loss=loss, batch=mine(rank, 4))
        made.append(others_made() - before)
    return made


def _looked_up(rank):
    """How many blocks are gathered to be looked up, for all that is done with one model."""
    model, find = sharded(), Blocks._find
    with patch.object(Blocks, "_find", autospec=True, side_effect=find) as found:
        for step in range(2):
            surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad())
            surgeon.step(loss=loss, batch=mine(rank, step))
            with gs.tape(model) as tape:
                tape.jacobian(loss(model, mine(rank, step)))
    return found.call_count


def _told(rank):
    model = sharded()
    surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad())

    def step(loss):
        before = whole(model)
        told = said(lambda: surgeon.step(loss=loss, batch=mine(rank, 7)))
        assert told == "accepted" or all(torch.equal(p, before[n]) for n, p in whole(model).items())
        return told

    def in_the_middle(model, batch):
        if rank == 1:
            model.blocks[1](model.tokens(batch["x"]))
            raise ValueError("mine")
        return loss(model, batch)

    def writes_over(model, batch):
        hidden = model.blocks[1](model.tokens(batch["x"])).exp()
        hidden.add_(1)  # exp's backward pass needs what it gave
        return loss(model, batch) + hidden.mean((1, 2))

    def writes_to_a_parameter(model, batch):
        with torch.no_grad():
            model.blocks[1].up.weight.mul_(2)
        return loss(model, batch)

    def one_writes(model, batch):
        return (writes_to_a_parameter if rank == 1 else loss)(model, batch)

    def nan_inside():
        with gs.tape(model) as tape:
            losses = loss(model, mine(rank, 8)) * (float("nan") if rank == 1 else 1)
            tape.jacobian(losses)

    told = [step(each) for each in (in_the_middle, writes_over, writes_to_a_parameter, one_writes)]
    told += [step(with_torch_func), said(nan_inside)]
    model.blocks[1].up.weight.requires_grad_(rank == 0)
    told.append(step(loss))
    model.blocks[1].up.weight.requires_grad_(True)
    told.append(step(loss))
    tied = Network()
    tied.head.weight = tied.tokens.weight
    fully_shard(tied.tokens)
    fully_shard(tied)
    told.append(
        said(
            lambda: gs.Surgeon(tied, adamw(tied), gs.UPGrad()).step(loss=loss, batch=mine(rank, 7))
        )
    )
    early = Network()
    optimizer = adamw(early)
    fully_shard(early)
    told.append(said(lambda: gs.Surgeon(early, optimizer, gs.UPGrad())))

    def weights_of_its_own_rows():
        with gs.tape(model) as tape:
            rows = tape.jacobian(loss(model, mine(rank, 8)))
            rows.backward(torch.ones(rows.own.m))

    told.append(said(weights_of_its_own_rows))
    return told


def _left(rank):
    """How many activations with a hook outlive steps."""
    model, seen = sharded(), []

    def hooked(model, batch):
        hidden = model.tokens(batch["x"])
        for block in model.blocks:
            hidden = block(hidden)
            hidden.register_hook(lambda _: None)
            seen.append(weakref.ref(hidden))
        logits = model.head(hidden)
        return nn.functional.cross_entropy(logits.mT, batch["y"], reduction="none").mean(1)

    surgeon = gs.Surgeon(model, adamw(model), gs.UPGrad())
    for step in range(2):
        surgeon.step(loss=hooked, batch=mine(rank, step))
    gc.collect()
    return sum(each() is not None for each in seen)


def _work(rank):
    found = {name: stepped(rank, **options) for name, options in SAME.items()}
    return found | {"recurrent": recurrent(rank)}


def _others(rank):
    return _held(rank), _told(rank), _handles(rank), _looked_up(rank), _left(rank)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """What each of two ranks found."""
    return run(_work, 2, tmp_path_factory.mktemp("blocks"))


@pytest.mark.parametrize("name", [*SAME, "recurrent"])
def test_as_in_one_process(name, every):
    options = {k: v for k, v in SAME.get(name, {}).items() if k != "sharded"}
    one = recurrent(None) if name == "recurrent" else stepped(None, **options)
    for each in every:
        torch.testing.assert_close(each[name][0], one[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(each[name][1], one[1], rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return run(_others, 2, tmp_path_factory.mktemp("blocks"))


def test_few_blocks_are_whole_at_once(others):
    for (most, noted), *_ in others:
        assert noted >= 2 * 2 * 7
        assert most <= 3  # one, what it is within, and what was used last


TOLD = [
    ("RankError: rank 1: ValueError: mine", "ValueError: mine"),
    ("modified by an inplace operation",) * 2,
    ("model: a pass writes to parameter blocks.1.up.weight",) * 2,
    (
        "InputError: rank 1: model: a pass writes to parameter b",
        "model: a pass writes to parameter",
    ),
    ("give it reshard_after_forward=False",) * 2,
    ("NonFiniteError: rank 1: losses: row 0 is", "NonFiniteError: losses: row 0 is"),
    ("model: rank 0 and rank 1 train different parameters, as blocks.1.up.weight",) * 2,
    ("accepted",) * 2,
    ("model: head.weight and tokens.weight were one parameter",) * 2,
    ("optimizer holds no parameter of the model: make it after fully_shard",) * 2,
    ("weights must be [6] or [30, 6], got [4]", "weights must be [6] or [30, 6], got [2]"),
]


@pytest.mark.parametrize("k", range(len(TOLD)))
def test_what_ranks_are_told(others, k):
    for rank, (_, told, *_) in enumerate(others):
        assert TOLD[k][rank] in told[k]


def test_steps_make_no_hooks_of_others(others):
    assert all(made == [0, 0] for _, _, made, *_ in others)


def test_blocks_are_looked_up_once(others):
    assert all(count == 8 for *_, count, _ in others)


def test_nothing_of_a_pass_outlives_it(others):
    assert all(left == 0 for *_, left in others)
