"""Projected steps of models in `fully_shard` or `replicate` are those of one process."""

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.ranks import cases
from tests.ranks.cases import share, whole
from tests.ranks.processes import run
from tests.ranks.test_sharded import WRAPPED, Network

STEPS = 5
SIZES = {2: (3, 2), 4: (2, 0, 2, 1)}


class Deep(nn.Module):
    """Wide layers and a convolution of groups, whose inputs leave directions to move in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(20, 33), nn.Linear(33, 3)
        self.blocks = nn.ModuleList([nn.Linear(33, 33), nn.Conv1d(6, 8, 3, groups=2)])
        self.free = nn.Linear(2, 2)  # what no loss depends on
        self.double()

    def forward(self, x):
        hidden = self.first(x).tanh()
        hidden = hidden + self.blocks[0](hidden).tanh()
        mixed = self.blocks[1](hidden[:, :30].view(len(x), 6, 5))
        return self.last(hidden) + mixed.flatten(1)[:, :3]


def rows(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 20, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(3, (size,), generator=generator)}


def classify(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def squares(model, batch):
    return model(batch["x"]).square().flatten(1).sum(1)


DEEP = Deep, rows, classify, squares
TEXT = Network, cases.data, cases.loss, squares


def null_space(model):
    return gs.NullSpace(model)


def paper(model):
    return gs.OWM(model, alpha=1e-2, others="leave")


# wrapped, what it is of, projection
CASES = {
    "root": ("root", DEEP, null_space),
    "blocks": ("blocks", DEEP, null_space),
    "blocks, OWM": ("blocks", TEXT, paper),
    "blocks, paper": ("blocks", DEEP, paper),
    "a part": ("a part", DEEP, paper),
    "kept": ("kept", TEXT, paper),
    "replicate": ("replicate", DEEP, null_space),
    "replicate by FSDP": ("replicate by FSDP", DEEP, null_space),
}


def _trained(model, kind, projection, part, loop=False):
    """Parameters after some steps, with what they were and what outputs moved by."""
    _, data, loss, outputs = kind
    kept = projection(model)
    before = whole(model)
    for seed in (90, 91):
        kept.observe(part(data, seed), outputs)
    # a larger eps, for Adam divides rounding by a gradient that is nearly none
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), project=None if loop else kept)
    for step in range(STEPS):
        both = {"forget": part(data, 2 * step), "retain": part(data, 2 * step + 1)}
        if not loop:
            surgeon.step(loss=loss, **both)
            continue
        surgeon.backward(loss=loss, **both)
        with kept.steps():
            optimizer.step()
        optimizer.zero_grad()
    seen = {f"seen {name}": s for name, seen in kept.state_dict().items() for s in _moments(seen)}
    return whole(model), before, seen, kept.not_held


def _moments(seen):
    return [rows.mT @ rows for rows in (seen or {}).values()]


def _part(sizes, rank):
    return lambda data, seed: share(data(sum(sizes), seed), sizes, rank)


def _work(rank, ranks):
    part = _part(SIZES[ranks], rank)
    if ranks == 4:
        return {"hybrid": _trained(WRAPPED["hybrid"](Deep()), DEEP, null_space, part)}
    found = {}
    for name, (wrapped, kind, projection) in CASES.items():
        found[name] = _trained(WRAPPED[wrapped](kind[0]()), kind, projection, part)
    model = WRAPPED["blocks"](Deep())
    found["in a loop of one's own"] = _trained(model, DEEP, null_space, part, loop=True)
    found["told"] = _told(rank, part)
    return found


def _told(rank, part):
    """What is said where one rank's optimizer raises in a projected step, and what is left."""
    model = WRAPPED["blocks"](Deep())
    kept = gs.NullSpace(model)
    kept.observe(part(rows, 90), squares)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), project=kept)
    before, told = whole(model), {}

    def refused(name, call):
        try:
            call()
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
        assert all(torch.equal(p, before[k]) for k, p in whole(model).items()), name

    def on_rank_1(*_):
        assert rank == 0, "a hook's"

    def step():
        surgeon.step(loss=classify, forget=part(rows, 0), retain=part(rows, 1))

    handle = optimizer.register_step_pre_hook(on_rank_1)
    refused("a hook before", step)
    handle.remove()
    refused("no function", lambda: kept.observe(part(rows, 1), squares if rank == 0 else 3))
    refused("another model", lambda: gs.Surgeon(model, optimizer, gs.OrthoGrad(), project=_other()))
    names = [name for name, _ in model.named_parameters()]
    update = kept(names, [torch.ones_like(p.detach()) for p in model.parameters()])
    told["update"] = {k: u.full_tensor() for k, u in zip(names, update, strict=True)}
    step()
    assert not torch.equal(whole(model)["first.weight"], before["first.weight"])
    return told


def _other():
    return gs.OWM(Deep())


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return run(_work, 2, tmp_path_factory.mktemp("projected"), 2)


def _assert_alike(found, kind, projection, loop=False):
    everything = _part((5,), 0)
    expected = _trained(kind[0](), kind, projection, everything, loop)
    assert found[3] == expected[3]
    for got, of_one in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(got, of_one, rtol=0, atol=1e-10)
    moved = [k for k, p in expected[0].items() if not torch.equal(p, expected[1][k])]
    assert len(moved) > 2


@pytest.mark.parametrize("name", CASES)
def test_projected_steps_are_those_of_one_process(name, every):
    for found in every:
        _assert_alike(found[name], *CASES[name][1:])


def test_in_a_loop_of_ones_own(every):
    for found in every:
        _assert_alike(found["in a loop of one's own"], DEEP, null_space, loop=True)


def test_shards_and_replicas(tmp_path):
    for found in run(_work, 4, tmp_path, 4):
        _assert_alike(found["hybrid"], DEEP, null_space)


def test_told(every):
    model = Deep()
    kept = gs.NullSpace(model)
    kept.observe(rows(5, 90), squares)
    names = [name for name, _ in model.named_parameters()]
    update = kept(names, [torch.ones_like(p.detach()) for p in model.parameters()])
    for rank, found in enumerate(every):
        said = found["told"]
        hook = "AssertionError: a hook's"
        assert said["a hook before"] == (hook if rank == 1 else f"RankError: rank 1: {hook}")
        assert "loss must be a function, got int" in said["no function"]
        assert "is no parameter of the model that project holds" in said["another model"]
        for name, part in zip(names, update, strict=True):
            torch.testing.assert_close(said["update"][name], part, rtol=0, atol=1e-10)
