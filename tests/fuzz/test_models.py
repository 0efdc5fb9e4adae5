"""Random models: rows, products and `.grad` as a loop of autograd over single losses has them."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradsurgery as gs
from tests.fuzz.functions import EDITS
from tests.fuzz.pool import D, Pool
from tests.fuzz.profiles import attack, examples
from tests.fuzz.programs import (
    HOOKED_MODULES,
    HOOKED_PARAMETERS,
    LOSSES,
    MODULE_HOOKS,
    THEMES,
    forward,
    hook_modules,
)

TOLERANCE = 1e-9  # of the largest row
CALM = ("plain", "shared", "in place", "modules")  # where hardly anything may be refused


@st.composite
def programs(draw, theme):
    """Steps, one of the theme among them, and how their losses are asked."""
    of = lambda name: st.tuples(  # noqa: E731
        st.just(name), st.sampled_from(list(THEMES[name])), st.integers(0, 2**16)
    )
    steps = draw(st.lists(st.sampled_from(CALM).flatmap(of), max_size=3))
    steps.insert(draw(st.integers(0, len(steps))), draw(of(theme)))
    hooks = ()
    if theme == "hooks" and draw(st.booleans()):
        kind = draw(st.sampled_from(MODULE_HOOKS))
        named = HOOKED_PARAMETERS if kind == "parameter" else HOOKED_MODULES
        hooks = ((kind, draw(st.sampled_from(named)), draw(st.sampled_from(list(EDITS)))),)
    kind = draw(st.sampled_from(list(LOSSES)))
    # equal sizes, and sizes of one, hide which dimension is the samples'
    size = draw(st.sampled_from([(4, 3), (4, 3), (4, 4), (4, 1), (1, 3), (2, 5), (3, 4)]))
    return {
        "size": size,
        "seed": draw(st.integers(0, 2**10)),
        "steps": steps,
        "hooks": hooks,
        # what a backward pass changes must not be there for the next loss
        "calm": theme in (*CALM, "odd"),
        "linear": all(step[0] != "hooks" for step in steps),
        "fresh": any(step[0] == "functions" for step in steps),
        "kind": kind,
        "groups": draw(st.sampled_from([None, None, None, "samples", "any", "one"])),
        "training": draw(st.booleans()),
        "coupled": draw(st.sampled_from(["refuse", "refuse", "refuse", "exact"])),
        "combine": draw(st.sampled_from(["stored", "stored", "backward"])),
        "path": draw(st.sampled_from(["", "", "factored", "direct"])),
        "only": draw(st.sampled_from([None, None, None, 1, 2])),  # every n-th parameter, from n on
        "retain": draw(st.booleans()),
    }


def groups_of(program, shape):
    """The row of each loss: a sample's own, or any, with none and gaps."""
    kind, random = program["groups"], torch.Generator().manual_seed(program["seed"])
    if kind is None:
        return None
    if kind == "one" or not shape:
        return torch.zeros(shape, dtype=torch.int64)
    if kind == "samples":
        rows = torch.randint(-1, 3, (shape[0], *[1] * (len(shape) - 1)), generator=random)
        groups = rows.expand(shape).contiguous()
    else:
        groups = torch.randint(-1, 4, shape, generator=random)
    return groups if groups.numel() and int(groups.max()) >= 0 else None


def made(program):
    """The model, with its hooks, and its batch: the same for the same program."""
    batch, tokens = program["size"]
    model = Pool(program["seed"], batch, tokens).train(program["training"])
    with torch.no_grad():
        model.batch.running_mean.normal_()
    hook_modules(model, program["hooks"])
    return model, torch.randn(batch, tokens, D, dtype=torch.float64)


def losses_from(program, model, x):
    return forward(model, x, program["steps"], program["kind"], program["seed"])


def wanted_of(program, model):
    """The parameters whose rows are taken."""
    held = [p for p in model.parameters() if p.requires_grad]
    return held if program["only"] is None else held[program["only"] :: program["only"] + 1]


def state(model):
    """What taking a Jacobian must leave alone."""
    hooks = [
        [(k, len(getattr(module, k))) for k in vars(module) if k.endswith("hooks")]
        for module in model.modules()
    ]
    return {
        "training": [module.training for module in model.modules()],
        "hooks": hooks,
        "names": [sorted(vars(module)) for module in model.modules()],
        "values": [v.detach().clone() for v in model.state_dict().values()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "global": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
        "random": torch.get_rng_state(),
    }


def same(before, after):
    for name, value in before.items():
        pairs = zip(value, after[name], strict=True) if isinstance(value, list) else None
        if pairs and name in ("values", "grads"):
            equal = all(a is b is None or torch.equal(a, b) for a, b in pairs)
        else:
            equal = bool(torch.as_tensor(value == after[name]).all())
        assert equal, f"{name} changed"


def expected_rows(program):
    """[m, p.numel()] for each parameter; of each loss from a forward pass of its own."""
    model, x = made(program)
    losses = losses_from(program, model, x)
    if not losses.requires_grad or not losses.numel():
        return None
    held = wanted_of(program, model)
    whole = torch.autograd.grad(
        losses.sum(), held, retain_graph=not program["fresh"], allow_unused=True
    )
    if all(grad is None for grad in whole):
        return None
    groups = groups_of(program, losses.shape)
    numbers = torch.arange(losses.numel()) if groups is None else groups.flatten()
    found = [torch.zeros(int(numbers.max()) + 1, p.numel(), dtype=torch.float64) for p in held]
    for row in sorted(set(numbers.tolist()) - {-1}):
        if program["fresh"]:
            model, x = made(program)
            losses, held = losses_from(program, model, x), wanted_of(program, model)
        grads = torch.autograd.grad(
            losses.flatten()[numbers == row].sum(),
            held,
            retain_graph=not program["fresh"],
            allow_unused=True,
        )
        for into, grad in zip(found, grads, strict=True):
            if grad is not None:
                into[row] = grad.to_dense().detach().flatten()
    return found


def close(found, expected, size, what):
    found = found.to_dense().double()  # as of nn.Embedding(sparse=True)
    error = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert error <= TOLERANCE * size, f"{what}: off by {error / size:.1e} of the largest row"


def taken(program, model, x):
    with gs.tape(model, parameters=wanted_of(program, model), coupled=program["coupled"]) as tape:
        losses = losses_from(program, model, x)
    before = state(model)
    groups = groups_of(program, losses.shape)
    options = {"combine": program["combine"], "retain_graph": program["retain"]}
    return tape.jacobian(losses, groups, **options), before, losses


def run(program):
    try:
        rows = expected_rows(program)
    except RuntimeError:  # what torch cannot differentiate says nothing
        return
    model, x = made(program)
    if rows is None or not all(bool(row.isfinite().all()) for row in rows):
        return
    jacobian, before, losses = taken(program, model, x)
    size = max(float(torch.cat(rows, 1).norm(dim=1).max()), 1e-12)
    per = torch.stack([row @ row.mT for row in rows])
    close(jacobian.gramian(), per.sum(0), size**2, "gramian")
    close(jacobian.gramian(per="tensor"), per, size**2, "gramian per tensor")
    held = wanted_of(program, model)
    names = {id(p): name for name, p in model.named_parameters()}
    named = {names[id(p)]: p for p in held}
    assert list(jacobian.names) == list(named)
    generator = torch.Generator().manual_seed(1)
    drawn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    if program["combine"] == "stored":
        close(jacobian.materialize(), torch.cat(rows, 1), size, "materialize")
        vectors = [drawn(*p.shape) for p in held]
        flat = [v.flatten() for v in vectors]
        products = torch.stack([row @ v for row, v in zip(rows, flat, strict=True)])
        close(jacobian.products(vectors), products, 10 * size, "products")
        metric = torch.stack([(row * v.abs()) @ row.mT for row, v in zip(rows, flat, strict=True)])
        found = jacobian.gramian(metric=[v.abs() for v in vectors])
        close(found, metric.sum(0), 10 * size**2, "gramian in a metric")
        both = gs.concat([jacobian, jacobian]).gramian()
        close(both, per.sum(0).repeat(2, 2), size**2, "gramian of two")
    apart = drawn(len(held), jacobian.m)
    weights = drawn(jacobian.m)
    size = size * float(weights.abs().sum() + apart.abs().sum())
    wanted = [(weights @ row).view(p.shape) for row, p in zip(rows, held, strict=True)]
    for update, want in zip(jacobian.combine(weights), wanted, strict=True):
        close(update, want, size, "combine")
    for update, w, row in zip(jacobian.combine(apart), apart, rows, strict=True):
        close(update.flatten(), w @ row, size, "combine per tensor")
    same(before, state(model))
    for times in (1, 2):
        jacobian.backward(weights)
        accumulated(named, wanted, times, size)
    again, _, _ = taken(program, model, x)
    again.backward(weights, release=True)
    accumulated(named, wanted, 3, size)
    if program["retain"] and not program["fresh"] and program["groups"] is None:
        grads = torch.autograd.grad(losses.sum(), held, allow_unused=True)
        for grad, row in zip(grads, rows, strict=True):
            if grad is not None and not program["hooks"] and program["linear"]:
                close(grad.to_dense().flatten(), row.sum(0), size + 1, "the graph that was kept")


def accumulated(named, wanted, times, size):
    """Every `.grad` is right, and memory of its own."""
    places = []
    for (name, p), want in zip(named.items(), wanted, strict=True):
        if p.grad is None:
            assert not bool(want.any()), f"{name} has no .grad"
            continue
        close(p.grad, times * want, size, f".grad of {name} after {times}")
        if p.grad.layout != torch.strided:
            continue
        assert p.grad.shape == p.shape and p.grad.dtype == p.dtype
        dense = sorted(zip(p.grad.stride(), p.grad.shape, strict=True))
        assert all(stride > 0 or n == 1 for stride, n in dense), f"{name}: .grad is expanded"
        place, bytes_ = p.grad.data_ptr(), p.numel() * p.itemsize
        for other, start, size_ in places:
            apart = place + bytes_ <= start or start + size_ <= place
            assert apart, f"the .grad of {name} is that of {other} too"
        places.append((name, place, bytes_))


def may_refuse(program):
    """Rows that are parts of samples meet, and so do samples in training; else nothing is asked."""
    parts = program["kind"] in ("tokens", "columns", "kept", "stacked", "again", "twice")
    return parts or program["groups"] == "any" or program["training"] or not program["calm"]


@pytest.mark.parametrize("theme", list(THEMES))
def test_random_models(theme, monkeypatch):
    @examples(15)
    @given(programs(theme))
    def attacked(program):
        refusable = may_refuse(program)
        with attack(f"models: {theme}", may_refuse=refusable), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monkeypatch.setenv("GRADSURGERY_PATH", program["path"])
            run(program)

    attacked()


@st.composite
def scaled(draw):
    """A program in float32 or 16 bits whose samples' losses differ by many orders of magnitude."""
    of = lambda name: st.tuples(  # noqa: E731
        st.just(name), st.sampled_from(list(THEMES[name])), st.integers(0, 2**16)
    )
    steps = draw(st.lists(st.sampled_from(("plain", "shared")).flatmap(of), min_size=1, max_size=3))
    return {
        "seed": draw(st.integers(0, 2**10)),
        "steps": steps,
        "size": draw(st.sampled_from([(4, 3), (3, 1), (2, 9)])),
        "powers": draw(st.lists(st.integers(-90, 60), min_size=4, max_size=4)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.float64])),
        "combine": draw(st.sampled_from(["stored", "backward"])),
        "path": draw(st.sampled_from(["", "factored", "direct"])),
    }


def ranges(program):
    """Products of rows of norms from 1e-27 to 1e18, to float32's rounding of each row."""
    batch, tokens = program["size"]
    model = Pool(program["seed"], batch, tokens).eval().to(program["dtype"])
    x = torch.randn(batch, tokens, D).to(program["dtype"])
    torch.set_default_dtype(program["dtype"])  # for what steps make themselves
    try:
        losses = forward(model, x, program["steps"], "sum", 0)
        if not losses.requires_grad:
            return
        held = [p for p in model.parameters() if p.requires_grad]
        grads = [
            torch.autograd.grad(loss, held, retain_graph=True, allow_unused=True) for loss in losses
        ]
        rows = torch.stack(
            [torch.cat([g.flatten().double() for g in row if g is not None]) for row in grads]
        )
        norms = rows.norm(dim=1)
        if not bool(((norms > 1e-2) & (norms < 1e3)).all()):
            return
        factors = 2.0 ** torch.tensor(program["powers"][:batch], dtype=torch.float64)
        with gs.tape(model) as tape:
            losses = forward(model, x, program["steps"], "sum", 0) * factors.to(program["dtype"])
        jacobian = tape.jacobian(losses, combine=program["combine"])
        lengths = (norms * factors)[:, None]
        found = jacobian.gramian() / lengths / lengths.mT
    finally:
        torch.set_default_dtype(torch.float32)
    expected = (rows / norms[:, None]) @ (rows / norms[:, None]).mT
    error = float((found - expected).abs().max())
    assert error < 1e-3, f"gramian: off by {error:.1e} of the rows' lengths"


def test_ranges(monkeypatch):
    @examples(12)
    @given(scaled())
    def attacked(program):
        with attack("models: ranges", may_refuse=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monkeypatch.setenv("GRADSURGERY_PATH", program["path"])
            ranges(program)

    attacked()
