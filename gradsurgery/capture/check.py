"""check: whether captured rows of a model are exact, how they are got, and what they cost."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.batch import (
    DETACHED,
    Loss,
    batch_size,
    per_sample_losses,
    take,
    tensors,
    trainable,
)
from gradsurgery.capture.exactness import (
    SHARES,
    TOLERANCES,
    coarsest,
    gramian_errors,
    loop,
    update_errors,
    values,
)
from gradsurgery.capture.factored import FactoredJacobian
from gradsurgery.capture.fallback import Fallback
from gradsurgery.capture.memory import needed
from gradsurgery.capture.table import folded, mib, table
from gradsurgery.capture.tape import NoRowsError, Tape, tape
from gradsurgery.capture.whole_batch import at_batch, paths_of
from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ops._inputs import check as require

REFUSED = "refused"


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
            parts = ", ".join(f"{k} {mib(v)}" for k, v in self.memory_parts.items())
            lines.append(f"memory: {mib(self.memory)} MiB ({parts})")
        lines.append(f"samples: {self.samples} in {self.rows} rows")
        lines += table(self.paths, self.shapes)
        lines += [f"{name}: {why}" for name, why in self.slow.items()]
        if self.frozen:
            lines.append(f"frozen: {len(self.frozen)} parameters")
            lines += [f"  {line}" for line in folded(dict.fromkeys(self.frozen, ()))]
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
            return _quiet(recorder, _losses(model, _some(batch, samples), loss), one)

    jacobian, refused = None, None
    with _undone(model, batch), torch.enable_grad():
        # one forward pass for both: dropout, and whatever else is random, is the same
        with tape(model) as recorder:
            losses = _losses(model, _some(batch, 2), loss)
            exact = loop(losses, list(named.values()))
            try:
                jacobian = _quiet(recorder, losses)
            except (NonFiniteError, NoRowsError):
                raise
            except InputError as error:
                refused = str(error)
        if jacobian is None:
            paths, slow = _refused(model, _some(batch, 2), loss, named)
            allowed = TOLERANCES[coarsest(list(named.values()))] if rtol is None else rtol
            return Checked(
                exact=False, rtol=allowed, paths=paths, slow=slow, refused=refused, **result
            )
        dtype = coarsest(values(jacobian))
        gramian = gramian_errors(jacobian, exact, SHARES[dtype])
        update = update_errors(jacobian, exact, SHARES[dtype])
        whole = at_batch(jacobian, rows, m)
        memory = needed(run, whole, jacobian, size)
    allowed = TOLERANCES[dtype] if rtol is None else rtol
    largest = [max(pair) for pair in zip(gramian, update, strict=True)]
    return Checked(
        exact=max(largest) <= allowed,
        rtol=allowed,
        gramian_error=max(gramian),
        update_error=max(update),
        worst=jacobian.names[largest.index(max(largest))],
        paths=paths_of(jacobian, whole),
        slow=_slow(jacobian.fallbacks),
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
    return take(batch, [k % batch_size(batch) for k in range(count)])


def _losses(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    losses = per_sample_losses(loss(model, batch), batch_size(batch))
    require(losses.requires_grad, DETACHED)
    return losses


@contextmanager
def _undone(model: nn.Module, batch: Any) -> Iterator[None]:
    """Puts back what forward passes change: buffers, `.grad` and the state of random numbers."""
    # a forward pass may write to buffers, or put others in their place
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


def _quiet(recorder: Tape, losses: Tensor, groups: Tensor | None = None) -> FactoredJacobian:
    """The Jacobian; its fallbacks are told by `Checked.slow`, not by a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return recorder.jacobian(losses, groups)


def _slow(fallbacks: Iterable[Fallback]) -> dict[str, str]:
    """By parameter, why its rows are got one at a time."""
    reasons: dict[str, list[str]] = {}
    for fallback in fallbacks:
        for name in fallback.parameters:
            reasons.setdefault(name, []).append(fallback.why)
    return {name: "; ".join(why) for name, why in reasons.items()}


def _refused(
    model: nn.Module, two: Any, loss: Loss, named: dict[str, nn.Parameter]
) -> tuple[dict[str, str], dict[str, str]]:
    """Paths of what is not refused: of the same rows where samples may meet; and what is slow."""
    try:
        with tape(model, coupled="exact") as recorder:
            jacobian = _quiet(recorder, _losses(model, two, loss))
    except InputError:
        return dict.fromkeys(named, REFUSED), {}
    met = [each for each in jacobian.fallbacks if each.reason in ("coupled", "opaque")]
    slow = _slow(each for each in jacobian.fallbacks if each not in met)
    refused = dict.fromkeys((name for each in met for name in each.parameters), REFUSED)
    return {**paths_of(jacobian, jacobian), **refused}, slow
