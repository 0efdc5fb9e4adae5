"""`gs.tape` on several ranks: rows of all, in the order of the ranks."""

import torch
import torch.distributed as dist
from torch import nn

import gradsurgery as gs
from tests.ranks.cases import Network, data, loss, share
from tests.ranks.processes import run

SIZES = (2, 0, 3)


def _rows(rank, model, batch, **options):
    with gs.tape(model, **options) as tape:
        inside = getattr(model, "module", model)
        losses = torch.zeros(0, requires_grad=True) if batch is None else loss(inside, batch)
        return tape.jacobian(losses)


def _work(rank):
    found = {}
    for name in ("plain", "DDP"):
        model = Network()
        wrapped = nn.parallel.DistributedDataParallel(model) if name == "DDP" else model
        options = {} if name == "DDP" else {"process_group": dist.group.WORLD}
        mine = share(data(sum(SIZES), 0), SIZES, rank)
        jacobian = _rows(rank, wrapped, mine, **options)
        weights = torch.arange(1.0, 6, dtype=torch.float64)
        jacobian.backward(weights)
        other = share(data(sum(SIZES), 1), SIZES, rank)
        both = gs.concat([jacobian, _rows(rank, wrapped, other, **options)])
        found[name] = {
            "gramian": jacobian.gramian(),
            "tensors": jacobian.gramian(per="tensor"),
            "rows": jacobian.materialize(),
            "norms": jacobian.row_norms(),
            "products": jacobian.products(list(model.parameters())),
            "update": torch.cat([part.flatten() for part in jacobian.combine(weights)]),
            "grads": torch.cat([p.grad.flatten() for p in model.parameters()]),
            "both": both.gramian(),
            "solved": gs.PCGrad().solve(both).weights,
        }
    found["in the body"], found["frozen"] = _failed(rank)
    alone = _rows(rank, Network(), data(2, rank))
    found["alone"] = {"gramian": alone.gramian()}
    try:
        bad = torch.full((1,), float("nan"), requires_grad=True) if rank == 2 else None
        with gs.tape(model, process_group=dist.group.WORLD) as tape:
            tape.jacobian(loss(model, data(1, 0)) if bad is None else bad * model.scale)
    except gs.NonFiniteError as error:
        found["said"] = str(error)
    return found


def _failed(rank):
    """What is said where one rank's loss raises, and where it has frozen another parameter."""
    said, model = [], Network()
    try:
        with gs.tape(model, process_group=dist.group.WORLD) as tape:
            if rank == 1:
                raise KeyError("mine")
            tape.jacobian(loss(model, data(1, 0)))
    except (KeyError, gs.RankError) as error:
        said.append(f"{type(error).__name__}: {error}")
    if rank == 1:
        model.scale.requires_grad_(False)
    try:
        _rows(rank, model, data(1, 0), process_group=dist.group.WORLD)
    except gs.InputError as error:
        said.append(str(error))
    return said


def test_rows_of_all_ranks(tmp_path):
    model = Network()
    one = _rows(0, model, data(5, 0))
    other = _rows(0, model, data(5, 1))
    both = gs.concat([one, other])
    weights = torch.arange(1.0, 6, dtype=torch.float64)
    update = torch.cat([part.flatten() for part in one.combine(weights)])
    expected = {
        "gramian": one.gramian(),
        "tensors": one.gramian(per="tensor"),
        "rows": one.materialize(),
        "norms": one.row_norms(),
        "products": one.products(list(model.parameters())),
        "update": update,
        "grads": update,
        "both": both.gramian(),
        "solved": gs.PCGrad().solve(both).weights,
    }
    for rank, found in enumerate(run(_work, 3, tmp_path)):
        for name in ("plain", "DDP"):
            for what, value in expected.items():
                torch.testing.assert_close(found[name][what], value, rtol=1e-12, atol=1e-12)
        alone = _rows(0, Network(), data(2, rank)).gramian()
        torch.testing.assert_close(found["alone"]["gramian"], alone)
        assert found["said"].startswith("" if rank == 2 else "rank 2: losses: row 0 is not finite")
        told = "KeyError: 'mine'" if rank == 1 else "RankError: rank 1: KeyError: 'mine'"
        assert found["in the body"] == told
        assert found["frozen"] == "model: ranks record other parameters: freeze the same on all"
