"""Who is stepped: what the optimizer holds, looked up in every step, each as an ordinary step."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.models import assert_same_state, batch, classification, mlp, state_of

WAYS = {
    "captured": {},
    "in parts": {"micro_batch": 2},
    "stored": {"rows": "stored"},
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def sgd(held):
    return torch.optim.SGD(held, lr=0.1)


def plain(model, optimizer, data, loss=classification):
    """What an ordinary step on the mean loss does."""
    optimizer.zero_grad()
    loss(model, data).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def unfreeze(model, optimizer):
    model[0].requires_grad_(True)


def add(model, optimizer):
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})


def freeze(model, optimizer):
    model[2].weight.requires_grad_(False)


def freeze_all_but_biases(model, optimizer):
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(True)


@pytest.mark.parametrize("change", [unfreeze, add, freeze, freeze_all_but_biases])
@pytest.mark.parametrize("kind", [sgd, lambda p: torch.optim.AdamW(p, lr=0.01)], ids=["sgd", "w"])
def test_parameters_of_each_step_move_as_in_an_ordinary_one(change, kind, way):
    models, data = [mlp()], [batch(4) for _ in range(4)]
    if change in (unfreeze, add):
        models[0][0].requires_grad_(False)
    models.append(copy.deepcopy(models[0]))
    optimizers = [
        kind((m[2] if change is add else m).parameters())  # what is added later is not held yet
        for m in models
    ]
    surgeon = gs.Surgeon(models[0], optimizers[0], gs.Mean(), **way)
    for k, each in enumerate(data):
        if k == 2:
            for model, optimizer in zip(models, optimizers, strict=True):
                change(model, optimizer)
        surgeon.step(batch=each, loss=classification)
        plain(models[1], optimizers[1], each)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_parameters_are_those_of_now():
    model = mlp()
    surgeon = gs.Surgeon(model, sgd(model.parameters()), gs.Mean())
    assert list(surgeon.parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    model[0].requires_grad_(False)
    assert list(surgeon.parameters) == ["2.weight", "2.bias"]


def test_a_parameter_replaced_on_the_module_is_named(way):
    model = mlp()
    surgeon = gs.Surgeon(model, sgd(model.parameters()), gs.Mean(), **way)
    surgeon.step(batch=batch(4), loss=classification)
    model[2].bias = nn.Parameter(torch.zeros(4).double())
    before = state_of(model)
    with pytest.raises(gs.InputError, match=r"model: parameter 2\.bias was replaced"):
        surgeon.step(batch=batch(4), loss=classification)
    assert_same_state(before, state_of(model))


def test_a_parametrization_added_later_trains_the_same_tensor(way):
    models, data = [mlp()], batch(4)
    models.append(copy.deepcopy(models[0]))
    optimizers = [sgd(m.parameters()) for m in models]
    surgeon = gs.Surgeon(models[0], optimizers[0], gs.Mean(), **way)
    for model in models:
        nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    surgeon.step(batch=data, loss=classification)
    plain(models[1], optimizers[1], data)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_layer_dead_on_its_input_decays_as_in_an_ordinary_step(way):
    # a zero gradient is one: adapters begin with it
    models = [nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()]
    nn.init.zeros_(models[0][1].weight)
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5) for m in models]
    surgeon = gs.Surgeon(models[0], optimizers[0], gs.Mean(), **way)
    for _ in range(2):
        data = batch(4)
        surgeon.step(batch=data, loss=classification)
        plain(models[1], optimizers[1], data)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_an_average_over_other_parameters_is_refused():
    model = mlp()
    twin = nn.ModuleList([nn.Linear(6, 4).double(), nn.Linear(6, 4).double()])
    twin[0].requires_grad_(False)
    rule = gs.GRU(momentum=0.5)
    surgeon = gs.Surgeon(twin, sgd(twin.parameters()), rule)
    given = {"forget": batch(3), "retain": batch(3)}
    loss = lambda m, b: classification(lambda x: m[0](x) + m[1](x), b)  # noqa: E731
    surgeon.step(**given, loss=loss)
    twin[0].requires_grad_(True)
    twin[1].requires_grad_(False)  # as many values as before
    with pytest.raises(gs.InputError, match="GRU remembers an average over other parameters"):
        surgeon.step(**given, loss=loss)
    rule.load_state_dict({})
    surgeon.step(**given, loss=loss)
    assert model is not twin


@pytest.mark.parametrize(
    "rule", [lambda: gs.GRU(momentum=0.5), lambda: gs.GradVac(granularity="tensor")]
)
@pytest.mark.parametrize("new", ["same", "surgeon", "state"])
def test_what_a_rule_remembers_is_of_the_parameters_it_saw(rule, new):
    twin = nn.ModuleList([nn.Linear(6, 4).double(), nn.Linear(6, 4).double()])
    loss = lambda m, b: classification(lambda x: m[0](x) + m[1](x), b)  # noqa: E731
    twin[0].requires_grad_(False)
    rule, data = rule(), batch(3)
    given = {"forget": batch(3), "retain": data} if "forget" in rule.roles else {"batch": data}
    optimizer = sgd(twin.parameters())
    surgeon = gs.Surgeon(twin, optimizer, rule)
    surgeon.step(**given, loss=loss)
    if new == "state":
        state = rule.state_dict()
        rule = dataclasses.replace(rule)
        rule.load_state_dict(state)
        gs.Surgeon(twin, optimizer, rule).step(**given, loss=loss)  # the same parameters
    twin[0].requires_grad_(True)
    twin[1].requires_grad_(False)
    with pytest.raises(gs.InputError, match=f"{type(rule).__name__} remembers .* other parameters"):
        (surgeon if new == "same" else gs.Surgeon(twin, optimizer, rule)).step(**given, loss=loss)
    rule.load_state_dict({})
    gs.Surgeon(twin, optimizer, rule).step(**given, loss=loss)


def test_a_projection_of_another_model_is_refused():
    model, data = mlp(), batch(4)
    copied = gs.NullSpace(copy.deepcopy(model))
    with pytest.raises(gs.InputError, match=r"project: 0\.weight is no parameter of the model"):
        gs.Surgeon(model, sgd(model.parameters()), gs.UPGrad(), project=copied)
    part = gs.NullSpace(model[0])
    with pytest.raises(gs.InputError, match=r"project: 2\.weight is no parameter of the model"):
        gs.Surgeon(model, sgd(model.parameters()), gs.UPGrad(), project=part)
    alone = gs.Surgeon(model, sgd(model[0].parameters()), gs.UPGrad(), project=part)
    alone.step(batch=data, loss=classification)
    alone.optimizer.add_param_group({"params": list(model[2].parameters())})
    with pytest.raises(gs.InputError, match=r"project: 2\.weight is no parameter of the model"):
        alone.step(batch=data, loss=classification)
    with (
        pytest.raises(gs.InputError, match="parameters are of another model"),
        copied.steps(model.parameters()),
    ):
        pytest.fail("the step was taken")


def test_the_metric_is_asked_of_the_models_parameters_alone():
    model, outside = mlp(), nn.Parameter(torch.zeros(2).double())
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.Adam([*model.parameters(), outside])
    surgeon = gs.Surgeon(model, optimizer, gs.UPGrad(precondition="optimizer"))
    for _ in range(2):
        surgeon.step(batch=batch(3), loss=classification)
    model[0].bias.requires_grad_(True)
    with pytest.raises(gs.InputError, match=r"state for some parameters only, none for 0\.bias"):
        surgeon.step(batch=batch(3), loss=classification)


# learned parameters of the loss


class Weighted:
    """Homoscedastic uncertainty of tasks: e exp(-s) + s, with learned s, as [B, T] or summed."""

    def __init__(self, tasks, each=True):
        self.s = nn.Parameter(torch.linspace(-0.5, 0.5, tasks).double())
        self.each = each

    def __call__(self, model, data):
        target = nn.functional.one_hot(data[1], len(self.s)).double()
        losses = (model(data[0]) - target).square() * torch.exp(-self.s) + self.s
        return losses if self.each else losses.sum(1)


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("each", [True, False], ids=["tasks", "samples"])
@pytest.mark.parametrize("rule", [gs.Sum(), gs.UPGrad(), gs.PCGrad(), gs.MGDA()])
def test_weights_of_losses_get_the_gradient_of_the_weighted_losses(rule, each, micro_batch):
    model, loss, data = mlp(), Weighted(4, each), batch(5)
    rows = loss(model, data).mean(0) if each else loss(model, data)
    columns = zip(
        *(torch.autograd.grad(r, [*model.parameters(), loss.s], retain_graph=True) for r in rows),
        strict=True,
    )
    blocks = [torch.stack(column) for column in columns]
    weights = copy.deepcopy(rule).weights(gs.gramian(blocks[:-1]))
    before = [p.detach().clone() for p in (*model.parameters(), loss.s)]
    optimizer = sgd([*model.parameters(), loss.s])
    surgeon = gs.Surgeon(model, optimizer, rule, micro_batch=micro_batch)
    info = surgeon.step(batch=data, loss=loss)
    torch.testing.assert_close(info.gramian, gs.gramian(blocks[:-1]))
    for p, start, block in zip((*model.parameters(), loss.s), before, blocks, strict=True):
        moved = torch.einsum("m,m...->...", weights, block) * -0.1
        torch.testing.assert_close(p - start, moved, rtol=1e-8, atol=1e-10)
    assert loss.s.grad is None


@pytest.mark.parametrize("together", [True, False])
def test_a_forget_row_raises_its_loss_in_them_too(together):
    model, loss, forget, retain = mlp(), Weighted(4, False), batch(3), batch(4)
    rule = gs.OrthoGrad(alpha=0.3)
    rows = [loss(model, forget).mean(), *loss(model, retain)]
    gram = gs.gramian(
        [
            torch.stack(column)
            for column in zip(
                *(
                    torch.autograd.grad(r, list(model.parameters()), retain_graph=True)
                    for r in rows
                ),
                strict=True,
            )
        ]
    )
    weights, start = rule.weights(gram), loss.s.detach().clone()
    (grad,) = torch.autograd.grad(torch.stack(rows) @ weights, loss.s)
    optimizer = sgd([*model.parameters(), loss.s])
    gs.Surgeon(model, optimizer, rule, together=together).step(
        forget=forget, retain=retain, loss=loss
    )
    torch.testing.assert_close(loss.s - start, -0.1 * grad, rtol=1e-8, atol=1e-10)


def test_a_tensor_of_the_models_and_the_losss_parameters_serves_both():
    model, data = mlp(), batch(5)
    scale = nn.Parameter(torch.tensor([1.5]).double())

    def loss(model, data):
        x, y = data
        x = torch.tanh(model[0](x))  # (W s): computed from both before a sample is met
        return nn.functional.cross_entropy(x @ (model[2].weight * scale).mT, y, reduction="none")

    twin, other = copy.deepcopy(model), copy.deepcopy(scale)
    gs.Surgeon(model, sgd([*model.parameters(), scale]), gs.Mean()).step(batch=data, loss=loss)
    mine, scale = scale, other
    plain(twin, sgd([*twin.parameters(), other]), data, loss)
    torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "rule,options,message",
    [
        (gs.SignAgreement(), {}, "SignAgreement gives the losses no weights"),
        (gs.UPGrad(granularity="tensor"), {}, "granularity='tensor' gives the losses several"),
        (gs.UPGrad(), {"rows": "stored"}, "rows='stored' has the model's alone"),
        (gs.SignAgreement(), {"micro_batch": 2}, "SignAgreement gives the losses no weights"),
    ],
)
def test_names_weights_of_losses_that_it_cannot_step(rule, options, message):
    model, loss = mlp(), Weighted(4, False)
    optimizer = torch.optim.SGD(
        [*model.named_parameters(), ("log_variances", loss.s), ("far", nn.Parameter(torch.ones(1)))]
    )
    surgeon = gs.Surgeon(model, optimizer, rule, **options)
    before = state_of(model, optimizer)
    with pytest.raises(gs.InputError, match=f"does not, log_variances: {message}"):
        surgeon.step(batch=batch(5), loss=loss)
    assert_same_state(before, state_of(model, optimizer))


def test_names_them_by_their_place_where_they_have_no_name():
    model, loss = mlp(), Weighted(4, False)
    groups = [{"params": model.parameters()}, {"params": [loss.s]}]
    surgeon = gs.Surgeon(model, sgd(groups), gs.SignAgreement())
    with pytest.raises(gs.InputError, match=r"optimizer\.param_groups\[1\]\['params'\]\[0\]: "):
        surgeon.step(batch=batch(5), loss=loss)


def test_what_no_loss_depends_on_stays(way):
    model, outside = mlp(), nn.Parameter(torch.ones(3).double())
    optimizer = torch.optim.AdamW([*model.parameters(), outside], weight_decay=0.5)
    gs.Surgeon(model, optimizer, gs.UPGrad(), **way).step(batch=batch(3), loss=classification)
    assert torch.equal(outside, torch.ones(3).double())


# losses of another model


def other_model(kind):
    model, other = mlp(), mlp()
    if kind == "detached inputs":
        wide = lambda m, x: m(x).detach().repeat(1, 2)[:, :6]  # noqa: E731
        return model, lambda m, b: classification(lambda x: other(wide(m, x)), b)
    return model, lambda m, b: classification(other, b)


@pytest.mark.parametrize("kind", ["a copy", "detached inputs"])
def test_losses_of_another_model_are_no_rows(kind, way):
    model, loss = other_model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    surgeon = gs.Surgeon(model, optimizer, gs.UPGrad(), **way)
    before = state_of(model, optimizer)
    with pytest.raises(gs.InputError, match=r"do(es)? not depend on the model's parameters"):
        surgeon.step(batch=batch(4), loss=loss)
    assert_same_state(before, state_of(model, optimizer))


@pytest.mark.parametrize("kind", ["a copy", "detached inputs"])
def test_everybody_says_so(kind):
    model, loss = other_model(kind)
    message = "do(es)? not depend on the model's parameters"
    for summed in (False, True):  # rows of samples, or all losses in one
        with gs.tape(model) as tape:
            losses = loss(model, batch(4))
        with pytest.raises(gs.InputError, match=message):
            tape.jacobian(losses.sum() if summed else losses)
    with pytest.raises(gs.InputError, match=message):
        gs.check(model, batch(4), loss=loss)
    for rows in ("samples", "mean"):
        with pytest.raises(gs.InputError, match=message):
            gs.DenseJacobian.from_model(model, batch(4), loss, rows=rows)


def test_losses_of_the_outside_alone_are_no_rows_of_the_model():
    model, loss = mlp(), Weighted(4, False)
    surgeon = gs.Surgeon(model, sgd([*model.parameters(), loss.s]), gs.UPGrad())
    with pytest.raises(gs.InputError, match="do not depend on the model's parameters"):
        surgeon.step(batch=batch(3), loss=lambda m, b: loss(mlp(), b))


def test_rows_that_are_zero_are_rows(way):
    model = mlp()
    flat = lambda m, b: classification(m, b) * 0  # noqa: E731
    before = state_of(model)
    info = gs.Surgeon(model, sgd(model.parameters()), gs.UPGrad(), **way).step(
        batch=batch(4), loss=flat
    )
    assert not info.gramian.any()
    assert_same_state(before, state_of(model))
    with gs.tape(model) as tape:
        losses = flat(model, batch(4))
    assert not tape.jacobian(losses.sum()).gramian().any()


@pytest.mark.parametrize("summed", [False, True])
def test_a_function_without_gradient_is_in_the_graph(summed):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            return None

    model = mlp()
    with gs.tape(model) as tape:
        losses = classification(lambda x: Stop.apply(model(x)), batch(4))
    assert not tape.jacobian(losses.sum() if summed else losses).gramian().any()


@pytest.mark.parametrize("together", [True, False, None])
def test_a_loss_may_freeze_parameters(together):
    model, forget, retain = mlp(), batch(4), batch(4)
    before = [p.detach().clone() for p in model.parameters()]

    def freezing(model, batch):
        model[2].weight.requires_grad_(False)
        return classification(model, batch)

    optimizer = sgd(list(model.parameters()))
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), together=together)
    surgeon.step(forget=forget, retain=retain, loss=freezing)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [p is not model[2].weight for p in model.parameters()]
