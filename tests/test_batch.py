"""Batches of every container a user has in hand, and errors that name the entry."""

import copy
import dataclasses
import types
from collections import UserDict, defaultdict, namedtuple
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import gradsurgery as gs
from gradsurgery.batch import batch_size, joined, map_batch, refilled, tensors
from tests.models import mlp


class Encoding(UserDict):
    """As `transformers.BatchEncoding`: attributes are entries, and it knows of whole samples."""

    def __init__(self, data):
        super().__init__(data)
        self._encodings = ["of", "all"]

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Attributes(dict):
    """A dict whose entries are attributes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class ByItems(Mapping):
    """A mapping that no one can write to."""

    def __init__(self, values):
        self._values = dict(values)

    def __getitem__(self, key):
        return self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)


@dataclasses.dataclass
class Plain:
    x: torch.Tensor
    y: torch.Tensor
    mask: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Scaled:
    """What it makes of its fields, it must not make again."""

    x: torch.Tensor
    y: torch.Tensor
    size: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        self.x = self.x / 2
        self.size = torch.ones(len(self.x))


class Attrs:
    """As attrs makes them, without attrs."""

    __attrs_attrs__ = (types.SimpleNamespace(name="x"), types.SimpleNamespace(name="y"))

    def __init__(self, x, y):
        self.x, self.y = x, y


Pair = namedtuple("Pair", "x y")

KINDS = {
    "dict": dict,
    "user dict": lambda **v: Encoding(v),
    "dict of attributes": Attributes,
    "mapping": lambda **v: ByItems(v),
    "proxy": lambda **v: types.MappingProxyType(v),
    "dataclass": Plain,
    "frozen": Frozen,
    "dataclass that computes": Scaled,
    "attrs": Attrs,
    "named tuple": Pair,
    "nested": lambda x, y: Encoding({"x": [x], "y": Plain(y, x)}),
}


def entries(data):
    """x and y of any of them, as a user's loss would take them."""
    x, y = (data["x"], data["y"]) if isinstance(data, Mapping) else (data.x, data.y)
    if isinstance(data, (Encoding, Attributes)):
        assert data.x is data["x"]
    return (x[0], y.x) if isinstance(x, list) else (x, y)


def loss(model, data):
    x, y = entries(data)
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def values(size):
    return {"x": torch.randn(size, 6).double(), "y": torch.randint(4, (size,))}


WAYS = {
    "captured": {},
    "a pass each": {"together": False},
    "in parts": {"micro_batch": 2},
    "stored": {"rows": "stored"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_a_tuple_of_tensors(kind, way):
    forget, retain = (KINDS[kind](**values(n)) for n in (3, 4))
    kept = [tensors(part) for part in (forget, retain)]
    models = [mlp()]
    models.append(copy.deepcopy(models[0]))
    surgeons = [
        gs.Surgeon(m, torch.optim.SGD(m.parameters(), lr=0.1), gs.OrthoGrad(), **WAYS[way])
        for m in models
    ]
    surgeons[0].step(forget=forget, retain=retain, loss=loss)
    plain = [Pair(*entries(part)) for part in (forget, retain)]
    surgeons[1].step(forget=plain[0], retain=plain[1], loss=loss)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for part, before in zip((forget, retain), kept, strict=True):  # the user's is as it was
        assert all(a is b for a, b in zip(tensors(part), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_check_and_stored_rows_take_it(kind):
    data, model = KINDS[kind](**values(3)), mlp()
    assert gs.check(model, data, loss=loss).exact
    rows = gs.DenseJacobian.from_model(model, data, loss)
    with gs.tape(model) as tape:
        losses = loss(model, data)
    torch.testing.assert_close(tape.jacobian(losses).gramian(), rows.gramian())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_of_the_same_type_and_hold_the_samples_asked_for(kind):
    data = KINDS[kind](**values(5))
    part = map_batch(lambda leaf: leaf[1:3], data)
    assert type(part) is type(data)
    for a, b in zip(entries(part), entries(data), strict=True):
        assert torch.equal(a, b[1:3])
    assert batch_size(part) == 2
    whole = joined(part, map_batch(lambda leaf: leaf[:1], data))
    assert batch_size(whole) == 3
    again = refilled(data, tensors(data))
    assert all(a is b for a, b in zip(entries(again), entries(data), strict=True))


def test_what_a_tokenizer_knows_of_all_samples_is_not_that_of_a_part():
    assert map_batch(lambda leaf: leaf[:1], Encoding(values(3)))._encodings is None


def test_a_tokenizers_batch_takes_a_step():
    transformers = pytest.importorskip("transformers")
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    data = {"input_ids": torch.randint(9, (4, 3)), "labels": torch.randint(2, (4,))}
    batch = transformers.BatchEncoding(data)

    def loss(model, batch):
        logits = model(batch.input_ids)
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    infos = []
    for given in (batch, transformers.BatchEncoding(data)):
        twin = copy.deepcopy(model)
        surgeon = gs.Surgeon(
            twin, torch.optim.SGD(twin.parameters(), lr=0.1), gs.UPGrad(), micro_batch=3
        )
        infos.append(surgeon.step(batch=given, loss=loss))
    assert torch.equal(infos[0].gramian, infos[1].gramian)
    out = transformers.modeling_outputs.SequenceClassifierOutput(logits=torch.ones(4, 2))
    assert map_batch(lambda leaf: leaf[:2], out).logits.shape == (2, 2)


@pytest.mark.parametrize(
    "other,fits",
    [
        (lambda v: Plain(**v), True),
        (lambda v: Plain(**v, mask=torch.ones(2)), False),
        (lambda v: Frozen(**v), False),
        (lambda v: v, False),
        (lambda v: Plain(v["x"].float(), v["y"]), False),
        (lambda v: Plain([v["x"]], v["y"]), False),
    ],
)
def test_batches_are_joined_only_if_alike(other, fits):
    found = joined(Plain(**values(3)), other(values(2)))
    assert (found is not None) == fits
    if fits:
        assert found.x.shape == (5, 6)
        assert found.mask is None


class Registered:
    """As a pytree with a context."""

    def __init__(self, x, y, scale):
        self.x, self.y, self.scale = x, y, scale


@dataclasses.dataclass
class Sub(Plain):
    pass


class SubDict(dict):
    pass


def told(kind):
    def make(v, scale):
        made = kind(v) if kind is Encoding else kind(**v)
        made.scale = scale
        return made

    return make


@pytest.fixture
def registered():
    pytree.register_pytree_node(
        Registered, lambda b: ([b.x, b.y], b.scale), lambda v, scale: Registered(*v, scale)
    )
    yield
    pytree._deregister_pytree_node(Registered)


@pytest.mark.parametrize(
    "make",
    [
        told(Encoding),
        told(Sub),
        told(SubDict),
        told(Attrs),
        lambda v, scale: (told(SubDict)(v, scale),),
        lambda v, scale: Registered(**v, scale=scale),
    ],
    ids=["user dict", "dataclass", "dict", "attrs", "nested", "registered"],
)
@pytest.mark.parametrize(
    "same,other", [(1.0, 3.0), ((1, "a"), (1, "b")), (None, np.arange(3))], ids=str
)
def test_what_batches_hold_beside_their_tensors_is_each_ones_own(make, same, other, registered):
    first, second = values(3), values(2)
    assert joined(make(first, same), make(second, same)) is not None
    assert joined(make(first, same), make(second, other)) is None
    assert joined(make(first, np.arange(3)), make(second, np.arange(3))) is None


def test_default_factories_are_compared():
    first, second = values(3), values(2)
    assert joined(defaultdict(int, first), defaultdict(int, second)) is not None
    assert joined(defaultdict(int, first), defaultdict(float, second)) is None


@pytest.mark.parametrize("way", WAYS)
def test_a_retain_batch_has_its_own_scale(way):
    def scaled(model, data):
        return data.scale * loss(model, data)

    infos = []
    forget, retain = told(Encoding)(values(2), 1.0), told(Encoding)(values(4), 3.0)
    for options in ({"together": False}, WAYS[way]):
        torch.manual_seed(0)
        model = mlp()
        surgeon = gs.Surgeon(
            model, torch.optim.SGD(model.parameters(), lr=0.1), gs.OrthoGrad(), **options
        )
        infos.append(surgeon.step(loss=scaled, forget=forget, retain=retain))
    torch.testing.assert_close(infos[0].gramian, infos[1].gramian)
    torch.testing.assert_close(infos[0].losses, infos[1].losses)


LARGE = torch.arange(1000)


@pytest.mark.parametrize(
    "data,message",
    [
        (lambda x: {"x": x, "rows": [x.numpy()]}, r"got a ndarray in batch\['rows'\]\[0\]"),
        (lambda x: Encoding({"x": x, "k": 3}), r"got 3 in batch\['k'\]; make it a tensor"),
        (lambda x: {"x": x, "y": [0, 1]}, r"got 0 in batch\['y'\]\[0\]; make it a tensor"),
        (lambda x: Plain(x, types.SimpleNamespace(a=LARGE)), r"got a SimpleNamespace in batch\.y"),
        (lambda x: Pair(x, x.numpy()), r"got a ndarray in batch\.y"),
        (lambda x: types.SimpleNamespace(x=x), "got a SimpleNamespace; pass a dict"),
        (lambda x: "text", "got a str; pass a dict"),
        (lambda x: Plain, "got a type; pass a dict"),
        (lambda x: None, "got None"),
        (lambda x: 3, "got 3; pass a dict"),
        (lambda x: torch.tensor(1), r"got a tensor of shape \[\]"),
        (lambda x: {"x": torch.tensor(1), "text": ["a", "b"]}, "batch holds no tensor with a"),
        (lambda x: iter([x]), "got a list_iterator; pass a dict"),
        (
            lambda x: {"a": {"b": (x, x[:1])}},
            r"batch sizes: \[1, 2\], as batch\['a'\]\['b'\]\[0\] and batch\['a'\]\['b'\]\[1\]",
        ),
        (lambda x: Encoding({}), "batch holds no tensor"),
    ],
)
def test_names_the_entry_that_is_no_tensor_of_samples(data, message):
    with pytest.raises(gs.InputError, match=message) as error:
        batch_size(data(torch.full((2, 3), 0.125)))
    assert "0.125" not in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 150


def test_a_tensor_beside_the_entries_is_named():
    data = Encoding(values(3))
    data.mask = torch.ones(3)
    with pytest.raises(gs.InputError, match="Encoding holds a tensor as attribute 'mask'"):
        map_batch(lambda leaf: leaf[:2], data)
    for kept in ((data["x"], data["y"]), [{"a": data["x"]}], {"x": torch.ones(3)}):
        data.mask = kept
        with pytest.raises(gs.InputError, match="Encoding holds a tensor as attribute 'mask'"):
            map_batch(lambda leaf: leaf[:2], data)
    data.mask = ["no", ("tensor",), {}]
    assert map_batch(lambda leaf: leaf[:2], data).mask is data.mask


def test_a_mapping_that_cannot_be_made_again_is_named():
    class Odd(ByItems):
        def __init__(self, x, y):
            super().__init__({"x": x, "y": y})

    with pytest.raises(gs.InputError, match=r"Odd cannot be made of other tensors: pass dict\(b"):
        map_batch(lambda leaf: leaf[:2], Odd(**values(3)))


# arguments that are nothing of the kind


@pytest.mark.parametrize(
    "options,message",
    [
        ({"micro_batch": torch.ones(2)}, "micro_batch must be 1 or more or None, got Tensor"),
        ({"micro_batch": "x"}, "micro_batch must be 1 or more or None, got 'x'"),
        ({"micro_batch": True}, "micro_batch must be 1 or more or None, got True"),
        ({"micro_batch": 1.5}, "micro_batch must be 1 or more or None, got 1.5"),
        ({"chunk_size": "x"}, "chunk_size must be 1 or more, got 'x'"),
        ({"together": 1}, "together must be True, False or None, got int"),
        ({"process_group": "world"}, "process_group must be a ProcessGroup, a DeviceMesh, False"),
    ],
)
def test_options_that_are_none(options, message):
    model = mlp()
    with pytest.raises(gs.InputError, match=message):
        gs.Surgeon(model, torch.optim.SGD(model.parameters()), gs.UPGrad(), **options)


def test_a_loss_that_is_no_function():
    model = mlp()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters()), gs.UPGrad())
    with pytest.raises(gs.InputError, match="loss must be a function, got Tensor"):
        surgeon.step(batch=values(3), loss=torch.ones(3))


@pytest.mark.parametrize(
    "given,message",
    [
        (torch.ones(2, 3), "jacobians must be a sequence of Jacobians, got Tensor"),
        ({"a": 1}, "jacobians must be a sequence of Jacobians, got dict"),
        (3, "jacobians must be a sequence of Jacobians, got int"),
        ([1], r"jacobians\[0\] must be a DenseJacobian or the Jacobian of a tape, got int"),
        ([torch.ones(2, 3)], r"jacobians\[0\] must be a DenseJacobian .*, got Tensor"),
        (iter([]), "jacobians is an empty sequence"),
    ],
)
def test_concat_names_what_is_no_jacobian(given, message):
    with pytest.raises(gs.InputError, match=message):
        gs.concat(given)


def test_concat_takes_any_iterable():
    rows = gs.DenseJacobian([torch.randn(3, 2)])
    assert gs.concat(iter([rows, rows])).m == 6
    assert gs.concat({"a": rows, "b": rows}.values()).m == 6


def _stored(model):
    return gs.DenseJacobian.from_model(model, values(3), loss)


def _captured(model):
    with gs.tape(model) as tape:
        losses = loss(model, values(3))
    return tape.jacobian(losses)


@pytest.mark.parametrize("rows", [_stored, _captured])
@pytest.mark.parametrize("name", ["metric", "vectors"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda like: [1, 2],
        lambda like: like[:1],
        lambda like: [*like[:-1], like[-1][:, None]],
        lambda like: [like[0].mT, *like[1:]],
        lambda like: torch.ones(3),
        lambda like: iter(like),
    ],
)
def test_what_is_not_like_the_parameters_is_named(rows, name, wrong):
    model = mlp()
    jacobian = rows(model)
    given = wrong([p.detach().clone() for p in model.parameters()])
    with pytest.raises(gs.InputError, match=rf"{name} must be like the parameters, \[\[8, 6\], "):
        jacobian.products(given) if name == "vectors" else jacobian.gramian(metric=given)


def test_a_metric_says_what_it_is_per():
    with pytest.raises(gs.InputError, match="per must be 'model' or 'tensor', got 'layer'"):
        gs.DenseJacobian([torch.ones(2, 3)]).gramian(per="layer", metric=[torch.ones(3)])
