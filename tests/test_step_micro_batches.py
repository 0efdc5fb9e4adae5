"""Lists of micro-batches: `add` of each, in one call; and lists that are a batch."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradsurgery as gs
from gradsurgery.batch import micro_batches
from tests.models import assert_same_state, batch, classification, mlp, state_of
from tests.test_batch import Encoding, Pair, Plain

WAYS = {
    "captured": {},
    "in parts": {"micro_batch": 2},
    "stored": {"rows": "stored"},
    "together": {"together": True},
}
KINDS = {
    "tuples": lambda x, y: (x, y),
    "lists": lambda x, y: [x, y],
    "dicts": lambda x, y: {"x": x, "y": y},
    "user dicts": lambda x, y: Encoding({"x": x, "y": y}),
    "dataclasses": Plain,
    "named tuples": Pair,
}


def loss(model, data):
    if isinstance(data, (dict, Encoding)):
        return classification(model, (data["x"], data["y"]))
    return classification(model, (data.x, data.y) if isinstance(data, Plain) else data)


def surgeon_of(model, rule, **options):
    return gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule, **options)


def twins(count=2):
    model = mlp()
    return [model, *(copy.deepcopy(model) for _ in range(count - 1))]


def assert_same_parameters(models):
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def whole(parts):
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_lists_is_that_of_whole_batches(kind, way):
    models, made = twins(), KINDS[kind]
    forget, retain = [batch(3), batch(1)], [batch(2), batch(4), batch(3)]
    info = surgeon_of(models[0], gs.OrthoGrad(), **WAYS[way]).step(
        forget=[made(*part) for part in forget],
        retain=[made(*part) for part in retain],
        loss=loss,
    )
    expected = surgeon_of(models[1], gs.OrthoGrad()).step(
        forget=whole(forget), retain=whole(retain), loss=classification
    )
    assert_same_parameters(models)
    torch.testing.assert_close(info.losses, expected.losses)
    torch.testing.assert_close(info.cosines, expected.cosines)


def test_add_and_backward_take_lists():
    models, parts = twins(3), [batch(2) for _ in range(4)]
    surgeon = surgeon_of(models[0], gs.UPGrad())
    surgeon.add(batch=parts[:2], loss=classification)
    surgeon.backward(batch=parts[2:], loss=classification)
    surgeon.optimizer.step()
    surgeon = surgeon_of(models[1], gs.UPGrad())
    for part in parts:
        surgeon.add(batch=part, loss=classification)
    surgeon.step()
    surgeon_of(models[2], gs.UPGrad()).step(batch=whole(parts), loss=classification)
    assert_same_parameters(models[:2])
    assert_same_parameters(models[1:])


def test_memory_may_be_a_list():
    models, data, memory = twins(), batch(3), [batch(2), batch(1)]
    surgeon_of(models[0], gs.AGEM()).step(batch=data, memory=memory, loss=classification)
    surgeon_of(models[1], gs.AGEM()).step(batch=data, memory=whole(memory), loss=classification)
    assert_same_parameters(models)


def test_the_loss_gets_the_entries_of_a_list_and_the_whole_of_a_tuple():
    views = batch(3), batch(3)
    found = []

    def keeps(model, data):
        found.append(data)
        return classification(model, data)

    def both(model, data):
        found.append(data)
        return classification(model, data[0]) + classification(model, data[1])

    surgeon_of(mlp(), gs.PCGrad()).step(batch=[*views], loss=keeps)
    assert all(isinstance(data[0], torch.Tensor) for data in found)
    found.clear()
    surgeon_of(mlp(), gs.PCGrad()).step(batch=views, loss=both)
    assert found[0] is views


@dataclasses.dataclass
class Other:
    x: torch.Tensor


X = torch.ones(2, 6).double()


@pytest.mark.parametrize(
    "data,several",
    [
        ([X, X], False),
        ([X], False),
        ((Other(X), Other(X)), False),
        ([{"x": X}, (X,)], False),
        ([X, {"x": X}], False),
        ([Other(X), Plain(X, X)], False),
        (["a", "b"], False),
        ([None, None], False),
        ([], False),
        ({"x": [X]}, False),
        ([{"x": X}], True),
        ([Other(X), Other(X[:1])], True),
        ([[X, X], [X]], True),
    ],
)
def test_which_lists_are_of_micro_batches(data, several):
    found = micro_batches(data)
    assert found is data if several else found[0] is data and len(found) == 1


def test_a_list_of_tensors_is_one_batch():
    models, data = twins(), batch(4)
    surgeon_of(models[0], gs.PCGrad()).step(batch=list(data), loss=classification)
    surgeon_of(models[1], gs.PCGrad()).step(batch=data, loss=classification)
    assert_same_parameters(models)


@pytest.mark.parametrize(
    "second,message",
    [
        ((torch.ones(0, 6), torch.zeros(0)), r"batch\[1\] is empty"),
        ((X, X[:1]), r"batch\[1\] holds tensors of different batch sizes: \[1, 2\], as batch\[1\]"),
        ((X, {3}), r"batch\[1\] must hold tensors .*, got a set in batch\[1\]\[1\]"),
        ((X * torch.nan, torch.zeros(2).long()), "losses: row 0 is not finite"),
    ],
)
def test_what_is_wrong_with_an_entry_leaves_all_as_it_was(second, message):
    model = mlp()
    surgeon = surgeon_of(model, gs.PCGrad())
    kept = batch(2)
    surgeon.add(batch=kept, loss=classification)
    before = state_of(model, surgeon.optimizer)
    with pytest.raises((gs.InputError, gs.NonFiniteError), match=message):
        surgeon.add(batch=[batch(3), second], loss=classification)
    assert_same_state(before, state_of(model, surgeon.optimizer))
    assert surgeon.backward().losses.shape == (2,)  # the rows from before, and no others


def test_a_loss_of_other_samples_is_refused_in_lists():
    def shared(model, data):
        return classification(model, data) / len(data[0])

    with pytest.raises(gs.InputError, match="add: loss of a sample of batch depends on the others"):
        surgeon_of(mlp(), gs.PCGrad()).step(batch=[batch(3), batch(2)], loss=shared)


class Sliced(nn.Module):
    """One parameter, of which matrices meet tokens of their own."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(32, 8) / 3)
        self.last = nn.Parameter(torch.randn(4, 16) / 3)

    def forward(self, x):
        one, other = F.linear(x, self.both[:16]), F.linear(x.flip(1) * 2, self.both[16:])
        return F.linear(one.tanh() * other.sigmoid(), self.last)


def test_matrices_of_a_parameter_keep_planes_of_their_own_row():
    """The sum of forget rows comes as a row from one pass, as pairs from another."""

    def loss(model, x):
        return model(x).square().mean((1, 2))

    model = Sliced().double()
    forget, retain = (torch.randn(k, 5, 8, dtype=torch.float64) for k in (7, 5))
    ends = []
    for options in ({"rows": "stored"}, {"together": True, "hold": "pairs"}):
        twin = copy.deepcopy(model)
        surgeon = gs.Surgeon(
            twin, torch.optim.SGD(twin.parameters(), lr=1.0), gs.OrthoGrad(), **options
        )
        for part in (slice(2), slice(2, None)):
            surgeon.add(forget=forget[part], retain=retain[part], loss=loss)
        surgeon.step()
        ends.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-11, atol=1e-13)
