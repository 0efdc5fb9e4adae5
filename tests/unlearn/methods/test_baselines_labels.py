"""NegGrad+, random labels, SalUn, l1-sparse and SSD: what each must do to the weights."""

import io
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.unlearn import Finetune, NegGrad, TrainingError
from gradsurgery.unlearn.methods import random_label
from gradsurgery.unlearn.methods.l1_sparse import L1Sparse
from gradsurgery.unlearn.methods.neggradplus import NegGradPlus
from gradsurgery.unlearn.methods.random_label import RandomLabel
from gradsurgery.unlearn.methods.salun import SalUn
from gradsurgery.unlearn.methods.ssd import SSD
from gradsurgery.unlearn.objectives.classification import cross_entropy

KINDS = [NegGradPlus, RandomLabel, SalUn, L1Sparse, SSD]


def make(kind, problem, **options):
    """A trainer on small batches of both sets, unless `options` say another size."""
    config = kind.Config(**{"steps": 9, "lr": 0.05, "schedule": "cosine"})
    for field in ("forget_batch", "retain_batch", "batch"):
        if hasattr(config, field):
            setattr(config, field, 5)
    if kind is SSD:
        config.alpha = 1.2  # 3 of 8 batches are to be forgotten: nothing passes 8 / 3
    for name, value in options.items():
        setattr(config, name, value)
    return kind(
        problem.model,
        problem.loss,
        forget=problem.forget,
        retain=problem.retain,
        config=config,
        seed=3,
    )


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def gradient(problem, data):
    """Of the mean loss of all samples in `data`, one tensor per parameter."""
    loss = problem.loss(problem.model, data).mean()
    return torch.autograd.grad(loss, list(problem.model.parameters()))


def in_order(data):
    """A loader whose batches depend on no seed."""
    return DataLoader(TensorDataset(data["image"], data["label"]), batch_size=5)


@pytest.fixture
def ordered(problem):
    """`problem` with loaders: methods that draw different sets see the same batches."""
    problem.forget, problem.retain = in_order(problem.forget), in_order(problem.retain)
    problem.loss = cross_entropy
    return problem


# -- of every method


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("taken", [0, 4])
def test_resumed_run_ends_at_the_same_bits(kind, optimizer, taken, problem):
    start = state(problem.model)
    whole = make(kind, problem, optimizer=optimizer, momentum=0.9)
    whole.run()
    end = weights(problem.model)
    assert not same(end, start.values())

    problem.model.load_state_dict(start)
    first = make(kind, problem, optimizer=optimizer, momentum=0.9)
    taken = min(taken, first.total_steps())
    steps = first.fit()
    for _ in range(taken):
        next(steps)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    problem.model.load_state_dict(start)
    torch.manual_seed(99)
    second = make(kind, problem, optimizer=optimizer, momentum=0.9)
    second.load_state_dict(torch.load(file, weights_only=True))
    left = [record["step"] for record in second.fit()]
    assert left == list(range(taken + 1, whole.step + 1))
    assert same(weights(problem.model), end)


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_change_nothing(kind, problem):
    problem.model.insert(1, nn.BatchNorm1d(40).double())
    problem.model[1].eval()
    start = state(problem.model)
    make(kind, problem, steps=0).run()
    assert same(state(problem.model).values(), start.values())
    assert [module.training for module in problem.model] == [True, False, True, True]
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_make_the_same_step(kind, problem):
    start = state(problem.model)
    ends = []
    for part in (None, 2):
        problem.model.load_state_dict(start)
        make(kind, problem, steps=3, micro_batch=part).run()
        ends.append(weights(problem.model))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_unused_parameters_stay(kind, problem):
    problem.model[0].bias.requires_grad_(False)
    problem.model[0].register_parameter("unused", nn.Parameter(torch.zeros(3).double()))
    start = problem.model[0].bias.clone()
    make(kind, problem, steps=3).run()
    assert torch.equal(problem.model[0].bias, start)
    assert not problem.model[0].unused.any()


@pytest.mark.parametrize(
    "kind,option,value",
    [
        (NegGradPlus, "retain_weight", -0.1),
        (NegGradPlus, "retain_weight", 1.1),
        (NegGradPlus, "retain_weight", math.nan),
        (NegGradPlus, "forget_ceiling", 0.0),
        (RandomLabel, "forget_weight", -1.0),
        (RandomLabel, "retain_weight", math.inf),
        (RandomLabel, "forget_batch", 0),
        (SalUn, "forget_weight", math.nan),
        (SalUn, "saliency", 0.0),
        (SalUn, "saliency", 1.5),
        (L1Sparse, "l1", -1e-4),
        (L1Sparse, "l1", math.inf),
        (SSD, "alpha", -1.0),
        (SSD, "alpha", math.nan),
        (SSD, "dampening", -0.5),
        (SSD, "batch", 0),
    ],
)
def test_options_out_of_range_are_named(kind, option, value):
    with pytest.raises(InputError, match=f"--it.{option.replace('_', '-')} must be .* got"):
        kind.Config(**{option: value}).check("it")


# -- NegGrad+


@pytest.mark.parametrize("weight,other", [(1.0, Finetune), (0.0, NegGrad)])
def test_neggradplus_ends_are_finetune_and_neggrad(weight, other, ordered):
    start = state(ordered.model)
    make(NegGradPlus, ordered, retain_weight=weight).run()
    end = weights(ordered.model)
    ordered.model.load_state_dict(start)
    make(other, ordered).run()
    assert same(end, weights(ordered.model))


def test_neggradplus_descends_a_retain_less_the_rest_forget(problem):
    forget, retain = gradient(problem, problem.forget), gradient(problem, problem.retain)
    wanted = [
        p - 0.1 * (0.75 * r - 0.25 * f)
        for p, f, r in zip(weights(problem.model), forget, retain, strict=True)
    ]
    options = {"retain_weight": 0.75, "forget_batch": 64, "retain_batch": 64}
    make(
        NegGradPlus, problem, steps=1, lr=0.1, optimizer="sgd", schedule="constant", **options
    ).run()
    torch.testing.assert_close(weights(problem.model), wanted)


def test_neggradplus_samples_above_the_ceiling_do_not_push(problem):
    start = weights(problem.model)
    with torch.no_grad():
        ceiling = problem.loss(problem.model, problem.forget).min().item() / 2
    make(NegGradPlus, problem, retain_weight=0.0, forget_ceiling=ceiling).run()
    assert same(weights(problem.model), start)


# -- random labels


@pytest.fixture
def taught(monkeypatch):
    """The labels [B] that each batch was taught."""
    seen = []

    def watch(logits, wanted):
        seen.append(wanted)
        return label_losses(logits, wanted)

    label_losses = random_label.label_losses
    monkeypatch.setattr(random_label, "label_losses", watch)
    return seen


def test_random_labels_are_wrong_uniform_and_drawn_anew(problem, taught):
    problem.model = nn.Linear(6, 5).double()
    n = 4000
    problem.forget = {"image": torch.randn(n, 6).double(), "label": torch.full((n,), 3)}
    make(RandomLabel, problem, steps=2, forget_batch=n).run()
    for labels in taught:
        counts = labels.bincount(minlength=5)
        assert counts[3] == 0
        # five standard deviations of a binomial of n draws with p = 1/4
        others = counts[[0, 1, 2, 4]]
        assert (others - n / 4).abs().max() < 5 * math.sqrt(n * 3 / 16)
    assert (taught[0] != taught[1]).double().mean() > 0.7  # 3/4 of independent draws


def test_random_label_descends_both_weighted_losses(problem, taught):
    start = state(problem.model)
    options = {"forget_batch": 64, "retain_batch": 64, "forget_weight": 3.0, "retain_weight": 0.5}
    trainer = make(
        RandomLabel, problem, steps=1, lr=0.1, optimizer="sgd", schedule="constant", **options
    )
    drawn = []
    draw, trainer.draw = trainer.draw, lambda kind: drawn.append(draw(kind)) or drawn[-1]
    (record,) = trainer.fit()
    end = weights(problem.model)

    problem.model.load_state_dict(start)
    relabeled = {"image": drawn[0]["image"], "label": taught[0]}
    forget, retain = gradient(problem, relabeled), gradient(problem, problem.retain)
    wanted = [
        p - 0.1 * (3.0 * f + 0.5 * r)
        for p, f, r in zip(weights(problem.model), forget, retain, strict=True)
    ]
    torch.testing.assert_close(end, wanted)
    with torch.no_grad():
        before = problem.loss(problem.model, relabeled).mean().item()
    assert record["relabeled_forget_loss_batch"] == pytest.approx(before)


def test_random_label_without_a_weight_on_it_is_finetune(ordered):
    start = state(ordered.model)
    make(RandomLabel, ordered, forget_weight=0.0).run()
    end = weights(ordered.model)
    ordered.model.load_state_dict(start)
    make(Finetune, ordered).run()
    assert same(end, weights(ordered.model))


def test_random_label_lowers_the_accuracy_on_forget_and_keeps_retain(problem):
    """The labels follow the inputs, so that a model can know them."""

    def sort(samples):
        return {**samples, "label": samples["image"][:, :3].argmax(1)}

    def right():
        with torch.no_grad():
            return [
                (problem.model(data["image"]).argmax(1) == data["label"]).double().mean().item()
                for data in (problem.forget, problem.retain)
            ]

    problem.forget, problem.retain = sort(problem.forget), sort(problem.retain)
    everything = {
        key: torch.cat([problem.forget[key], problem.retain[key]]) for key in ("image", "label")
    }
    Finetune(
        problem.model,
        problem.loss,
        forget=None,
        retain=everything,
        config=Finetune.Config(steps=200, lr=0.02),
    ).run()
    assert right() == [1.0, 1.0]
    make(RandomLabel, problem, steps=200, lr=0.02, retain_batch=24).run()
    forget, retain = right()
    assert forget < 0.5
    assert retain > 0.9


@pytest.mark.parametrize("kind", [RandomLabel, SalUn])
def test_one_class_has_no_wrong_label(kind, problem):
    problem.model = nn.Linear(6, 1).double()
    for data in (problem.forget, problem.retain):
        data["label"].zero_()
    with pytest.raises(InputError, match="no wrong label can be drawn of 1 class"):
        make(kind, problem).run()


# -- SalUn


def test_saliency_mask_by_hand(problem):
    """At weights of zero both classes have p = 1/2, so |dL/dw_kj| = |mean x_j| / 2: the largest two
    fifths of the ten are the columns of 3 and of -4, neither the bias (1/2) nor 1 and 2."""
    problem.model = nn.Linear(4, 2).double()
    for p in problem.model.parameters():
        p.data.zero_()
    images = torch.tensor([[2.0, -4.0, 1.0, 3.0], [0.0, -4.0, 3.0, 3.0]]).double()
    problem.forget = {"image": images, "label": torch.tensor([1, 1])}
    problem.retain = {"image": -images, "label": torch.tensor([0, 0])}
    weight, bias = make(SalUn, problem, saliency=0.4).masks
    assert weight.tolist() == [[False, True, False, True]] * 2
    assert bias.tolist() == [False, False]


def test_saliency_mask_is_of_the_whole_forget_set_in_evaluation_mode(problem):
    problem.model.insert(1, nn.BatchNorm1d(40).double())
    problem.model.insert(2, nn.Dropout(0.5))
    problem.model(torch.randn(50, 6).double())  # statistics unlike those of any batch
    start = state(problem.model)
    forget, loss = problem.forget, problem.loss
    problem.forget, problem.retain = in_order(forget), in_order(problem.retain)  # 5, 5, 2
    problem.loss = cross_entropy
    masks = make(SalUn, problem, saliency=0.3).masks
    assert same(state(problem.model).values(), start.values())
    assert all(module.training for module in problem.model)

    problem.loss = loss
    problem.model.eval()
    sizes = torch.cat([g.abs().flatten() for g in gradient(problem, forget)])
    mask = torch.cat([part.flatten() for part in masks])
    assert int(mask.sum()) == round(0.3 * len(mask))
    assert sizes[mask].min() >= sizes[~mask].max()


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "adam", "weight_decay": 0.1},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    ],
    ids=lambda options: options["optimizer"],
)
def test_salun_moves_the_masked_weights_and_no_others(options, problem):
    start = weights(problem.model)
    trainer = make(SalUn, problem, saliency=0.25, **options)
    trainer.run()
    for mask, before, after in zip(trainer.masks, start, weights(problem.model), strict=True):
        assert torch.equal(before[~mask], after[~mask])
        assert (before[mask] != after[mask]).all()
    share = sum(int(mask.sum()) for mask in trainer.masks) / sum(p.numel() for p in start)
    assert share == pytest.approx(0.25, abs=0.5 / 403)


def test_salun_hides_other_gradients_from_the_optimizer(problem):
    """One that mixes coordinates must see zeros there, not only be undone afterwards."""
    trainer, seen = make(SalUn, problem, steps=1, saliency=0.25), []
    parameters = list(problem.model.parameters())
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in parameters)
    )
    trainer.run()
    for grad, mask in zip(seen, trainer.masks, strict=True):
        assert not grad[~mask].any()
        assert grad[mask].all()


def test_salun_of_all_weights_is_random_label(problem):
    start = state(problem.model)
    make(SalUn, problem, saliency=1.0, optimizer="adamw", weight_decay=0.1).run()
    end = weights(problem.model)
    problem.model.load_state_dict(start)
    make(RandomLabel, problem, optimizer="adamw", weight_decay=0.1).run()
    assert same(end, weights(problem.model))


def test_salun_names_a_gradient_that_is_not_finite(problem):
    problem.forget["image"][3, 2] = math.nan
    with pytest.raises(NonFiniteError, match="a loss of the batch is not finite"):
        make(SalUn, problem)


# -- l1-sparse


def test_l1_step_is_the_retain_gradient_and_the_signs(problem):
    retain = gradient(problem, problem.retain)
    wanted = [
        p - 0.1 * (r + 0.01 * p.sign()) for p, r in zip(weights(problem.model), retain, strict=True)
    ]
    options = {"l1": 0.01, "retain_batch": 64}
    make(L1Sparse, problem, steps=1, lr=0.1, optimizer="sgd", schedule="constant", **options).run()
    torch.testing.assert_close(weights(problem.model), wanted)


def test_l1_weight_falls_linearly_to_zero(problem):
    records = list(make(L1Sparse, problem, steps=5, l1=0.4).fit())
    found = [record["l1_weight"] for record in records]
    assert found == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_l1_norm_is_of_what_trains_and_falls(problem):
    problem.model[0].bias.requires_grad_(False)
    start = sum(p.abs().sum().item() for p in problem.model.parameters() if p.requires_grad)
    norms = [record["l1_norm"] for record in make(L1Sparse, problem, steps=40, l1=0.1).fit()]
    assert norms[0] == pytest.approx(start)
    assert norms[-1] < 0.5 * start


def test_l1_of_zero_is_finetune(problem):
    start = state(problem.model)
    make(L1Sparse, problem, l1=0.0).run()
    end = weights(problem.model)
    problem.model.load_state_dict(start)
    make(Finetune, problem).run()
    assert same(end, weights(problem.model))


# -- SSD


@pytest.fixture
def linear(problem):
    """Losses w x, so that the gradient of a batch is the mean of its inputs whatever w is.

    In batches of 2: I_f = ((3² + 1²) / 2, 0, 1) = (5, 0, 1); the first column of the retain set
    cancels in all batches but the last, so that I_r = (1 / 3, 4, 1); I_D = (2 I_f + 3 I_r) / 5 =
    (2.2, 2.4, 1).
    """
    problem.model = nn.Linear(3, 1, bias=False).double()
    problem.model.weight.data = torch.tensor([[1.0, -2.0, 3.0]]).double()
    problem.forget = torch.tensor([[2.0, 0, 1], [4.0, 0, 1], [1.0, 0, 1]]).double()
    problem.retain = torch.tensor([[1.0, 2, 1], [-1.0, 2, 1]] * 2 + [[1.0, 2, 1]]).double()
    problem.loss = lambda model, batch: model(batch).squeeze(1)
    return problem


@pytest.mark.parametrize(
    "alpha,dampening,factors",
    [
        (2.2, 1.0, [0.44, 1, 1]),  # 5 > 2.2 * 2.2
        (2.4, 1.0, [1, 1, 1]),  # 5 < 2.4 * 2.2
        (0.9, 1.0, [0.44, 1, 1]),  # 1 > 0.9 * 1 too, by a factor of 1
        (0.9, 0.5, [0.22, 1, 0.5]),
        (0.9, 2.0, [0.88, 1, 1]),  # no weight grows
        (2.2, 0.0, [0, 1, 1]),
    ],
)
def test_ssd_by_hand(alpha, dampening, factors, linear):
    options = {"alpha": alpha, "dampening": dampening, "batch": 2}
    trainer = make(SSD, linear, **options)
    (record,) = trainer.fit()
    wanted = torch.tensor([[1.0, -2.0, 3.0]]).double() * torch.tensor([factors]).double()
    torch.testing.assert_close(linear.model.weight.detach(), wanted)
    chosen = 0 if alpha > 2.3 else 1 if alpha > 1 else 2
    assert record["dampened_share"] == pytest.approx(chosen / 3)
    assert trainer.samples["forget"] == 3 and trainer.samples["retain"] == 5


def test_ssd_takes_one_step(linear):
    trainer = make(SSD, linear, steps=9, alpha=2.2, batch=2)
    trainer.run()
    assert trainer.step == 1
    assert linear.model.weight[0, 0].item() == pytest.approx(0.44)


@pytest.mark.parametrize("retain,dampened", [(8, 0.0), (10, 1.0)])
def test_ssd_dampens_nothing_of_more_than_a_tenth_of_the_batches(retain, dampened, linear):
    """A weight that matters to the forget set alone: I_D = I_f / 9, or I_f / 11."""
    linear.model = nn.Linear(1, 1, bias=False).double()
    linear.forget = torch.ones(1, 1).double()
    linear.retain = torch.zeros(retain, 1).double()
    (record,) = make(SSD, linear, batch=1, alpha=10.0).fit()
    assert record["dampened_share"] == dampened


def test_ssd_measures_in_evaluation_mode(problem):
    problem.model.insert(1, nn.BatchNorm1d(40).double())
    problem.model.insert(2, nn.Dropout(0.5))
    start = state(problem.model)
    ends = []
    for seed in (1, 2):
        problem.model.load_state_dict(start)
        torch.manual_seed(seed)
        make(SSD, problem).run()
        ends.append(weights(problem.model))
        assert problem.model.training
        assert torch.equal(problem.model[1].running_mean, start["1.running_mean"])
    assert same(*ends)
    problem.model.load_state_dict(start)
    assert not same(ends[0], weights(problem.model))


def test_ssd_names_a_set_whose_gradient_is_not_finite(problem):
    start = weights(problem.model)
    problem.retain["image"][3, 2] = math.nan
    with pytest.raises(TrainingError, match="a loss of the batch is not finite"):
        make(SSD, problem).run()
    assert same(weights(problem.model), start)
