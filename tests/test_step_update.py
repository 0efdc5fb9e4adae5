"""What a step's update is in `.grad`: as a backward pass would leave it, on every path."""

import pytest
import torch
from torch import nn

import gradsurgery as gs

WAYS = {
    "captured": {},
    "in parts": {"micro_batch": 3},
    "stored": {"rows": "stored"},
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("rule", [gs.Sum, gs.PCGrad, gs.GradDrop])
@pytest.mark.parametrize("dtype,scale", [(torch.float16, 3e4), (torch.float32, 2e38)])
def test_an_update_that_overflows_moves_nothing(rule, dtype, scale, way):
    model = nn.Linear(2, 1, bias=False).to(dtype)
    before = model.weight.detach().clone()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=1e-6), rule(), **way)
    with pytest.raises(gs.NonFiniteError, match=f"overflows {dtype}"):
        surgeon.step(loss=lambda m, x: m(x)[:, 0] * scale, batch=torch.ones(8, 2, dtype=dtype))
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_an_update_whose_elements_fit_is_taken(way):
    """Their sum overflows, none of them does."""
    model = nn.Linear(8, 1, bias=False).half()
    before = model.weight.detach().clone()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=1e-6), gs.Sum(), **way)
    surgeon.step(loss=lambda m, x: m(x)[:, 0] * 6e3, batch=torch.ones(8, 8).half())
    torch.testing.assert_close(model.weight, before - 0.048, rtol=0, atol=1e-3)


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, (torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("rule", [gs.UPGrad, gs.GradDrop])
def test_hooks_run_once_a_gradient_is_there(rule, way):
    seen, moves = [], []

    def double(parameter):
        parameter += 0 * parameter.grad  # without a graph, as in a backward pass
        seen.append(parameter.grad.mul_(2))

    for hooked in (False, True):
        model, data = small()
        before = [p.detach().clone() for p in model.parameters()]
        if hooked:
            model[0].weight.register_post_accumulate_grad_hook(double)
        surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule(), **way)
        surgeon.step(loss=losses, batch=data)
        moves.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    torch.testing.assert_close(moves[1], [2 * moves[0][0], *moves[0][1:]])
    assert len(seen) == 1


@pytest.mark.parametrize(
    "hook,name",
    [
        (lambda m: m[0].weight.register_hook(lambda g: g * 0), r"parameter 0\.weight"),
        (lambda m: m[1].register_full_backward_hook(lambda *a: None), "module 1"),
        (lambda m: m[2].register_full_backward_pre_hook(lambda *a: None), "module 2"),
        (lambda m: m.register_full_backward_hook(lambda *a: None), "module model"),
    ],
    ids=["parameter", "module", "before a module", "model"],
)
@pytest.mark.parametrize("rows", ["samples", "mean"])
def test_stored_rows_name_hooks_that_they_do_not_run(hook, name, rows):
    model, data = small()
    hook(model)
    with pytest.raises(gs.InputError, match=f"{name} has a backward hook.*captured rows"):
        gs.DenseJacobian.from_model(model, data, losses, rows=rows)
    surgeon = gs.Surgeon(
        model, torch.optim.SGD(model.parameters(), lr=0.1), gs.OrthoGrad(), rows="stored"
    )
    with pytest.raises(gs.InputError, match=f"{name} has a backward hook.*captured rows"):
        surgeon.step(loss=losses, forget=data, retain=data)


RULES = [gs.SAGO(), gs.SalUn(), gs.GRU(momentum=0.5), gs.OrthoGrad(), gs.GradDrop(), gs.UPGrad()]


@pytest.mark.parametrize("way", [{}, {"micro_batch": 3}], ids=["captured", "in parts"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_autocast_around_captured_rows_is_for_its_loss_alone(rule, way):
    """A loss that says itself how it computes takes the same step, to the bit."""

    def full(model, batch):
        with torch.autocast("cpu", enabled=False):
            return losses(model, batch)

    infos, moved = [], []
    for autocast in (False, True):
        model, (x, y) = small()
        model, data = model.float(), (x.float(), y)
        rule.load_state_dict({})
        given = {"forget": data, "retain": data} if "forget" in rule.roles else {"batch": data}
        surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule, **way)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            infos.append([surgeon.step(loss=full, **given) for _ in range(2)])
        moved.append(list(model.parameters()))
    assert torch.equal(infos[0][-1].gramian, infos[1][-1].gramian)
    assert all(map(torch.equal, *moved))
