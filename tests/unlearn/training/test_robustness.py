"""Models, loaders and failures that a careless trainer gets wrong in silence."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from gradsurgery.errors import InputError
from gradsurgery.ops import conflict_averse_weights
from gradsurgery.unlearn import (
    METHODS,
    SSD,
    Finetune,
    FinetuneConfig,
    GradDiff,
    GradDiffConfig,
    LTUConfig,
    LTUTrainer,
    NegGradPlus,
    NegGradPlusConfig,
    RandomLabel,
    RandomLabelConfig,
    Retrain,
    RetrainConfig,
    SalUn,
    SalUnConfig,
    SSDConfig,
    TrainingError,
    unlearning,
)
from gradsurgery.unlearn.methods.ltu.meta import meta_gradient
from gradsurgery.unlearn.methods.retrain import reset_parameters
from gradsurgery.unlearn.methods.scrub import divergence
from gradsurgery.unlearn.metrics.accuracy import accuracy
from gradsurgery.unlearn.metrics.relearn import forget_measure
from gradsurgery.unlearn.objectives.classification import cross_entropy, wrong_labels
from gradsurgery.unlearn.training.data import overlap


@pytest.fixture(autouse=True)
def fixed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def samples(n, d=6, classes=3, dtype=torch.float32):
    return torch.randn(n, d, dtype=dtype), torch.randint(0, classes, (n,))


def sets(dtype=torch.float32):
    return samples(12, dtype=dtype), samples(24, dtype=dtype), samples(10, dtype=dtype)


def net(*between):
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Tanh(), nn.Linear(8, 3))


def objective(x, y):
    return lambda model: F.cross_entropy(model(x), y)


# -- LTU: the tuned parameters are not where the loss is taken


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.classifier = self.head  # one module, two names

    def forward(self, x):
        return self.head(self.body(x).tanh())


def test_meta_gradient_leaves_a_module_with_two_names_alone():
    model = Aliased()
    weight = model.head.weight
    meta_gradient(model, [objective(*samples(5))], [objective(*samples(5))], 0.1)
    assert model.head.weight is weight  # is a tuned Tensor, no Parameter


def test_ltu_trains_the_model_it_was_given():
    forget, retain, validation = sets()
    model = Aliased()
    weight = model.head.weight
    LTUTrainer(
        model,
        cross_entropy,
        forget=forget,
        retain=retain,
        config=LTUConfig(steps=3),
        validation=validation,
    ).run()
    assert torch.equal(model.head.weight, weight)


class Checkpointed(nn.Module):
    def __init__(self, on):
        super().__init__()
        self.a, self.b, self.on = nn.Linear(6, 8), nn.Linear(8, 3), on

    def inner(self, x):
        return self.a(x).tanh().square()

    def forward(self, x):
        part = checkpoint(self.inner, x, use_reentrant=False) if self.on else self.inner(x)
        return self.b(part)


@pytest.mark.parametrize("order", ["first", "second"])
def test_checkpointing_does_not_change_the_meta_gradient(order):
    tune, test = objective(*samples(8)), objective(*samples(8))
    found = []
    for on in (False, True):
        torch.manual_seed(1)
        found.append(meta_gradient(Checkpointed(on), [tune], [test], 0.5, order=order)[0])
    torch.testing.assert_close(found[1], found[0])


def test_parameters_held_in_a_plain_list_are_tuned():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.held = [self.inner.weight, self.inner.bias]

        def forward(self, x):
            return F.linear(x, *self.held)

    model, tune, test = Listed(), objective(*samples(8)), objective(*samples(8))
    wanted, _, _ = meta_gradient(model.inner, [tune], [test], 0.5)
    found, _, _ = meta_gradient(model, [tune], [test], 0.5)
    torch.testing.assert_close(found, wanted)


def test_second_order_of_parts_bends_the_loss_that_was_tuned():
    """A random layer, reduced to one draw c a part: L = c t^2 / 2, so H = c1 + c2 of the tuning."""
    model = nn.Module()
    model.t = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    drawn = []

    def part(m):
        drawn.append(torch.rand((), dtype=torch.float64))
        return drawn[-1] * (m.t**2).sum() / 2

    (found,), _, _ = meta_gradient(model, [part, part], [lambda m: (m.t**2).sum() / 2], 0.5)
    h = drawn[0] + drawn[1]
    tuned = 2 - 0.5 * h * 2
    assert found is not None
    torch.testing.assert_close(found[0], h * 2 + tuned - 0.5 * h * tuned)


def test_ltu_does_not_decay_a_parameter_that_no_loss_depends_on():
    forget, retain, validation = sets()
    model = net()
    model.unused = nn.Parameter(torch.ones(3))
    config = LTUConfig(steps=3, lr=0.05, optimizer="adamw", weight_decay=0.1)
    LTUTrainer(
        model, cross_entropy, forget=forget, retain=retain, config=config, validation=validation
    ).run()
    assert torch.equal(model.unused.data, torch.ones(3))


def test_ltu_random_label_does_not_touch_batch_norm_before_the_run():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))
    forget, retain = ((torch.randn(n, 1, 6, 6), torch.randint(0, 3, (n,))) for n in (6, 12))
    before = copy.deepcopy(model.state_dict())
    config = LTUConfig(steps=0, feedback="random_label")
    LTUTrainer(model, cross_entropy, forget=forget, retain=retain, config=config).run()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_ltu_random_label_takes_batch_norm_of_vectors():
    forget, retain, _ = sets()
    config = LTUConfig(steps=1, feedback="random_label")
    LTUTrainer(
        net(nn.BatchNorm1d(8)), cross_entropy, forget=forget, retain=retain, config=config
    ).run()


def test_ltu_made_and_not_run_leaves_the_mode():
    forget, retain, validation = sets()
    model = net(nn.Dropout())
    LTUTrainer(
        model,
        cross_entropy,
        forget=forget,
        retain=retain,
        config=LTUConfig(steps=0),
        validation=validation,
    )
    assert model.training


def test_ltu_survives_a_loader_whose_last_batch_has_one_sample():
    forget, _, _ = sets()
    retain = DataLoader(TensorDataset(*samples(9)), batch_size=4)
    config = LTUConfig(steps=4, feedback="random_label")
    LTUTrainer(net(), cross_entropy, forget=forget, retain=retain, config=config).run()


def test_ltu_names_an_empty_validation_set():
    forget, retain, _ = sets()
    empty = torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)
    with pytest.raises(InputError, match="validation"):
        LTUTrainer(
            net(), cross_entropy, forget=forget, retain=retain, config=LTUConfig(), validation=empty
        )


def test_ltu_refuses_members_as_non_members():
    forget, retain, _ = sets()
    with pytest.raises(InputError, match="overlap"):
        LTUTrainer(
            net(),
            cross_entropy,
            forget=forget,
            retain=retain,
            config=LTUConfig(),
            validation=forget,
        )


@pytest.mark.parametrize("name", ["ltu", "gru"])
def test_weights_of_two_dtypes(name):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8).bfloat16(), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(x.bfloat16()).tanh().float())

    forget, retain, validation = sets()
    unlearning(
        Mixed(),
        retain_loader=retain,
        forget_loader=forget,
        val_loader=validation,
        method=name,
        steps=2,
    )


# -- resuming


def run_and_continue(kind, copied, options):
    forget, retain, validation = sets()
    torch.manual_seed(1)
    model = net()
    config = kind.Config(steps=6, lr=1e-2, **options)

    def make():
        return kind(
            model,
            cross_entropy,
            forget=forget,
            retain=retain,
            config=config,
            validation=validation,
            seed=1,
        )

    trainer = make()
    steps = trainer.fit()
    for _ in range(3):
        next(steps)
    state = trainer.state_dict()
    state = copy.deepcopy(state) if copied else state
    for _ in steps:
        pass
    end = model[0].weight.detach().clone()
    again = make()
    again.load_state_dict(state)
    again.run()
    return end, model[0].weight.detach()


def test_the_example_of_the_docs_ends_at_the_same_bits():
    end, again = run_and_continue(GradDiff, False, {"forget_batch": 5, "retain_batch": 5})
    assert torch.equal(end, again)


@pytest.mark.parametrize("name", ["scrub", "salun", "bad_teacher", "boundary_shrink"])
def test_a_state_has_what_was_made_of_the_original(name):
    """Teachers and masks: made of the model as it is when the second trainer is made."""
    end, again = run_and_continue(METHODS[name], True, {})
    assert torch.equal(end, again)


def test_a_loader_goes_back_with_the_state():
    forget, retain, _ = sets()
    model, config = net(), GradDiffConfig(steps=5, lr=0.01)
    loaders = {
        name: DataLoader(TensorDataset(*data), batch_size=4)
        for name, data in (("forget", forget), ("retain", retain))
    }
    trainer = GradDiff(model, cross_entropy, **loaders, config=config)
    steps = trainer.fit()
    next(steps)
    next(steps)
    state = copy.deepcopy(trainer.state_dict())
    list(steps)
    end = model[0].weight.detach().clone()
    trainer.load_state_dict(state)
    trainer.run()
    assert torch.equal(model[0].weight, end)


@pytest.mark.parametrize("seeded", [True, False])
def test_shuffling_loaders_resume(seeded):
    """With a generator of their own and refreshed auditors; and as vision scripts have them."""
    data = [TensorDataset(*part) for part in sets()]
    model = net()
    start = copy.deepcopy(model.state_dict())

    def make():
        forget, retain, validation = (
            DataLoader(
                part,
                batch_size=4,
                shuffle=True,
                generator=torch.Generator().manual_seed(i) if seeded else None,
            )
            for i, part in enumerate(data)
        )
        config = LTUConfig(steps=6, lr=0.01, refresh=2) if seeded else GradDiffConfig(6, 0.01)
        kind = LTUTrainer if seeded else GradDiff
        return kind(
            model, cross_entropy, forget=forget, retain=retain, config=config, validation=validation
        )

    torch.manual_seed(5)
    make().run()
    end = model[0].weight.detach().clone()
    model.load_state_dict(start)
    torch.manual_seed(5)
    first = make()
    steps = first.fit()
    for _ in range(3):
        next(steps)
    state = copy.deepcopy(first.state_dict())
    model.load_state_dict(start)
    torch.manual_seed(99)
    second = make()
    second.load_state_dict(state)
    second.run()
    assert torch.equal(model[0].weight, end)


# -- what is not finite


class Steep(nn.Module):
    """A finite loss whose gradient is not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        return self.inner(x) + (self.inner.weight * 0).sqrt().sum()


def test_a_last_step_that_breaks_the_model_is_an_error():
    _, retain, _ = sets()
    with pytest.raises(TrainingError):
        Finetune(
            Steep(), cross_entropy, forget=None, retain=retain, config=FinetuneConfig(steps=1)
        ).run()


def test_a_batch_that_is_not_finite_does_not_reach_the_weights():
    _, (images, labels), _ = sets()
    images[5, 0] = torch.nan
    model = net()
    with pytest.raises(TrainingError):
        Finetune(
            model,
            cross_entropy,
            forget=None,
            retain=(images, labels),
            config=FinetuneConfig(steps=3),
        ).run()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_logit_masked_in_both_models_is_no_divergence():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert divergence(logits, logits).item() == 0


# -- micro-batches


def test_parts_of_a_batch_that_batch_norm_would_tell_apart_are_refused():
    _, retain, _ = sets()
    config = FinetuneConfig(steps=1, retain_batch=20, micro_batch=5)
    with pytest.raises(InputError, match=r"micro_batch: 1 \(BatchNorm1d\) would normalize"):
        Finetune(net(nn.BatchNorm1d(8)), cross_entropy, forget=None, retain=retain, config=config)


# -- Retrain


def test_retrain_leaves_frozen_weights():
    _, retain, _ = sets()
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    Retrain(model, cross_entropy, forget=None, retain=retain, config=RetrainConfig(steps=2)).run()
    assert torch.equal(model[0].weight, before)


def resets(model, weight):
    before = weight.detach().clone()
    try:
        reset_parameters(model, 3)
    except InputError:
        return True  # said so
    return not torch.equal(weight, before)


def test_reset_reaches_or_names_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.utils.weight_norm(nn.Linear(6, 8))
    assert resets(layer, layer.weight_v)


def test_reset_reaches_or_names_a_pruned_layer():
    layer = nn.Linear(6, 8)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    assert resets(layer, layer.weight_orig)


def test_reset_reaches_or_names_what_a_subclass_adds():
    class Scaled(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.scale = nn.Parameter(torch.full((1,), 5.0))

    layer = Scaled(6, 8)
    assert resets(layer, layer.scale)


def test_reset_seeds_no_device_the_model_is_not_on(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    reset_parameters(nn.Linear(6, 3), 3)
    assert not seeded


# -- sets and loaders


def test_samplers_over_one_dataset_do_not_overlap():
    data = TensorDataset(*samples(30))
    forget, retain = (
        DataLoader(data, batch_size=5, sampler=SubsetRandomSampler(part))
        for part in (range(10), range(10, 30))
    )
    NegGradPlus(
        net(), cross_entropy, forget=forget, retain=retain, config=NegGradPlusConfig(steps=1)
    ).run()


def test_a_part_of_a_part_overlaps_with_the_whole():
    data = TensorDataset(*samples(30))
    train = Subset(data, range(20))
    assert overlap(DataLoader(Subset(train, range(5))), DataLoader(train)) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: ((x.double(), y), (x, y)),
        lambda x, y: ((x, y.int()), (x, y)),
        lambda x, y: ({"image": x, "label": y}, {"label": y, "image": x}),
        lambda x, y: ((0 * x.abs(), y), (-0.0 * x.abs(), y)),
    ],
    ids=["dtype", "labels", "order of keys", "-0.0"],
)
def test_equal_samples_overlap_however_they_are_stored(change):
    assert overlap(*change(torch.randn(4, 3), torch.arange(4))) == 4


def test_an_empty_forget_set_is_named_by_methods_that_do_not_draw_it():
    _, retain, _ = sets()
    empty = torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)
    with pytest.raises(InputError, match="forget: no samples"):
        Finetune(net(), cross_entropy, forget=empty, retain=retain, config=FinetuneConfig(steps=1))


def test_a_label_of_minus_100_is_out_of_range():
    images, labels = samples(3)
    labels[0] = -100  # ignore_index of F.cross_entropy
    with pytest.raises(InputError, match="labels must be in"):
        cross_entropy(net(), (images, labels))


# -- draws


def test_random_labels_do_not_follow_the_order_of_the_data():
    """Seed 0, the default: sample p of the first batch is p + r_p mod (n - p), its label has the
    very r_p."""
    n, found = 900, []

    class Told(RandomLabel):
        def _relabeled_losses(self, batch):
            wrong = wrong_labels(batch[1], 4, self.generator)
            found.append((batch[0][:, 0].long(), wrong))
            return F.cross_entropy(self.logits(batch), wrong, reduction="none")

    images = torch.arange(n).float()[:, None].expand(n, 2)
    labels = torch.zeros(n, dtype=torch.long)
    data = {"forget": (images, labels), "retain": (images + 5000, labels)}
    config = RandomLabelConfig(steps=1, lr=1e-9)
    Told(nn.Linear(2, 4), cross_entropy, **data, config=config).run()
    index, wrong = found[0]
    at = torch.arange(len(index))
    known = (n - at) % 3 == 0  # of these the index says the label
    agree = (1 + (index - at)[known] % 3 == wrong[known]).double().mean().item()
    assert agree < 0.8  # a third by chance


# -- modes, gradients, options


def test_unlearning_leaves_the_mode_of_every_module():
    forget, retain, _ = sets()
    model = net(nn.BatchNorm1d(8))
    model[1].eval()
    unlearning(model, retain_loader=retain, forget_loader=forget, method="graddiff", steps=1)
    assert not model[1].training


def out_of_range(n):
    images, labels = samples(n)
    labels[-1] = 7
    return images, labels


def test_salun_that_fails_leaves_mode_and_gradients():
    _, retain, _ = sets()
    model = net(nn.Dropout())
    with pytest.raises(InputError):
        SalUn(model, cross_entropy, forget=out_of_range(300), retain=retain, config=SalUnConfig())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_ssd_that_fails_leaves_the_mode():
    forget, _, _ = sets()
    model = net(nn.Dropout())
    with pytest.raises(InputError):
        SSD(model, cross_entropy, forget=forget, retain=out_of_range(20), config=SSDConfig()).run()
    assert model.training


def test_forget_measure_that_fails_leaves_the_mode():
    model = net(nn.Dropout())
    with pytest.raises(InputError):
        forget_measure(model, cross_entropy, out_of_range(20), "loss")
    assert model.training


def test_accuracy_changes_no_statistics():
    model = net(nn.BatchNorm1d(8))
    before = model[1].running_mean.clone()
    images, labels = samples(20)
    accuracy(model, {"image": images, "label": labels})
    assert torch.equal(model[1].running_mean, before)


def test_a_schedule_of_the_config_holds_for_an_optimizer_of_ones_own():
    _, retain, _ = sets()
    config = FinetuneConfig(steps=4, lr=0.1, schedule="cosine")

    def sgd(parameters):
        return torch.optim.SGD(parameters, 0.1)

    trainer = Finetune(
        net(), cross_entropy, forget=None, retain=retain, config=config, optimizer=sgd
    )
    assert len({record["lr"] for record in trainer.fit()}) > 1


def test_probe_every_is_checked():
    _, retain, _ = sets()
    with pytest.raises(InputError, match="probe_every"):
        Finetune(
            net(),
            cross_entropy,
            forget=None,
            retain=retain,
            config=FinetuneConfig(steps=1),
            probe=lambda model: {},
            probe_every=0,
        ).run()


def test_second_order_refuses_weight_norm():
    forget, retain, validation = sets()
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))
    data = {"forget": forget, "retain": retain, "validation": validation}
    with pytest.raises(InputError, match=r'0 has weight norm.*order="first"'):
        LTUTrainer(model, cross_entropy, **data, config=LTUConfig())
    LTUTrainer(model, cross_entropy, **data, config=LTUConfig(order="first"))


def test_duplicates_that_should_be_are_allowed():
    _, retain, _ = sets()
    same = tuple(part[:3] for part in retain)
    config = NegGradPlusConfig(steps=1)
    with pytest.raises(InputError, match="forget and retain overlap: 3 samples"):
        NegGradPlus(net(), cross_entropy, forget=same, retain=retain, config=config)
    NegGradPlus(
        net(), cross_entropy, forget=same, retain=retain, config=config, overlap="allow"
    ).run()


# -- the way past the dispatcher


@pytest.mark.filterwarnings("ignore")
def test_a_trace_holds_the_solve_and_not_its_result():
    def gramian():
        rows = torch.randn(4, 6, dtype=torch.float64)
        return rows @ rows.mT

    def weights(gram):
        return conflict_averse_weights(gram, 0.5)

    traced, other = torch.jit.trace(weights, (gramian(),), check_trace=False), gramian()
    torch.testing.assert_close(traced(other), weights(other))
