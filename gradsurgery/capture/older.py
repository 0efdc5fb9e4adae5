"""Hooks of tensors and nodes that live anywhere in this process, whatever thread made them."""

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

OWNERS = (nn.Module, Optimizer)
GLOBAL = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks, *vars(module).values())


class LiveHooks:
    """Looks for them where handles were made since none was found.

    torch keeps the hooks of a tensor, or of a node, in an OrderedDict by the numbers of their
    handles, which lives as long as its graph. The collector of garbage knows it, but not whose it
    is: those of modules, of optimizers and of leaves are set aside.

    Args:
        made: how many handles others have made.
    """

    def __init__(self, made: Callable[[], int]) -> None:
        self._made, self._none_at = made, 0
        self._known: list[weakref.ref] = []

    def live(self) -> bool:
        """Whether there may be one; a look through all objects where handles were made."""
        made = self._made()
        if made == self._none_at:
            return False
        if any(hooks() for hooks in self._known):  # alive, and not removed
            return True
        if gc.get_freeze_count() > 0:  # what is frozen is not listed
            return True
        with torch._C.DisableTorchFunctionSubclass():  # tensors of all kinds are asked
            self._known = [weakref.ref(hooks) for hooks in _found()]
        if not self._known:
            self._none_at = made
        return bool(self._known)


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
        return tensor.is_leaf
    except RuntimeError:  # a view whose base was written to, as those of DDP's buckets are
        return False


def _are_hooks(content: OrderedDict) -> bool:
    return len(content) > 0 and all(
        isinstance(key, int) and callable(hook) for key, hook in content.items()
    )
