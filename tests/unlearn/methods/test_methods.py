"""The direction of every method: what it must raise, lower and leave alone."""

import math

import pytest
import torch
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn import (
    METHODS,
    Finetune,
    GradDiff,
    NegGrad,
    OrthoGradConfig,
    OrthoGradTrainer,
    Retrain,
    RetrainConfig,
)
from gradsurgery.unlearn.objectives.classification import cross_entropy

EVERYTHING = 64  # a batch size beyond every set: all samples in each batch


def losses(problem):
    with torch.no_grad():
        return tuple(problem.loss(problem.model, data) for data in (problem.forget, problem.retain))


def run(kind, problem, **options):
    """Losses of the forget and the retain samples after minus before."""
    sizes = {f"{drawn}_batch": EVERYTHING for drawn in kind.draws}
    config = kind.Config(**{"optimizer": "sgd", **sizes, **options})
    before = losses(problem)
    data = {"forget": problem.forget, "retain": problem.retain, "config": config}
    loss = cross_entropy if kind.instead_of_loss else problem.loss
    kind(problem.model, loss, **data, validation=problem.validation).run()
    return tuple(b - a for a, b in zip(before, losses(problem), strict=True))


def test_finetune_lowers_the_retain_loss(problem):
    _, retain = run(Finetune, problem, steps=20, lr=0.1)
    assert retain.mean() < 0


def test_neggrad_raises_the_forget_loss(problem):
    forget, _ = run(NegGrad, problem, steps=20, lr=0.1)
    assert forget.mean() > 0.1


def test_graddiff_raises_forget_and_holds_retain(problem):
    forget, retain = run(GradDiff, problem, steps=30, lr=0.1, forget_ceiling=2.0)
    assert forget.mean() > 0.1
    assert retain.mean() < 0


def test_graddiff_weights_act_on_their_own_loss(problem):
    start = {key: value.clone() for key, value in problem.model.state_dict().items()}
    ends = {}
    for name, kind, options in (
        ("retain only", GradDiff, {"forget_weight": 0.0}),
        ("finetune", Finetune, {}),
        ("forget only", GradDiff, {"retain_weight": 0.0}),
        ("neggrad", NegGrad, {}),
    ):
        problem.model.load_state_dict(start)
        run(kind, problem, steps=5, lr=0.1, **options)
        ends[name] = problem.model[0].weight.clone()
    torch.testing.assert_close(ends["retain only"], ends["finetune"])
    torch.testing.assert_close(ends["forget only"], ends["neggrad"])


def test_orthograd_climbs_forget_and_leaves_every_retain_loss_to_first_order(problem):
    """alpha = 0: half the step is half the forget gain and a quarter of each retain change."""
    start = {key: value.clone() for key, value in problem.model.state_dict().items()}
    changes = []
    for lr in (2e-3, 1e-3):
        problem.model.load_state_dict(start)
        changes.append(run(OrthoGradTrainer, problem, steps=1, lr=lr, alpha=0.0))
    (forget, retain), (forget_half, retain_half) = changes
    assert forget.mean() > 0
    assert (forget.mean() / forget_half.mean()).item() == pytest.approx(2, rel=0.02)
    assert retain.abs().max() < 1e-3 * forget.mean()
    assert (retain.norm() / retain_half.norm()).item() == pytest.approx(4, rel=0.02)


def test_orthograd_raises_forget_and_lowers_retain(problem):
    forget, retain = run(OrthoGradTrainer, problem, steps=30, lr=0.1, alpha=0.5)
    assert forget.mean() > 0.1
    assert retain.mean() < 0


def test_orthograd_records_what_its_steps_saw(problem):
    config = OrthoGradConfig(steps=1, retain_batch=7)
    trainer = OrthoGradTrainer(
        problem.model, problem.loss, forget=problem.forget, retain=problem.retain, config=config
    )
    (record,) = trainer.fit()
    assert record["rank"] == 7
    assert 0 < record["kept_norm"] < 1
    assert -1 <= record["cosine_mean"] <= record["cosine_max"] <= 1
    assert 0 <= record["conflict_rate"] <= 1


@pytest.mark.parametrize("kind", [NegGrad, GradDiff, OrthoGradTrainer])
def test_samples_above_the_ceiling_do_not_push(kind, problem):
    start = {key: value.clone() for key, value in problem.model.state_dict().items()}
    ceiling = losses(problem)[0].min().item() / 2
    alone = {
        NegGrad: {},
        GradDiff: {"retain_weight": 0.0},
        OrthoGradTrainer: {"alpha": 0.0},
    }[kind]
    run(kind, problem, steps=3, lr=0.1, forget_ceiling=ceiling, **alone)
    for key, value in problem.model.state_dict().items():
        assert torch.equal(value, start[key])


@pytest.mark.parametrize("name", METHODS)
def test_no_steps_change_nothing(name, problem):
    start = {key: value.clone() for key, value in problem.model.state_dict().items()}
    run(METHODS[name], problem, steps=0)
    for key, value in problem.model.state_dict().items():
        assert torch.equal(value, start[key])


def test_retrain_forgets_the_weights_it_was_given(problem):
    run(Retrain, problem, steps=5)
    first = problem.model[0].weight.clone()
    with torch.no_grad():
        problem.model[0].weight.fill_(math.pi)
    run(Retrain, problem, steps=5)
    assert torch.equal(problem.model[0].weight, first)


def test_retrain_leaves_the_global_generator_alone(problem):
    state = torch.get_rng_state()
    Retrain(
        problem.model,
        problem.loss,
        forget=None,
        retain=problem.retain,
        config=RetrainConfig(steps=1),
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_retrain_names_a_module_it_cannot_reset(problem):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return x * self.scale

    problem.model.append(Scale())
    with pytest.raises(InputError, match=r"3.scale \(Scale\) is drawn by no reset_parameters"):
        run(Retrain, problem, steps=1)
