"""Tasks that are no classification of pictures, and what tests do with them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn import METHODS, Objective, Outputs, Retrain, unlearning

ALL = {**METHODS, "retrain": Retrain}
WORDS, LONGEST = 12, 3
# by default SSD dampens what is ten times as important to the few as to all: here nothing
OPTIONS = {"ssd": {"alpha": 1.0}, "scrub": {"msteps": 1}, "ltu": {"model_steps": 5}}


class Reader(nn.Module):
    """Questions [B, Q] of words -> logits [B, A, words] of answers of any length A."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.places = nn.Embedding(LONGEST, 8)
        self.head = nn.Linear(8, WORDS)
        self.double()

    def forward(self, question, length):
        places = self.places(torch.arange(length))
        return self.head(torch.tanh(self.words(question).mean(1)[:, None] + places))


class Answers(Objective):
    """A question's answer, word by word; -1 is padding."""

    refusals = torch.tensor([[7, 8, 9], [9, 8, -1]])  # one word longer than any answer

    def losses(self, model, batch):
        question, answer = batch
        found = model(question, answer.shape[1]).flatten(0, 1)
        each = F.cross_entropy(found, answer.flatten(), reduction="none", ignore_index=-1)
        return each.view(answer.shape).sum(1) / (answer >= 0).sum(1)

    def outputs(self, model, batch):
        question, answer = batch
        found, counts = model(question, answer.shape[1]), answer >= 0
        return Outputs(found[counts], answer[counts], counts.nonzero()[:, 0])

    def relabel(self, batch, generator):
        which = torch.randint(len(self.refusals), (len(batch[0]),), generator=generator)
        return batch[0], self.refusals[which]


def questions(n):
    answer = torch.randint(0, 7, (n, 2))
    answer[::3, 1] = -1  # every third is one word
    return torch.randint(0, WORDS, (n, 4)), answer


class Tagger(nn.Sequential):
    """Frames [B, T, 5] -> logits [B, T, 3]."""

    def __init__(self):
        super().__init__(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
        self.double()


class Tags(Objective):
    """A tag for each frame [B, T, 5], and a kind of recording, [B]: a task that has everything."""

    def losses(self, model, batch):
        found = model(batch["frames"]).transpose(1, 2)
        return F.cross_entropy(found, batch["tags"], reduction="none").mean(1)

    def outputs(self, model, batch):
        found, (size, length) = model(batch["frames"]), batch["tags"].shape
        sample = torch.arange(size).repeat_interleave(length)
        return Outputs(found.flatten(0, 1), batch["tags"].flatten(), sample)

    def relabel(self, batch, generator):
        shift = torch.randint(1, 3, batch["tags"].shape, generator=generator)
        return {**batch, "tags": (batch["tags"] + shift) % 3}

    def classes(self, batch):
        return batch["kind"]

    def inputs(self, batch):
        return batch["frames"]

    def with_inputs(self, batch, new):
        return {**batch, "frames": new}

    def with_labels(self, batch, new):
        return {**batch, "tags": new.view(batch["tags"].shape)}


def recordings(n):
    kinds = {"kind": torch.arange(n) % 4, "tags": torch.randint(0, 3, (n, 6))}
    return {"frames": torch.randn(n, 6, 5, dtype=torch.float64), **kinds}


TASKS = {"answers": (Answers, Reader, questions), "tags": (Tags, Tagger, recordings)}


def made(task):
    objective, model, samples = TASKS[task]
    sets = {"retain_loader": samples(24), "forget_loader": samples(12), "val_loader": samples(10)}
    return objective(), model(), sets


def run(net, sets, loss, method, **options):
    options = {"steps": 3, "lr": 0.01, **OPTIONS.get(method, {}), **options}
    return unlearning(net, **sets, loss=loss, method=method, **options)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def values(model):
    return [value.clone() for value in model.state_dict().values()]


class LossesAlone:
    """No subclass: methods of the same names are enough."""

    def losses(self, model, batch):
        return Answers().losses(model, batch)


class Untouched:
    """Inside it an error is raised, and no parameter, `.grad` or generator has changed after it."""

    def __init__(self, model, message):
        self.model, self.raised = model, pytest.raises(InputError, match=message)
        model(*(questions(2)[0], 2) if isinstance(model, Reader) else [recordings(2)["frames"]])
        self.grads = [torch.randn_like(p) for p in model.parameters()]
        for p, grad in zip(model.parameters(), self.grads, strict=True):
            p.grad = grad.clone()
        self.before, self.drawn = values(model), torch.get_rng_state()

    def __enter__(self):
        self.raised.__enter__()

    def __exit__(self, *error):
        assert self.raised.__exit__(*error)
        assert torch.equal(torch.get_rng_state(), self.drawn)
        assert same(values(self.model), self.before)
        assert same([p.grad for p in self.model.parameters()], self.grads)
        return True
