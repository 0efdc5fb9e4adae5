"""Saved tensors that are made anew when they are read: by checkpoints, or by hooks of others.

A junction reads what a node saved, and so does the pass that follows. Inside torch's own
`GraphExecGroup` a checkpoint recomputes once for both; but it gives each tensor to one reader only,
so those that are to be read again are held for the next.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch.utils.checkpoint
from torch import Tensor
from torch._C._autograd import SavedTensor

from gradsurgery.capture.graph import ordered, roots


class _Held(dict):
    """A checkpoint's tensors by reader: one that was given to a reader stays."""

    def __setitem__(self, group: Any, handle: Any) -> None:
        if handle is not None:
            super().__setitem__(group, handle)


_holders: ContextVar[list[tuple[Any, dict]] | None] = ContextVar("holders", default=None)


@contextmanager
def recomputed_once() -> Iterator[None]:
    """What checkpoints recompute is recomputed once, for all reads inside, where torch can."""
    group = getattr(torch.utils.checkpoint, "GraphExecGroup", None)
    if group is None or group._get_current_group() is not None:
        yield
        return
    known: list[tuple[Any, dict]] = []
    token = _holders.set(known)
    try:
        with group():
            yield
    finally:
        _holders.reset(token)
        # as it was, so that nothing recomputed outlives the pass
        for holder, handles in known:
            holder.handles = handles


def read_again(nodes: Iterable[Any]) -> None:
    """What these nodes saved can be read several times inside `recomputed_once`."""
    known = _holders.get()
    if known is None:
        return
    for node in nodes:
        for saved in saved_by(node):
            holder = None if saved.unpack_hook is None else saved.data
            handles = getattr(holder, "handles", None)
            if isinstance(handles, dict) and not isinstance(handles, _Held):
                known.append((holder, handles))
                vars(holder)["handles"] = _Held(handles)


_known: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()  # by kind of node


def _names(kind: type) -> tuple[str, ...]:
    if kind not in _known:
        _known[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    return _known[kind]


def saved_by(node: Any) -> Iterator[Any]:
    """torch's records of the tensors that a node saved and still has."""
    for name in _names(node.__class__):
        try:
            found = getattr(node, name)
        except RuntimeError:  # freed
            continue
        for each in found if isinstance(found, tuple) else (found,):
            if isinstance(each, SavedTensor):
                yield each


def refusal(error: Exception, losses: Tensor) -> str | None:
    """Why what was saved cannot be read as often as rows need it; None for other errors."""
    if "backward an extra time" in str(error):
        return (
            "torch.utils.checkpoint with context_fn (selective activation checkpoints) lets its "
            "tensors be recomputed once only, and here they are needed again, as where the hook of "
            "a tensor lives anywhere in the process; leave context_fn out"
        )
    names = {
        node.name()
        for node in ordered(roots(losses)[0])
        for saved in saved_by(node)
        if saved.unpack_hook is not None
        # of a checkpoint, or of what says that it can be read as often as asked
        and not (hasattr(saved.data, "handles") or getattr(saved.data, "lasting", False))
    }
    if not names:
        return None
    named = ", ".join(sorted(names)[:3])
    return (
        f"tensors saved by {named} are packed by torch.autograd.graph.saved_tensors_hooks that do "
        f"not let them be unpacked twice ({type(error).__name__}): leave the hooks out, or have "
        "them unpack as often as asked"
    )
