"""What is timed beside what: operators on rows that exist, rules on a Gramian, steps of models.

Of each piece of work the first contender is ours. Those with `floor` do less than the work asks:
they say what no exact method can beat.
"""

import contextlib
import copy
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.bench import steps
from gradsurgery.bench.models import (
    CLASSES,
    VOCAB,
    Batches,
    labelled,
    mlp,
    resnet,
    seeded,
    text,
    transformer,
    with_lora,
)

OURS = "gradsurgery"
GROUPS = ("steps", "operators", "rules", "scaling")  # as they are asked for and told of
REFERENCE = "plain PyTorch"  # the same rule, its solver in torch


class Contender(NamedTuple):
    call: Callable[[], object]
    error: Callable[[], float] | None = None
    """Relative, against float64; none: what it computes is another thing."""
    floor: bool = False


class Work(NamedTuple):
    contenders: dict[str, Contender]
    bytes: int
    """That must move through memory at least."""
    operations: int
    """Floating-point ones, that must be done at least; 0: not counted."""


@dataclass(frozen=True)
class Case:
    """One row of the report, made when its turn has come."""

    group: str
    name: str
    make: Callable[[torch.device], Work]
    weight: float
    """Its part of the time, beside those of the others."""
    along: dict[str, int] = field(default_factory=dict)
    """By axis of a picture, where it stands there."""
    kind: str = ""
    """What it has in common with those it is drawn beside."""


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    columns: int
    """Of rows that exist."""
    rows: tuple[int, ...]
    rule_rows: tuple[int, ...]
    samples: int
    """To forget, and as many to retain."""
    hidden: int
    """Width of the MLP, whose inputs are half as many."""
    transformer: tuple[int, int, int]
    """Width, layers, tokens."""
    channels: tuple[int, ...]
    """Of the stages of a ResNet."""
    side: int
    """Of its images."""
    grown: dict[str, tuple[int, ...]]
    """Of a transformer of two layers, the numbers that grow, one at a time from the first."""
    rounds: int = 50
    """At most, however much time is left."""


SIZES = {
    "tiny": Size(
        columns=10_000,
        rows=(2, 4),
        rule_rows=(3,),
        samples=2,
        hidden=64,
        transformer=(64, 1, 8),
        channels=(32,),
        side=8,
        grown={"tokens": (4, 8), "width": (64, 128), "samples": (2, 4)},
        rounds=5,
    ),
    "small": Size(
        columns=1_000_000,
        rows=(2, 4, 8, 16, 32, 64),
        rule_rows=(8, 32),
        samples=16,
        hidden=2048,
        transformer=(256, 2, 64),
        channels=(32, 64, 128),
        side=32,
        grown={"tokens": (32, 64, 128), "width": (128, 256, 512), "samples": (8, 16, 32)},
    ),
    "large": Size(
        columns=5_000_000,
        rows=(2, 4, 8, 16, 32, 64),
        rule_rows=(8, 32),
        samples=16,
        hidden=4096,
        transformer=(512, 8, 128),
        channels=(64, 128, 256, 512),
        side=32,
        grown={
            "tokens": (64, 128, 256, 512),
            "width": (256, 512, 1024),
            "samples": (8, 16, 32, 64),
        },
    ),
}


def operators(size: Size) -> Iterator[Case]:
    columns = size.columns
    for m in size.rows:
        for kind, make in (
            ("gramian", _gramian),
            ("combine", _combine),
            ("project_out", _project_out),
        ):
            name = f"{kind} {m} x {columns:,}"
            weight = m / size.rows[-1] * (2 if kind == "project_out" else 1) + 0.3
            yield Case("operators", name, partial(make, m, columns), weight, {"rows": m}, kind)


def _gramian(m: int, n: int, device: torch.device) -> Work:
    torch.manual_seed(0)
    rows = torch.randn(m, n, device=device)
    calls = {OURS: lambda: gs.gramian(rows), "J @ J.T": lambda: rows @ rows.mT}
    parts = [part.double() for part in rows.split(1 << 20, dim=1)]
    exact = torch.stack([part @ part.mT for part in parts]).sum(0)
    del parts
    found = {name: Contender(call, partial(_of, call, exact)) for name, call in calls.items()}
    found["one read"] = Contender(rows.sum, floor=True)
    return Work(found, rows.nbytes, m * (m + 1) * n)


def _combine(m: int, n: int, device: torch.device) -> Work:
    torch.manual_seed(0)
    rows, weights = torch.randn(m, n, device=device), torch.randn(m, device=device)
    calls = {OURS: lambda: gs.combine(rows, weights), "w @ J": lambda: weights @ rows}
    exact = weights.double() @ rows.double()
    found = {name: Contender(call, partial(_of, call, exact)) for name, call in calls.items()}
    found["one read"] = Contender(rows.sum, floor=True)
    return Work(found, rows.nbytes + 4 * n, 2 * m * n)


def by_qr(grad: Tensor, rows: Tensor) -> Tensor:
    q = torch.linalg.qr(rows.mT).Q
    return grad - q @ (q.mT @ grad)


def by_gramian(grad: Tensor, rows: Tensor) -> Tensor:
    gramian = rows @ rows.mT
    return grad - rows.mT @ torch.linalg.solve(gramian, rows @ grad)


def _project_out(m: int, n: int, device: torch.device) -> Work:
    torch.manual_seed(0)
    rows, grad = torch.randn(m, n, device=device), torch.randn(n, device=device)
    calls = {
        OURS: lambda: gs.project_out(grad, rows),
        "torch.linalg.qr": lambda: by_qr(grad, rows),
        "Gramian in torch": lambda: by_gramian(grad, rows),
    }
    exact = by_gramian(grad.double(), rows.double())
    found = {name: Contender(call, partial(_of, call, exact)) for name, call in calls.items()}
    found["two reads"] = Contender(lambda: (rows.sum(), rows.sum()), floor=True)
    return Work(found, 2 * (rows.nbytes + 4 * n) + 4 * n, m * (m + 1) * n + 4 * m * n)


def _of(call: Callable[[], Tensor], exact: Tensor) -> float:
    return relative(call(), exact)


# by rule, TorchJD's arguments for the same; none: it has no such rule
RULES: dict[str, dict[str, float] | None] = {
    "OrthoGrad": None,
    "UPGrad": {},
    "DualProj": {},
    "PCGrad": {},
    "MGDA": {},
    "CAGrad": {"c": 0.5},
    "IMTLG": {},
    "AlignedMTL": {},
}
TORCH = {"IMTLG", "AlignedMTL"}  # made of calls of torch, so ours is the plain one


def rules(size: Size) -> Iterator[Case]:
    for name in RULES:
        for m in size.rule_rows:
            make = partial(_rule, name, m)
            yield Case("rules", f"{name} of {m} rows", make, 0.3, {"rows": m}, name)


def _rule(name: str, m: int, device: torch.device) -> Work:
    torch.manual_seed(0)
    rows = torch.randn(m, 8 * m, dtype=torch.float64, device=device)
    gram = rows @ rows.mT
    kind = getattr(gs, name)
    ours, again = kind(), kind()  # one draws as the other does
    with _reference():
        exact = kind().weights(gram)

    def reference() -> Tensor:
        with _reference():
            return again.weights(gram)

    found = {
        OURS: Contender(lambda: ours.weights(gram), lambda: relative(kind().weights(gram), exact)),
    }
    if name not in TORCH:  # what errors are distances from has none
        found[REFERENCE] = Contender(reference, lambda: 0.0)
    theirs = RULES[name]
    if theirs is not None and (weighting := _torchjd(name, theirs)):
        # PCGrad draws an order, and theirs another one
        error = None if name == "PCGrad" else lambda: relative(weighting(gram), exact)
        found["TorchJD"] = Contender(lambda: weighting(gram), error)
    return Work(found, gram.nbytes, 0)


@contextlib.contextmanager
def _reference() -> Iterator[None]:
    """Operators are those in plain torch."""
    before = os.environ.get("GRADSURGERY_BACKEND")
    os.environ["GRADSURGERY_BACKEND"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRADSURGERY_BACKEND"]
        else:
            os.environ["GRADSURGERY_BACKEND"] = before


def _torchjd(name: str, arguments: dict[str, float]) -> Callable[[Tensor], Tensor] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cvxpy's
            from torchjd import aggregation

            return getattr(aggregation, f"{name}Weighting")(**arguments)
    except ImportError:  # it, or a solver it calls
        return None


class Model(NamedTuple):
    """What steps are taken of."""

    build: Callable[[], nn.Module]
    batches: Batches
    samples: int
    """To forget, and as many to retain."""


def of_models(size: Size) -> Iterator[Case]:
    """A step of each kind of model."""
    hidden, (width, layers, tokens) = size.hidden, size.transformer
    build = partial(transformer, width, layers, VOCAB, tokens)
    text_model = f"transformer {width} x {layers}, {tokens} tokens"
    inputs = labelled(hidden // 2), text(tokens), text(tokens), labelled(3, size.side, size.side)
    builds = {
        f"MLP {hidden // 2}-{hidden}-{hidden}": partial(mlp, hidden // 2, hidden, hidden, CLASSES),
        text_model: build,
        f"LoRA on {text_model}": lambda: with_lora(build(), 8),
        f"ResNet of {'-'.join(map(str, size.channels))} channels": partial(resnet, *size.channels),
    }
    for (name, made), batches in zip(builds.items(), inputs, strict=True):
        yield Case("steps", name, partial(_step, Model(made, batches, size.samples)), 8)


def scaling(size: Size) -> Iterator[Case]:
    """Steps of one model, of which one number grows."""
    base = {axis: values[0] for axis, values in size.grown.items()}
    places: dict[tuple[int, ...], dict[str, int]] = {}  # one that is on several axes comes once
    for axis, values in size.grown.items():
        for value in values:
            place = tuple((base | {axis: value}).values())
            places.setdefault(place, {})[axis] = value
    for (tokens, width, samples), along in places.items():
        model = Model(partial(transformer, width, 2, VOCAB, tokens), text(tokens), samples)
        name = f"transformer {width} x 2, {tokens} tokens, {samples} + {samples} samples"
        grown = math.prod(value / base[axis] for axis, value in along.items())
        yield Case("scaling", name, partial(_step, model), 1 + grown, along, "step")


STEPS = {OURS: steps.our_step, **steps.RIVALS}
PACKAGES = ("torchjd",)  # timed where they are installed


def _step(model: Model, device: torch.device) -> Work:
    ours = seeded(model.build).to(device)
    forget, retain = (
        (x.to(device), y.to(device)) for x, y in (model.batches(model.samples) for _ in range(2))
    )
    exact = functools.cache(lambda: steps.exact_update(ours, forget, retain))
    found = {}
    for name, make in STEPS.items():
        # a model of its own: TorchJD's hooks count every forward pass while its engine lives
        own = copy.deepcopy(ours)
        optimizer = torch.optim.SGD(steps.parameters(own), lr=0.0)
        try:
            step = make(own, optimizer, forget, retain)
        except ImportError:
            continue
        floor = name == steps.PLAIN
        error = None if floor else partial(_of_step, step, own, optimizer, exact)
        found[name] = Contender(step, error, floor)
    size = sum(p.numel() for p in steps.parameters(ours))
    return Work(found, 3 * 4 * size, 0)  # weights read forward and backward, the update written


def _of_step(
    step: steps.Step,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    exact: Callable[[], Tensor],
) -> float:
    return relative(steps.update_of(step, model, optimizer), exact())


def all_cases(size: Size, groups: Sequence[str] = GROUPS) -> list[Case]:
    """Of the groups, steps first: what does not fit into the time is what comes last."""
    makers = {"steps": of_models, "operators": operators, "rules": rules, "scaling": scaling}
    return [case for group, make in makers.items() if group in groups for case in make(size)]
