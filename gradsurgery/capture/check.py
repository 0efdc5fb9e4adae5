"""check: whether captured rows of a model are exact, how they are got, and what they cost."""

import copy
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.batch import (
    DETACHED,
    Loss,
    batch_size,
    map_batch,
    per_sample_losses,
    tensors,
    trainable,
)
from gradsurgery.capture.factored import FactoredJacobian
from gradsurgery.capture.graph import roots
from gradsurgery.capture.memory import needed
from gradsurgery.capture.snapshot import as_before, functions
from gradsurgery.capture.tape import NO_ROWS, Tape, tape
from gradsurgery.capture.uses import RowsUse, Use, Within
from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ops._inputs import check as require

SLOW, REFUSED, STORED, UNREACHED = "one row at a time", "refused", "stored rows", "not reached"
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# The loop rounds each entry of a gradient to its dtype, once for each use of a parameter, and what
# of a tensor cancels leaves its roundings. So in 16 bits, 4 eps of the whole row are allowed; else
# a tensor counts by itself, or by this share of the row if it is less.
SHARES = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 1.0, torch.float16: 1.0}
WEIGHTS = (1.0, -0.7)


@dataclass(frozen=True)
class Checked:
    """What `check` found. Errors and memory are None where the rows are refused."""

    # two captured rows, and the gradients made of them, agree with a loop of backward passes
    exact: bool
    rtol: float  # the relative error allowed for that
    samples: int  # B
    rows: int  # m
    paths: dict[str, str]  # of each trainable parameter, at all B samples
    shapes: dict[str, list[int]]
    frozen: list[str]  # parameters that are not trained
    slow: dict[str, str]  # why some rows are got one at a time
    refused: str | None = None  # why there are no rows, as `Tape.jacobian` says it
    gramian_error: float | None = None  # of an entry, to the norms of its rows
    # of a weighted sum, to its norm: the largest of `combine`, of `.grad` after `backward`, and of
    # `.grad` halved in place, as by clipping, and added to by a second `backward`
    update_error: float | None = None
    worst: str | None = None  # the parameter whose errors these are: the largest of all
    # bytes for a Jacobian, its Gramian and its `backward`: by which a process grows on a CPU, alive
    # at once on a GPU; and some of what that is made of: "passes", the forward and the backward
    # pass at their highest, "pairs" kept of them, "gradients" of the model's size, "buffers"
    memory: int | None = None
    memory_parts: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        if self.refused is not None:
            lines = [f"refused: {self.refused}"]
        else:
            lines = [
                f"exact: {'yes' if self.exact else f'NO, worst in {self.worst}'}; Gramian "
                f"{self.gramian_error:.0e}, update {self.update_error:.0e}, up to {self.rtol:.0e}"
            ]
        if self.memory is not None:
            parts = ", ".join(f"{k} {_mib(v)}" for k, v in self.memory_parts.items())
            lines.append(f"memory: {_mib(self.memory)} MiB ({parts})")
        lines.append(f"samples: {self.samples} in {self.rows} rows")
        lines += _table(self.paths, self.shapes)
        lines += [f"{name}: {why}" for name, why in self.slow.items()]
        if self.frozen:
            lines.append(f"frozen: {len(self.frozen)} parameters")
            lines += [f"  {line}" for line in _alike(dict.fromkeys(self.frozen, ()))]
        return "\n".join(lines)


def check(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss,
    groups: Tensor | None = None,
    rtol: float | None = None,
) -> Checked:
    """Whether this library's rows of your model are right, and what they will cost.

    The captured rows of two samples are compared with a loop of backward passes over the same two
    losses, and so is what their weighted sums leave in `.grad`: at once, and after gradients were
    changed in place and added to. All else is counted on runs of two and four samples. The model,
    its buffers, `.grad` and torch's random numbers are as they were afterwards. Hooks that run
    after accumulation are not called.

    Args:
        model: in the mode (train or eval) its losses are wanted in.
        batch: any pytree of tensors with leading dimension B; handed to `loss`, some samples of it.
        loss: (model, batch) -> per-sample losses [B], not reduced.
        groups: int64 [B], the row each loss is summed into, as for `Tape.jacobian`.
        rtol: relative error up to which rows are exact: 1e-10 in float64, 1e-4 in float32, 3e-2 in
            bfloat16, 4e-3 in float16.

    Raises:
        InputError: a reduced loss, or one without gradient, an empty or ragged batch, bad groups.
            Rows that are refused are no error here: see `Checked.refused`.
    """
    require(isinstance(model, nn.Module), f"model must be a Module, got {type(model).__name__}")
    size = batch_size(batch)
    rows = _rows(groups, size)
    m = int(rows.max()) + 1
    require(m > 0, "groups leaves every sample out")
    named = trainable(model)
    shapes = {name: list(p.shape) for name, p in named.items()}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    result = {"samples": size, "rows": m, "shapes": shapes, "frozen": frozen}

    def run(samples: int) -> FactoredJacobian:
        one = torch.zeros(samples, dtype=torch.int64, device="cpu") if m == 1 else None
        with tape(model) as recorder:
            return _watched(recorder, _losses(model, _some(batch, samples), loss), one)[0]

    jacobian, slow, refused = None, {}, None
    with _undone(model, batch), torch.enable_grad():
        with tape(model) as recorder:
            losses = _losses(model, _some(batch, 2), loss)
            exact = _loop(losses, list(named.values()))
            try:
                jacobian, slow = _watched(recorder, losses)
            except NonFiniteError:
                raise
            except InputError as error:
                if str(error) == NO_ROWS:
                    raise
                refused = str(error)
        if jacobian is None:
            paths, slow = _refused(model, _some(batch, 2), loss, named)
            allowed = TOLERANCES[_coarsest(list(named.values()))] if rtol is None else rtol
            return Checked(
                exact=False, rtol=allowed, paths=paths, slow=slow, refused=refused, **result
            )
        dtype = _coarsest(_values(jacobian))
        gramian = _gramian_errors(jacobian, exact, SHARES[dtype])
        update = _update_errors(jacobian, exact, SHARES[dtype])
        whole = _at(jacobian, rows, m)
        memory = needed(run, whole, jacobian, size)
    allowed = TOLERANCES[dtype] if rtol is None else rtol
    largest = [max(pair) for pair in zip(gramian, update, strict=True)]
    return Checked(
        exact=max(largest) <= allowed,
        rtol=allowed,
        gramian_error=max(gramian),
        update_error=max(update),
        worst=jacobian.names[largest.index(max(largest))],
        paths=_paths(jacobian, whole, slow),
        slow=slow,
        memory=memory.pop("total"),
        memory_parts=memory,
        **result,
    )


def _rows(groups: Tensor | None, size: int) -> Tensor:
    if groups is None:
        return torch.arange(size, device="cpu")
    require(isinstance(groups, Tensor), f"groups must be a Tensor, got {type(groups).__name__}")
    require(groups.dtype == torch.int64, f"groups must be int64, got {groups.dtype}")
    got = list(groups.shape)
    require(got == [size], f"groups must be [{size}], one row per sample, got {got}")
    require(bool((groups >= -1).all()), f"groups must be -1 or rows, got {int(groups.min())}")
    return groups.detach().cpu()


def _some(batch: Any, count: int) -> Any:
    """`count` samples from the batch's beginning, again from there if it has fewer."""
    return map_batch(lambda leaf: leaf[torch.arange(count, device=leaf.device) % len(leaf)], batch)


def _losses(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    losses = per_sample_losses(loss(model, batch), batch_size(batch))
    require(losses.requires_grad, DETACHED)
    return losses


@contextmanager
def _undone(model: nn.Module, batch: Any) -> Iterator[None]:
    """Puts back what forward passes change: buffers, `.grad` and the state of random numbers."""
    owned = [(module, dict(module._buffers)) for module in model.modules()]
    copies = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    grads = [(p, p.grad) for p in model.parameters()]
    leaves = [*model.parameters(), *model.buffers(), *tensors(batch)]
    devices = sorted({leaf.device.index or 0 for leaf in leaves if leaf.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for module, buffers in owned:
                module._buffers.update(buffers)
            for buffer, before in copies:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        for p, grad in grads:
            p.grad = grad


# exactness


def _loop(losses: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Each parameter's gradients of every loss, [len(losses), p.numel()], by autograd alone."""
    rows = []
    with as_before(functions([roots(losses)[0]])) as kept:
        for each in losses:
            kept.put_back()
            grads = torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True)
            rows.append(kept.owned(grads))
    return [
        torch.stack([torch.zeros_like(p) if g is None else g.to_dense() for g in column]).reshape(
            len(losses), -1
        )
        for p, column in zip(parameters, zip(*rows, strict=True), strict=True)
    ]


def _gramian_errors(
    jacobian: FactoredJacobian, exact: Sequence[Tensor], share: float
) -> list[float]:
    grams = torch.stack([rows.double() @ rows.double().mT for rows in exact])
    norms = grams.diagonal(dim1=1, dim2=2).sqrt()  # [L, m]
    norms = torch.maximum(norms, share * norms.square().sum(0).sqrt())
    scale = norms.unsqueeze(1) * norms.unsqueeze(2)
    away = (jacobian.gramian(per="tensor") - grams).abs()
    return _relative(away, scale).flatten(1).amax(1).tolist()


def _update_errors(
    jacobian: FactoredJacobian, exact: Sequence[Tensor], share: float
) -> list[float]:
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=exact[0].device)
    sums = [weights @ rows.double() for rows in exact]
    norms = torch.stack([each.norm() for each in sums])
    scale = torch.maximum(norms, share * norms.norm())

    def errors(found: Sequence[Tensor | None], times: float = 1) -> Tensor:
        pairs = zip(found, sums, strict=True)
        away = [((0 if a is None else a.double().flatten()) - times * b).norm() for a, b in pairs]
        return _relative(torch.stack(away), times * scale)

    parameters, largest = jacobian.parameters, [errors(jacobian.combine(weights))]
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        jacobian._add(jacobian._weights(weights), release=False, hooks=False)
        grads = [p.grad for p in parameters]
        shared = _shared(grads)
        largest += [errors(grads), torch.where(torch.tensor(shared), math.inf, 0.0).to(scale)]
        if not any(shared):
            for grad in grads:
                if grad is not None:
                    grad *= 0.5  # as clipping does
            jacobian._add(jacobian._weights(weights), release=False, hooks=False)
            largest += [errors([p.grad for p in parameters], 1.5)]
            largest += [errors(jacobian.combine(weights))]
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
    return torch.stack(largest).amax(0).tolist()


def _shared(grads: Sequence[Tensor | None]) -> list[bool]:
    """Which share memory with another, or have values that share it."""
    places = [grad.untyped_storage()._cdata if grad is not None else None for grad in grads]
    return [
        grad is not None
        and (places.count(place) > 1 or grad.untyped_storage().nbytes() < grad.nbytes)
        for grad, place in zip(grads, places, strict=True)
    ]


def _relative(away: Tensor, scale: Tensor) -> Tensor:
    """Infinite where it is not a number."""
    return torch.where(away == 0, away, away / scale).nan_to_num(nan=math.inf, posinf=math.inf)


def _values(jacobian: FactoredJacobian) -> list[Tensor]:
    derived = [use for part in jacobian._derived for _, uses in part.leaves for use in uses]
    uses = [use for mine in jacobian._uses for use in mine]
    return [*jacobian.parameters, *(t for use in (*uses, *derived) for t in use.values)]


def _coarsest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype with fewest digits: under autocast that of the products."""
    dtypes = {t.dtype for t in tensors if t.dtype in TOLERANCES}
    return max(dtypes, key=lambda dtype: TOLERANCES[dtype])


# paths


def _watched(
    recorder: Tape, losses: Tensor, groups: Tensor | None = None
) -> tuple[FactoredJacobian, dict[str, str]]:
    """The Jacobian, and the parameters it warns of: why their rows are got one by one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jacobian = recorder.jacobian(losses, groups)
    slow = {}
    for warning in caught:
        for part in str(warning.message).split("; "):
            names, found, why = part.partition(": ")
            for name in names.split(", ") if found else ():
                if name in recorder.names:
                    slow[name] = re.sub(", so the rows are.*", "", why)
    return jacobian, slow


def _refused(
    model: nn.Module, two: Any, loss: Loss, named: dict[str, nn.Parameter]
) -> tuple[dict[str, str], dict[str, str]]:
    """Paths of what is not refused: of the same rows where samples may meet."""
    try:
        with tape(model, coupled="exact") as recorder:
            jacobian, slow = _watched(recorder, _losses(model, two, loss))
    except InputError:
        return dict.fromkeys(named, REFUSED), {}
    paths = _paths(jacobian, jacobian, slow)
    met = [n for n, why in slow.items() if "across samples" in why or "nothing is known" in why]
    kept = {name: why for name, why in slow.items() if name not in met}
    return {**paths, **dict.fromkeys(met, REFUSED)}, kept


def _at(jacobian: FactoredJacobian, rows: Tensor, m: int) -> FactoredJacobian:
    """What two samples' Jacobian would be for samples of these rows; without memory."""
    like = [p.detach().to("meta") for p in jacobian.parameters]
    one = torch.tensor([0], device="cpu")
    if m == 1:
        reached = [
            bool(mine) or any(p is q for part in jacobian._derived for q in part.parameters)
            for p, mine in zip(jacobian.parameters, jacobian._uses, strict=True)
        ]
        uses: list[list[Use]] = [
            [RowsUse(p.unsqueeze(0), one)] if r else [] for p, r in zip(like, reached, strict=True)
        ]
    else:
        known: dict[tuple[int, int], Tensor] = {}
        uses = [[_scaled(use, rows, known) for use in mine] for mine in jacobian._uses]
    losses = torch.zeros(m, device="meta")
    return FactoredJacobian(jacobian.names, jacobian.parameters, m, losses, uses)


def _scaled(use: Use, rows: Tensor, known: dict[tuple[int, int], Tensor]) -> Use:
    """A use of two samples as one of many, which are like those two in turns."""
    if isinstance(use, Within):
        return Within(_scaled(use.inner, rows, known), use.start, use.plane[0])
    counts = int((use.rows == 0).sum()), int((use.rows == 1).sum())
    if counts not in known:
        samples = (rows >= 0).nonzero().flatten()
        known[counts] = rows[samples].repeat_interleave(
            torch.tensor(counts, device="cpu")[samples % 2]
        )
    part = copy.copy(use)
    part.rows = known[counts]
    for name in use.tensors:
        tensor = getattr(use, name)
        setattr(part, name, tensor.new_empty(len(part.rows), *tensor.shape[1:], device="meta"))
    return part


def _paths(
    jacobian: FactoredJacobian, whole: FactoredJacobian, slow: dict[str, str]
) -> dict[str, str]:
    derived = {id(p) for part in jacobian._derived for p in part.parameters}
    paths = {}
    for name, p, plane in zip(whole.names, whole.parameters, whole._planes, strict=True):
        if name in slow:
            paths[name] = SLOW
        elif id(p) in derived:
            paths[name] = STORED
        elif plane is None:
            paths[name] = UNREACHED
        else:
            paths[name] = STORED if plane.plan is None else plane.plan.path
    return paths


# the table


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}" if size < 100 * 2**20 else f"{size / 2**20:.0f}"


def _alike(items: dict[str, tuple[str, ...]]) -> list[str]:
    """A line for all names that differ in numbers only, if they come with the same values."""
    found: dict[tuple, list[list[str]]] = {}
    for name, values in items.items():
        parts = name.split(".")
        words = tuple("" if part.isdigit() else part for part in parts)
        found.setdefault((words, values), []).append(parts)
    lines = []
    for (_, values), names in found.items():
        columns = [set(column) for column in zip(*names, strict=True)]
        name = ".".join(column.pop() if len(column) == 1 else "*" for column in columns)
        lines.append((name, *values, f"x {len(names)}" if len(names) > 1 else ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _table(paths: dict[str, str], shapes: dict[str, list[int]]) -> list[str]:
    return _alike({name: (str(shapes[name]), path) for name, path in paths.items()})
