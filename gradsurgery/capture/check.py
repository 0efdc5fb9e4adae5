"""check: whether captured rows of a model are exact, how they are got, and what they cost."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gradsurgery.batch import (
    DETACHED,
    Loss,
    batch_size,
    map_batch,
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
from gradsurgery.capture.held import Hold, held
from gradsurgery.capture.memory import Parts, needed
from gradsurgery.capture.on_meta import on_meta
from gradsurgery.capture.planner import device_of
from gradsurgery.capture.probe import NoValuesError
from gradsurgery.capture.standing import of_model, of_optimizer
from gradsurgery.capture.table import amount, folded, mib, table
from gradsurgery.capture.tape import NoRowsError, Tape, tape
from gradsurgery.capture.whole_batch import at_batch, paths_of
from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ops._inputs import check as require
from gradsurgery.ops._inputs import check_count, one_of
from gradsurgery.optimizers import steppable
from gradsurgery.spread import local

REFUSED = "refused"


@dataclass(frozen=True)
class Checked:
    """What `check` found. Errors and memory are None where the rows are refused."""

    # two captured rows, and the gradients made of them, agree with a loop of backward passes; None
    # for a model on the meta device, which has no values
    exact: bool | None
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
    # pass at their highest, "pairs" kept of them, or rows, "gradients" of the model's size, and
    # "buffers"
    memory: int | None = None
    memory_parts: dict[str, int] = field(default_factory=dict)
    # bytes that a process holds at the highest of a step: "model", its parameters and buffers,
    # "optimizer", the state of that, and "step", `memory` or what the optimizer's step takes
    needs: int | None = None
    needs_parts: dict[str, int] = field(default_factory=dict)
    ranks: int = 1
    # bytes that leave each of several ranks in a step: for the "Gramian" and for the "update";
    # "plain" are those of a step of DistributedDataParallel
    sent: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        if self.refused is not None:
            lines = [f"refused: {self.refused}"]
        elif self.exact is None:
            lines = ["exact: not known, a model on the meta device has no values"]
        else:
            lines = [
                f"exact: {'yes' if self.exact else f'NO, worst in {self.worst}'}; Gramian "
                f"{self.gramian_error:.0e}, update {self.update_error:.0e}, up to {self.rtol:.0e}"
            ]
        each = " a rank" if self.ranks > 1 else ""
        if self.needs is not None:
            parts = ", ".join(f"{k} {amount(v)}" for k, v in self.needs_parts.items())
            lines.append(f"needs about {amount(self.needs)}{each} ({parts})")
        if self.sent:
            total = amount(self.sent["Gramian"] + self.sent["update"])
            gramian, update, plain = map(amount, self.sent.values())
            lines.append(
                f"sends {total}{each} in a step (Gramian {gramian}, update {update}); "
                f"a plain step of DistributedDataParallel {plain}"
            )
        if self.memory is not None:
            parts = ", ".join(f"{k} {mib(v)}" for k, v in self.memory_parts.items())
            lines.append(f"memory: {mib(self.memory)} MiB ({parts})")
        lines.append(f"samples: {self.samples} in {self.rows} rows{each}")
        lines += table(self.paths, self.shapes)
        lines += [f"{name}: {why}" for name, why in self.slow.items()]
        if self.frozen:
            lines.append(f"frozen: {len(self.frozen)} parameters")
            lines += [f"  {line}" for line in folded(dict.fromkeys(self.frozen, ()))]
        return "\n".join(lines)


class Found(NamedTuple):
    """What `checked` found, and rows like those of the whole batch, which take no memory."""

    report: Checked
    whole: FactoredJacobian | None  # None where they are refused


def checked(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    groups: Tensor | None = None,
    rtol: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    micro_batch: int | None = None,
    hold: Hold = "auto",
) -> Found:
    """As `gradsurgery.check` says it, for one process."""
    require(isinstance(model, nn.Module), f"model must be a Module, got {type(model).__name__}")
    one_of("hold", hold, ("auto", "pairs", "rows"))
    if micro_batch is not None:
        check_count("micro_batch", micro_batch, " or None")
    size = batch_size(batch)
    rows = _rows(groups, size)
    m = int(rows.max()) + 1
    require(m > 0, "groups leaves every sample out")
    named = trainable(model)
    shapes = {name: list(p.shape) for name, p in named.items()}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    result = {"samples": size, "rows": m, "shapes": shapes, "frozen": frozen}
    meta = any(p.is_meta for p in named.values())
    if meta:
        batch = map_batch(lambda tensor: tensor.to("meta"), batch)
    parts = _parts(rows, micro_batch)
    if parts is not None and parts.alone <= parts.most:
        hold = "pairs"  # of the last part, nothing is formed

    def run(samples: int, what: Literal["rows", "sum", "losses"] = "rows") -> Any:
        whole = m == 1 or what == "sum"
        one = torch.zeros(samples, dtype=torch.int64, device="cpu") if whole else None
        with tape(model) as recorder:
            losses = _losses(model, _some(batch, samples), loss)
            if what == "losses":
                return losses
            jacobian = _quiet(recorder, losses, one)
        return jacobian if parts is None or whole else held(jacobian, hold)

    jacobian, refused = None, None
    with _undone(model, batch), torch.enable_grad(), on_meta(meta):
        # one forward pass for both: dropout, and whatever else is random, is the same
        with tape(model) as recorder:
            losses = _losses(model, _some(batch, 2), loss)
            exact = None if meta else loop(losses, list(named.values()))
            try:
                jacobian = _quiet(recorder, losses)
            except (NonFiniteError, NoRowsError, NoValuesError):
                raise
            except InputError as error:
                refused = str(error)
        allowed = TOLERANCES[coarsest(list(named.values()))] if rtol is None else rtol
        if jacobian is None:
            paths, slow = _refused(model, _some(batch, 2), loss, named)
            return Found(
                Checked(
                    exact=False, rtol=allowed, paths=paths, slow=slow, refused=refused, **result
                ),
                None,
            )
        agreement: dict[str, Any] = {"exact": None, "rtol": allowed}
        if exact is not None:
            agreement = _agreement(jacobian, exact, rtol)
        if parts is None:
            whole = at_batch(jacobian, rows, m)
        else:
            whole = at_batch(held(jacobian, hold), rows, m, _summed(rows))
        memory = needed(run, whole, jacobian, size, parts)
    total = memory.pop("total")
    kept = made = 0
    if optimizer is not None:
        kept, made = of_optimizer(steppable(optimizer), device_of(losses))
    grads = sum(local(p).nbytes for p in named.values())
    standing = {"model": of_model(model), "optimizer": kept, "step": max(total, grads + made)}
    report = Checked(
        paths=paths_of(jacobian, whole),
        slow=_slow(jacobian.fallbacks),
        memory=total,
        memory_parts=memory,
        needs=sum(standing.values()),
        needs_parts=standing,
        **agreement,
        **result,
    )
    return Found(report, whole)


def _agreement(
    jacobian: FactoredJacobian, exact: Sequence[Tensor], rtol: float | None
) -> dict[str, Any]:
    """What a report says of the rows' errors."""
    dtype = coarsest(values(jacobian))
    gramian = gramian_errors(jacobian, exact, SHARES[dtype])
    update = update_errors(jacobian, exact, SHARES[dtype])
    allowed = TOLERANCES[dtype] if rtol is None else rtol
    largest = [max(pair) for pair in zip(gramian, update, strict=True)]
    return {
        "exact": max(largest) <= allowed,
        "rtol": allowed,
        "gramian_error": max(gramian),
        "update_error": max(update),
        "worst": jacobian.names[largest.index(max(largest))],
    }


def _summed(rows: Tensor) -> list[int]:
    """Rows of several samples."""
    return (rows[rows >= 0].bincount() > 1).nonzero().flatten().tolist()


def _parts(rows: Tensor, micro_batch: int | None) -> Parts | None:
    if micro_batch is None or micro_batch >= len(rows):
        return None
    summed = torch.tensor(_summed(rows), dtype=torch.int64, device="cpu")
    alone = (rows >= 0) & ~torch.isin(rows, summed)
    return Parts(micro_batch, int(alone.sum()), len(summed))


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
                if not buffer.is_meta and not torch.equal(buffer, before):
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
