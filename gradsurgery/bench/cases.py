"""What is timed beside what: operators on rows that exist, rules on a Gramian, steps of models.

Of each piece of work the first contender is ours. Those with `floor` do less than the work asks:
they say what no exact method can beat.
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator
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
GROUPS = ("operators", "rules", "steps", "scaling")  # as they are asked for and told of
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


def operators(columns: int, rows: tuple[int, ...]) -> Iterator[Case]:
    for m in rows:
        for kind, make in (
            ("gramian", _gramian),
            ("combine", _combine),
            ("project_out", _project_out),
        ):
            name = f"{kind} {m} x {columns:,}"
            weight = m / rows[-1] * (2 if kind == "project_out" else 1) + 0.3
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


def rules(rows: tuple[int, ...]) -> Iterator[Case]:
    for name in RULES:
        for m in rows:
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
        # float64 itself, so its error is none by definition
        REFERENCE: Contender(reference, lambda: 0.0),
    }
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
    samples: int = 16  # to forget, and as many to retain


def models(size: str) -> dict[str, Model]:
    """By name, the models of a step of each kind."""
    width, layers, tokens = {"tiny": (64, 1, 8), "small": (256, 4, 64), "large": (512, 8, 128)}[
        size
    ]
    inner = {"tiny": 64, "small": 2048, "large": 4096}[size]
    channels = {"tiny": (32,), "small": (32, 64, 128, 256), "large": (64, 128, 256, 512)}[size]
    side = 8 if size == "tiny" else 32
    samples = 2 if size == "tiny" else 16
    text_model = partial(transformer, width, layers, VOCAB, tokens)
    return {
        f"MLP {inner // 2}-{inner}-{inner}": Model(
            partial(mlp, inner // 2, inner, inner, CLASSES), labelled(inner // 2), samples
        ),
        f"transformer {width} x {layers}, {tokens} tokens": Model(
            text_model, text(tokens), samples
        ),
        f"LoRA on transformer {width} x {layers}, {tokens} tokens": Model(
            lambda: with_lora(text_model(), 8), text(tokens), samples
        ),
        f"ResNet of {len(channels)} stages, {channels[0]} channels": Model(
            partial(resnet, *channels), labelled(3, side, side), samples
        ),
    }


def of_steps(size: str) -> Iterator[Case]:
    for name, model in models(size).items():
        yield Case("steps", name, partial(_step, model), 8)


def scaling(size: str) -> Iterator[Case]:
    """Steps of one model, of which one number grows."""
    d, t, b = {"tiny": (64, 4, 2), "small": (256, 32, 8), "large": (512, 64, 16)}[size]
    axes = {
        "tokens": {"tiny": (2, 8), "small": (16, 64, 256), "large": (32, 128, 512)}[size],
        "width": {"tiny": (64, 128), "small": (128, 256, 512), "large": (256, 512, 1024)}[size],
        "samples": {"tiny": (2, 4), "small": (4, 8, 16, 32), "large": (8, 16, 32, 64)}[size],
    }
    base = {"tokens": t, "width": d, "samples": b}
    places: dict[tuple[int, ...], dict[str, int]] = {}  # one that is on several axes comes once
    for axis, values in axes.items():
        for value in values:
            place = tuple((base | {axis: value}).values())
            places.setdefault(place, {})[axis] = value
    for (tokens, width, samples), along in places.items():
        model = Model(partial(transformer, width, 2, VOCAB, tokens), text(tokens), samples)
        name = f"transformer {width} x 2, {tokens} tokens, {samples} + {samples} samples"
        weight = 1 + tokens / t + (width / d) ** 2 + samples / b
        yield Case("scaling", name, partial(_step, model), weight, along, "step")


def _step(model: Model, device: torch.device) -> Work:
    ours = seeded(model.build).to(device)
    forget, retain = (
        (x.to(device), y.to(device)) for x, y in (model.batches(model.samples) for _ in range(2))
    )
    exact = steps.exact_update(ours, forget, retain)
    found = {}
    for name, make in {OURS: steps.our_step, **steps.RIVALS}.items():
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
    step: steps.Step, model: nn.Module, optimizer: torch.optim.Optimizer, exact: Tensor
) -> float:
    return relative(steps.update_of(step, model, optimizer), exact)


SIZES = ("tiny", "small", "large")
COLUMNS = {"tiny": 10_000, "small": 1_000_000, "large": 20_000_000}
ROWS = {"tiny": (2, 4), "small": (2, 4, 8, 16, 32, 64), "large": (2, 4, 8, 16, 32, 64)}
RULE_ROWS = {"tiny": (3,), "small": (8, 32), "large": (8, 32)}


def all_cases(size: str, groups: tuple[str, ...] = GROUPS) -> list[Case]:
    """Of the groups, steps first: what does not fit into the time is what comes last."""
    made = {
        "steps": lambda: of_steps(size),
        "operators": lambda: operators(COLUMNS[size], ROWS[size]),
        "rules": lambda: rules(RULE_ROWS[size]),
        "scaling": lambda: scaling(size),
    }
    return [case for group in made if group in groups for case in made[group]()]
