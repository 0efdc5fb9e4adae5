"""Forget losses that are bounded and lowered: their values, their signs in every method, state."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradsurgery.errors import InputError
from gradsurgery.unlearn import METHODS, unlearning
from gradsurgery.unlearn.jobs.tune import draws
from gradsurgery.unlearn.objectives.base import divergence
from gradsurgery.unlearn.objectives.classification import cross_entropy
from gradsurgery.unlearn.training.forgetting import BOUNDED, Forgetting
from tests.unlearn.objectives.tasks import LossesAlone, made, same, values

MOVING = [name for name, kind in METHODS.items() if issubclass(kind, Forgetting)]
EVERYTHING = 64  # a batch size beyond every set: all samples in each batch


def make(name, problem, loss="uniform", size=EVERYTHING, **options):
    kind = METHODS[name]
    sizes = {f"{drawn}_batch": size for drawn in kind.draws}
    config = kind.Config(**{"optimizer": "sgd", "forget_loss": loss, **sizes, **options})
    sets = {k: getattr(problem, k) for k in ("forget", "retain", "validation")}
    return kind(problem.model, cross_entropy, **sets, config=config, seed=3)


def flat(grads):
    return torch.cat([grad.detach().flatten() for grad in grads])


def gradient(model, loss):
    return flat(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


def target_of(problem, loss):
    """The distribution by the definition: the mean of the original's on held-out samples."""
    if loss == "uniform":
        return torch.full((3,), 1 / 3, dtype=torch.float64)
    return problem.model(problem.validation["image"]).softmax(1).mean(0).detach()


def apart(problem, target):
    """KL(outputs || target) of the forget samples, [B], term by term."""
    p = problem.model(problem.forget["image"]).softmax(1)
    return (p * (p / target).log()).sum(1)


def disturb(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.5)


def test_all_that_climb_may_descend_instead():
    assert set(MOVING) == {
        *("orthograd", "graddiff", "gdr_gma", "gru", "neggrad", "neggradplus", "surgery")
    }


class Told(nn.Module):
    """Logits [B, 2] that samples [B, 2] say, moved by one parameter."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2).double())

    def forward(self, x):
        return x + self.shift


def told(*shares):
    """Samples on which `Told` gives the first class these probabilities."""
    p = torch.tensor(shares, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log(), torch.zeros(len(p), dtype=torch.int64)


@pytest.mark.parametrize(
    "loss,worked",
    [
        # KL((3/4, 1/4) || (1/2, 1/2)), and of a sample that has it
        ("uniform", [0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0]),
        # held out are (3/8, 5/8) and (1/8, 7/8): their mean is (1/4, 3/4)
        ("held_out", [0.75 * math.log(3) + 0.25 * math.log(1 / 3), 0.5 * math.log(4 / 3)]),
    ],
)
def test_values_and_slopes_worked_by_hand(loss, worked):
    model = Told()
    sets = {"forget": told(0.75, 0.5), "validation": told(0.375, 0.125)}
    config = METHODS["neggrad"].Config(forget_loss=loss, optimizer="sgd", lr=1.0)
    trainer = METHODS["neggrad"](model, cross_entropy, retain=None, **sets, config=config)
    found = trainer.forget_losses(sets["forget"])
    assert found.shape == (2,)
    assert found.tolist() == pytest.approx(worked, abs=1e-15)
    # d KL(p || q) / d z_1 = p_1 (log(p_1 / q_1) - KL)
    q = 0.5 if loss == "uniform" else 0.25
    slopes = [p * (math.log(p / q) - kl) for p, kl in zip((0.75, 0.5), worked, strict=True)]
    next(trainer.fit())
    # the step lowers the first logit, of the class that is more likely than it should be
    assert model.shift[0].item() == pytest.approx(-sum(slopes) / 2)
    assert model.shift[0] < 0


def expected(name, f, r, rows, retain_loss):
    """What each method descends, from its definition: f and r are gradients of what is lowered."""

    def off(a, b):
        return a - min(float(a @ b), 0) / float(b @ b) * b

    if name == "orthograd":
        q = torch.linalg.qr(rows.mT).Q
        return 0.3 * r + 0.7 * (f - q @ (q.mT @ f))
    share = 1 / (1 + math.exp(2.0 * (retain_loss - 0.02)))
    return {
        "neggrad": lambda: f,
        "graddiff": lambda: 0.4 * f + 0.6 * r,
        "neggradplus": lambda: 0.2 * f + 0.8 * r,
        "gru": lambda: off(f, r),
        "gdr_gma": lambda: share * off(f, r) + (1 - share) * off(r, f),
        "surgery": lambda: off(f, r) + off(r, f),
    }[name]()


OPTIONS = {
    "orthograd": {"alpha": 0.3},
    "graddiff": {"forget_weight": 0.4, "retain_weight": 0.6},
    "neggradplus": {"retain_weight": 0.8},
    "gdr_gma": {"gamma": 2.0},
}


@pytest.mark.parametrize("loss,part", [("uniform", 5), ("held_out", None)])
@pytest.mark.parametrize("name", MOVING)
def test_every_method_descends_it(name, loss, part, problem):
    target = target_of(problem, loss)
    trainer = make(name, problem, loss, lr=1.0, micro_batch=part, **OPTIONS.get(name, {}))
    disturb(problem.model)  # the target is the original's
    model = problem.model
    values, kept = apart(problem, target), problem.loss(model, problem.retain)
    f, r = gradient(model, values.mean()), gradient(model, kept.mean())
    rows = torch.stack([gradient(model, each) for each in kept])
    wanted = expected(name, f, r, rows, kept.mean().item())
    before = flat(model.parameters())
    record = next(trainer.fit())
    assert record["forget_loss_batch"] == pytest.approx(values.mean().item())
    torch.testing.assert_close(
        before - flat(model.parameters()), wanted, rtol=1e-8, atol=1e-9 * float(wanted.norm())
    )


@pytest.mark.parametrize("loss", BOUNDED)
@pytest.mark.parametrize("name", ["orthograd", "gru", "neggrad"])
def test_it_comes_to_zero_and_no_further(name, loss, problem):
    target = target_of(problem, loss)
    disturbed = copy.deepcopy(problem.model)
    options = {"orthograd": {"alpha": 0.0, "retain_batch": 2}}.get(name, {})
    make(name, problem, loss, steps=150, lr=0.02, **{"optimizer": "adam", **options}).run()
    found = apart(problem, target)
    problem.model = disturbed
    assert found.mean() < apart(problem, target).mean() / 100
    assert found.min() >= -1e-12
    # as plain ascent does not
    assert found.max() <= -float(target.log().min())


@pytest.mark.parametrize("loss", BOUNDED)
@pytest.mark.parametrize("name", MOVING)
def test_outputs_that_are_the_target_have_no_loss_and_no_slope(name, loss, problem):
    with torch.no_grad():
        problem.model[2].weight.zero_()
        if loss == "uniform":
            problem.model[2].bias.zero_()
    alone = {"graddiff": {"retain_weight": 0.0}, "neggradplus": {"retain_weight": 0.0}}
    trainer = make(name, problem, loss, lr=1.0, **alone.get(name, {}))
    assert trainer.forget_losses(problem.forget).abs().max() <= 1e-15
    if name in ("neggrad", "graddiff", "neggradplus"):
        before = flat(problem.model.parameters())
        next(trainer.fit())
        assert (flat(problem.model.parameters()) - before).abs().max() <= 1e-15


def test_classes_that_are_masked_have_no_share():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    found = divergence(torch.zeros(1, 3), logits)
    assert found.item() == pytest.approx(math.log(1.5))
    (slope,) = torch.autograd.grad(found, logits)
    assert slope.isfinite().all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_in_few_bits_it_is_what_it_is_in_many(precision, problem):
    wide = make("graddiff", problem, "held_out").forget_losses(problem.forget)
    problem.model.float()
    for data in (problem.forget, problem.retain, problem.validation):
        data["image"] = data["image"].float()
    found = make("graddiff", problem, "held_out", precision=precision).forget_losses(problem.forget)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), wide, rtol=0, atol=1e-6 if precision == "float32" else 0.02
    )


# -- state


@pytest.mark.parametrize("name", MOVING)
def test_a_resumed_run_ends_at_the_same_bits(name, problem):
    problem.model.insert(2, nn.Dropout(0.2))
    options = {"steps": 9, "lr": 0.05, "size": 5, "optimizer": "adam"}
    twin = copy.deepcopy(problem.model)
    torch.manual_seed(7)
    make(name, problem, "held_out", **options).run()
    whole, problem.model = problem.model.state_dict(), twin
    torch.manual_seed(7)
    first = make(name, problem, "held_out", **options)
    steps = first.fit()
    for _ in range(4):
        next(steps)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    # made of a model that has moved, whose own mean output is another
    disturb(problem.model)
    second = make(name, problem, "held_out", **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.run()
    for key, value in problem.model.state_dict().items():
        assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize("name", ["orthograd", "graddiff"])
def test_a_state_of_another_loss_is_named(name, problem):
    own, other = (make(name, problem, loss) for loss in ("held_out", "ascent"))
    states = [copy.deepcopy(trainer.state_dict()) for trainer in (own, other)]
    with pytest.raises(InputError, match="forget_original is not that of this loss"):
        own.load_state_dict(states[1])
    with pytest.raises(InputError, match="forget_original is of a loss that holds one"):
        other.load_state_dict(states[0])
    states[0]["extra"]["forget_original"]["log"] = torch.zeros(4).double()
    before = own.forget.original.log.clone()
    with pytest.raises(InputError, match=r"^state: extra: "):
        own.load_state_dict(states[0])
    assert torch.equal(own.forget.original.log, before)


def test_seconds_of_a_step_are_measured_aside(problem):
    start = copy.deepcopy(problem.model.state_dict())
    trainer = make("orthograd", problem, "held_out", size=5)
    seconds = trainer.step_seconds()
    assert seconds.keys() == {"orthograd", "plain"} and min(seconds.values()) > 0
    assert same(problem.model.state_dict().values(), start.values())


# -- data, tasks, options


def test_loaders_serve_and_the_model_is_left_in_its_mode(problem):
    def loader(data):
        return DataLoader(TensorDataset(data["image"], data["label"]), batch_size=4)

    target = target_of(problem, "held_out")
    problem.model.insert(2, nn.Dropout(0.5))
    ends = []
    for held_out in (loader(problem.validation), tuple(problem.validation.values())):
        kind, pair = METHODS["graddiff"], tuple(problem.forget.values())
        config = kind.Config(forget_loss="held_out")
        data = {"forget": pair, "retain": tuple(problem.retain.values()), "validation": held_out}
        trainer = kind(problem.model, cross_entropy, **data, config=config)
        ends.append(trainer.forget.original.log)
        assert problem.model.training
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0].exp(), target)


@pytest.mark.parametrize("loss", BOUNDED)
@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("task", ["answers", "tags"])
def test_a_sample_of_several_predictions_has_their_mean(task, name, loss):
    objective, net, sets = made(task)
    before = values(net)
    unlearning(net, **sets, method=name, loss=objective, forget_loss=loss, steps=2)
    assert not same(values(net), before)
    if name == "neggrad":
        kind = METHODS[name]
        data = {"forget": sets["forget_loader"], "validation": sets["val_loader"]}
        config = kind.Config(forget_loss=loss)
        trainer = kind(net, objective, retain=None, **data, config=config)
        held, found = (objective.outputs(net, data[k]) for k in ("validation", "forget"))
        target = held.logits.softmax(1).mean(0)
        if loss == "uniform":
            target = torch.full_like(target, 1 / len(target))
        p = found.logits.softmax(1)
        each = (p * (p / target).log()).sum(1)
        wanted = [each[found.sample == k].mean() for k in range(12)]
        torch.testing.assert_close(trainer.forget_losses(data["forget"]), torch.stack(wanted))


def test_what_it_needs_is_named_before_anything_changes(problem):
    start = copy.deepcopy(problem.model.state_dict())
    kind, data = METHODS["gru"], {"forget": problem.forget, "retain": problem.retain}

    def given(loss=cross_entropy, **options):
        return kind(problem.model, loss, **data, config=kind.Config(**options))

    for options, message in (
        ({"forget_loss": "held_out"}, "validation: GRUTrainer with forget_loss = held_out needs"),
        ({"forget_loss": "uniform", "forget_ceiling": 2.0}, "forget_ceiling is for losses that"),
        ({"forget_loss": "npo"}, "needs forget_loss, which Classification has not"),
        ({"forget_loss": "uniform", "loss": LossesAlone()}, "needs outputs, which LossesAlone has"),
        ({"forget_loss": "uniform", "forget_loss_options": ("a=1",)}, "uniform has none, got"),
        ({"forget_loss_options": ("a",)}, "forget-loss-options must be NAME=VALUE"),
        ({"forget_loss": 3}, "forget-loss must be of type str, got 3"),
    ):
        with pytest.raises(InputError, match=message):
            given(**options)
    assert same(problem.model.state_dict().values(), start.values())


def test_a_search_draws_no_ceiling_for_what_is_lowered():
    kind = METHODS["orthograd"]
    for loss in ("ascent", "uniform"):
        (drawn,) = draws("orthograd", "class", kind.Config(forget_loss=loss), 1)
        assert ("forget_ceiling" in drawn) == (loss == "ascent")


@pytest.mark.parametrize("name", MOVING)
def test_without_a_ceiling_given_a_classifier_is_not_made_worse_than_a_guess(name, problem):
    """ln C, of its own cross-entropy alone: another loss is in units of its own."""

    def end(loss, **options):
        twin = copy.deepcopy(problem)
        config = METHODS[name].Config(forget_loss="ascent", steps=3, lr=0.3, **options)
        sets = {kind: getattr(twin, kind) for kind in ("forget", "retain", "validation")}
        trainer = METHODS[name](twin.model, loss, **sets, config=config, seed=3)
        return list(trainer.run().parameters())

    def own(model, batch):
        return cross_entropy(model, batch)

    guess, never = ({"forget_ceiling": top} for top in (math.log(3), math.inf))
    disturb(problem.model)
    by_default = end(cross_entropy)
    assert same(by_default, end(cross_entropy, **guess))
    assert not same(by_default, end(cross_entropy, **never))
    assert same(end(own), end(own, **never))
