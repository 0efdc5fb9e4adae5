"""Recipes: what they give is what a walk gives, whatever changed, and they hold nothing."""

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradsurgery as gs
from gradsurgery.capture import recipe
from gradsurgery.capture.graph import Notes, ordered
from gradsurgery.capture.layout import Layout
from tests.capture.changing import CHANGES, OPERATION, STEPS, D, Pool, values
from tests.capture.oracle import check, energy, loop, mlp
from tests.capture.zoo import ZOO, make


@contextmanager
def counted(monkeypatch):
    """How often a graph was looked at, and how often walked."""
    counts = Counter()
    matched, follow, walk = recipe.Recipe.matched, recipe.Recipe.follow, recipe.trace

    def noted(self, place, layout, count):
        self.asked = place, layout
        return matched(self, place, layout, count)

    def followed(self, nodes, wanted):
        found = follow(self, nodes, wanted)
        counts["followed" if found else "another"] += 1
        if found is not None:
            assert said(found) == said(walk(*self.asked, wanted, self._losses[1], Notes()))
        del self.asked  # which holds the graph
        return found

    def walked(*args):
        counts["walked"] += 1
        return walk(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.Recipe, "matched", noted)
        patch.setattr(recipe.Recipe, "follow", followed)
        patch.setattr(recipe, "trace", walked)
        yield counts


def said(trace):
    """All that a trace says, of the same graph in the same words."""

    def layout(each):
        return each and (each.stride, each.rows.tolist())

    def of(outs):
        return {nr: layout(each) for nr, each in outs.items()}

    def met(junctions):
        return [(j.node, j.k, of(j.outs), layout(j.whole)) for j in junctions]

    return (
        [(x.place, x.shape, x.coupled, x.opaque, met(x.junctions)) for x in trace.leaves],
        [x.simple and (id(x.simple.parameter), *x.simple[1:]) for x in trace.leaves],
        [(id(x[0]), x.place, layout(x.layout), met(x.junctions)) for x in trace.unshared],
        [(node, of(outs)) for node, outs in trace.sampled.items()],
        [(coupling, list(map(id, each))) for coupling, each in trace.coupled.items()],
        trace.scattered,
    )


def outcome(tape, losses, groups=None, **options):
    """All that a Jacobian says, or the error; and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            jacobian = tape.jacobian(losses, groups, **options)
        except gs.InputError as error:
            return None, (type(error), str(error), [])
    told = [str(each.message) for each in caught]
    return jacobian, (jacobian.gramian(), jacobian.materialize(), jacobian.fallbacks, told)


def assert_equal(found, expected):
    """Bit by bit."""
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def both(tape, losses, groups=None):
    """By a recipe where one fits, after a walk of the same graph has said what is right."""
    with recipe.walking_anew():
        _, expected = outcome(tape, losses, groups, retain_graph=True)
    jacobian, found = outcome(tape, losses, groups)
    assert_equal(found, expected)
    return jacobian


# experts take the tokens that come to them, and other samples others
BY_VALUES = {"routed experts", "weighted experts", "labelling, padding left out"}


@pytest.mark.parametrize("name", ZOO)
def test_a_model_is_walked_once(name, monkeypatch):
    model, _ = make(name)
    for step in range(3):
        batch = make(name, seed=step)[1]
        with counted(monkeypatch) as counts:
            with gs.tape(model) as tape:
                losses = ZOO[name].loss(model, batch)
            both(tape, losses)
            walks = 1 if step else 2  # one of them to compare with
            assert counts["walked"] == walks or name in BY_VALUES


# graphs that change


class Stepped:
    """A program, a model and a batch, any of which may change before the next step."""

    def __init__(self, program, kind):
        self.program, self.kind, self.branch = list(program), kind, 0
        self.model, self.b, self.t = Pool().double().eval(), 4, 3
        self.group, self.only = 0, None

    def change(self, what, at, operation):
        model, program = self.model, self.program
        k = at % len(program)
        name, n, seed = program[k]
        parameters = list(model.parameters())
        if what == "n":
            program[k] = name, n + 1 + at % 3, seed
        elif what == "seed":
            program[k] = name, n, seed + 1 + at % 3
        elif what == "operation":
            program[k] = operation
        elif what == "drop" and len(program) > 1:
            del program[k]
        elif what == "add":
            program.insert(k, operation)
        elif what == "swap":
            program[k], program[0] = program[0], program[k]
        elif what == "size":
            self.b = 2 + (self.b - 1) % 3
        elif what == "tokens":
            self.t = 2 + (self.t - 1) % 3
        elif what == "freeze":
            parameters[at % len(parameters)].requires_grad ^= True
        elif what == "tie":
            model.b.weight = (model.a.weight, nn.Parameter(model.b.weight.detach().clone()))[at % 2]
        elif what == "mode":
            model.train(not model.training)
        elif what == "module":
            model.a = nn.Linear(D, D, bias=at % 2 == 0).double()
        elif what == "groups":
            self.group = at % 4
        elif what == "parameters":
            wanted = [p for p in parameters if p.requires_grad]
            self.only = wanted[at % 3 :: 2] if wanted and at % 2 else None
        elif what == "branch":
            self.branch = at % (len(program) + 1)

    def losses(self, x):
        kept = x
        for i, (name, n, seed) in enumerate(self.program):
            if i == self.branch:
                kept = x
            x = STEPS[name](self.model, x, n, seed).clamp(-4, 4)
        x = x + 0.5 * kept
        if self.kind == "tokens":
            return x.square().sum(2)
        losses = x.square().sum((1, 2))
        if self.kind == "joined":
            return torch.cat([losses[:2], losses[2:] * self.model.scalar])
        return losses

    def step(self, batch_seed):
        """Checked against a loop over rows; False where there are none."""
        torch.manual_seed(batch_seed)
        x = torch.randn(self.b, self.t, D, dtype=torch.float64)
        if self.only is not None:
            mine = {id(p) for p in self.model.parameters() if p.requires_grad}
            self.only = [p for p in self.only if id(p) in mine] or None
        if not any(p.requires_grad for p in self.model.parameters()):
            return
        with gs.tape(self.model, parameters=self.only, coupled="exact") as tape:
            losses = self.losses(x)
        if not losses.requires_grad:
            return
        groups = [None, torch.arange(losses.numel()) % 3, torch.arange(losses.numel()) // 2,
                  values(batch_seed, losses.numel(), high=3) - 1][self.group]  # fmt: skip
        if groups is not None:
            groups = groups.view(losses.shape)
            if int(groups.max()) < 0:
                return
        # the loop only, of those that are asked for
        others = [p for p in self.model.parameters() if p.requires_grad]
        others = [] if self.only is None else [p for p in others if not is_in(p, self.only)]
        with frozen(others):
            rows = loop(losses, self.model, groups)
            jacobian = both(tape, losses, groups)
            if jacobian is not None:
                check(jacobian, self.model, rows)


def is_in(tensor, tensors):
    return any(tensor is each for each in tensors)


@contextmanager
def frozen(parameters):
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@pytest.mark.parametrize("name", STEPS)
def test_another_number_or_index(name):
    stepped = Stepped([("linear", 0, 0), (name, 0, 0), ("scale", 0, 0)], "samples")
    for n, seed in [(0, 0), (1, 0), (2, 0), (3, 0), (5, 0), (3, 1), (3, 2), (0, 1), (0, 2), (0, 0)]:
        stepped.program[1] = name, n, seed
        stepped.step(0)


def twice(layer, x):
    once = layer(x)
    return once + once


def crossed(layer, x, order):
    parts = layer(x).split(2)
    return torch.cat([parts[k] * (1 + k) for k in order])


# functions of a layer and a batch whose graphs differ in one thing
def stacked(*parts):
    return torch.stack(parts).sin().sum(0)


PAIRS = {
    "kinds": [lambda m, x: m(x).sin(), lambda m, x: m(x).sum(0, keepdim=True).expand(4, 3)],
    "coupled kinds": [lambda m, x: m(x).cumsum(0), lambda m, x: m(x).flip(0)],
    "shared": [twice, lambda m, x: m(x) + m(x)],
    "outputs": [lambda m, x: crossed(m, x, (0, 1)), lambda m, x: crossed(m, x, (1, 0))],
    "weights": [lambda m, x: m(x), lambda m, x: F.linear(x, m.weight.detach(), m.bias)],
    "below": [lambda m, x: m(x) * x[:, :3], lambda m, x: m(x) * x[:, :3].requires_grad_()],
    "an edge above": [
        lambda m, x: F.linear(F.linear(x, m.weight, m.bias) + m.bias, m.weight.T, x[0] * 0),
        lambda m, x: F.linear(
            F.linear(x, m.weight, m.bias) + m.bias.detach(), m.weight.T, x[0] * 0
        ),
    ],
    "one of a stack": [
        lambda m, x: m(x) + stacked(m.bias, m.bias, m.bias),
        lambda m, x: m(x) + stacked(m.bias.detach(), m.bias, m.bias),
    ],
    "of whom": [lambda m, x: m(x) * m.bias, lambda m, x: m(x) * x[:, :3].requires_grad_()[0]],
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_graphs_that_differ_in_one_thing(name, monkeypatch):
    layer = nn.Linear(5, 3).double()
    for function in [*PAIRS[name], *PAIRS[name], *PAIRS[name][::-1]]:
        x = torch.randn(4, 5, dtype=torch.float64)
        with counted(monkeypatch), gs.tape(layer, coupled="exact") as tape:
            losses = energy(function(layer, x))
            rows = loop(losses, layer)
            jacobian = both(tape, losses)
        check(jacobian, layer, rows)


def test_the_same_graph_for_other_parameters():
    layer, x = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    many = [None, [layer.weight], [layer.bias]]
    for parameters in [*many, *many]:
        with gs.tape(layer, parameters=parameters) as tape:
            losses = energy(layer(x))
        both(tape, losses)
        with gs.tape(layer, parameters=parameters) as tape:
            losses = energy(layer(x))
        assert tape.jacobian(losses).materialize().shape[1] == sum(
            p.numel() for p in parameters or layer.parameters()
        )


def test_the_same_graph_for_other_rows(monkeypatch):
    layer, x = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    many = [None, [0, 0, 1, 1], [0, 1, 0, 1], [0, -1, 1, 2], [0, 2, 1, 1], [0, 5, 1, 1]]
    with counted(monkeypatch) as counts:
        for groups in [*many, *many]:
            groups = None if groups is None else torch.tensor(groups)
            with gs.tape(layer) as tape:
                losses = energy(layer(x))
                rows = loop(losses, layer, groups)
            check(both(tape, losses, groups), layer, rows)
    assert counts["followed"] == len(many)  # the second time round


def test_the_same_graph_for_losses_that_lie_otherwise():
    layer, x = nn.Linear(5, 2).double(), torch.randn(2, 5, dtype=torch.float64)
    by_sample, by_output = torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1], [0, 1]])
    for groups in (by_sample, by_output, by_sample, by_output):
        with gs.tape(layer) as tape:
            losses = layer(x)
            rows = loop(losses, layer, groups)
        check(both(tape, losses, groups), layer, rows)
    for nr in (0, 1, 0, 1):
        with gs.tape(layer) as tape:
            losses = layer(x).unbind(1)[nr]
            rows = loop(losses, layer)
        check(both(tape, losses), layer, rows)


@pytest.mark.parametrize("kind", ["samples", "joined", "tokens"])
def test_changed_graphs(kind, monkeypatch):
    seen = Counter()

    @settings(
        max_examples=60, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
    )  # fmt: skip
    @given(
        program=st.lists(OPERATION, min_size=1, max_size=5),
        changes=st.lists(
            st.tuples(st.sampled_from(CHANGES), st.integers(0, 11), OPERATION),
            min_size=4,
            max_size=7,
        ),
    )
    def holds(program, changes):
        torch.manual_seed(0)
        stepped = Stepped(program, kind)
        stepped.step(0)
        for k, change in enumerate(changes):
            stepped.change(*change)
            with counted(monkeypatch) as counts:
                stepped.step(k)
            seen.update(counts)

    holds()
    # both happened, and often: graphs that were the same, and such as were seen to be others

    assert seen["followed"] > 100
    assert seen["walked"] - seen["followed"] > 100


# what stays


def step(model, x, **options):
    with gs.tape(model, **options) as tape:
        losses = energy(model(x))
    return tape.jacobian(losses)


def test_shapes_that_take_turns(monkeypatch):
    model = mlp()
    with counted(monkeypatch) as counts:
        for size in [6, 3, 6, 3, 1, 6, 3]:
            step(model, torch.randn(size, 5, dtype=torch.float64))
    assert counts["walked"] == 2  # and one sample is one row: nothing to trace


def test_the_last_used_are_kept(monkeypatch):
    monkeypatch.setattr(recipe, "RARELY", 1)
    model = mlp()
    many = range(2, 3 + recipe.KEPT)
    with counted(monkeypatch) as counts:
        for size in [*many, *many, many[-1]]:
            step(model, torch.randn(size, 5, dtype=torch.float64))
    assert counts["walked"] == 2 * len(many)
    assert len(recipe._recipes[model].recipes) == recipe.KEPT


def test_graphs_that_never_come_again_are_seldom_compared(monkeypatch):
    """And the first that does is followed a while later."""
    model = mlp()
    with counted(monkeypatch) as counts:
        for size in range(2, 2 + recipe.KEPT + 3 * recipe.RARELY):
            step(model, torch.randn(size, 5, dtype=torch.float64))
        assert counts["walked"] == recipe.KEPT + 3 * recipe.RARELY
        kept = [each.size for each in recipe._recipes[model].recipes]
        assert len(kept) == recipe.KEPT
        counts.clear()
        for _ in range(3 * recipe.RARELY):
            step(model, torch.randn(4, 5, dtype=torch.float64))
        assert counts["followed"] >= recipe.RARELY


def test_a_parameter_with_two_nodes(monkeypatch):
    """As of layers that are cast around their use: a recipe would take the one for the other."""
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    x = torch.randn(5, 4)

    def through(first, second):
        hidden = x.double()
        for k in (first, second):
            blocks[k].double()
            hidden = blocks[k](hidden).tanh()
            blocks[k].float()
        return energy(hidden)

    for order in [(0, 0), (0, 1), (2, 1), (0, 0), (1, 2)]:
        with gs.tape(blocks) as tape:
            losses = through(*order)
        with recipe.walking_anew():
            rows = tape.jacobian(losses, retain_graph=True).materialize()
        assert torch.equal(tape.jacobian(losses).materialize(), rows), order


def test_recipes_hold_no_more_than_they_may(monkeypatch):
    model = mlp()
    for size in (4, 5):
        step(model, torch.randn(size, 5, dtype=torch.float64))
    one, other = recipe._recipes[model].recipes
    monkeypatch.setattr(recipe, "LARGE", one.size + other.size - 1)
    step(model, torch.randn(5, 5, dtype=torch.float64))
    assert recipe._recipes[model].recipes == [one]
    monkeypatch.setattr(recipe, "LARGE", one.size - 1)
    step(model, torch.randn(5, 5, dtype=torch.float64))
    assert recipe._recipes[model].recipes == []


def test_graphs_alike_but_for_a_number(monkeypatch):
    """Two that take turns are both kept; of many that never come again, no more are tried."""
    layer, x = nn.Linear(5, 8).double(), torch.randn(4, 5, dtype=torch.float64)

    def shifted(k):
        with gs.tape(layer) as tape:
            losses = energy(layer(x)[:, k : k + 3])
        both(tape, losses)

    with counted(monkeypatch) as counts:
        for k in (0, 1, 0, 1, 0):
            shifted(k)
    assert counts["followed"] == 3
    with counted(monkeypatch) as counts:
        for k in (2, 3, 4, 5):
            shifted(k)
    assert counts["another"] == 4 * recipe.TRIED
    assert len(recipe._recipes[layer].recipes) == recipe.TRIED


def test_axes_are_found_once_for_all_steps(monkeypatch):
    layers = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 5)
    model = nn.Sequential(*layers).double()
    found, find = [], Layout._axis

    def noted(self, shape):
        found.append(shape)
        return find(self, shape)

    monkeypatch.setattr(Layout, "_axis", noted)
    counts = []
    for _ in range(4):
        found.clear()
        step(model, torch.randn(4, 3, 6, 6, dtype=torch.float64)).gramian()
        counts.append(len(found))
    assert counts[0] > 0
    assert counts[2:] == [0, 0]


class Mark:
    """Of a node, which it lives as long as."""


class Ordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(order)
        return x[order]

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (order,) = ctx.saved_tensors
        return torch.zeros_like(grad).index_copy(0, order, grad), None


def test_no_node_is_kept_alive():
    model = mlp()
    seen = []

    def once():
        x = torch.randn(4, 5, dtype=torch.float64)
        order = torch.tensor([1, 0, 3, 2])
        mask = torch.rand(4, 4) > 0.5
        made = type("Made", (Ordered,), {"held": x})
        with gs.tape(model) as tape:
            hidden = checkpoint(model[:2], x, use_reentrant=False)
            picked = made.apply(hidden, order)[order]
            losses = energy(model[2](picked.masked_fill(mask[:, :1], 0)))
        seen.extend(map(weakref.ref, (x, order, mask, hidden, losses, made)))
        for node in ordered(losses.grad_fn):  # which takes no weak reference, but holds this
            node.metadata["mark"] = mark = Mark()
            seen.append(weakref.ref(mark))
        tape.jacobian(losses).gramian()

    for _ in range(3):
        once()
        gc.collect()
        assert recipe._recipes[model].recipes
        assert [ref() for ref in seen] == [None] * len(seen)


def test_a_recipe_dies_with_its_model():
    model = mlp()
    step(model, torch.randn(4, 5, dtype=torch.float64))
    (kept,) = map(weakref.ref, recipe._recipes[model].recipes)
    parameter = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert kept() is None
    assert parameter() is None


def test_models_and_tapes_are_copied_as_before(monkeypatch):
    model, x = mlp(), torch.randn(4, 5, dtype=torch.float64)
    rows = step(model, x).materialize()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with counted(monkeypatch) as counts:
            assert torch.equal(step(other, x).materialize(), rows)
        assert counts["walked"] == 1  # a copy has its own


def test_threads_share_recipes():
    model, batches = mlp(), [torch.randn(2 + k % 3, 5, dtype=torch.float64) for k in range(6)]
    rows = [step(model, x).materialize() for x in batches]
    wrong = []

    def work(k):
        for _ in range(20):
            same = torch.equal(step(model, batches[k]).materialize(), rows[k])
            wrong.extend([] if same else [k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_each_step_warns():
    model = nn.Sequential(nn.Linear(5, 4), nn.RReLU(), nn.Linear(4, 3)).double()
    model[0].weight.register_hook(lambda grad: 2 * grad)
    for _ in range(3):
        with pytest.warns(UserWarning, match="has a hook"):
            step(model, torch.randn(4, 5, dtype=torch.float64))


def test_each_step_is_refused():
    model = mlp(middle=[nn.BatchNorm1d(7)])
    for _ in range(3):
        with pytest.raises(gs.CoupledSamplesError, match="computes across samples"):
            step(model, torch.randn(4, 5, dtype=torch.float64))


def test_a_hook_comes_and_goes(monkeypatch):
    model, x = mlp(), torch.randn(4, 5, dtype=torch.float64)
    rows = step(model, x).materialize()
    for there in (True, False, True):
        handle = None
        if there:
            handle = model[0].register_full_backward_hook(lambda m, i, o: (2 * i[0],))
        with gs.tape(model) as tape:
            losses = energy(model(x.clone().requires_grad_()))
        both(tape, losses)
        if handle is not None:
            handle.remove()
    assert torch.equal(step(model, x).materialize(), rows)


def test_a_parameter_of_another_shape(alone):
    model = mlp()
    for width in (7, 3, 7):
        with torch.no_grad():
            model[0].weight.data, model[0].bias.data = (
                torch.randn(width, 5).double(),
                torch.randn(width).double(),
            )
            model[2].weight.data = torch.randn(4, width).double()
        with gs.tape(model) as tape:
            losses = energy(model(torch.randn(4, 5, dtype=torch.float64)))
        both(tape, losses)


def test_a_graph_that_was_freed():
    model, x = mlp(), torch.randn(4, 5, dtype=torch.float64)
    step(model, x)
    with gs.tape(model) as tape:
        losses = energy(model(x))
    tape.jacobian(losses)
    with pytest.raises(gs.InputError, match="freed by an earlier backward pass"):
        tape.jacobian(losses)
