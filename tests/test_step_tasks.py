"""Surgeon with every rule: the step is the rule's update of the rows, whatever makes the rows."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery import RULES
from tests.surgery.properties import make

TASKS = [name for name in RULES if "forget" not in RULES[name].roles and name != "constant"]
FORGETTING = [name for name in RULES if "forget" in RULES[name].roles]


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch_of(n):
    return torch.randn(n, 5).double(), torch.randn(n, 3).double()


def per_task(model, batch):
    return (model(batch[0]) - batch[1]).square()  # [B, 3]


def per_sample(model, batch):
    return per_task(model, batch).sum(1)


def gradient(model, value):
    return torch.autograd.grad(value, list(model.parameters()), retain_graph=True)


def rows_of(model, losses):
    """Gradients of losses, one by one, as blocks."""
    each = [gradient(model, value) for value in losses]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def step_of(rule, **given):
    """What one step of plain descent at rate 1 subtracts."""
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=1.0), rule)
    info = surgeon.step(**given)
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)], info


def assert_equal(update, expected):
    for a, b in zip(update, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", TASKS)
def test_a_row_for_each_task(name):
    batch, model = batch_of(6), network()
    losses = per_task(model, batch).mean(0)
    if name in ("gem", "agem"):
        past = batch_of(2)
        update, info = step_of(make(name), batch=batch, memory=past, loss=per_task)
        rows = rows_of(model, [losses.mean(), *per_task(model, past).mean(0)])
        assert_equal(update, make(name)(rows))
        return
    update, info = step_of(make(name, 3), batch=batch, loss=per_task)
    blocks = rows_of(model, losses)
    assert_equal(update, make(name, 3)(blocks))
    torch.testing.assert_close(info.losses, losses.detach())
    gram = gs.gramian(blocks)
    torch.testing.assert_close(info.gramian, gram)
    assert info.cosines.shape == (3, 3)
    assert info.diagnosis.conflict_rate == pytest.approx(info.conflict_rate)


@pytest.mark.parametrize("name", TASKS)
def test_a_row_for_each_sample(name):
    batch, past, model = batch_of(5), batch_of(4), network()
    blocks = rows_of(model, per_sample(model, batch))
    roles, given = {}, {}
    if "memory" in RULES[name].roles:
        given["memory"] = past
        blocks = [
            torch.cat(pair)
            for pair in zip(blocks, rows_of(model, per_sample(model, past)), strict=True)
        ]
        roles["memory"] = slice(5, None)
    update, info = step_of(make(name, 5), batch=batch, loss=per_sample, **given)
    assert_equal(update, make(name, 5)(blocks, **roles))
    assert info.forget_loss is None
    assert json.loads(json.dumps(info.to_dict()))["losses"] == info.losses.tolist()


@pytest.mark.parametrize("rows", ["captured", "stored"])
@pytest.mark.parametrize("name", FORGETTING)
def test_forget_and_retain(name, rows):
    forget, retain, model = batch_of(3), batch_of(4), network()
    each = per_sample(model, retain)
    values = [per_sample(model, forget).mean(), *each]
    rule = gs.GDRGMA() if name == "gdrgma" else make(name)
    roles = {"retain_loss": each.mean().detach()} if name == "gdrgma" else {}
    expected = rule(rows_of(model, values), forget=0, **roles)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    info = gs.Surgeon(model, optimizer, copy.deepcopy(rule), rows=rows).step(
        forget=forget, retain=retain, loss=per_sample
    )
    update = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    assert_equal(update, expected)
    assert info.forget_loss == pytest.approx(float(values[0].detach()))
    assert info.retain_loss == pytest.approx(float(each.mean().detach()))


def test_memory_is_projected_off_too():
    forget, retain, past, model = batch_of(3), batch_of(4), batch_of(2), network()
    update, info = step_of(
        gs.OrthoGrad(alpha=0.0), forget=forget, retain=retain, memory=past, loss=per_sample
    )
    for batch in (retain, past):
        for row in zip(*rows_of(model, per_sample(model, batch)), strict=True):
            product = sum(float((a * b).sum()) for a, b in zip(row, update, strict=True))
            assert abs(product) <= 1e-10
    assert info.rank == 6


def test_granularity_reaches_the_step():
    batch, model = batch_of(6), network()
    blocks = rows_of(model, per_task(model, batch).mean(0))
    for granularity in ("module", "tensor"):
        rule = gs.MGDA(granularity=granularity)
        names = [name for name, _ in model.named_parameters()]
        expected = rule(gs.DenseJacobian(dict(zip(names, blocks, strict=True))))
        update, _ = step_of(rule, batch=batch, loss=per_task)
        assert_equal(update, expected)


def test_in_the_optimizers_metric_the_step_opposes_no_row():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    scales = 10.0 ** torch.arange(6).sub(3).double() / 10  # v differs between weights

    def draw():
        x = torch.randn(8, 6).double()
        return x * scales, torch.stack([x[:, 0], x[:, 1] - x[:, 0], -x[:, 2]], 1)

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.999))
    surgeon = gs.Surgeon(model, optimizer, gs.UPGrad(precondition="optimizer"))
    for _ in range(200):
        surgeon.step(batch=draw(), loss=per_task)
    least = {None: 0.0, "optimizer": 0.0}
    for batch in [draw() for _ in range(10)]:
        for precondition in least:
            twin = copy.deepcopy(model)
            other = torch.optim.Adam(twin.parameters(), lr=1e-3, betas=(0.0, 0.999))
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            blocks = rows_of(twin, per_task(twin, batch).mean(0))
            rows = torch.cat([b.flatten(1) for b in blocks], 1)
            before = nn.utils.parameters_to_vector(twin.parameters()).detach().clone()
            rule = gs.UPGrad(precondition=precondition)
            gs.Surgeon(twin, other, rule).step(batch=batch, loss=per_task)
            moved = before - nn.utils.parameters_to_vector(twin.parameters()).detach()
            cosines = rows @ moved / rows.norm(dim=1) / moved.norm()
            least[precondition] = min(least[precondition], float(cosines.min()))
    assert least[None] < -0.02
    assert least["optimizer"] > 0.1 * least[None]  # what is left is this gradient's share in v


def test_a_moving_average_goes_on_from_step_to_step():
    model = network()
    rule = gs.GRU(momentum=0.5)
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule)
    for _ in range(2):
        surgeon.step(forget=batch_of(3), retain=batch_of(4), loss=per_sample)
    assert rule.state_dict()["average"].shape == (sum(p.numel() for p in model.parameters()),)


@pytest.mark.parametrize(
    "rule,given,message",
    [
        (gs.PCGrad(), ("forget", "retain"), "PCGrad lowers every loss it is given: it takes batch"),
        (gs.PCGrad(), (), r"PCGrad lowers every loss it is given: it takes batch=, got \[\]"),
        (gs.OrthoGrad(), ("batch",), "OrthoGrad takes forget= and retain="),
        (gs.NGDiff(), ("forget", "retain", "batch"), "NGDiff takes forget= and retain="),
        (gs.PCGrad(), ("batch", "memory"), "PCGrad has no memory rows"),
    ],
)
def test_refuses_batches_the_rule_has_no_use_for(rule, given, message):
    with pytest.raises(gs.InputError, match=message):
        step_of(rule, loss=per_sample, **{name: batch_of(3) for name in given})


def test_a_head_is_trained_by_its_own_task():
    trunk, heads = nn.Linear(5, 4), [nn.Linear(4, 1) for _ in range(3)]
    model = nn.ModuleList([trunk, *heads])

    def loss(model, batch):
        shared = model[0](batch[0]).tanh()
        return torch.cat([head(shared) for head in heads], 1).sub(batch[1]).square()

    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(6, 5), torch.randn(6, 3)
    gs.Surgeon(model, optimizer, gs.MGDA(granularity="tensor")).step(batch=batch, loss=loss)
    assert all(not torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_what_no_loss_reaches_does_not_decay():
    used, unused = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    model = nn.ModuleList([used, unused])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = unused.weight.detach().clone()
    for rule in (gs.UPGrad(), gs.GradDrop()):
        surgeon = gs.Surgeon(model, optimizer, rule)
        surgeon.step(batch=batch_of(4), loss=lambda m, b: per_task(used, b))
    assert torch.equal(unused.weight, before)


@pytest.mark.parametrize("name", TASKS)
def test_sixteen_bits(name):
    model = nn.Linear(5, 3).bfloat16()
    batch = torch.randn(4, 5).bfloat16(), torch.randn(4, 3).bfloat16()
    given = {"memory": batch} if name in ("gem", "agem") else {}
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), make(name, 3))
    surgeon.step(batch=batch, loss=per_task, **given)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in TASKS if RULES[n].remembers])
def test_a_step_that_fails_leaves_the_rule_as_it_was(name):
    model, rule = network(), make(name, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgeon = gs.Surgeon(model, optimizer, rule)
    surgeon.step(batch=batch_of(4), loss=per_task)
    before, weights = rule.state_dict(), copy.deepcopy(model.state_dict())

    def fails(*_):
        raise RuntimeError("no step")

    hook = optimizer.register_step_pre_hook(fails)
    with pytest.raises(RuntimeError, match="no step"):
        surgeon.step(batch=batch_of(4), loss=per_task)
    hook.remove()
    assert all(torch.equal(rule.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_conflicts_are_with_what_the_update_does():
    forget, retain = batch_of(3), batch_of(4)
    _, raised = step_of(gs.GRU(), forget=forget, retain=retain, loss=per_sample)
    rule = gs.GRU(objective="lower")
    _, lowered = step_of(rule, forget=forget, retain=retain, loss=per_sample)
    assert raised.conflict_rate == 1 - lowered.conflict_rate


@pytest.mark.parametrize(
    "swap,message",
    [
        ({"rule": gs.UPGrad}, "rule must be a Rule, got UPGrad"),
        ({"rule": "upgrad"}, "rule must be a Rule, got str"),
        ({"optimizer": gs.UPGrad()}, "optimizer must be a Optimizer, got UPGrad"),
        ({"model": [1]}, "model must be a Module, got list"),
    ],
)
def test_refuses_what_is_no_rule_or_optimizer(swap, message):
    model = network()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "rule": gs.Mean()}
    with pytest.raises(gs.InputError, match=message):
        gs.Surgeon(**{**given, **swap})


def test_refuses_losses_that_are_no_rows():
    for loss, message in (
        (lambda m, b: tuple(per_task(m, b).mean(0)), r"got tuple: torch.stack\(..., 1\)"),
        (lambda m, b: per_task(m, b)[:2], r"loss must return \[4\] or \[4, tasks\], got \[2, 3\]"),
        (lambda m, b: per_task(m, b).mean(), r"one value per sample, \[4\], got \[\]"),
        (lambda m, b: per_task(m, b)[:, :0], r"\[4, tasks\], got \[4, 0\]"),
    ):
        with pytest.raises(gs.InputError, match=message):
            step_of(gs.UPGrad(), batch=batch_of(4), loss=loss)


def test_trains_conflicting_tasks():
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    target = torch.stack([x[:, 0], -x[:, 0] + 0.3 * x[:, 1], x[:, 2]], 1)
    for name in ("upgrad", "pcgrad", "cagrad", "nashmtl"):
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        surgeon = gs.Surgeon(model, torch.optim.Adam(model.parameters(), lr=0.02), make(name))
        losses = [surgeon.step(batch=(x, target), loss=per_task).losses for _ in range(60)]
        assert (losses[-1] < 0.5 * losses[0]).all(), name


def test_token_losses_of_a_classifier():
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), gs.UPGrad())
    info = surgeon.step(
        batch=(x, y), loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")
    )
    assert info.losses.shape == (6,)


@pytest.mark.parametrize(
    "name,losses",
    [(name, per_sample) for name in TASKS + FORGETTING] + [(name, per_task) for name in TASKS],
)
def test_a_batch_in_parts_takes_the_same_step(name, losses):
    batch, other = batch_of(7), batch_of(4)
    given = {"batch": batch} if name in TASKS else {"forget": batch, "retain": other}
    if "memory" in RULES[name].roles and name in TASKS:
        given["memory"] = other
    ends, infos = [], []
    for micro_batch in (None, 3):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        surgeon = gs.Surgeon(model, optimizer, make(name), micro_batch=micro_batch)
        infos.append(surgeon.step(**given, loss=losses))
        ends.append(list(model.parameters()))
    assert_equal(*ends)
    assert infos[0].losses.shape == infos[1].losses.shape
    torch.testing.assert_close(infos[0].losses, infos[1].losses)
    torch.testing.assert_close(infos[0].gramian, infos[1].gramian)


def test_nonsense_parts_are_named():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(gs.InputError, match="micro_batch must be 1 or more or None, got 0"):
        gs.Surgeon(model, optimizer, gs.PCGrad(), micro_batch=0)
    with pytest.raises(gs.InputError, match="micro_batch is for captured rows"):
        gs.Surgeon(model, optimizer, gs.PCGrad(), micro_batch=2, rows="stored")


def one_column(model, batch):
    return per_task(model, batch)[:, :1]


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("rule,memory", [(gs.UPGrad(), False), (gs.GEM(), True)])
def test_a_column_for_samples_or_for_one_task_is_asked_about(rule, memory, micro_batch):
    model, given = network(), {"memory": batch_of(4)} if memory else {}
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    surgeon = gs.Surgeon(model, optimizer, rule, micro_batch=micro_batch)
    part = "memory" if memory else "batch"  # the mean of GEM's batch is one row in any case
    with pytest.raises(
        gs.InputError, match=rf"loss of {part} is \[\d, 1\]: losses.squeeze\(1\) has"
    ):
        surgeon.step(batch=batch_of(4), loss=one_column, **given)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_column_of_which_both_readings_are_one_row_is_served():
    one, several, model = batch_of(1), batch_of(4), network()
    update, _ = step_of(gs.UPGrad(), batch=one, loss=one_column)
    assert_equal(update, gradient(model, one_column(model, one).mean()))
    update, info = step_of(gs.AGEM(), batch=several, memory=one, loss=one_column)
    assert len(info.losses) == 2
    # and what the error says to do for one task
    update, _ = step_of(gs.Mean(), batch=several, loss=lambda m, b: one_column(m, b).squeeze(1))
    assert_equal(update, gradient(model, one_column(model, several).mean()))
