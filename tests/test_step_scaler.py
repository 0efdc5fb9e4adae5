"""Steps under a GradScaler, and in accelerate's loops."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.models import assert_same_state, batch, classification, mlp, state_of

SCALE = 2.0**12


def scaler_of(scale=SCALE, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def explodes(net, given):
    """Finite losses, whose gradients no float32 holds once they are scaled."""
    return net(given[0]).float().sum(1) * 1e36


@pytest.mark.parametrize("rule", [gs.OrthoGrad, gs.GRU, gs.NGDiff, gs.MUNBa])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_scaled_steps_are_the_steps(rule, micro_batch):
    models = [mlp().float(), None]
    models[1] = copy.deepcopy(models[0])
    surgeons = []
    for model, scaler in zip(models, (None, scaler_of(growth_interval=2)), strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        surgeons.append(
            gs.Surgeon(model, optimizer, rule(), micro_batch=micro_batch, scaler=scaler)
        )
    for _ in range(5):
        data = {
            part: (x.float(), y) for part, (x, y) in (("forget", batch(3)), ("retain", batch(5)))
        }
        infos = [surgeon.step(**data, loss=classification) for surgeon in surgeons]
        torch.testing.assert_close(infos[1].gramian, infos[0].gramian, rtol=1e-5, atol=1e-8)
        assert not infos[1].skipped
    assert surgeons[1].scaler.get_scale() == 4 * SCALE
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_backward_leaves_gradients_as_the_scaler_expects_them():
    model = mlp()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), scaler_of()
    data = batch(4)
    classification(model, data).mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    surgeon = gs.Surgeon(model, optimizer, gs.Mean(), scaler=scaler)
    surgeon.add(batch=data, loss=classification)
    surgeon.backward()
    for p, grad in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, SCALE * grad, rtol=1e-10, atol=0)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    norm = sum(float(g.square().sum()) for g in plain) ** 0.5
    torch.testing.assert_close(model[0].weight, before - 0.1 * 0.01 / norm * plain[0])


@pytest.mark.parametrize("where", ["losses", "rows"])
@pytest.mark.parametrize("whole", ["step", "add and backward"])
def test_an_overflow_skips_the_step_and_lowers_the_scale(where, whole):
    model = mlp().float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    rule, scaler = gs.GRU(), scaler_of(1e10)
    surgeon = gs.Surgeon(model, optimizer, rule, scaler=scaler)
    x, y = batch(3)
    data = {"forget": (x.float(), y), "retain": (x.float() + 1, y)}
    scale = scaler.get_scale()

    def loss(net, given):
        if where == "losses":
            return explodes(net, given)
        with torch.autocast("cpu", dtype=torch.float16):  # which does not hold scaled gradients
            return classification(net, given)

    surgeon_state = rule.state_dict()
    before = state_of(model, optimizer)
    if whole == "step":
        info = surgeon.step(**data, loss=loss)
    else:
        for part in ("forget", "retain"):
            surgeon.add(**{part: data[part]}, loss=loss)
        info = surgeon.backward()
        assert all(p.grad.isinf().all() for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert info.skipped
    assert_same_state(before, state_of(model, optimizer))
    assert rule.state_dict().keys() == surgeon_state.keys()
    assert scaler.get_scale() == scale / 2


def test_a_step_that_fails_leaves_the_scaler_ready():
    models = [mlp()]
    models.append(copy.deepcopy(models[0]))
    data = batch(4)
    for model, fails in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        surgeon = gs.Surgeon(model, optimizer, gs.UPGrad(), scaler=scaler_of())
        if fails:
            handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                surgeon.step(batch=data, loss=classification)
            handle.remove()
        surgeon.step(batch=data, loss=classification)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_step_after_unscale_is_named():
    model, data = mlp(), batch(4)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), scaler_of()
    surgeon = gs.Surgeon(model, optimizer, gs.UPGrad(), scaler=scaler)
    surgeon.backward(batch=data, loss=classification)
    scaler.unscale_(optimizer)
    with pytest.raises(gs.InputError, match=r"unscaled or stepped .* call scaler.update\(\) first"):
        surgeon.step(batch=data, loss=classification)


def test_a_scaler_that_is_off_changes_nothing():
    model = mlp().float()
    surgeon = gs.Surgeon(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        gs.UPGrad(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    with pytest.raises(gs.NonFiniteError):
        surgeon.step(batch=(torch.full((2, 6), torch.inf), torch.zeros(2).long()), loss=explodes)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"scaler": 2.0}, "scaler must be a torch.amp.GradScaler, got float"),
        ({"scaler": scaler_of(), "rows": "stored"}, "scaler is for captured rows"),
    ],
    ids=["number", "stored"],
)
def test_names_what_cannot_scale(options, message):
    model = mlp()
    with pytest.raises(gs.InputError, match=message):
        gs.Surgeon(model, torch.optim.SGD(model.parameters()), gs.UPGrad(), **options)


def test_accelerates_accumulation_steps_along_the_whole():
    accelerate = pytest.importorskip("accelerate")
    models = [mlp()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in models]
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer = accelerator.prepare(models[0], optimizers[0])
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())
    whole = gs.Surgeon(models[1], optimizers[1], gs.OrthoGrad())
    for _ in range(4):
        forget, retain = batch(6), batch(3)
        for k in range(3):
            with accelerator.accumulate(model):
                surgeon.add(
                    forget=[t[2 * k : 2 * k + 2] for t in forget],
                    retain=[t[k : k + 1] for t in retain],
                    loss=classification,
                )
                if accelerator.sync_gradients:
                    surgeon.backward()
                    accelerator.clip_grad_norm_(model.parameters(), 1e3)
                optimizer.step()
                optimizer.zero_grad()
        whole.step(forget=forget, retain=retain, loss=classification)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
