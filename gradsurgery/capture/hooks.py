"""Hooks between the losses and the parameters, asked like operations where they change a gradient.

Where one of the nodes that gradients pass has a hook (hooked.py), the pass is watched, and repeated
for some rows alone: what is made of a row's gradient must be the same without the others.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils.hooks import BackwardHook, RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from gradsurgery.capture.graph import Place, ordered, roots, variable_of
from gradsurgery.capture.layout import Layout
from gradsurgery.capture.snapshot import Snapshot
from gradsurgery.errors import InputError
from gradsurgery.spread import is_split

Sampled = dict[Any, dict[int, Layout]]  # operations, losses first: the layouts of their outputs
# how much smaller and larger losses are made to see whether all below is linear in them
SCALES = {torch.float16: 2.0**4, torch.float64: 2.0**200}
ROUNDINGS = 64  # in units of the last place, that two ways to a sum may differ by


_own = 0  # handles made here
_counting = Lock()


def register(method: Callable, hook: Callable) -> RemovableHandle:
    """A hook of the library's own on a node or an optimizer, which `others` does not count."""
    global _own
    with _counting:
        _own += 1
        return method(hook)


def others() -> int:
    """How many handles of hooks were made in this process, but for those made here."""
    with _counting:
        return RemovableHandle.next_id - _own


_looked_at = WeakTensorKeyDictionary()  # by parameter: how many handles there were


def refuse_unseen_accumulation(named: Mapping[str, nn.Parameter]) -> None:
    """Raise where a parameter's gradient is changed, or kept, where rows do not pass.

    Nodes that accumulate are looked at where a handle was made since they last were.
    """
    # rows are taken before gradients are accumulated, so what happens there is not seen
    made = others()
    for name, parameter in named.items():
        if hasattr(parameter, "main_grad"):
            raise InputError(
                f"parameter {name} has its gradient accumulated in main_grad, by a backward of its "
                "own, which rows do not see: switch gradient accumulation fusion off"
            )
        # one that the loss of another pass froze accumulates nothing
        if not parameter.requires_grad or _looked_at.get(parameter) == made:
            continue
        _looked_at[parameter] = made
        node = torch.autograd.graph.get_gradient_edge(parameter).node
        for method in (node.register_prehook, node.register_hook):
            handle = register(method, _nothing)
            hooks = handle.hooks_dict_ref() or {}
            handle.remove()
            if len(hooks) > 0:
                raise InputError(
                    f"parameter {name} has a hook on the node that accumulates its gradient, where "
                    "rows do not pass: use Tensor.register_hook, or "
                    "register_post_accumulate_grad_hook"
                )


def _nothing(*_: object) -> None:
    pass


class Hook(NamedTuple):
    """What changed a gradient: at the output `nr` of a node, or in what the node gave."""

    node: Any
    nr: int | None
    functions: Sequence[Callable]


class Watch:
    """Sees what every node takes and gives in a backward pass, after all hooks; for one pass."""

    def __init__(self, sampled: Sampled, root: Place, outputs: Tensor) -> None:
        self.sampled = sampled
        self.taken: dict[Any, Sequence[Tensor | None]] = {}
        # what was given for each place, and sums of it from then: a hook may write to it later
        self._came: dict[Place, list[tuple[Tensor, Tensor]]] = {root: [(outputs, _sum(outputs))]}
        self._gave: dict[Any, Sequence[Tensor | None]] = {}
        self._before: dict[Any, Sequence[Callable]] = {}  # hooks of others on nodes
        self._after: dict[Any, Sequence[Callable]] = {}
        self._handles: list[RemovableHandle] = []
        self.hooks: list[Hook] = []  # that changed a gradient, losses first

    def __enter__(self) -> "Watch":
        for node in self.sampled:
            take, give = partial(self._take, node), partial(self._give, node)
            # registered last, so they run last: prehooks see what other hooks made, and so do hooks
            for method, mine, theirs in (
                (node.register_prehook, take, self._before),
                (node.register_hook, give, self._after),
            ):
                handle = register(method, mine)
                self._handles.append(handle)
                hooks = handle.hooks_dict_ref() or {}
                # another thread may ask where mine is, too
                found = [getattr(hook, "stands_for", hook) for hook in hooks.values()]
                theirs[node] = [hook for hook in found if hook is not mine]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _take(self, node: Any, grads: Sequence[Tensor | None]) -> None:
        self.taken[node] = grads

    def _give(self, node: Any, grads: Sequence[Tensor | None], _: object) -> None:
        if self._after[node]:
            self._gave[node] = grads
        for place, grad in zip(node.next_functions, grads, strict=True):
            if grad is not None and place[0] in self.sampled:
                self._came.setdefault(place, []).append((grad, _sum(grad)))

    def look(self, snapshot: Snapshot) -> None:
        """Finds hooks; what was seen stays when what Functions keep is put back."""
        self.hooks = list(self._hooks())
        self.taken = {node: snapshot.owned(grads) for node, grads in self.taken.items()}

    def _hooks(self) -> Iterator[Hook]:
        """Those that changed a gradient, losses first."""
        for node, taken in self.taken.items():
            for nr, grad in enumerate(taken):
                came = self._came.get((node, nr))
                if grad is not None and came and _changed(came, grad):
                    yield Hook(node, nr, self._before[node])
            # what an operation would have given cannot be known; such a one gives what it takes
            if self._after[node] and not (
                _passes_on(node)
                and all(a is b for a, b in zip(self._gave.get(node, taken), taken, strict=True))
            ):
                yield Hook(node, None, self._after[node])


def _passes_on(node: Any) -> bool:
    return type(node) is BackwardHookFunction._backward_cls


def _sum(grad: Tensor) -> Tensor:
    """Another number where a hook has written to it, by whatever way."""
    grad = torch.view_as_real(grad) if grad.is_complex() else grad
    return torch.stack([grad.double().sum(), grad.double().abs().sum()])


def _changed(came: list[tuple[Tensor, Tensor]], grad: Tensor) -> bool:
    """Whether a gradient is no longer the sum of what came."""
    # a single gradient is handed on as the tensor it is; several are summed by autograd, in an
    # order that is not known, so they agree up to rounding
    first, before = came[0]
    if len(came) == 1:  # what a hook returned is another tensor, though its values be the same
        return grad is not first or not torch.equal(_sum(grad).nan_to_num(), before.nan_to_num())
    total = first.to(grad.dtype)
    size = total.abs()
    for other, _ in came[1:]:
        total, size = total + other, size + other.abs()
    near = (grad - total).abs() <= 4 * len(came) * torch.finfo(grad.dtype).eps * size
    return not bool((near | (grad == total) | (grad.isnan() & total.isnan())).all())


class Difference(NamedTuple):
    """Where a pass took another gradient than expected."""

    node: Any
    nr: int


def coupling(full: Watch, masked: Watch, inside: Callable[[Tensor], Tensor]) -> Difference | None:
    """The first place where rows depend on others, from a pass of some rows alone.

    inside: of row numbers, whether the masked pass had them.
    """
    for node, outs in full.sampled.items():
        for nr, layout in outs.items():
            whole, part = _at(full, node, nr), _at(masked, node, nr)
            if whole is None or part is None:
                continue
            rows = layout.beside(tuple(whole.shape)).to(whole.device)
            mine = inside(rows) & (rows >= 0)
            if torch.equal(part, torch.where(mine, whole, 0)):  # mostly; NaN is equal to nothing
                continue
            # equal up to rounding, of the size of the largest value of the element's own row: rows
            # may differ by many orders, and each must be right for itself
            rows = rows.expand(whole.shape)
            size = whole.abs()
            sizes = size.new_zeros(int(rows.max()) + 2 if rows.numel() else 1)
            sizes.scatter_reduce_(0, (rows + 1).flatten(), size.flatten(), "amax")
            near = (part - whole).abs() <= _roundings(whole) * sizes[rows + 1]
            none = ~part.isfinite()  # 0 / 0, where a hook divides by what a sample has not
            known = whole.isfinite()
            fine = torch.where(mine, torch.where(known, near, none), (part == 0) | none)
            if not bool(fine.all()):
                return Difference(node, nr)
    return None


def bending(full: Watch, scaled: Watch, factor: float) -> Difference | None:
    """The first place that is not linear, from a pass of all losses times a factor."""
    for node, outs in full.sampled.items():
        for nr in outs:
            whole, part = _at(full, node, nr), _at(scaled, node, nr)
            if whole is not None and part is not None and not linear(whole, part, factor):
                return Difference(node, nr)
    return None


def linear(whole: Tensor, scaled: Tensor, factor: float) -> bool:
    """Whether one is the other times a factor, as far as both can be known."""
    expected = whole * factor
    return near(scaled, expected, expected.abs())


def near(
    found: Tensor,
    expected: Tensor,
    size: Tensor,
    dtype: torch.dtype | None = None,
    roundings: int = ROUNDINGS,
) -> bool:
    """Whether two sums of the same numbers agree, as far as both can be known.

    Args:
        size: the sums of these numbers without their signs.
        dtype: what they were rounded to, where that is coarser than theirs.
        roundings: how often they may have been.
    """
    # what overflowed when it was scaled says nothing about hooks
    known = expected.isfinite() & found.isfinite()
    if not bool(known.any()):
        return expected.numel() == 0
    away = torch.where(known, (found - expected).abs(), 0)
    largest = torch.where(known, size, 0).max()
    eps = roundings * torch.finfo(expected.dtype if dtype is None else dtype).eps
    return bool((away <= eps * largest + torch.finfo(expected.dtype).tiny).all())


def _at(watch: Watch, node: Any, nr: int) -> Tensor | None:
    taken = watch.taken.get(node)
    grad = None if taken is None else taken[nr]
    # of what ranks have parts of, the whole
    # a DTensor, which its type does not say
    return grad.full_tensor() if grad is not None and is_split(grad) else grad  # type: ignore[operator]


def _roundings(like: Tensor) -> float:
    return ROUNDINGS * torch.finfo(like.dtype).eps


def scale_of(dtypes: Iterable[torch.dtype]) -> float:
    """How much larger and smaller gradients of these dtypes can be made to be."""
    return min((SCALES.get(dtype, 2.0**40) for dtype in dtypes), default=2.0**40)


def dtypes_under(losses: Tensor) -> set[torch.dtype]:
    """Those of all gradients that a backward pass has."""
    nodes = [n for n in ordered(roots(losses)[0]) if variable_of(n) is None]
    return {losses.dtype, *(meta.dtype for node in nodes for meta in node._input_metadata)}


def culprit(watches: Sequence[Watch], difference: Difference, model: nn.Module) -> str:
    """The name of the hook, or of the operation, that is the reason of a difference."""
    sampled, hooks = watches[0].sampled, [hook for watch in watches for hook in watch.hooks]
    order = {node: k for k, node in enumerate(sampled)}
    last = order[difference.node]
    # of the hooks above the difference the nearest: further up nothing differed
    above = [hook for hook in hooks if order[hook.node] <= last]
    above = [hook for hook in above if hook.node is not difference.node or hook.nr is not None]
    if not above:
        gave = [
            node
            for node in sampled
            if (difference.node, difference.nr) in list(node.next_functions)
        ]
        return ", ".join(sorted({node.name() for node in gave})) or difference.node.name()
    return named(max(above, key=lambda hook: order[hook.node]), model)


def named(hook: Hook, model: nn.Module) -> str:
    module = next(filter(None, map(_module_of, hook.functions)), None)
    if module is not None:
        known = {id(m): name for name, m in model.named_modules()}
        name = known.get(id(module), "")
        return f"the backward hook of {name or 'the model'} ({type(module).__name__})"
    if hook.nr is None:
        return f"a hook on {hook.node.name()}"
    shape = list(hook.node._input_metadata[hook.nr].shape)
    return f"a hook on the output of {hook.node.name()}, {shape}"


def _module_of(function: Callable) -> nn.Module | None:
    """The module that torch registered a hook for."""
    for cell in getattr(function, "__closure__", None) or ():
        if isinstance(cell.cell_contents, BackwardHook):
            return cell.cell_contents.module
    return None


def bits(count: int) -> int:
    return max(1, math.ceil(math.log2(max(count, 2))))
