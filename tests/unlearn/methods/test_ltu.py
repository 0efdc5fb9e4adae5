"""LTU: what its two gradients are, how they are mixed, and what its membership models learn."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn import LTUConfig, LTUTrainer
from gradsurgery.unlearn.methods.ltu.membership import MembershipModels, features, halves
from gradsurgery.unlearn.methods.ltu.sets import dealt, shifted

EVERYTHING = 64


@pytest.fixture
def unseen(problem):
    return problem.validation


def make(problem, unseen=None, **options):
    sizes = {"forget_batch": EVERYTHING, "retain_batch": EVERYTHING}
    config = LTUConfig(**{"steps": 1, "optimizer": "sgd", "lr": 0.1, **sizes, **options})
    data = {"forget": problem.forget, "retain": problem.retain, "validation": unseen}
    return LTUTrainer(problem.model, problem.loss, **data, config=config, seed=2)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(problem, values, model=None):
    model = problem.model if model is None else model
    grads = torch.autograd.grad(values(model), list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def moved(model, direction):
    """A copy of the model, moved."""
    other = copy.deepcopy(model)
    nn.utils.vector_to_parameters(weights(model) + direction, other.parameters())
    return other


def step_by_hand(problem, trainer, config):
    """One update from the definition, in plain torch, from the draws the trainer will make."""
    state = trainer.generator.get_state()
    forget, retain = (next(copy.copy(trainer.batches[kind])) for kind in ("forget", "retain"))
    sets = trainer._split(retain)
    tries_labels = config.support == "forget" and config.tune_loss == "random_label"
    relabeled = trainer.relabel(forget) if tries_labels else forget
    order = torch.randperm(config.models, generator=trainer.generator)
    trainer.generator.set_state(state)

    def verdict(which):
        def value(model):
            seen = features(model(forget["image"]), forget["label"])
            # cross-entropy of "member" with "no": -log(1 - sigmoid(logit))
            return -(1 - trainer.auditors(seen, which).sigmoid()).log().mean()

        return value

    def label_loss(batch):
        return lambda model: problem.loss(model, batch).mean()

    def mean(parts):
        return lambda model: sum(part(model) for part in parts) / len(parts)

    first, *others = map(verdict, order.tensor_split(config.queries + 1))
    forgetting = first, mean(others)
    if config.support == "retain":
        remembering = label_loss(sets[0]), mean([label_loss(each) for each in sets[1:]])
    else:
        tried = label_loss(relabeled) if tries_labels else verdict(slice(None))
        remembering = tried, mean([label_loss(each) for each in sets])
    found = []
    for tune, test in (forgetting, remembering):
        g = gradients(problem, tune)
        v = config.query_weight * gradients(
            problem, test, moved(problem.model, -config.tune_lr * g)
        )
        # H v by central differences of g
        h = 1e-5 / max(1.0, v.norm().item())
        ends = [gradients(problem, tune, moved(problem.model, sign * h * v)) for sign in (1, -1)]
        found.append(g + v - config.tune_lr * (ends[0] - ends[1]) / (2 * h))
    f, r = found
    dot = (f @ r).item()
    update = f + r
    if config.harmonize in ("forget", "both"):
        update = update - min(0.0, dot) / (r @ r) * r
    if config.harmonize in ("retain", "both"):
        update = update - min(0.0, dot) / (f @ f) * f
    return weights(problem.model) - config.lr * update, dot


EARLIER = {"support": "retain", "queries": 1}  # as it was read from the text alone
READINGS = {
    "seen": {},
    "verdicts tried": {"tune_loss": "membership", "query_weight": 2.0},
    "earlier": EARLIER,
    "earlier, three": {"support": "retain", "query_weight": 0.5},
    "two queries of five models": {"queries": 2, "models": 5},
}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("harmonize", ["forget", "retain", "both", "none"])
def test_a_step_is_the_one_of_the_definition(harmonize, reading, problem, unseen):
    conflicts = 0
    for seed in range(8):
        torch.manual_seed(seed)
        for p in problem.model.parameters():
            nn.init.normal_(p, std=0.7)
        trainer = make(problem, unseen, harmonize=harmonize, tune_lr=0.3, **READINGS[reading])
        expected, dot = step_by_hand(problem, trainer, trainer.config)
        conflicts += dot < 0
        trainer.run()
        torch.testing.assert_close(
            weights(problem.model), expected, rtol=0, atol=1e-6
        )  # differences
    assert 0 < conflicts < 8  # both branches were taken


def test_without_meta_the_tuning_step_is_none(problem, unseen):
    """A rate of zero, whatever the order."""
    start = copy.deepcopy(problem.model.state_dict())
    ends = []
    for options in ({"meta": False}, {"tune_lr": 0.0}, {"tune_lr": 0.3}):
        problem.model.load_state_dict(start)
        make(problem, unseen, **options).run()
        ends.append(weights(problem.model))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_micro_batches_take_the_same_step(problem, unseen):
    start = copy.deepcopy(problem.model.state_dict())
    ends = []
    for size in (None, 5):
        problem.model.load_state_dict(start)
        make(problem, unseen, tune_lr=0.3, micro_batch=size).run()
        ends.append(weights(problem.model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sets", [1, 2, 3, 5])
def test_sets_share_no_class(sets):
    classes = torch.randint(7, (90,), generator=torch.Generator().manual_seed(1)) * 10
    assert len(classes.unique()) == 7
    for seed in range(20):
        parts = dealt(classes, sets, torch.Generator().manual_seed(seed))
        assert sorted(torch.cat(parts).tolist()) == list(range(90))
        theirs = [set(classes[part].tolist()) for part in parts]
        assert sum(map(len, theirs)) == 7
        sizes = [len(part) for part in parts]
        # a class has some 13 samples: a cut is no further from an even one than half of it allows
        assert max(sizes) - min(sizes) <= 2 * int(classes.unique(return_counts=True)[1].max())


def test_which_classes_go_together_is_drawn():
    classes = torch.arange(6).repeat(4)
    found = {
        tuple(classes[dealt(classes, 3, torch.Generator().manual_seed(seed))[0]].unique().tolist())
        for seed in range(40)
    }
    assert len(found) > 8  # of 15 pairs


@pytest.mark.parametrize("classes", [[4] * 12, [4] * 6 + [7] * 6])
def test_fewer_classes_than_sets_are_cut_evenly(classes):
    parts = dealt(torch.tensor(classes), 3, torch.Generator().manual_seed(0))
    assert [len(part) for part in parts] == [4, 4, 4]
    assert sorted(torch.cat(parts).tolist()) == list(range(12))


def test_as_many_samples_as_sets():
    parts = dealt(torch.tensor([3, 3, 1]), 3, torch.Generator().manual_seed(0))
    assert sorted(map(len, parts)) == [1, 1, 1]


def test_each_of_many_small_classes_finds_a_set():
    """One class of nearly all samples leaves a class for each of the other sets."""
    classes = torch.tensor([0] * 50 + [1, 2])
    for seed in range(10):
        parts = dealt(classes, 3, torch.Generator().manual_seed(seed))
        assert sorted(len(part) for part in parts) == [1, 1, 50]


def test_images_move_and_keep_their_labels():
    images = torch.arange(1.0, 65).reshape(1, 1, 8, 8).expand(50, 1, 8, 8)
    batch = {"image": images, "label": torch.arange(50)}
    found = shifted(batch, torch.Generator().manual_seed(0))
    assert torch.equal(found["label"], batch["label"])
    assert found["image"].shape == images.shape
    corners = {tuple(image[0, 3:5, 3].tolist()) for image in found["image"]}
    # a pixel's neighbors, all nine shifts of at most one
    expected = {(28.0 + dy * 8 + dx, 36.0 + dy * 8 + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert corners == expected
    with pytest.raises(InputError, match=r"moves images \[B, C, H, W\], got \[5, 6\]"):
        shifted({"image": torch.ones(5, 6), "label": torch.ones(5)}, torch.Generator())


def test_augment_makes_the_other_sets(problem, unseen):
    def halved(batch, generator):
        return {**batch, "image": batch["image"] / 2}

    config = LTUConfig(split="augmentation", steps=1)
    data = {"forget": problem.forget, "retain": problem.retain, "validation": unseen}
    trainer = LTUTrainer(problem.model, problem.loss, **data, config=config, augment=halved)
    first, *others = trainer._split(problem.retain)
    assert first is problem.retain
    assert len(others) == 2
    for each in others:
        assert torch.equal(each["image"], problem.retain["image"] / 2)


def test_random_labels_need_no_held_out_samples(problem):
    start = problem.loss(problem.model, problem.forget).mean()
    make(problem, feedback="random_label", steps=30, tune_lr=0.05).run()
    assert problem.loss(problem.model, problem.forget).mean() > start + 0.1


@pytest.mark.parametrize("which", ["outputs", "loss"])
def test_forgetting_lowers_what_the_auditors_say(which, problem, unseen):
    for _ in range(200):  # the samples to forget are learned first
        loss = problem.loss(problem.model, problem.forget).mean()
        grads = torch.autograd.grad(loss, list(problem.model.parameters()))
        with torch.no_grad():
            for p, g in zip(problem.model.parameters(), grads, strict=True):
                p -= 0.5 * g
    trainer = make(problem, unseen, steps=40, lr=0.02, model_features=which, **EARLIER)

    def looked_at():
        return features(problem.model(problem.forget["image"]), problem.forget["label"], which)

    seen = [looked_at()]
    trainer.run()
    seen.append(looked_at())
    auditors = trainer.auditors
    assert auditors is not None
    assert auditors.mean.numel() == (1 if which == "loss" else 7)
    with torch.no_grad():
        before, after = (auditors(x).sigmoid().mean() for x in seen)
    assert before > 0.7
    assert after < before - 0.1


@pytest.mark.parametrize(
    "options",
    [{}, EARLIER, {"refresh": 3, "tune_loss": "membership"}, {"feedback": "random_label"}],
)
def test_a_resumed_run_ends_at_the_same_bits(options, problem, unseen):
    start = copy.deepcopy(problem.model.state_dict())
    options = {"steps": 8, "forget_batch": 5, "retain_batch": 6, "optimizer": "adam", **options}
    make(problem, unseen, **options).run()
    whole = weights(problem.model)

    problem.model.load_state_dict(start)
    first = make(problem, unseen, **options)
    steps = first.fit()
    for _ in range(5):
        next(steps)
    state = copy.deepcopy(first.state_dict())
    problem.model.load_state_dict(start)
    second = make(problem, unseen, **options)
    second.load_state_dict(state)
    second.run()
    assert torch.equal(weights(problem.model), whole)


def test_held_out_labels_drawn_from_the_forget_set_are_never_their_own(problem, unseen):
    seen = []
    trainer = make(problem, unseen, audit_labels="forget", steps=0)
    original = MembershipModels.learn

    def spy(self, features, member, *rest):
        seen.append((features, member))
        return original(self, features, member, *rest)

    MembershipModels.learn = spy
    try:
        trainer._train_auditors()
    finally:
        MembershipModels.learn = original
    ((found, member),) = seen
    known = found[member == 0][:, 4:].argmax(-1)  # after 3 shares and a loss
    with torch.no_grad():
        outputs = problem.model(unseen["image"]).softmax(-1).sort(-1, descending=True).values
    places = [int((outputs - row[:3]).abs().sum(-1).argmin()) for row in found[member == 0]]
    assert len(places) < 10  # some drew their own label
    assert all(unseen["label"][i] != label for i, label in zip(places, known, strict=True))


# -- membership models


def test_features_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf]])
    (row,) = features(logits, torch.tensor([0])).tolist()
    expected = [0.75, 0.25, 0.0, math.log(1 + math.log(4)), 1.0, 0.0, 0.0]
    assert row == pytest.approx(expected)
    assert features(logits, torch.tensor([0]), "loss").tolist() == [pytest.approx(expected[3:4])]


def test_halves_are_balanced_and_opposite():
    member = torch.tensor([1] * 6 + [0] * 9)
    shown = halves(member, 3, torch.Generator().manual_seed(0))
    for mask in shown:
        assert mask[:6].sum() == 3
    assert torch.equal(shown[0], ~shown[1])
    assert shown[2][6:].sum() == 5
    assert not torch.equal(shown[0], shown[2])


def test_models_learn_what_can_be_told_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    member = torch.tensor([1] * 200 + [0] * 50)
    noise = torch.randn(250, 3, generator=generator, dtype=torch.float64)
    shown = halves(member, 4, generator)
    told = noise + F.pad(3.0 * member[:, None].double(), (0, 2))
    models = [MembershipModels(3, 4, 16, generator) for _ in range(2)]
    scores = [
        auditors.learn(seen, member, shown, 100, 0.01)
        for auditors, seen in zip(models, (told, noise), strict=True)
    ]
    assert scores[0].min() > 0.85
    assert (scores[1] - 0.5).abs().max() < 0.15
    # members and others count alike: 0.8 would be their share
    assert abs(models[1](noise).sigmoid().mean() - 0.5) < 0.1


def test_each_model_learns_from_its_own_half():
    """Samples a model is not shown do not change it."""
    member = torch.tensor([1, 1, 0, 0])
    shown = torch.tensor([[True, False, True, False], [False, True, False, True]])
    seen = torch.randn(4, 2, dtype=torch.float64)
    other = seen.clone()
    other[1], other[3] = seen[3], seen[1]  # the same mean and scale
    ends = []
    for rows in (seen, other):
        models = MembershipModels(2, 2, 4, torch.Generator().manual_seed(0))
        models.learn(rows, member, shown, 20, 0.1)
        ends.append(models)
    assert torch.equal(ends[0].inner[0], ends[1].inner[0])
    assert not torch.equal(ends[0].inner[1], ends[1].inner[1])


def test_verdicts_reach_the_model_through_every_auditor():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    models = MembershipModels(7, 3, 4, torch.Generator().manual_seed(0)).requires_grad_(False)
    values = models(features(logits, torch.zeros(6, dtype=torch.int64)), torch.tensor([2, 0]))
    assert values.shape == (2, 6)
    (grad,) = torch.autograd.grad(F.softplus(values).mean(), logits)
    assert (grad.norm(dim=-1) > 0).all()


# -- bad input


def test_missing_validation_is_named(problem):
    with pytest.raises(InputError, match="validation: LTU's membership models need samples"):
        make(problem)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"models": 3}, "models must be at least 4, for a support and 3 query sets, got 3"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"query_weight": -1.0}, "query-weight must be finite and at least 0"),
        (
            {"feedback": "random_label", "tune_loss": "membership"},
            "tune-loss must be random_label where feedback is",
        ),
        ({"tune_lr": -1.0}, "tune-lr must be finite and at least 0"),
        ({"retain_batch": 2}, "retain-batch must be at least 3, one for each set, got 2"),
        ({"retain_batch": 3, "support": "retain"}, "retain-batch must be at least 4"),
        ({"refresh": -1}, "refresh must be at least 0"),
    ],
)
def test_nonsense_options_are_named(options, message, problem, unseen):
    with pytest.raises(InputError, match=f"LTUTrainer.{message}"):
        make(problem, unseen, **options)


def test_fewer_retain_samples_than_sets_are_named(problem, unseen):
    problem.retain = {key: value[:1] for key, value in problem.retain.items()}
    with pytest.raises(InputError, match="deals out a batch of 3 samples or more, got 1"):
        make(problem, unseen).run()
