"""`gs.tape` and `gs.check` of models in `fully_shard` or `replicate`: rows of all ranks."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gradsurgery as gs
from tests.ranks.cases import data, loss, share, whole
from tests.ranks.processes import run
from tests.ranks.test_sharded import WRAPPED, Network, Normalized, sharded_blocks

SIZES = {2: (2, 3), 4: (2, 0, 1, 2)}
WEIGHTS = torch.arange(1.0, 6, dtype=torch.float64)


def adapted():
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    torch.manual_seed(1)
    return peft.inject_adapter_in_model(options, Network()).double()


CASES = {
    "root": (WRAPPED["root"], Network),
    "blocks": (WRAPPED["blocks"], Network),
    "kept": (WRAPPED["kept"], Network),
    "checkpoints": (WRAPPED["checkpoints"], Network),
    "a part": (WRAPPED["a part"], Network),
    "replicate": (WRAPPED["replicate"], Network),
    "adapters": (sharded_blocks, adapted),
    "normalized": (sharded_blocks, Normalized),
}


def _rows(model, batch, inside=True):
    with gs.tape(model) as tape:
        losses = torch.zeros(0, requires_grad=True) if batch is None else loss(model, batch)
        if inside:
            return tape.jacobian(losses)
    return tape.jacobian(losses)


def _found(model, part):
    """All that a Jacobian answers, of an own part of the samples."""
    jacobian, other = _rows(model, part(0)), _rows(model, part(1), inside=False)
    both = gs.concat([jacobian, other])
    found = {
        "gramian": jacobian.gramian(),
        "tensors": jacobian.gramian(per="tensor"),
        "metric": jacobian.gramian(metric=[p.detach() ** 2 for p in _trained(model)]),
        "rows": jacobian.materialize(),
        "norms": jacobian.row_norms(),
        "products": jacobian.products([p.detach() for p in _trained(model)]),
        "update": torch.cat([each.flatten() for each in jacobian.combine(WEIGHTS)]),
        "both": both.gramian(),
        "solved": gs.PCGrad().solve(both).weights,
    }
    jacobian.backward(WEIGHTS)
    both.backward(torch.cat([WEIGHTS, -WEIGHTS]), release=True)
    grads = [p.grad for p in _trained(model)]
    assert all(type(g) is type(p.detach()) for g, p in zip(grads, _trained(model), strict=True))
    found["grads"] = torch.cat([_whole(grad).flatten() for grad in grads])
    for p in model.parameters():
        p.grad = None
    # two passes in one body, and an ordinary step after it
    with gs.tape(model) as tape:
        first = tape.jacobian(_losses(model, part(0)))
        second = tape.jacobian(_losses(model, part(1)))
    found["passes"] = torch.stack([first.gramian(), second.gramian()])
    assert float(loss(model, data(1, 0)).detach().sum()) > 0
    return found


def _losses(model, batch):
    return torch.zeros(0, requires_grad=True) if batch is None else loss(model, batch)


def _trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _part(rank, ranks):
    return lambda seed: share(data(sum(SIZES[ranks]), seed), SIZES[ranks], rank)


def _checked(model, rank):
    made = torch.optim.AdamW(_trained(model))
    return gs.check(model, data(4, rank), loss=loss, optimizer=made)


def _work(rank, ranks):
    if ranks == 4:
        model = WRAPPED["hybrid"](Network())
        return {"sent": _checked(model, rank).sent, "hybrid": _found(model, _part(rank, 4))}
    found = {}
    for name, (wrap, network) in CASES.items():
        model = wrap(network())
        before = whole(model)
        if name != "checkpoints":
            found[f"{name}, check"] = _checked(model, rank)
        found[name] = _found(model, _part(rank, 2))
        assert all(torch.equal(p, before[k]) for k, p in whole(model).items())
        assert all(p.grad is None for p in model.parameters())
    found["halves"] = _halves(rank)
    found["told"] = _told(rank)
    return found


def _halves(rank):
    """Rows of passes in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = Network(torch.float32)
    fully_shard(model, mp_policy=policy)
    return _rows(model, _part(rank, 2)(0)).gramian()


def _told(rank):
    model = sharded_blocks(Network())

    def said(call):
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    def in_the_body():
        with gs.tape(model) as tape:
            if rank == 1:
                raise KeyError("mine")
            tape.jacobian(loss(model, data(1, 0)))

    def not_finite():
        with gs.tape(model) as tape:
            losses = loss(model, data(1, 0))
        tape.jacobian(losses * (1 if rank == 0 else float("nan")))

    def other_parameters():
        mine = [model.tokens.weight] if rank else [nn.Linear(2, 2).weight]
        with gs.tape(model, parameters=mine) as tape:
            tape.jacobian(loss(model, data(1, 0)))

    return {
        "in the body": said(in_the_body),
        "not finite": said(not_finite),
        "other parameters": said(other_parameters),
        "alone": said(lambda: _rows_alone(model)),
        "a batch": said(lambda: gs.check(model, {"x": 3}, loss=loss)),
        "after all": said(lambda: _rows(model, data(2, rank))),
    }


def _rows_alone(model):
    with gs.tape(model, process_group=False) as tape:
        tape.jacobian(loss(model, data(1, 0)))


TOLD = {
    "in the body": ("RankError: rank 1: KeyError: 'mine'", "KeyError: 'mine'"),
    "not finite": ("NonFiniteError: rank 1: losses: row 0 is", "NonFiniteError: losses: row 0 is"),
    "other parameters": ("InputError: ", "InputError: rank 0: "),
    "alone": ("InputError: model is spread over several processes or devices by fully_shard",) * 2,
    "a batch": ("InputError: batch must hold",) * 2,
    "after all": ("accepted",) * 2,
}


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return run(_work, 2, tmp_path_factory.mktemp("taped"), 2)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_one_process(name, every):
    expected = _found(CASES[name][1](), lambda seed: data(5, seed))
    for found in every:
        for what, value in expected.items():
            torch.testing.assert_close(found[name][what], value, rtol=1e-12, atol=1e-12, msg=what)


def test_rows_of_shards_and_replicas(tmp_path):
    expected = _found(Network(), lambda seed: data(5, seed))
    for found in run(_work, 4, tmp_path, 4):
        # half leaves a rank for shards, and half for the sum of its own over replicas
        update = found["sent"]["plain"] / 1.5
        assert found["sent"]["update"] == pytest.approx(update, rel=1e-6)
        for what, value in expected.items():
            got = found["hybrid"][what]
            torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12, msg=what)


def test_rows_in_16_bits(every):
    expected = _rows(Network(torch.bfloat16), data(5, 0)).gramian()
    for found in every:
        assert (found["halves"] - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize("name", ["root", "blocks", "a part", "replicate", "adapters"])
def test_check(name, every):
    for rank, found in enumerate(every):
        report = found[f"{name}, check"]
        alone = _checked(CASES[name][1](), rank)
        assert report.exact
        assert (report.ranks, report.paths, report.rows) == (2, alone.paths, 4)
        halved = name in ("root", "blocks", "adapters")
        share = 0.5 if halved else 1.0
        if name != "a part":
            plain = report.sent["plain"]
            assert report.sent["update"] == pytest.approx(share * plain, rel=1e-6)
            kept = report.needs_parts["optimizer"] / alone.needs_parts["optimizer"]
            assert kept == pytest.approx(share, rel=0.1)


def test_told(every):
    for rank, found in enumerate(every):
        for name, messages in TOLD.items():
            assert messages[rank] in found["told"][name], name
