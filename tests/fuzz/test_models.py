"""Random models: rows, products and `.grad` as a loop of autograd over single losses has them."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradsurgery as gs
from tests.capture.oracle import flattened, loop, trainable
from tests.fuzz.functions import EDITS
from tests.fuzz.pool import B, D, Pool, T
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
    kind = draw(st.sampled_from(LOSSES))
    columns = {"tokens": T, "stacked": 2}.get(kind)
    groups = None
    if draw(st.integers(0, 3)) == 3:
        rows = draw(st.lists(st.integers(-1, 2), min_size=B, max_size=B))
        if max(rows) >= 0:
            groups = torch.tensor(rows)
            groups = groups if columns is None else groups[:, None].repeat(1, columns)
    return {
        "seed": draw(st.integers(0, 2**10)),
        "steps": steps,
        "hooks": hooks,
        "kind": kind,
        "groups": groups,
        "training": draw(st.booleans()),
        "coupled": draw(st.sampled_from(["refuse", "refuse", "refuse", "exact"])),
        "combine": draw(st.sampled_from(["stored", "stored", "backward"])),
    }


def made(program):
    """The model, with its hooks, and its batch: the same for the same program."""
    model = Pool(program["seed"]).train(program["training"])
    with torch.no_grad():
        model.batch.running_mean.normal_()
    hook_modules(model, program["hooks"])
    return model, torch.randn(B, T, D, dtype=torch.float64)


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
    model, x = made(program)
    losses = forward(model, x, program["steps"], program["kind"], program["seed"])
    if not losses.requires_grad:
        return None
    return flattened(loop(losses, model, program["groups"]), model, _rows(program, losses))


def _rows(program, losses):
    return losses.numel() if program["groups"] is None else int(program["groups"].max()) + 1


def close(found, expected, size, what):
    error = float((found.double() - expected).abs().max()) if expected.numel() else 0.0
    assert error <= TOLERANCE * size, f"{what}: off by {error / size:.1e} of the largest row"


def taken(program, model, x):
    with gs.tape(model, coupled=program["coupled"]) as tape:
        losses = forward(model, x, program["steps"], program["kind"], program["seed"])
    before = state(model)
    jacobian = tape.jacobian(losses, program["groups"], combine=program["combine"])
    return jacobian, before


def run(program):
    rows = expected_rows(program)
    model, x = made(program)
    if rows is None or not all(bool(row.isfinite().all()) for row in rows):
        return
    jacobian, before = taken(program, model, x)
    size = max(float(torch.cat(rows, 1).norm(dim=1).max()), 1e-12)
    per = torch.stack([row @ row.mT for row in rows])
    close(jacobian.gramian(), per.sum(0), size**2, "gramian")
    close(jacobian.gramian(per="tensor"), per, size**2, "gramian per tensor")
    named = trainable(model)
    if program["combine"] == "stored":
        close(jacobian.materialize(), torch.cat(rows, 1), size, "materialize")
        vectors = [torch.randn_like(p) for p in named.values()]
        flat = [v.detach().flatten().double() for v in vectors]
        products = torch.stack([row @ v for row, v in zip(rows, flat, strict=True)])
        close(jacobian.products(vectors), products, 10 * size, "products")
        torch.set_rng_state(before["random"])
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(jacobian.m, generator=generator, dtype=torch.float64)
    size = size * float(weights.abs().sum())
    wanted = [(weights @ row).view(p.shape) for row, p in zip(rows, named.values(), strict=True)]
    for update, want in zip(jacobian.combine(weights), wanted, strict=True):
        close(update, want, size, "combine")
    same(before, state(model))
    for times in (1, 2):
        jacobian.backward(weights)
        accumulated(named, wanted, times, size)
    again, _ = taken(program, model, x)
    again.backward(weights)
    accumulated(named, wanted, 3, size)


def accumulated(named, wanted, times, size):
    """Every `.grad` is right, and memory of its own."""
    places = set()
    for (name, p), want in zip(named.items(), wanted, strict=True):
        if p.grad is None:
            assert not bool(want.any()), f"{name} has no .grad"
            continue
        close(p.grad, times * want, size, f".grad of {name} after {times}")
        place = p.grad.untyped_storage().data_ptr()
        assert place not in places, f"the .grad of {name} is another parameter's too"
        assert p.grad.untyped_storage().nbytes() >= p.numel() * 8, f"{name}: .grad is expanded"
        places.add(place)


@pytest.mark.parametrize("theme", list(THEMES))
def test_random_models(theme):
    @examples(40)
    @given(programs(theme))
    def attacked(program):
        with attack(f"models: {theme}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(program)

    attacked()
