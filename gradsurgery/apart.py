"""Whether a sample's loss or gradient depends on samples taken with it, tried out on a few."""

import functools
import random
import sys
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradsurgery.batch import AnyLoss, WeightedLosses, batch_size, take, tensors
from gradsurgery.buffers import Buffers
from gradsurgery.capture.graph import ordered, roots
from gradsurgery.capture.hooks import dtypes_under, near, scale_of
from gradsurgery.capture.passing import Looking
from gradsurgery.capture.uncompiled import uncompiled
from gradsurgery.capture.weighted import Terms
from gradsurgery.spread import beside, local

# What rounding may do to a loss: this often a unit in the last place of the largest one, and this
# often what losses move by when all parameters do by such a unit. A forward pass adds up many
# roundings, in another order for each size of a batch.
ROUNDINGS = 10
TF32 = 2.0**-11  # the digits that a GPU may keep of float32


class Trial(NamedTuple):
    """What a trial found."""

    coupled: str | None = None  # a loss that differs, in words, or a parameter by name
    moves: Sequence[str] = ()  # names of buffers of the model that a forward pass changes


# calls a function, and gives None where it raises
Attempt = Callable[[Callable[[], Trial]], Trial | None]


class Holder(nn.Module):
    """A module whose forward is the loss, so that functional_call swaps the model's parameters."""

    def __init__(self, model: nn.Module, loss: AnyLoss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor | WeightedLosses:
        return self.loss(self.model, batch)


def attempted(call: Callable[[], Trial]) -> Trial | None:
    """As an `Attempt` of this process alone."""
    try:
        return call()
    except Exception:
        return None


def in_parts(
    model: nn.Module, loss: AnyLoss, batch: Any, most: int, attempt: Attempt = attempted
) -> Trial:
    """Some samples of a batch together, and in parts of no more than `most`: of one or of two."""
    step = min(most, 2)
    together = few(batch, 2 + step)
    parts = [take(together, slice(k, k + step)) for k in range(0, batch_size(together), step)]
    return tried(model, loss, together, parts if len(parts) > 1 else [], attempt)


def few(batch: Any, count: int) -> Any:
    """Samples of a batch: those with most padding, those with least, and some between.

    Zeros count as padding, and so does the least value of a tensor. Where all have as much, samples
    are spread over the batch.
    """
    size = batch_size(batch)
    padding = [0] * size
    for leaf in tensors(batch):
        if leaf.dim() > 1 and leaf.numel() > 0 and not leaf.is_complex():
            flat = leaf.detach().flatten(1)
            counts = (flat == 0).sum(1) + (flat == flat.min()).sum(1)
            padding = [a + b for a, b in zip(padding, counts.tolist(), strict=True)]
    order = sorted(range(size), key=padding.__getitem__)
    count = min(count, size)
    chosen = [order[round(k * (size - 1) / max(count - 1, 1))] for k in range(count)]
    return take(batch, chosen)


def tried(
    model: nn.Module,
    loss: AnyLoss,
    together: Any,
    parts: Sequence[Any],
    attempt: Attempt = attempted,
) -> Trial:
    """Losses of samples taken together, and of the same in parts, in order.

    The loss is called once for each, and again where they differ. Buffers of the model and of a
    loss that is a module, their modes and random numbers are afterwards as before.

    What draws random numbers, or differs from call to call, is tried in eval mode. Where it does so
    there too, or where it raises, nothing is known, and nothing is found.
    """
    if not parts and next(model.buffers(), None) is None:
        return Trial()
    before = _Before(model, loss, together)
    try:
        with uncompiled(), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compared = functools.partial(_compared, model, loss, together, parts, before)
            return attempt(compared) or Trial()  # where the loss is wanted, it will raise again
    finally:
        before.put_back()


def added_up(
    model: nn.Module,
    loss: AnyLoss,
    batch: Any,
    named: Mapping[str, nn.Parameter],
    attempt: Attempt = attempted,
) -> Trial:
    """Whether gradients of two samples taken together are the sum of those of each alone.

    Also those of losses made larger: a hook may leave small gradients as they are. What is found is
    the name of a parameter. The loss is called three times, and what it changes is put back; one
    that draws random numbers is tried in eval mode, and not at all where it does so there too.

    Args:
        named: the parameters, by name.
    """
    two = few(batch, 2)
    before = _Before(model, loss, two)
    try:
        with uncompiled(), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return attempt(functools.partial(_added_up, model, loss, two, named, before)) or Trial()
    finally:
        before.put_back()


def written_over(model: nn.Module, loss: AnyLoss, batch: Any) -> Trial:
    """The collective, if there is one, that writes over a tensor that gradients flow through.

    The loss is called once more; what it changes is put back.
    """
    before, looking = _Before(model, loss, batch), Looking()
    try:
        with torch.enable_grad(), looking, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(model, batch)
    finally:
        before.put_back()
    return Trial(looking.name)


def identity(loss: Any, depth: int = 3) -> Hashable:
    """What tells one loss from another; the same for a lambda that is made anew at each step."""
    if depth == 0:
        return None
    if isinstance(loss, functools.partial):
        code, own = None, None
        inside = [loss.func, *loss.args, *loss.keywords.values()]
    else:
        code = getattr(loss, "__code__", None)
        own = getattr(loss, "__self__", loss if code is None else None)
        cells = getattr(loss, "__closure__", None) or ()
        inside = [*map(_content, cells), *(getattr(loss, "__defaults__", None) or ())]
    # flags and names; a number may be another at each step, as a weight that is scheduled
    options = tuple(each for each in inside if isinstance(each, (bool, str)))
    known = tuple(identity(each, depth - 1) for each in inside if callable(each))
    return code, None if own is None else id(own), options, known


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # as yet empty
        return None


def _compared(
    model: nn.Module,
    loss: AnyLoss,
    together: Any,
    parts: Sequence[Any],
    before: "_Before",
) -> Trial:
    whole = _losses(model, loss, together)
    moves = before.buffers_changed()
    if whole is None or not parts:
        return Trial(None, moves)
    eps = _unit(whole, list(model.parameters()))
    whole = whole.detach()  # without the graph, which would be there while others are made
    each = []
    for part in parts:
        before.put_back_buffers()
        losses = _losses(model, loss, part)
        if losses is None or losses.shape[1:] != whole.shape[1:]:
            return Trial(None, moves)
        each.append(losses.detach())
        del losses  # and its graph
    before.put_back_buffers()
    away = float(_away(whole, torch.cat(each)).max())
    limit = ROUNDINGS * eps * _largest(whole)
    if not away <= limit:
        moved = functools.partial(_move, model, loss, together, whole, before=before)
        limit += ROUNDINGS * _visible(moved, eps)
    if away <= limit:
        return Trial(None, moves)
    random = before.random_changed()
    repeated = _losses(model, loss, together)
    again = float("nan") if repeated is None else float(_away(whole, repeated).max())
    if random or again != again or again > 0.1 * away:
        if not any(module.training for module in before.modules):
            return Trial(None, moves)
        before.put_back()
        for module in before.modules:
            module.training = False
        return Trial(_compared(model, loss, together, parts, before).coupled, moves)
    return Trial(_said(whole, each), moves)


def _added_up(
    model: nn.Module,
    loss: AnyLoss,
    two: Any,
    named: Mapping[str, nn.Parameter],
    before: "_Before",
) -> Trial:
    held = {name: p for name, p in named.items() if p.requires_grad}
    parameters = list(held.values())
    whole = _total(model, loss, two)
    if before.random_changed():
        before.put_back()
        for module in before.modules:
            module.training = False
        whole = _total(model, loss, two)
        if before.random_changed():
            return Trial()
    each = []
    for k in (0, 1):
        before.put_back_buffers()
        each.append(_total(model, loss, take(two, slice(k, k + 1))))
    dtypes = {*dtypes_under(whole), *(p.dtype for p in parameters)}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    for scale in (1.0, scale_of(dtypes)):
        with Terms(whole, parameters) as terms:
            away = [grad.clone() for grad in _gradients(whole, parameters, scale)]
        sizes = [torch.zeros_like(grad) for grad in away]
        for total in each:
            for left, size, grad in zip(
                away, sizes, _gradients(total, parameters, scale), strict=True
            ):
                left -= grad
                size += grad.abs()
        for (name, p), left, size in zip(held.items(), away, sizes, strict=True):
            if not bool((left.isfinite() & size.isfinite()).any()):  # it overflowed
                continue
            size = size.double().clamp(terms.least(p, coarsest))
            if not near(left, torch.zeros_like(left), size, coarsest):
                return Trial(name)
    return Trial()


def _total(model: nn.Module, loss: AnyLoss, batch: Any) -> Tensor:
    losses: Any = loss(model, batch)
    if isinstance(losses, WeightedLosses):
        losses = losses.losses * losses.weights.to(losses.losses)
    return losses.sum()


def _gradients(total: Tensor, parameters: Sequence[nn.Parameter], scale: float) -> list[Tensor]:
    start = torch.full_like(total, scale)
    found = torch.autograd.grad(total, parameters, start, retain_graph=True, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return [local(torch.zeros_like(p) if g is None else g).to_dense() for g, p in pairs]


def _losses(model: nn.Module, loss: AnyLoss, batch: Any) -> Tensor | None:
    """Losses of samples, [B, ...]; None for what is none, which is told elsewhere."""
    losses: Any = loss(model, batch)
    if isinstance(losses, WeightedLosses):
        losses = losses.losses
    wanted = isinstance(losses, Tensor) and losses.is_floating_point() and losses.dim() > 0
    return losses if wanted and len(losses) == batch_size(batch) else None


def _away(a: Tensor, b: Tensor) -> Tensor:
    """By how much they differ; infinities and NaN do not where they are the same."""
    a, b = a.detach().double(), b.detach().double()
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0, a - b).abs()


def _visible(moved: Callable[[float], float], eps: float) -> float:
    """What losses move by when parameters do by eps, or by the least more that they see at all.

    A loss near 0 that is a difference of larger numbers, as cross-entropy of a sample that a model
    is sure of, has steps of their last place and not of its own: within one it does not move.
    """
    move, share = 0.0, eps
    while move == 0 and share < 1:
        move = moved(share)
        share *= 4
    return move


def _move(
    model: nn.Module,
    loss: AnyLoss,
    batch: Any,
    losses: Tensor,
    eps: float,
    before: "_Before",
) -> float:
    """What losses move by when every parameter does by eps of itself, up or down."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def moved(parameter: Tensor) -> Tensor:
        signs = torch.randint(2, parameter.shape, generator=generator, device="cpu") * 2 - 1
        found = parameter.detach() * (1 + eps * beside(signs.to(local(parameter)), parameter))
        return found.requires_grad_(parameter.requires_grad)

    values = {
        # asked for as a pass does: it may be gathered for that
        f"model.{name}": moved(model.get_parameter(name))
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }
    state = before.random()
    try:
        before.put_back_random()  # the same draws, if there are any
        found = functional_call(Holder(model, loss), values, (batch,))
        found = found.losses if isinstance(found, WeightedLosses) else found
    finally:
        before.put_back_random(state)
        before.put_back_buffers()
    return _largest(_away(losses, found))


def _largest(values: Tensor) -> float:
    """Of their sizes, but infinities and NaN."""
    return float(torch.where(values.isfinite(), values, 0).abs().max())


def _unit(losses: Tensor, parameters: Sequence[Tensor]) -> float:
    """By the coarsest dtype of parameters, losses and what autograd's graph has between."""
    dtypes = {losses.dtype, *(parameter.dtype for parameter in parameters)}
    if losses.requires_grad:
        for node in ordered(roots(losses)[0]):
            dtypes |= {meta.dtype for meta in getattr(node, "_input_metadata", ())}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    if losses.is_cuda and torch.float32 in dtypes:
        eps = max(eps, TF32)
    return eps


def _said(whole: Tensor, each: Sequence[Tensor]) -> str:
    parts = torch.cat(list(each))
    away = _away(whole, parts)
    at = int(torch.where(away.isnan(), torch.inf, away).argmax())
    row = at // max(whole[0].numel(), 1)
    ends = torch.tensor([len(part) for part in each], device="cpu").cumsum(0).tolist()
    size = len(each[next(k for k, end in enumerate(ends) if row < end)])
    values = [float(losses.detach().flatten()[at]) for losses in (whole, parts)]
    where = "alone" if size == 1 else f"among {size}"
    return f"{values[0]:.6g} among {len(whole)} samples, {values[1]:.6g} {where}"


class _Before:
    """What calls of a loss may change, to be put back: buffers, modes, random numbers."""

    def __init__(self, model: nn.Module, loss: AnyLoss, batch: Any) -> None:
        owners = [each for each in (loss, getattr(loss, "__self__", None)) if each is not model]
        owners = [model, *(each for each in owners if isinstance(each, nn.Module))]
        self.modules = [module for owner in owners for module in owner.modules()]
        self._modes = [module.training for module in self.modules]
        self._buffers = [Buffers(owner) for owner in owners]
        leaves = [*model.parameters(), *model.buffers(), *tensors(batch)]
        self._devices = sorted({leaf.device.index or 0 for leaf in leaves if leaf.is_cuda})
        self._state = self.random()

    def random(self) -> tuple[list[Tensor], Any, Any]:
        """The state of torch's random numbers, of Python's, and of numpy's if there is any."""
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
        numpy = sys.modules.get("numpy")
        return states, random.getstate(), None if numpy is None else numpy.random.get_state()

    def random_changed(self) -> bool:
        states, python, numpy = self.random()
        same = all(torch.equal(a, b) for a, b in zip(states, self._state[0], strict=True))
        return not (same and python == self._state[1] and repr(numpy) == repr(self._state[2]))

    def buffers_changed(self) -> list[str]:
        """Of the model, by name."""
        return self._buffers[0].changed()

    def put_back_buffers(self) -> None:
        for buffers in self._buffers:
            buffers.put_back()

    def put_back_random(self, state: tuple[list[Tensor], Any, Any] | None = None) -> None:
        states, python, numpy = self._state if state is None else state
        torch.set_rng_state(states[0])
        for device, each in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(each, device)
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)

    def put_back(self) -> None:
        """All of them, and no cast of a parameter is kept by autocast with a graph."""
        for module, training in zip(self.modules, self._modes, strict=True):
            module.training = training
        self.put_back_buffers()
        self.put_back_random()
        torch.clear_autocast_cache()
