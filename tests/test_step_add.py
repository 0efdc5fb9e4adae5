"""Rows added micro-batch by micro-batch, and the update left in `.grad`."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import gradsurgery as gs
from gradsurgery.collect import Added
from tests.capture.zoo import ZOO
from tests.capture.zoo import make as from_zoo
from tests.models import (
    MODELS,
    assert_same_state,
    batch,
    classification,
    make,
    mlp,
    state_of,
)

RULES = {
    "OrthoGrad": lambda: gs.OrthoGrad(alpha=0.5),
    "OrthoGrad by tensor": lambda: gs.OrthoGrad(granularity="tensor"),
    "GRU": gs.GRU,
    "NGDiff": gs.NGDiff,
    "PCGrad": gs.PCGrad,
    "UPGrad": gs.UPGrad,
    "SignAgreement": gs.SignAgreement,
}
HOLDS = ("auto", "pairs", "rows")


def cut(whole, *ends):
    """Pieces of a batch."""
    starts = (0, *ends)
    return [
        pytree.tree_map(lambda leaf, a=a, b=b: leaf[a:b], whole)
        for a, b in zip(starts, (*ends, None), strict=True)
    ]


def surgeon_of(model, rule, **options):
    return gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule, **options)


def taken(model):
    """The gradients there are, which are then no more."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


def assert_close(got, expected, tolerance):
    largest = max(float(grad.norm()) for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        if grad is None:
            assert got[name] is None, name
            continue
        if (
            float(grad.norm()) <= tolerance * largest
        ):  # none, as a key's bias has: both are rounding
            assert float(got[name].norm()) <= tolerance * largest, name
            continue
        scale = max(float(grad.norm()), 1e-3)
        assert float((got[name] - grad).norm()) <= tolerance * scale, name


def assert_same_info(got, expected, tolerance=1e-12):
    for name in ("losses", "cosines", "gramian"):
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=tolerance, atol=tolerance
        )
    for name in ("forget_loss", "retain_loss", "kept_norm", "rank", "conflict_rate"):
        value = getattr(expected, name)
        close = None if value is None else pytest.approx(value, rel=tolerance)
        assert getattr(got, name) == close, name


def whole_and_parts(model, rule, forget, retain, loss, **options):
    """Gradients and infos: of all at once, and of uneven parts that come by turns."""
    found = []
    for parts in (False, True):
        made = rule()
        surgeon = surgeon_of(model, made, **options)
        if "forget" not in made.roles:
            for each in cut(retain, 1, 4) if parts else [retain]:
                surgeon.add(batch=each, loss=loss)
        elif parts:
            first, second = cut(forget, 2)
            one, two, three = cut(retain, 1, 4)
            surgeon.add(retain=one, loss=loss)
            surgeon.add(forget=first, retain=two, loss=loss)
            surgeon.add(forget=second, loss=loss)
            surgeon.add(retain=three, loss=loss)
        else:
            surgeon.add(forget=forget, retain=retain, loss=loss)
        info = surgeon.backward()
        found.append((taken(model), info))
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options", [*({"hold": hold} for hold in HOLDS), {"rows": "stored"}], ids=str
)
def test_parts_give_the_update_of_the_whole(rule, options):
    model, forget, loss = make("attention")
    _, retain, _ = make("attention", size=7)
    whole, parts = whole_and_parts(model, RULES[rule], forget, retain, loss, **options)
    assert_close(parts[0], whole[0], 1e-12)
    assert_same_info(parts[1], whole[1])


PLACED = ("loss reversed", "loss of two halves")  # by the place of a sample in its batch


@pytest.mark.parametrize("name", PLACED)
def test_losses_that_depend_on_other_samples_are_refused(name):
    model, data = from_zoo(name, size=5)
    surgeon = surgeon_of(model, gs.PCGrad())
    with pytest.raises(gs.InputError, match="add: loss of a sample of batch depends on the others"):
        surgeon.add(batch=data, loss=ZOO[name].loss)
    surgeon.step(batch=data, loss=ZOO[name].loss)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in PLACED])
def test_every_architecture_gives_the_update_of_the_whole(name):
    # the rows held are the same in either form, and the sums those of all samples
    model, data = from_zoo(name, size=5)
    tolerance = max(1e-12, ZOO[name].tolerance)
    expected = None
    for hold in ("whole", *HOLDS):
        surgeon = surgeon_of(model, gs.OrthoGrad(), hold="auto" if hold == "whole" else hold)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part in [data] if hold == "whole" else cut(data, 2):
                surgeon.add(forget=part, retain=part, loss=ZOO[name].loss)
        # the forget row lies in the span of the retain rows: its own products decide
        gram = surgeon.backward().gramian
        model.zero_grad()
        expected = gram if expected is None else expected
        assert (gram - expected).abs().max() <= tolerance * expected.abs().max(), hold


@pytest.mark.parametrize("name", MODELS)
def test_float32_parts_give_the_update_of_the_whole(name):
    model, forget, loss = make(name, dtype=torch.float32)
    _, retain, _ = make(name, size=7, dtype=torch.float32)
    whole, parts = whole_and_parts(model, gs.PCGrad, forget, retain, loss)
    assert_close(parts[0], whole[0], 1e-6)
    whole, parts = whole_and_parts(model, gs.OrthoGrad, forget, retain, loss)
    assert_close(parts[0], whole[0], 1e-5 if name == "mlp" else 1e-4)  # what is left is small


def test_tasks_are_means_over_all_samples():
    model, data = mlp(), batch(6)

    def tasks(net, given):
        return F.softplus(net(given[0]))[:, :3]

    found = []
    for parts in ([data], cut(data, 1, 4)):
        surgeon = surgeon_of(model, gs.UPGrad())
        for part in parts:
            surgeon.add(batch=part, loss=tasks)
        info = surgeon.backward()
        found.append((taken(model), info))
    assert_close(found[1][0], found[0][0], 1e-12)
    assert_same_info(found[1][1], found[0][1])


def test_step_is_add_backward_and_the_optimizers_step():
    models = [mlp()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in models]
    surgeons = [
        gs.Surgeon(m, o, gs.OrthoGrad(), together=False)
        for m, o in zip(models, optimizers, strict=True)
    ]
    for _ in range(3):
        data = {"forget": batch(3), "retain": batch(4)}
        surgeons[0].step(**data, loss=classification)
        surgeons[1].add(**data, loss=classification)
        surgeons[1].backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        surgeons[2].add(retain=data["retain"], loss=classification)
        surgeons[2].step(forget=data["forget"], loss=classification)
    for a, b, c in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-12)


def test_step_without_batches_steps_along_what_was_added():
    model, data = mlp(), batch(4)
    other = copy.deepcopy(model)
    surgeon = surgeon_of(model, gs.Mean())
    surgeon.add(batch=data, loss=classification)
    surgeon.step()
    surgeon_of(other, gs.Mean()).step(batch=data, loss=classification)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_backward_takes_batches_besides_what_was_added():
    model, data = mlp(), batch(4)
    surgeon = surgeon_of(model, gs.UPGrad())
    for part in cut(data, 3):
        surgeon.add(batch=part, loss=classification)
    surgeon.backward()
    added = taken(model)
    surgeon.backward(batch=data, loss=classification)
    assert_close(taken(model), added, 1e-12)
    first, second = cut(data, 3)
    surgeon.add(batch=first, loss=classification)
    surgeon.backward(batch=second, loss=classification)
    assert_close(taken(model), added, 1e-12)


def test_adds_to_the_gradients_there_are_in_their_memory():
    model, data = mlp(), batch(4)
    classification(model, data).sum().backward()
    before = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    seen = {}
    handles = [
        p.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.update({name: p.grad.clone()})
        )
        for name, p in model.named_parameters()
    ]
    surgeon = surgeon_of(model, gs.Sum())
    surgeon.add(batch=data, loss=classification)
    surgeon.backward(scale=-3.0)
    for handle in handles:
        handle.remove()
    for name, p in model.named_parameters():
        grad, value = before[name]
        assert p.grad is grad
        torch.testing.assert_close(grad, -2 * value)
        assert torch.equal(seen[name], grad)


def test_clipping_and_schedules_work_between():
    model, data = mlp(), batch(5)
    other = copy.deepcopy(model)
    for net, mine in ((model, True), (other, False)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        surgeon = gs.Surgeon(net, optimizer, gs.Mean())
        for _ in range(4):
            optimizer.zero_grad()
            if mine:
                for part in cut(data, 2):
                    surgeon.add(batch=part, loss=classification)
                surgeon.backward()
            else:
                classification(net, data).mean().backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            assert norm > 0.1
            optimizer.step()
            schedule.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_lbfgs_steps_by_a_closure():
    model, data = mlp(), batch(5)
    other = copy.deepcopy(model)
    ours, theirs = (
        torch.optim.LBFGS(m.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")
        for m in (model, other)
    )
    surgeon = gs.Surgeon(model, ours, gs.Mean())

    def closure():
        ours.zero_grad()
        for part in cut(data, 3):
            surgeon.add(batch=part, loss=classification)
        return surgeon.backward().losses.mean()

    def plain():
        theirs.zero_grad()
        loss = classification(other, data).mean()
        loss.backward()
        return loss

    for _ in range(3):
        ours.step(closure)
        theirs.step(plain)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    with pytest.raises(gs.InputError, match=r"LBFGS.step needs closure.*surgeon.backward\(\)"):
        surgeon.step(batch=data, loss=classification)


def padded(lengths):
    ids = torch.randint(11, (len(lengths), max(lengths)))
    keep = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"ids": ids, "next": torch.where(keep, ids.roll(-1, 1), -100)}


def by_token(model, data):
    """The mean over its own tokens, and how many these are."""
    each = F.cross_entropy(model(data["ids"]).mT, data["next"], reduction="none")
    count = (data["next"] >= 0).sum(1)
    return gs.WeightedLosses(each.sum(1) / count, count)


def test_token_means_are_over_the_tokens_of_all_parts():
    model, _, _ = make("attention")
    data = padded([2, 6, 1, 4, 5])
    logits = model(data["ids"])
    expected = F.cross_entropy(logits.flatten(0, 1), data["next"].flatten())  # torch's own mean
    expected.backward()
    plain = taken(model)
    for ends in ((), (1,), (2, 3)):
        surgeon = surgeon_of(model, gs.Mean())
        for part in cut(data, *ends):
            surgeon.add(batch=part, loss=by_token)
        surgeon.backward()
        assert_close(taken(model), plain, 1e-12)
        surgeon = surgeon_of(model, gs.GRU())
        for part in cut(data, *ends):
            surgeon.add(forget=part, retain=part, loss=by_token)
        info = surgeon.backward()
        model.zero_grad()
        assert info.forget_loss == pytest.approx(float(expected.detach()), rel=1e-12)
    sizes = torch.stack([g.pow(2).sum() for g in plain.values() if g is not None]).sum()
    assert float(info.gramian[0, 0]) == pytest.approx(float(sizes), rel=1e-10)


def test_weights_of_losses_by_hand():
    # one weight w = 1; losses w x of x = 1, 2, 6 with weights 1, 2, 1: the mean is (1 + 4 + 6) / 4
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x, n = torch.tensor([[1.0], [2.0], [6.0]]).double(), torch.tensor([1, 2, 1])

    def loss(net, data):
        return gs.WeightedLosses(net(data[0])[:, 0], data[1])

    surgeon = surgeon_of(model, gs.Mean())
    for part in cut((x, n), 1):
        surgeon.add(batch=part, loss=loss)
    info = surgeon.backward()
    assert float(model.weight.grad) == pytest.approx(11 / 4)
    # rows are gradients times weights / mean(weights) = 3/4, 3/2, 3/4
    assert info.gramian.diagonal().sqrt().tolist() == pytest.approx([0.75, 3.0, 4.5])
    assert info.losses.tolist() == [1.0, 2.0, 6.0]


@pytest.mark.parametrize(
    "weights,message",
    [
        (torch.ones(2), r"one for each sample, \[3\], got \[2\]"),
        ([1, 1, 1], r"one for each sample, \[3\], got list"),
        (torch.tensor([1.0, -1.0, 1.0]), "finite and not negative"),
        (torch.tensor([1.0, float("nan"), 1.0]), "finite and not negative"),
        (torch.zeros(3), "those of forget sum to zero"),
    ],
    ids=["few", "list", "negative", "nan", "zero"],
)
def test_names_weights_that_weigh_nothing(weights, message):
    model, data = mlp(), batch(3)
    surgeon = surgeon_of(model, gs.OrthoGrad(), together=False)

    def loss(net, given):
        return gs.WeightedLosses(classification(net, given), weights)

    with pytest.raises(gs.InputError, match=message):
        surgeon.step(forget=data, retain=data, loss=loss)


def test_what_raises_in_add_leaves_the_rows_from_before():
    model, data = mlp(), batch(4)
    surgeon = surgeon_of(model, gs.PCGrad(), micro_batch=2)
    surgeon.add(batch=data, loss=classification)
    before = state_of(model, surgeon.optimizer)
    calls = []

    def fails(net, given):
        calls.append(None)
        losses = classification(net, given)
        if len(calls) == 2:
            raise RuntimeError("the second half")
        return losses

    with pytest.raises(RuntimeError, match="the second half"):
        surgeon.add(batch=batch(4), loss=fails)
    with pytest.raises(gs.InputError, match="loss must return"):
        surgeon.add(batch=batch(4), loss=lambda net, given: classification(net, given).mean())
    with pytest.raises(gs.InputError, match=r"of one shape for batch, got \[B\] and \[B, 4\]"):
        surgeon.add(batch=batch(4), loss=lambda net, given: F.softplus(net(given[0])))
    with pytest.raises(gs.NonFiniteError):
        surgeon.add(
            batch=(torch.full((2, 6), torch.nan).double(), data[1][:2]), loss=classification
        )
    assert_same_state(before, state_of(model, surgeon.optimizer))
    info = surgeon.backward()
    assert len(info.losses) == 4
    got = taken(model)
    once = surgeon_of(model, gs.PCGrad())
    once.add(batch=data, loss=classification)
    once.backward()
    assert_close(got, taken(model), 1e-12)


def test_what_raises_in_backward_leaves_gradients_and_the_rule(monkeypatch):
    model, data = mlp(), batch(4)
    rule = gs.GRU()
    surgeon = surgeon_of(model, rule)
    surgeon.step(forget=data, retain=data, loss=classification)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, remembered = state_of(model), rule.state_dict()
    handle = model[2].bias.register_post_accumulate_grad_hook(lambda p: 1 / 0)
    surgeon.add(forget=data, retain=data, loss=classification)
    with pytest.raises(ZeroDivisionError):
        surgeon.backward()
    handle.remove()
    assert_same_state(before, state_of(model))
    assert {k: v.tolist() for k, v in rule.state_dict().items()} == {
        k: v.tolist() for k, v in remembered.items()
    }
    with pytest.raises(gs.InputError, match=r"takes forget= and retain=, got \[\]"):
        surgeon.backward()


def test_a_step_that_fails_leaves_no_rows_for_the_next():
    model, data = mlp(), batch(4)
    surgeon = surgeon_of(model, gs.PCGrad())
    handle = surgeon.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        surgeon.step(batch=data, loss=classification)
    handle.remove()
    assert len(surgeon.step(batch=data, loss=classification).losses) == 4


@pytest.mark.parametrize(
    "rule,given,message",
    [
        (gs.OrthoGrad, {"forget"}, r"takes forget= and retain=, got \['forget'\]"),
        (gs.OrthoGrad, {"forget", "memory"}, r"got \['forget', 'memory'\]"),
        (gs.UPGrad, {"memory"}, r"it takes batch=, got \['memory'\]"),
    ],
)
def test_backward_names_what_was_not_added(rule, given, message):
    model = mlp()
    surgeon = surgeon_of(model, rule())
    for part in given:
        surgeon.add(**{part: batch(2)}, loss=classification)
    with pytest.raises(gs.InputError, match=message):
        surgeon.backward()


def test_rows_of_a_model_that_has_moved_are_refused():
    model, data = mlp(), batch(4)
    surgeon = surgeon_of(model, gs.PCGrad())
    surgeon.add(batch=data, loss=classification)
    with torch.no_grad():
        model[0].weight += 1
    for call in (
        lambda: surgeon.add(batch=data, loss=classification),
        surgeon.backward,
        lambda: surgeon.step(batch=data, loss=classification),
    ):
        surgeon.discard()
        surgeon.add(batch=data, loss=classification)
        with torch.no_grad():
            model[0].weight += 1
        with pytest.raises(gs.InputError, match=r"0\.weight moved after rows were added"):
            call()
    surgeon.discard()
    surgeon.step(batch=data, loss=classification)


@pytest.mark.parametrize("move", ["fused", "data", "copied by torch"])
def test_moves_that_change_no_version_are_noticed(move):
    model, data = mlp(), batch(4)
    surgeon = surgeon_of(model, gs.PCGrad())
    surgeon.add(batch=data, loss=classification)
    if move == "fused":
        classification(model, data).mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()
        model.zero_grad()
    elif move == "data":
        model[0].weight.data.mul_(2)
    else:
        flat = nn.utils.parameters_to_vector(model.parameters()).detach()
        nn.utils.vector_to_parameters(2 * flat, model.parameters())
    with pytest.raises(gs.InputError, match=r"0\.weight.* moved after rows were added"):
        surgeon.backward()


@pytest.mark.parametrize("hold", HOLDS)
def test_batches_may_be_refilled_after_add(hold):
    model, data = mlp(), batch(6)
    surgeon = surgeon_of(model, gs.UPGrad(), hold=hold)
    x, y = torch.empty(2, 6).double(), torch.empty(2).long()
    for a, b in cut(data, 2, 4):
        surgeon.add(batch=(x.copy_(a), y.copy_(b)), loss=classification)
    x.zero_()
    surgeon.backward()
    got = taken(model)
    surgeon.backward(batch=data, loss=classification)
    assert_close(got, taken(model), 1e-12)


def test_a_buffer_of_the_models_own_that_is_refilled_is_noticed():
    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4).double()
            self.register_buffer("inputs", torch.zeros(2, 6).double())

        def forward(self, x):
            return self.layer(self.inputs.copy_(x))

    model = Static()
    surgeon = surgeon_of(model, gs.UPGrad(), hold="pairs")
    surgeon.add(batch=batch(2), loss=classification)
    with pytest.raises(gs.InputError, match=r"a tensor .* was modified in place while"):
        surgeon.add(batch=batch(2), loss=classification)
        surgeon.backward()
    surgeon.discard()
    with pytest.raises(gs.InputError, match=r"a tensor .* was modified in place while"):
        surgeon.step(batch=batch(2), memory=batch(2), loss=classification)


@pytest.mark.parametrize("where", ["held", "sums", "joined", "kept"])
def test_what_stops_in_the_middle_of_adding_is_never_used(where, monkeypatch):
    model, data = mlp(), batch(4)
    surgeon = surgeon_of(model, gs.OrthoGrad(), together=True)
    surgeon.add(forget=data, retain=data, loss=classification)
    name = {
        "held": "gradsurgery.collect.held",
        "sums": "gradsurgery.capture.held.Sums.add",
        "joined": "gradsurgery.collect.Added._note",
        "kept": "gradsurgery.undo.Undo.keep",
    }[where]
    calls = []
    real = Added._note

    def stops(*given, **options):
        calls.append(None)
        if where == "joined" and len(calls) < 4:  # before the second part's, of those that join
            return real(*given, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(name, stops)
        surgeon.add(forget=data, retain=data, loss=classification)
    if where == "joined":  # as it was before
        assert len(surgeon.backward().losses) == 5
        return
    for call in (
        lambda: surgeon.add(retain=data, loss=classification),
        surgeon.backward,
    ):
        with pytest.raises(gs.InputError, match="left rows half added"):
            call()
        surgeon._added.torn = True
    surgeon.discard()
    assert len(surgeon.step(forget=data, retain=data, loss=classification).losses) == 5


def test_another_loss_of_the_same_code_is_tried():
    model, data = mlp(), batch(4)
    surgeon = surgeon_of(model, gs.PCGrad())

    def made(coupled):
        def loss(net, given):
            losses = classification(net, given)
            return losses / losses.detach().mean() if coupled else losses

        return loss

    surgeon.add(batch=data, loss=made(False))
    with pytest.raises(gs.InputError, match="depends on the others of its pass"):
        surgeon.add(batch=data, loss=made(True))


def test_rows_added_are_not_copied():
    model, data = mlp(), batch(4)
    surgeon = surgeon_of(model, gs.UPGrad())
    surgeon.add(batch=data, loss=classification)
    for made in (copy.deepcopy, pickle.dumps):
        with pytest.raises(gs.InputError, match=r"rows were added, which are not copied"):
            made(surgeon)


def test_a_surgeon_can_be_pickled():
    model, data = mlp(), batch(4)
    surgeon = surgeon_of(model, gs.PCGrad(seed=3))
    surgeon.backward(batch=data, loss=classification)
    other = pickle.loads(pickle.dumps(surgeon))
    other.step(batch=data, loss=classification)


def test_parameters_frozen_or_unfrozen_between_are_named():
    model, data = mlp(), batch(4)
    model[2].requires_grad_(False)
    surgeon = surgeon_of(model, gs.PCGrad())
    surgeon.add(batch=data, loss=classification)
    model[2].requires_grad_(True)
    with pytest.raises(gs.InputError, match=r"before 2\.weight, 2\.bias was frozen, unfrozen"):
        surgeon.add(batch=data, loss=classification)
    surgeon.discard()
    surgeon.add(batch=data, loss=classification)
    surgeon.backward()
    assert model[2].weight.grad is not None


def test_parameters_added_to_the_optimizer_later_have_rows():
    model, data = mlp(), batch(4)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    surgeon = gs.Surgeon(model, optimizer, gs.Mean())
    optimizer.add_param_group({"params": list(model[2].parameters())})
    for part in cut(data, 1):
        surgeon.add(batch=part, loss=classification)
    surgeon.backward()
    got = taken(model)
    classification(model, data).mean().backward()
    assert_close(got, taken(model), 1e-12)


def test_learned_weights_of_losses_get_the_gradient_of_the_weighted_losses():
    model, data = mlp(), batch(5)
    scale = nn.Parameter(torch.tensor(0.3).double())
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    surgeon = gs.Surgeon(model, optimizer, gs.UPGrad())

    def loss(net, given):
        return scale.exp() * classification(net, given) - scale

    whole = None
    for ends in ((), (2,)):
        for part in cut(data, *ends):
            surgeon.add(batch=part, loss=loss)
        info = surgeon.backward()
        found = scale.grad.clone()
        optimizer.zero_grad()
        whole = found if whole is None else whole
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
    weights = gs.UPGrad().weights(info.gramian)
    expected = weights @ (scale.detach().exp() * classification(model, data).detach() - 1)
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=0)


def test_a_hook_that_is_not_linear_is_refused_for_a_sum_over_parts():
    model, data = mlp(), batch(4)
    model[0].weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    surgeon = surgeon_of(model, gs.OrthoGrad())
    with pytest.warns(UserWarning, match="it has a hook"):
        surgeon.add(retain=data, loss=classification)
    with pytest.raises(gs.InputError, match=r"0\.weight.* not linear in its gradient.*take whole"):
        surgeon.add(forget=data, loss=classification)
    surgeon = surgeon_of(model, gs.OrthoGrad(), micro_batch=1)
    with pytest.raises(gs.InputError, match=r"0\.weight: a hook.*a row of forget is a sum over"):
        surgeon.step(forget=data, retain=data, loss=classification)


def test_projections_are_of_steps():
    model, data = mlp(), batch(4)
    kept = gs.OWM(model)
    kept.observe(data, classification)
    surgeon = surgeon_of(model, gs.PCGrad(), project=kept)
    surgeon.add(batch=data, loss=classification)
    with pytest.raises(gs.InputError, match=r"with kept\.steps"):
        surgeon.backward()
    surgeon.step()
