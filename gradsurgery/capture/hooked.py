"""Which nodes of a graph have hooks.

Nothing tells from outside what the hook of a tensor is on. But what is called as a hook knows the
node that is being run. So where any hook of a tensor or a node lives in this process, whatever
thread made it, one backward pass asks them all where they are, and calls none.
"""

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, compress, starmap
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules import module
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.hooks import RemovableHandle

from gradsurgery.capture.graph import ordered, roots, variable_of
from gradsurgery.capture.hooks import others, register
from gradsurgery.capture.leaves import vjps
from gradsurgery.capture.recomputed import read_again
from gradsurgery.capture.snapshot import functions

GLOBAL = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks, *vars(module).values())
OF_MODULES = [name for name, value in vars(nn.Module()).items() if type(value) is OrderedDict]
KINDS = (OrderedDict, RemovableHandle, nn.Module, Optimizer, Tensor)
ENGINE = torch.autograd.graph.__name__  # the module that runs the engine

Hooks = OrderedDict[int, Callable]  # of one tensor or node, by handle


class Hooked:
    """The nodes under some losses that hooks were registered on.

    Args:
        losses: with their graph, which is kept.
        outputs: makes what a backward pass starts from, like the losses.
        parameters: where it ends.
    """

    def __init__(
        self, losses: Tensor, outputs: Callable[[], Tensor], parameters: Sequence[nn.Parameter]
    ) -> None:
        self._losses, self._outputs, self._parameters = losses, outputs, parameters
        self._asked = False
        self._nodes: set[Any] | None = None

    def among(self, nodes: Iterable[Any]) -> bool:
        """Whether one of these nodes has a hook, or may have one where that cannot be known."""
        known = self._known()
        return known is None or not known.isdisjoint(nodes)

    @property
    def found(self) -> bool:
        """Whether any operation has a hook, or may have, if that was asked of some."""
        return self._asked and self._nodes != set()

    def _known(self) -> set[Any] | None:
        if not self._asked:
            self._asked, self._nodes = True, self._all()
        return self._nodes

    def _all(self) -> set[Any] | None:
        """By a backward pass, where any hook lives; None where they are not known."""
        hooks = live_hooks.found()
        if not hooks:
            return None if hooks is None else set()
        with torch.enable_grad():
            total = (self._losses * self._outputs()).sum()
        root = roots(total)[0]
        nodes = ordered(root)
        # what was frozen after the forward pass is still in the graph
        own = set(map(id, self._parameters))
        ends = [GradientEdge(n, 0) for n in nodes if id(variable_of(n)) in own]
        if not ends:
            return set()
        read_again(nodes)
        # what draws random numbers draws the same ones again
        devices = [total.device] if total.is_cuda else []
        asking = Asking()
        start = register(root.register_prehook, asking.begins)
        try:
            with torch.random.fork_rng(devices), _asked(hooks, asking):
                vjps([total], ends, [torch.ones_like(total)], False, functions([root]))
        except Exception:  # a pass may need what its hooks do; else it will raise again
            return None
        finally:
            start.remove()
        return {node for node in asking.found if variable_of(node) is None}


class Asking:
    """A pass that asks hooks where they are: its number, and the nodes found."""

    def __init__(self) -> None:
        self.task: int | None = None
        self.found: set[Any] = set()

    def begins(self, _: object) -> None:
        self.task = torch._C._current_graph_task_id()


class _Asked:
    """Stands for a hook in its place; for all but the passes that ask, it is that hook."""

    def __init__(self, hook: Callable) -> None:
        self.stands_for = hook
        self.by: list[Asking] = []  # of all threads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        task = torch._C._current_graph_task_id()
        mine = [asking for asking in tuple(self.by) if asking.task == task]
        if not mine or not _called_by_the_engine():
            return self.stands_for(*args, **kwargs)
        for asking in mine:
            asking.found.add(torch._C._current_autograd_node())
        return None  # as a hook that changes nothing


def _called_by_the_engine() -> bool:
    """Whether a hook that asks this was called by autograd, and not by a Function's backward."""
    try:
        frame = sys._getframe(2)
    except ValueError:  # a GPU's thread has no frames
        return True
    return frame.f_globals.get("__name__") == ENGINE


_putting = Lock()


@contextmanager
def _asked(hooks: Iterable[Hooks], asking: Asking) -> Iterator[None]:
    """Has one more who asks, as long as this lasts.

    No key is added or taken: another thread may be reading.
    """
    put = []
    try:
        with _putting:
            for each in hooks:
                for key, hook in list(each.items()):
                    asked: Any = hook if type(hook) is _Asked else _Asked(hook)
                    put.append((each, key, asked))
                    asked.by.append(asking)
                    if each.get(key) is hook:  # not removed since
                        each[key] = asked
        yield
    finally:
        with _putting:
            for each, key, asked in put:
                if asking in asked.by:
                    asked.by.remove(asking)
                if not asked.by and each.get(key) is asked:
                    each[key] = asked.stands_for


class LiveHooks:
    """Looks for them where handles were made since the last look.

    torch keeps the hooks of a tensor, or of a node, in an OrderedDict by the numbers of their
    handles, which lives as long as its graph. The collector of garbage knows it, but not whose it
    is: those of modules and of optimizers are set aside.

    Args:
        made: how many handles others have made.
    """

    def __init__(self, made: Callable[[], int]) -> None:
        self._made = made
        # at how many handles, what lived, and what may be somebody's table
        self._looked: tuple[int, list[weakref.ref], list[weakref.ref]] = 0, [], []

    def found(self) -> list[Hooks] | None:
        """All that live, by handle; None where that cannot be told.

        Where handles were made since the last look, all objects are looked through.
        """
        made, (at, known, unclear) = self._made(), self._looked
        if made != at:
            if gc.get_freeze_count() > 0:  # what is frozen is not listed
                return None
            with torch._C.DisableTorchFunctionSubclass():  # tensors of all kinds are asked
                known, unclear = (list(map(weakref.ref, each)) for each in _found())
            self._looked = made, known, unclear
        if any(hooks() for hooks in unclear):
            return None
        alive = (hooks() for hooks in known)
        return [hooks for hooks in alive if hooks]  # and not removed


def _found() -> tuple[list[Hooks], list[Hooks]]:
    """Those of tensors and nodes, and what may be such or a table of functions by number."""
    some = _some()
    hooks = [each for each in some if type(each) is OrderedDict and _are_hooks(each)]
    if not hooks:
        return [], []
    # those of modules, of optimizers, and for what was accumulated, are known by their owners; and
    # so are those of tensors and handles that are still there
    other, known = set(map(id, GLOBAL)), set()
    for each in some:
        kind = type(each)
        if issubclass(kind, nn.Module):
            other.update(id(vars(each).get(name)) for name in OF_MODULES)
        elif issubclass(kind, Optimizer):
            other.update(id(v) for name, v in vars(each).items() if name.startswith("_optimizer_"))
        elif issubclass(kind, Tensor):
            other.add(id(getattr(each, "_post_accumulate_grad_hooks", None)))
            known.add(id(each._backward_hooks))
        elif issubclass(kind, RemovableHandle) and "hooks_dict_ref" in vars(each):
            known.add(id(each.hooks_dict_ref()))  # one of several handles has none
    hooks = [each for each in hooks if id(each) not in other]
    rest = [each for each in hooks if id(each) not in known]
    # else nobody holds them but autograd, which says nothing of it
    mine = {id(some), id(hooks), id(rest)}
    holders = [each for each in gc.get_referrers(*rest) if id(each) not in mine]
    held = {id(each) for holder in holders for each in gc.get_referents(holder)}
    clear = [each for each in hooks if id(each) in known or id(each) not in held]
    return clear, [each for each in rest if id(each) in held]


def _some() -> list[Any]:
    """Of all objects those that are hooks, or may own some."""
    # millions, of some thousand types
    kinds = set(map(type, _every()))
    wanted = {k for k in kinds if issubclass(k, KINDS)}
    objects, some = [], []
    picked = compress(objects, map(wanted.__contains__, map(type, objects)))
    steps = [partial(objects.extend, _every()), partial(some.extend, picked), objects.clear]
    # another thread may be filling a tuple, and fails where anybody else holds it: so no thread
    # runs while all objects are held, which is so inside of one call that makes none
    any(chain.from_iterable([starmap(step, [()]) for step in steps]))
    return some


def _every() -> Iterator[Any]:
    """All objects, listed when the first is asked for."""
    return chain.from_iterable(starmap(gc.get_objects, [()]))


def _are_hooks(content: OrderedDict) -> bool:
    return len(content) > 0 and all(
        isinstance(key, int) and callable(hook) for key, hook in list(content.items())
    )


live_hooks = LiveHooks(others)
