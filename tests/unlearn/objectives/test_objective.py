"""Tasks of another kind than classification: every method runs on one, or refuses it by name."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradsurgery.errors import InputError
from gradsurgery.unlearn import METHODS, BadTeacher, Classification, LTUTrainer, RandomLabel
from gradsurgery.unlearn.methods.ltu.membership import MembershipModels, features
from gradsurgery.unlearn.metrics.accuracy import accuracy
from gradsurgery.unlearn.objectives.base import check_has, joined, per_sample
from tests.unlearn.objectives.tasks import (
    ALL,
    TASKS,
    Answers,
    LossesAlone,
    Tags,
    Untouched,
    made,
    run,
    same,
    values,
)

# -- every method, on every task

REFUSED = {
    "boundary_shrink": "BoundaryShrink needs inputs and with_inputs and with_labels",
    "ltu": "LTUTrainer needs classes",
}


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("task", TASKS)
def test_every_method_runs_or_refuses_by_name(task, method):
    objective, net, sets = made(task)
    if task == "answers" and method in REFUSED:
        with Untouched(net, f"^loss: {REFUSED[method]}, which Answers has not$"):
            run(net, sets, objective, method)
        return
    before = values(net)
    run(net, sets, objective, method)
    assert not same(values(net), before)
    assert all(value.isfinite().all() for value in values(net))


@pytest.mark.parametrize("method", [m for m in ALL if m != "ssd"])
def test_parts_of_a_batch_make_the_same_step(method):
    objective, net, sets = made("tags")
    ends = []
    for part in (None, 2):
        twin = copy.deepcopy(net)
        run(twin, sets, objective, method, micro_batch=part, **{"steps": 2, "optimizer": "sgd"})
        ends.append(values(twin))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)


class WithoutOutputs(LossesAlone):
    outputs = None

    def relabel(self, batch, generator):
        return Answers().relabel(batch, generator)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("objective", [LossesAlone(), WithoutOutputs()])
def test_what_a_task_lacks_is_named_before_anything_changes(objective, method):
    _, net, sets = made("answers")
    name = type(objective).__name__
    has = {"losses", "relabel"} if isinstance(objective, WithoutOutputs) else {"losses"}
    missing = " and ".join(sorted(ALL[method].asks - has))
    if not missing:
        before = values(net)
        run(net, sets, objective, method)
        assert not same(values(net), before)
        return
    message = f"^loss: {ALL[method].__name__} needs {missing}, which {name} has not$"
    with Untouched(net, message):
        run(net, sets, objective, method)
    data = {"forget": sets["forget_loader"], "retain": sets["retain_loader"]}
    with Untouched(net, message):
        ALL[method](net, objective, **data, config=ALL[method].Config())


@pytest.mark.parametrize(
    "options,missing",
    [
        ({}, "classes and outputs"),
        ({"feedback": "random_label"}, "classes and relabel"),
        ({"feedback": "random_label", "split": "augmentation"}, "inputs and relabel and with_inp"),
    ],
)
def test_what_ltu_asks_is_a_matter_of_its_options(options, missing):
    _, net, sets = made("answers")
    with Untouched(net, f"LTUTrainer needs {missing}"):
        run(net, sets, LossesAlone(), "ltu", **options)


def swapped(batch, generator):
    question, answer = batch
    return question[:, torch.randperm(question.shape[1], generator=generator)], answer


@pytest.mark.parametrize("feedback", ["membership", "random_label"])
def test_ltu_of_answers_needs_an_augmentation_of_ones_own(feedback):
    objective, net, sets = made("answers")
    config = LTUTrainer.Config(
        steps=2, lr=0.01, split="augmentation", feedback=feedback, model_steps=5
    )
    data = {"forget": sets["forget_loader"], "retain": sets["retain_loader"]}
    before = values(net)
    held_out = {"validation": sets["val_loader"]}
    LTUTrainer(net, objective, **data, **held_out, config=config, augment=swapped).run()
    assert not same(values(net), before)


# -- a sample's predictions


def test_means_over_predictions_by_hand():
    given = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sample = torch.tensor([2, 0, 2, 0, 2])
    found = per_sample(given, sample, 4)
    assert found.tolist() == [5.0, 0.0, 7.0, 0.0]
    (grad,) = torch.autograd.grad(found @ torch.tensor([6.0, 1.0, 9.0, 1.0]), given)
    assert grad.tolist() == [3.0, 3.0, 3.0, 3.0, 3.0]
    rows = torch.arange(6.0).view(3, 2)
    assert per_sample(rows, torch.tensor([1, 1, 0]), 2).tolist() == [[4.0, 5.0], [1.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_many_narrow_values_are_right(dtype):
    values = torch.full((3000,), 100.0, dtype=dtype)
    found = per_sample(values, torch.zeros(3000, dtype=torch.int64), 2)
    assert found.dtype == dtype
    assert found.tolist() == [100.0, 0.0]


def test_batches_are_joined_by_name():
    first = {"a": torch.tensor([1]), "b": torch.tensor([2])}
    found = joined(first, {"b": torch.tensor([4]), "a": torch.tensor([3])})
    assert {name: value.tolist() for name, value in found.items()} == {"a": [1, 3], "b": [2, 4]}
    with pytest.raises(InputError, match=r"must have the same tensors: one alone has \['b'\]"):
        joined(first, {"a": torch.tensor([3])})


def test_of_one_prediction_each_they_are_the_values():
    given = torch.randn(50).mul(1e3).requires_grad_()
    found, pull = per_sample(given, torch.arange(50), 50), torch.randn(50)
    assert torch.equal(found, given)
    assert torch.equal(torch.autograd.grad(found @ pull, given)[0], pull)


def kl(net, teacher, batch, heat=1.0):
    """Mean over samples of the mean over words of KL(teacher || net), one sample at a time."""
    each = []
    for question, answer in zip(*batch, strict=True):
        words = answer[answer >= 0]
        p, q = ((m(question[None], len(words))[0] / heat).log_softmax(-1) for m in (teacher, net))
        each.append(heat**2 * (p.exp() * (p - q)).sum(-1).mean())
    return torch.stack(each).mean()


def grads(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()))


def one_step(kind, net, sets, **options):
    """A trainer that takes one step of SGD at a rate of 1 on whole sets."""
    sizes = {f"{drawn}_batch": 64 for drawn in kind.draws}
    config = kind.Config(**{"optimizer": "sgd", "lr": 1.0, "steps": 1, **sizes, **options})
    data = {"forget": sets["forget_loader"], "retain": sets["retain_loader"]}
    return kind(net, Answers(), **data, config=config, validation=sets["val_loader"])


def moved(net, trainer):
    before = values(net)
    trainer.run()
    return [a - b for a, b in zip(before, values(net), strict=True)]


def test_bad_teacher_counts_samples_alike_whatever_their_length():
    _, net, sets = made("answers")
    trainer = one_step(BadTeacher, net, sets)
    forget = kl(net, trainer.incompetent, sets["forget_loader"])
    wanted = grads(net, forget + kl(net, trainer.competent, sets["retain_loader"]))
    torch.testing.assert_close(moved(net, trainer), list(wanted))


def test_so_does_scrub():
    _, net, sets = made("answers")
    trainer = one_step(METHODS["scrub"], net, sets, msteps=0, epochs=1, distill_weight=0.3)
    for p in net.parameters():  # away from the teacher, where the divergence has a gradient
        p.data += 0.3 * torch.randn_like(p)
    retain = sets["retain_loader"]
    loss = Answers().losses(net, retain).mean() + 0.3 * kl(net, trainer.teacher, retain, 4.0)
    wanted = grads(net, loss)
    torch.testing.assert_close(moved(net, trainer), list(wanted))


def test_random_label_descends_the_losses_of_what_it_was_relabeled_with():
    _, net, sets = made("answers")
    trainer = one_step(RandomLabel, net, sets, forget_weight=0.5)
    first = sets["forget_loader"], sets["retain_loader"]
    drawn = []
    relabel = trainer.relabel
    trainer.relabel = lambda batch: drawn.append(relabel(batch)) or drawn[-1]
    before = copy.deepcopy(net)
    change = moved(net, trainer)
    (relabeled,) = drawn
    assert relabeled[1].shape == (12, 3) and first[0][1].shape == (12, 2)
    forget, retain = (Answers().losses(before, b).mean() for b in (relabeled, first[1]))
    torch.testing.assert_close(change, list(grads(before, 0.5 * forget + retain)))


@pytest.mark.parametrize("which", ["outputs", "loss"])
def test_a_membership_model_sees_a_samples_mean(which):
    _, net, sets = made("answers")
    config = LTUTrainer.Config(split="augmentation", model_features=which, model_steps=1)
    data = {"forget": sets["forget_loader"], "retain": sets["retain_loader"]}
    held_out = {"validation": sets["val_loader"]}
    trainer = LTUTrainer(net, Answers(), **data, **held_out, config=config, augment=swapped)
    batch = sets["forget_loader"]
    seen = trainer._seen(trainer.outputs(batch), 12)
    for row, question, answer in zip(seen, *batch, strict=True):
        words = answer[answer >= 0]
        each = features(net(question[None], len(words))[0], words, which)
        torch.testing.assert_close(row, each.mean(0))
    assert trainer.auditors.mean.numel() == seen.shape[1]
    assert trainer.audit.shape == (config.models,)


def test_samples_of_a_whole_set_are_numbered_through():
    _, net, sets = made("answers")
    data = {"retain": sets["retain_loader"], "validation": sets["val_loader"]}
    data["forget"] = DataLoader(TensorDataset(*sets["forget_loader"]), batch_size=5)
    config = LTUTrainer.Config(split="augmentation", model_steps=1)
    trainer = LTUTrainer(net, Answers(), **data, config=config, augment=swapped)
    found, whole = trainer._predicted("forget"), trainer.outputs(sets["forget_loader"])
    assert torch.equal(found.sample, whole.sample) and torch.equal(found.labels, whole.labels)
    torch.testing.assert_close(found.logits, whole.logits)


def test_held_out_samples_that_drew_their_own_words_are_no_members(monkeypatch):
    _, net, sets = made("answers")
    sets["forget_loader"][1].fill_(3)
    question, answer = sets["val_loader"]
    answer[:4], answer[4:] = torch.tensor([3, -1]), torch.tensor([3, 4])
    learn, seen = MembershipModels.learn, []

    def watched(self, rows, *rest):
        seen.append(rows)
        return learn(self, rows, *rest)

    monkeypatch.setattr(MembershipModels, "learn", watched)
    config = LTUTrainer.Config(split="augmentation", audit_labels="forget", model_steps=1)
    data = {"forget": sets["forget_loader"], "retain": sets["retain_loader"]}
    held_out = {"validation": sets["val_loader"]}
    LTUTrainer(net, Answers(), **data, **held_out, config=config, augment=swapped)
    (rows,) = seen
    assert len(rows) == 12 + 6  # of the other six the second word is left
    found = net(question[4:], 2)[:, 1]
    wanted = features(found, torch.full((6,), 3)).detach()
    torch.testing.assert_close(rows[12:], wanted)


# -- what a task says is looked at


WRONG_OUTPUTS = {
    "list": (list, r" must return Outputs\(logits, labels, sample\), got list"),
    "pair": (lambda o: o[:2], r" must return Outputs\(logits, labels, sample\), got tuple"),
    "vector": (lambda o: o._replace(logits=o.logits[0]), r": logits .*\[N, C\], got \[12\]"),
    "none": (lambda o: o._replace(logits=None), r": logits must be real .*, got NoneType"),
    "fewer": (lambda o: o._replace(labels=o.labels[1:]), r": labels must be integers \[\d+\], o"),
    "below": (lambda o: o._replace(labels=o.labels - 1), r": labels must be in \[0, 12\), got -1 "),
    "halves": (lambda o: o._replace(sample=o.sample + 0.5), r": sample must be integers"),
    "past": (lambda o: o._replace(sample=o.sample + 1), r": sample .*\[0, 12\), got 1 to 12"),
}


@pytest.mark.parametrize("kind", WRONG_OUTPUTS)
def test_outputs_of_another_kind_are_named(kind):
    change, message = WRONG_OUTPUTS[kind]

    class Wrong(Answers):
        def outputs(self, model, batch):
            batch[1][0, 0] = 0  # the least label
            return change(super().outputs(model, batch))

    _, net, sets = made("answers")
    before = values(net)
    with pytest.raises(InputError, match=f"^Wrong.outputs{message}"):
        run(net, sets, Wrong(), "scrub")
    with pytest.raises(InputError, match=f"^Wrong.outputs{message}"):
        accuracy(net, sets["forget_loader"], objective=Wrong())
    assert same(values(net), before)


def test_relabeling_keeps_the_samples():
    class Fewer(Answers):
        def relabel(self, batch, generator):
            question, answer = super().relabel(batch, generator)
            return question[1:], answer[1:]

    _, net, sets = made("answers")
    with pytest.raises(
        InputError, match=r"^Fewer\.relabel must keep a batch's 12 samples, got 11$"
    ):
        run(net, sets, Fewer(), "random_label")


def test_losses_are_looked_at_too():
    class Reduced(Answers):
        def losses(self, model, batch):
            return super().losses(model, batch).mean()

    _, net, sets = made("answers")
    with pytest.raises(InputError, match="one value per sample"):
        run(net, sets, Reduced(), "finetune")


@pytest.mark.parametrize(
    "given,got", [(Answers, "the class Answers"), (Classification, "the class Class"), ({}, "dict")]
)
def test_what_is_no_task_is_named(given, got):
    _, net, sets = made("answers")
    with Untouched(net, rf"^loss must be a function .* or an Objective, got {got}"):
        run(net, sets, given, "finetune")


def test_what_a_subclass_does_not_write_it_lacks():
    check_has(Tags(), sorted(set().union(*(kind.asks for kind in ALL.values()))), "it")
    with pytest.raises(
        InputError, match=r"^loss: it needs classes and inputs, which Answers has not$"
    ):
        check_has(Answers(), ("losses", "inputs", "classes", "relabel"), "it")
