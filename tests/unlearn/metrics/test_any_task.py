"""Metrics of a task that is no classification: accuracy counts predictions, losses samples."""

import math

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn import Finetune, FinetuneConfig
from gradsurgery.unlearn.metrics.accuracy import accuracy, losses
from gradsurgery.unlearn.metrics.relearn import forget_measure, relearn_steps
from tests.unlearn.objectives.tasks import WORDS, LossesAlone, made


def test_accuracy_counts_predictions():
    task, net, sets = made("answers")
    question, answer = sets["forget_loader"]
    best = net(question, 2).argmax(-1)
    answer.copy_(torch.where(answer < 0, answer, best))
    answer[0] = torch.tensor([(best[0, 0] + 1) % WORDS, -1])
    answer[1, 1] = (best[1, 1] + 1) % WORDS
    n = int((answer >= 0).sum())
    assert n == 20
    for found in (
        accuracy(net, (question, answer), objective=task),
        forget_measure(net, task, (question, answer)),
    ):
        assert found == pytest.approx((n - 2) / n)
    labels = task.outputs(net, (question, answer)).logits.argmax(1)
    assert accuracy(net, (question, answer), labels, objective=task) == 1.0
    assert torch.equal(
        losses(net, task, sets["retain_loader"]), losses(net, task.losses, sets["retain_loader"])
    )
    assert math.isnan(forget_measure(net, task, (question, torch.full_like(answer, -1))))


def test_what_a_metric_needs_is_named():
    _, net, sets = made("answers")
    task, data, message = LossesAlone(), sets["forget_loader"], "accuracy needs outputs, which Loss"
    config = FinetuneConfig(steps=2)
    for measure in (
        lambda: accuracy(net, data, objective=task),
        lambda: forget_measure(net, task, data),
        lambda: relearn_steps(net, task, data, 1.0, config),
    ):
        with pytest.raises(InputError, match=message):
            measure()
    assert relearn_steps(net, task, data, 100.0, config, measure="loss") == 0


def test_answers_are_learned_again():
    task, net, sets = made("answers")
    data = sets["forget_loader"]
    data[0].copy_(torch.arange(12)[:, None])  # questions that can be told apart
    config = FinetuneConfig(steps=300, lr=0.1)
    steps = relearn_steps(net, task, data, 1.0, config)
    assert steps is not None and steps > 3
    trainer = Finetune(net, task, forget=None, retain=data, config=config)
    assert next(r["step"] for r in trainer.fit() if forget_measure(net, task, data) > 0.94) == steps
