"""Which nodes of a graph have hooks.

Nothing tells from outside what the hook of a tensor is on. But a hook that is called knows the node
that is being run. So where any hook of a tensor or a node lives in this process, whatever thread
made it, one backward pass calls them all.
"""

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradsurgery.capture.graph import ordered, roots
from gradsurgery.capture.hooks import others
from gradsurgery.capture.leaves import vjps
from gradsurgery.capture.recomputed import read_again
from gradsurgery.capture.snapshot import functions

OWNERS = (nn.Module, Optimizer)
GLOBAL = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks, *vars(module).values())


Hooks = OrderedDict[int, Callable]  # of one tensor or node, by handle


class Hooked:
    """The nodes under some losses that hooks were registered on; hooks of leaves are not asked for.

    Args:
        losses: with their graph, which is kept.
        outputs: makes what a backward pass starts from, like the losses.
        parameters: where it ends.
    """

    def __init__(
        self, losses: Tensor, outputs: Callable[[], Tensor], parameters: Sequence[nn.Parameter]
    ) -> None:
        self._losses, self._outputs = losses, outputs
        self._parameters = [p for p in parameters if p.requires_grad]  # the loss may freeze some

    def among(self, nodes: Iterable[Any]) -> bool:
        """Whether one of these nodes has a hook, or may have one where that cannot be known."""
        return self._nodes is None or not self._nodes.isdisjoint(nodes)

    @cached_property
    def _nodes(self) -> set[Any] | None:
        """All of them, by a backward pass where any hook lives; None where they are not known."""
        hooks = live_hooks.found()
        if not hooks:
            return None if hooks is None else set()
        root = roots(self._losses)[0]
        read_again(ordered(root))
        # what draws random numbers draws the same ones again
        devices = [self._losses.device] if self._losses.is_cuda else []
        with torch.random.fork_rng(devices), _telling(hooks) as found:
            vjps([self._losses], self._parameters, [self._outputs()], False, functions([root]))
        return found


@contextmanager
def _telling(hooks: Iterable[Hooks]) -> Iterator[set[Any]]:
    """Nodes that run while one of the hooks is called, as long as this lasts.

    Each hook does what it does. No key is added or taken: others may be reading what is no hook.
    """
    found: set[Any] = set()

    def telling(hook: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.add(torch._C._current_autograd_node())
            return hook(*args, **kwargs)

        return call

    put = [(each, key, hook, telling(hook)) for each in hooks for key, hook in list(each.items())]
    try:
        for each, key, hook, mine in put:
            if each.get(key) is hook:
                each[key] = mine
        yield found
    finally:
        for each, key, hook, mine in put:
            if each.get(key) is mine:
                each[key] = hook


class LiveHooks:
    """Looks for them where handles were made since the last look.

    torch keeps the hooks of a tensor, or of a node, in an OrderedDict by the numbers of their
    handles, which lives as long as its graph. The collector of garbage knows it, but not whose it
    is: those of modules, of optimizers and of leaves are set aside.

    Args:
        made: how many handles others have made.
    """

    def __init__(self, made: Callable[[], int]) -> None:
        self._made, self._looked_at = made, 0
        self._known: list[weakref.ref] = []

    def found(self) -> "list[Hooks] | None":
        """All that live, by handle; None where that cannot be told.

        Where handles were made since the last look, all objects are looked through.
        """
        made = self._made()
        if made != self._looked_at:
            if gc.get_freeze_count() > 0:  # what is frozen is not listed
                return None
            with torch._C.DisableTorchFunctionSubclass():  # tensors of all kinds are asked
                self._known = [weakref.ref(hooks) for hooks in _found()]
            self._looked_at = made
        alive = (known() for known in self._known)
        return [hooks for hooks in alive if hooks]  # and not removed


def _found() -> list[Any]:
    # any OrderedDict with numbers for keys and functions for values may be one; those of modules,
    # optimizers and leaves are known by their owners
    every = gc.get_objects()  # millions, of some thousand types
    some = list(compress(every, map(_Wanted().__getitem__, map(type, every))))
    hooks = [each for each in some if type(each) is OrderedDict and _are_hooks(each)]
    if not hooks:
        return []
    known = set(map(id, GLOBAL))
    for each in some:
        if issubclass(type(each), OWNERS):
            known.update(map(id, vars(each).values()))
        elif issubclass(type(each), Tensor) and _is_leaf(each):
            known.add(id(each._backward_hooks))
            known.add(id(getattr(each, "_post_accumulate_grad_hooks", None)))
    return [each for each in hooks if id(each) not in known]


class _Wanted(dict[type, bool]):
    """Whether objects of a type are looked at."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = wanted = issubclass(kind, (OrderedDict, *OWNERS, Tensor))
        return wanted


def _is_leaf(tensor: Tensor) -> bool:
    try:
        # one that was cut off by detach_() keeps the hooks of the node that made it
        return tensor.is_leaf and (tensor.requires_grad or isinstance(tensor, nn.Parameter))
    except RuntimeError:  # a view whose base was written to, as those of DDP's buckets are
        return False


def _are_hooks(content: OrderedDict) -> bool:
    return len(content) > 0 and all(
        isinstance(key, int) and callable(hook) for key, hook in content.items()
    )


live_hooks = LiveHooks(others)
