"""Baselines with teachers, with shifted boundaries and with rules: each by what defines it."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradsurgery.errors import CoupledSamplesError, InputError
from gradsurgery.unlearn import Finetune, NegGrad, OrthoGradTrainer
from gradsurgery.unlearn.methods.bad_teacher import BadTeacher
from gradsurgery.unlearn.methods.boundary_shrink import BoundaryShrink
from gradsurgery.unlearn.methods.gdr_gma import GDRGMATrainer
from gradsurgery.unlearn.methods.gru import GRUTrainer
from gradsurgery.unlearn.methods.scrub import SCRUB, divergence
from gradsurgery.unlearn.objectives.classification import cross_entropy

FORWARD = [SCRUB, BadTeacher, BoundaryShrink]
SURGICAL = [GDRGMATrainer, GRUTrainer]
KINDS = [*FORWARD, *SURGICAL]
EVERYTHING = 64  # a batch size beyond every set: all samples in each batch


def make(kind, problem, size=EVERYTHING, **options):
    sizes = {f"{drawn}_batch": size for drawn in kind.draws}
    config = kind.Config(**{"optimizer": "sgd", **sizes, **options})
    loss = cross_entropy if kind.instead_of_loss else problem.loss
    return kind(
        problem.model, loss, forget=problem.forget, retain=problem.retain, config=config, seed=3
    )


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def stepped(trainer, **expected):
    """What one sgd step of rate 1 descended."""
    before = flat(trainer.model)
    record = next(trainer.fit())
    for name, value in expected.items():
        assert record[name] == pytest.approx(value)
    return before - flat(trainer.model)


def disturb(model, scale=0.3):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=scale)


def kl(teacher, student):
    """KL(teacher || student) of distributions [B, C], [B], term by term."""
    return (teacher * (teacher / student).log()).sum(1)


# -- the protocol


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_resumed_run_ends_at_the_same_bits(kind, optimizer, problem):
    problem.model.insert(2, nn.Dropout(0.2))
    options = {"steps": 9, "lr": 0.05, "schedule": "cosine", "size": 5}
    options.update(optimizer=optimizer, momentum=0.9)
    start = state(problem.model)
    torch.manual_seed(7)
    make(kind, problem, **options).run()
    whole = state(problem.model)
    assert not torch.equal(whole["0.weight"], start["0.weight"])

    problem.model.load_state_dict(start)
    torch.manual_seed(7)
    first = make(kind, problem, **options)
    steps = first.fit()
    for _ in range(4):
        next(steps)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    problem.model.load_state_dict(start)
    torch.manual_seed(99)
    second = make(kind, problem, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert [record["step"] for record in second.fit()] == [5, 6, 7, 8, 9]
    for key, value in problem.model.state_dict().items():
        assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_change_nothing(kind, problem):
    start, drawn = state(problem.model), torch.get_rng_state()
    make(kind, problem, steps=0).run()
    for key, value in problem.model.state_dict().items():
        assert torch.equal(value, start[key])
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("kind", FORWARD)
def test_parts_of_a_batch_give_what_the_batch_does(kind, problem):
    start, ends = state(problem.model), []
    for part in (None, 2):
        problem.model.load_state_dict(start)
        make(kind, problem, steps=6, size=5, lr=0.1, micro_batch=part).run()
        ends.append(flat(problem.model))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_forward_is_in_the_precision_asked_for(kind, problem):
    seen = []
    problem.model.float()
    problem.model.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    for data in (problem.forget, problem.retain):
        data["image"] = data["image"].float()
    records = list(make(kind, problem, steps=3, precision="bfloat16").fit())
    assert seen and all(seen)
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert {p.dtype for p in problem.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_batches_too(kind, problem):
    ends = []
    start = state(problem.model)
    for paired in (False, True):
        problem.model.load_state_dict(start)
        if paired:
            problem.forget, problem.retain = (
                (data["image"], data["label"]) for data in (problem.forget, problem.retain)
            )
            problem.loss = lambda model, batch: F.cross_entropy(
                model(batch[0]), batch[1], reduction="none"
            )
        make(kind, problem, steps=4, lr=0.1).run()
        ends.append(flat(problem.model))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "kind,option,value",
    [
        (SCRUB, "epochs", 0),
        (SCRUB, "msteps", -1),
        (SCRUB, "retain_weight", -0.1),
        (SCRUB, "distill_weight", math.inf),
        (SCRUB, "temperature", 0.0),
        (SCRUB, "forget_batch", 0),
        (BadTeacher, "temperature", -1.0),
        (BadTeacher, "temperature", math.nan),
        (BoundaryShrink, "bound", 0.0),
        (BoundaryShrink, "bound", math.inf),
        (GDRGMATrainer, "gamma", -1.0),
        (GDRGMATrainer, "eps", math.nan),
        (GDRGMATrainer, "forget_ceiling", 0.0),
        (GRUTrainer, "retain_momentum", 1.0),
        (GRUTrainer, "retain_momentum", -0.1),
        (GRUTrainer, "forget_ceiling", math.nan),
    ],
)
def test_options_out_of_range_are_named(kind, option, value):
    with pytest.raises(InputError, match=f"--x.{option.replace('_', '-')} must be .* got"):
        kind.Config(**{option: value}).check("x")


# -- SCRUB


def test_divergence_of_two_coins():
    """KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 log(3/2) + 1/4 log(1/2); the other way round it is 0.1438.

    At T = 4 the logits are four times as large for the same distributions, and T² = 16.
    """
    teacher, student = torch.tensor([[0.75, 0.25]]).double(), torch.tensor([[0.5, 0.5]]).double()
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(student.log(), teacher.log()).tolist() == pytest.approx([wanted])
    hot = divergence(4 * student.log(), 4 * teacher.log(), temperature=4.0)
    assert hot.tolist() == pytest.approx([16 * wanted])


@pytest.mark.parametrize(
    "options,plan",
    [
        # 12 to forget are two batches of 5, 24 to retain three of 7
        ({"epochs": 3, "msteps": 2}, "ffrrr ffrrr rrr"),
        ({"epochs": 2, "msteps": 0}, "rrr rrr"),
        ({"epochs": 2, "msteps": 5}, "ffrrr ffrrr"),
        ({"epochs": 3, "msteps": 2, "steps": 7}, "ffrrr ff"),
    ],
)
def test_scrub_goes_by_its_plan(options, plan, problem):
    trainer = make(SCRUB, problem, forget_batch=5, retain_batch=7, **options)
    plan = plan.replace(" ", "")
    assert trainer.total_steps() == len(plan)
    kinds = ["f" if "forget_loss_batch" in record else "r" for record in trainer.fit()]
    assert "".join(kinds) == plan
    assert trainer.samples["forget"] == 5 * plan.count("f")
    assert trainer.samples["retain"] == 7 * plan.count("r")


def test_scrub_of_no_options_takes_five_epochs(problem):
    """One batch of 12 is the forget set, one of 24 the retain set."""
    config = SCRUB.Config()
    trainer = SCRUB(
        problem.model, cross_entropy, forget=problem.forget, retain=problem.retain, config=config
    )
    kinds = ["f" if "forget_loss_batch" in record else "r" for record in trainer.fit()]
    assert "".join(kinds) == "frfrfrrr"


def distilled(trainer, problem, data, temperature):
    """T² KL at temperature T of the data, [B], from the definition."""
    teacher = (trainer.teacher(data["image"]) / temperature).softmax(1)
    student = (problem.model(data["image"]) / temperature).softmax(1)
    return temperature**2 * kl(teacher, student)


def test_scrub_climbs_the_divergence_on_forget(problem):
    trainer = make(SCRUB, problem, lr=1.0, temperature=3.0)
    disturb(problem.model)
    apart = distilled(trainer, problem, problem.forget, 3.0).mean()
    wanted = -gradient(problem.model, apart)
    torch.testing.assert_close(stepped(trainer, forget_loss_batch=apart.item()), wanted)
    assert distilled(trainer, problem, problem.forget, 3.0).mean() > apart


def test_scrub_descends_both_losses_on_retain(problem):
    trainer = make(SCRUB, problem, lr=1.0, msteps=0, retain_weight=0.7, distill_weight=0.3)
    disturb(problem.model)
    right = problem.loss(problem.model, problem.retain)
    apart = distilled(trainer, problem, problem.retain, 4.0)
    loss = (0.7 * right + 0.3 * apart).mean()
    wanted = gradient(problem.model, loss)
    torch.testing.assert_close(stepped(trainer, retain_loss_batch=loss.item()), wanted)


def test_a_student_equal_to_its_teacher_stays_with_it(problem):
    start = flat(problem.model)
    make(SCRUB, problem, lr=10.0, msteps=0, retain_weight=0.0).run()
    torch.testing.assert_close(flat(problem.model), start, rtol=0, atol=1e-13)


def test_scrub_without_its_teacher_is_finetuning(problem):
    start = state(problem.model)
    make(SCRUB, problem, lr=0.1, epochs=4, msteps=0, distill_weight=0.0).run()
    end = flat(problem.model)
    problem.model.load_state_dict(start)
    make(Finetune, problem, lr=0.1, steps=4).run()
    torch.testing.assert_close(end, flat(problem.model), rtol=1e-12, atol=1e-12)


def test_scrub_parts_from_its_teacher_on_forget_alone(problem):
    options = {"optimizer": "adam", "lr": 0.02, "epochs": 6, "msteps": 6}
    trainer = make(SCRUB, problem, size=6, retain_weight=0.1, distill_weight=1.0, **options)
    trainer.run()
    forget, retain = (
        distilled(trainer, problem, data, 1.0).mean().item()
        for data in (problem.forget, problem.retain)
    )
    assert forget > 0.01 and forget > 2 * retain


# -- Bad Teacher


def outputs(model, data):
    with torch.no_grad():
        return model(data["image"]).softmax(1)


def test_the_incompetent_teacher_knows_nothing_of_the_original(problem):
    torch.manual_seed(3)
    fresh = [copy.deepcopy(module) for module in problem.model]
    for module in fresh:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    teachers = [flat(make(BadTeacher, problem).incompetent) for _ in range(2)]
    assert torch.equal(*teachers)  # a resumed run has the same
    with torch.no_grad():
        for p in problem.model.parameters():
            p.fill_(math.pi)
    trainer = make(BadTeacher, problem)
    assert torch.equal(flat(trainer.incompetent), teachers[0])
    assert not torch.equal(flat(nn.Sequential(*fresh)), teachers[0])  # as its seed would begin
    assert torch.equal(flat(trainer.competent), flat(problem.model))
    other = BadTeacher(
        problem.model,
        cross_entropy,
        forget=problem.forget,
        retain=problem.retain,
        config=BadTeacher.Config(),
        seed=4,
    )
    assert not torch.equal(flat(other.incompetent), teachers[0])


def test_bad_teacher_descends_a_divergence_from_each_teacher(problem):
    trainer = make(BadTeacher, problem, lr=1.0, temperature=2.0)
    disturb(problem.model)

    def apart(teacher, data):
        given = [(model(data["image"]) / 2).softmax(1) for model in (teacher, problem.model)]
        return 4 * kl(*given).mean()

    forget = apart(trainer.incompetent, problem.forget)
    retain = apart(trainer.competent, problem.retain)
    wanted = gradient(problem.model, forget + retain)
    descended = stepped(trainer, forget_loss_batch=forget.item(), retain_loss_batch=retain.item())
    torch.testing.assert_close(descended, wanted)


def test_a_student_that_agrees_with_both_teachers_stays(problem):
    trainer = make(BadTeacher, problem, lr=10.0, steps=3)
    trainer.incompetent = trainer.competent
    start = flat(problem.model)
    trainer.run()
    torch.testing.assert_close(flat(problem.model), start, rtol=0, atol=1e-13)


def test_bad_teacher_brings_each_set_to_its_teacher(problem):
    trainer = make(BadTeacher, problem, lr=0.02, steps=150, optimizer="adam")
    good, bad = trainer.competent, trainer.incompetent
    disturb(bad, 1.0)  # further from the original than one untrained model is from another
    weights = flat(good), flat(bad)

    def apart(teacher, data):
        return kl(outputs(teacher, data), outputs(problem.model, data)).mean()

    before = apart(bad, problem.forget)
    trainer.run()
    assert apart(bad, problem.forget) < 0.1 * before < apart(good, problem.forget)
    assert apart(good, problem.retain) < 0.1 * before < apart(bad, problem.retain)
    assert torch.equal(flat(good), weights[0]) and torch.equal(flat(bad), weights[1])


def test_bad_teacher_names_a_module_it_cannot_draw(problem):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return x * self.scale

    problem.model.append(Scale())
    with pytest.raises(InputError, match=r"3.scale \(Scale\) is drawn by no reset_parameters"):
        make(BadTeacher, problem)


# -- Boundary Shrink


def plane():
    """Logits of (x, y): 2 x; y + 0.4; 0.5 - 3 x."""
    model = nn.Linear(2, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]]))
        model.bias.copy_(torch.tensor([0.0, 0.4, 0.5]))
    return model


@pytest.mark.parametrize(
    "point,label,bound,nearest",
    [
        # (0.4, 0.1, -0.1); climbing the loss of class 0 is x down, y up: (0, 0.3, 0.5) at (0, -0.1)
        ((0.2, -0.3), 0, 0.2, 2),
        # hardly moved the second-best of before is that of after
        ((0.2, -0.3), 0, 1e-3, 1),
        # (4, 0.1, -5.5) is (3.6, 0.3, -4.9) at (1.8, -0.1), class 0 still: the best of the others
        ((2.0, -0.3), 0, 0.2, 1),
        # sure of class 0 a slope is next to nothing, its sign is not: (0, -1.6, 0.5) at (0, -2)
        ((2.0, -4.0), 0, 2.0, 2),
        # labeled 2 and taken for 0: x up, y up, to (0.8, 0.3, -0.7)
        ((0.2, -0.3), 2, 0.2, 0),
    ],
)
def test_the_nearest_class_in_the_plane(point, label, bound, nearest, problem):
    forget = {"image": torch.tensor([point]).double(), "label": torch.tensor([label])}
    config = BoundaryShrink.Config(bound=bound)
    trainer = BoundaryShrink(plane(), problem.loss, forget=forget, retain=None, config=config)
    assert trainer.nearest(forget).tolist() == [nearest]


def test_boundary_shrink_asks_the_original(problem):
    trainer = make(BoundaryShrink, problem)
    first = trainer.nearest(problem.forget)
    assert (first != problem.forget["label"]).all()
    weights = flat(trainer.original)
    disturb(problem.model, 3.0)
    assert torch.equal(trainer.nearest(problem.forget), first)
    assert torch.equal(flat(trainer.original), weights)


def test_boundary_shrink_descends_the_loss_of_the_nearest_labels(problem):
    trainer = make(BoundaryShrink, problem, lr=1.0)
    labels = trainer.nearest(problem.forget)
    loss = problem.loss(problem.model, {**problem.forget, "label": labels}).mean()
    wanted = gradient(problem.model, loss)
    torch.testing.assert_close(stepped(trainer, forget_loss_batch=loss.item()), wanted)


def test_boundary_shrink_ends_across_the_boundary(problem):
    trainer = make(BoundaryShrink, problem, steps=100, lr=0.05, optimizer="adam")
    labels = trainer.nearest(problem.forget)
    trainer.run()
    assert torch.equal(problem.model(problem.forget["image"]).argmax(1), labels)
    assert trainer.samples["retain"] == 0


def test_inputs_that_cannot_be_moved_are_named(problem):
    tokens = {"image": torch.zeros(4, 6, dtype=torch.int64), "label": torch.zeros(4).long()}
    trainer = BoundaryShrink(
        problem.model, problem.loss, forget=tokens, retain=None, config=BoundaryShrink.Config()
    )
    with pytest.raises(InputError, match=r"forget: inputs must be a tensor .* got torch.int64"):
        trainer.run()


# -- rules: GDR-GMA and GRU


def gradients(problem):
    """f and r: what raises the forget loss and what lowers the retain loss, if descended."""
    forget, retain = (
        gradient(problem.model, problem.loss(problem.model, data).mean())
        for data in (problem.forget, problem.retain)
    )
    return -forget, retain


@pytest.fixture(params=[True, False], ids=["conflicting", "agreeing"])
def conflicting(request, problem):
    """Whether f and r oppose each other, and a problem in which they do, or do not."""
    if request.param:  # what is learned of the one is learned of the other
        problem.retain["image"][:12] = problem.forget["image"] + 0.1
        problem.retain["label"][:12] = problem.forget["label"]
    else:
        problem.retain["image"][:12] = problem.forget["image"] + 0.1
        problem.retain["label"][:12] = (problem.forget["label"] + 1) % 3
        problem.retain["image"][12:] = problem.forget["image"] - 0.1
        problem.retain["label"][12:] = (problem.forget["label"] + 2) % 3
    f, r = gradients(problem)
    assert bool(f @ r < 0) == request.param
    return request.param


def off(a, b):
    return a - min(0.0, (a @ b).item()) / (b @ b) * b


@pytest.mark.parametrize("gamma,eps", [(2.0, 1.0), (100.0, 0.02), (100.0, 5.0), (0.0, 0.02)])
def test_gdr_gma_takes_the_step_of_its_formula(gamma, eps, conflicting, problem):
    trainer = make(GDRGMATrainer, problem, lr=1.0, gamma=gamma, eps=eps)
    f, r = gradients(problem)
    loss = problem.loss(problem.model, problem.retain).mean().item()
    share = 1 / (1 + math.exp(gamma * (loss - eps)))
    wanted = share * off(f, r) + (1 - share) * off(r, f)
    descended = stepped(trainer, retain_loss_batch=loss)
    torch.testing.assert_close(descended, wanted)
    assert descended @ f > -1e-12 and descended @ r > -1e-12


@pytest.mark.parametrize("eps,raised", [(0.0, False), (50.0, True)])
def test_gdr_gma_turns_from_forgetting_to_retaining(eps, raised, problem):
    f, r = gradients(problem)
    descended = stepped(make(GDRGMATrainer, problem, lr=1.0, eps=eps))
    torch.testing.assert_close(descended, off(f, r) if raised else off(r, f))
    assert descended @ (f if raised else r) > 0


def test_gru_takes_the_step_of_its_formula(conflicting, problem):
    trainer = make(GRUTrainer, problem, lr=1.0, retain_momentum=0.0)
    f, r = gradients(problem)
    descended = stepped(trainer)
    torch.testing.assert_close(descended, f - (f @ r / (r @ r) * r if conflicting else 0))
    assert descended @ f > 0  # forgets
    assert (descended @ r / r.norm() / f.norm()).item() > -1e-12  # and opposes nothing


def test_gru_averages_the_retain_gradients(problem):
    trainer = make(GRUTrainer, problem, steps=4, lr=0.5, retain_momentum=0.6)
    twin = copy.deepcopy(problem)
    _, average = gradients(twin)  # begun by the first
    for _ in range(4):
        f, r = gradients(twin)
        average = 0.6 * average + 0.4 * r
        weights = flat(twin.model) - 0.5 * off(f, average)
        nn.utils.vector_to_parameters(weights, twin.model.parameters())
    trainer.run()
    torch.testing.assert_close(flat(problem.model), flat(twin.model))
    torch.testing.assert_close(trainer.extra_state()["average"], average)


def test_gru_without_retaining_in_the_way_is_ascent(problem):
    problem.retain["image"] = problem.forget["image"].repeat(2, 1) + 0.1
    problem.retain["label"] = (problem.forget["label"].repeat(2) + 1) % 3
    start = state(problem.model)
    make(GRUTrainer, problem, steps=2, lr=0.1).run()
    end = flat(problem.model)
    problem.model.load_state_dict(start)
    make(NegGrad, problem, steps=2, lr=0.1).run()
    torch.testing.assert_close(end, flat(problem.model))


def test_samples_above_the_ceiling_do_not_push(problem):
    """f is zero: GRU stays, GDR-GMA with both directions alike takes half a step of retaining."""
    start = state(problem.model)
    ceiling = problem.loss(problem.model, problem.forget).min().item() / 2
    _, r = gradients(problem)
    assert not stepped(make(GRUTrainer, problem, lr=1.0, forget_ceiling=ceiling)).any()
    problem.model.load_state_dict(start)
    trainer = make(GDRGMATrainer, problem, lr=1.0, gamma=0.0, forget_ceiling=ceiling)
    torch.testing.assert_close(stepped(trainer), r / 2)


def test_rules_record_what_their_steps_saw(problem):
    f, r = gradients(problem)
    for kind in SURGICAL:
        start = state(problem.model)
        (record,) = make(kind, problem, steps=1).fit()
        problem.model.load_state_dict(start)
        cosine = (-f @ r / f.norm() / r.norm()).item()
        assert record["cosine_mean"] == record["cosine_max"] == pytest.approx(cosine)
        assert record["conflict_rate"] == float(cosine > 0)
        assert "rank" not in record and "kept_norm" not in record


@pytest.fixture
def normalized(problem):
    """The same with batch norm, as given by a training that has set its statistics."""
    problem.model.insert(1, nn.BatchNorm1d(40).double())
    problem.model(problem.retain["image"])
    return problem


@pytest.mark.parametrize("kind", [OrthoGradTrainer, *SURGICAL])
def test_rules_take_a_model_with_batch_norm(kind, normalized):
    norm = normalized.model[1]
    statistics, weight = norm.running_mean.clone(), norm.weight.detach().clone()
    trainer = make(kind, normalized, steps=2, lr=0.1, retain_batch=5)
    trainer.run()
    assert torch.equal(norm.running_mean, statistics)
    assert not torch.equal(norm.weight, weight)


def test_batch_norm_in_training_is_named_where_samples_have_rows(normalized):
    trainer = make(OrthoGradTrainer, normalized, batch_norm="train")
    with pytest.raises(InputError, match=r"batch_norm = train: .* \(1 \(BatchNorm1d\) in training"):
        trainer.run()


def test_batch_norm_is_named_for_no_other_coupling(problem):
    problem.model.insert(1, nn.Softmax(0))
    trainer = make(OrthoGradTrainer, problem)
    with pytest.raises(CoupledSamplesError, match=r"^SoftmaxBackward0 computes across samples"):
        trainer.run()


@pytest.mark.parametrize("kind", SURGICAL)
def test_batch_norm_in_training_sees_each_batch_alone(kind, normalized):
    # both rows are means: those of ordinary backward passes, a batch each
    model = copy.deepcopy(normalized.model).train()
    rows = []
    for batch in (normalized.forget, normalized.retain):
        loss = normalized.loss(model, batch).mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    gram = torch.stack(rows) @ torch.stack(rows).mT
    trainer = make(kind, normalized, batch_norm="train", steps=1)
    seen = next(iter(trainer.fit()))
    expected = float(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt())
    assert seen["cosine_mean"] == pytest.approx(expected, rel=1e-9)


def test_timing_a_step_knows_batch_norm_and_loaders(normalized):
    normalized.model.insert(3, nn.Dropout(0.3))  # draws from the generator that loaders draw from
    ends, start = [], state(normalized.model)
    for timed in (False, True):
        torch.manual_seed(5)
        normalized.model.load_state_dict(start)
        loaders = [
            DataLoader(TensorDataset(data["image"], data["label"]), batch_size=5)
            for data in (normalized.forget, normalized.retain)
        ]
        trainer = OrthoGradTrainer(
            normalized.model,
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
            forget=loaders[0],
            retain=loaders[1],
            config=OrthoGradTrainer.Config(steps=3),
        )
        for record in trainer.fit():
            if timed and record["step"] == 1:
                assert trainer.step_seconds().keys() == {"orthograd", "plain"}
        ends.append(flat(normalized.model))
    assert torch.equal(*ends)
