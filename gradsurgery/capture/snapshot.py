"""What a torch.autograd.Function keeps for its backward pass, put back after it was asked.

A backward pass may write into what it kept: scale a gradient that the forward pass made, update a
largest value, count its calls. Autograd calls it once, so whoever calls it more often must leave
everything as it was.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dis import get_instructions
from itertools import chain
from types import FunctionType, MemberDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _unsafe_set_version_counter
from torch.nn.modules._functions import BackwardHookFunction

from gradsurgery.capture.graph import is_of_mesh, ordered

BINDS = "STORE_GLOBAL"  # the instruction of an assignment to a global variable
DEPTH = 3  # of attributes of attributes that are looked into; a bound, or it might be everything
CONTAINERS = (dict, list, set, deque)
NONE = object()  # of a slot that is not set
SIMPLE = (bool, int, float, complex, str, type(None), Tensor, *CONTAINERS)


def is_function(node: Any) -> bool:
    """Whether a node is a torch.autograd.Function of somebody's."""
    own = type(node) is BackwardHookFunction._backward_cls or is_of_mesh(node)
    return hasattr(node, "apply") and not own


def functions(roots: Iterable[Any]) -> list[Any]:
    """The torch.autograd.Functions in the graph under some nodes."""
    found = {node: None for root in roots for node in ordered(root) if is_function(node)}
    return list(found)


@contextmanager
def as_before(nodes: Iterable[Any]) -> Iterator["Snapshot"]:
    """All that these Functions keep is afterwards what it was; `put_back` does it at once."""
    snapshot = Snapshot(nodes)
    try:
        yield snapshot
    finally:
        snapshot.put_back()


class Snapshot:
    """Copies of what Functions could change, each with that which it is a copy of.

    Those are the tensors they saved, their attributes, those of their class, and the variables that
    their backward uses from around it. Nobody can say which of them a backward writes to, so all
    are copied, but for the model's parameters.
    """

    def __init__(self, nodes: Iterable[Any]) -> None:
        # memory is copied once, however many tensors are views of it. Each tensor counts writes to
        # it, and autograd refuses one whose count has moved, so that is put back too
        self._storages: dict[int, tuple[Any, Tensor]] = {}
        self._versions: dict[int, tuple[Tensor, int]] = {}
        # the same objects under the same names, slots and keys; what is in them is looked into
        self._names: list[tuple[Any, dict[str, Any]]] = []
        self._slots: list[tuple[Any, MemberDescriptorType, Any]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()  # objects looked into: they may hold one another
        self._written: set[int] = set()  # memory that was seen to be changed
        self._mine: set[int] = set()  # memory, and what has names, of the nodes' own
        self._changed: set[int] = set()  # of what has names
        for node in nodes:
            self._look_at(node)

    def put_back(self) -> None:
        """All that Functions keep is again as it was when this was made."""
        for owner, before in self._names:
            _put_names_back(owner, before)
        for owner, slot, before in self._slots:
            _put_slot_back(owner, slot, before)
        for container, before in self._containers:
            _put_content_back(container, before)
        with torch.no_grad():
            for storage, before in self._storages.values():
                if storage.nbytes() != before.numel():
                    storage.resize_(before.numel())
                _bytes(storage).copy_(before)
        for tensor, version in self._versions.values():
            _unsafe_set_version_counter((tensor,), (version,))

    def owned(self, grads: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Gradients, as copies where putting back would change them."""
        return [g.clone() if g is not None and self._holds(g) else g for g in grads]

    def _holds(self, grad: Tensor) -> bool:
        return grad.layout == torch.strided and grad.untyped_storage()._cdata in self._storages

    def note_changes(self) -> None:
        """Remember which memory is not as it was."""
        self._written |= {
            key
            for key, (storage, before) in self._storages.items()
            if storage.nbytes() != before.numel() or not torch.equal(_bytes(storage), before)
        }
        self._written |= {
            tensor.untyped_storage()._cdata
            for tensor, version in self._versions.values()
            if tensor._version != version
        }
        self._changed |= {id(o) for o, was in self._names if _names_differ(o, was)}
        self._changed |= {id(o) for o, slot, was in self._slots if _in_slot(o, slot) is not was}
        self._changed |= {id(c) for c, was in self._containers if _content_differs(c, was)}

    def forget_the_rest(self) -> None:
        """Keep only what nodes hold themselves, and of that what was seen to be changed.

        What they reach besides, as a counter of the user's, may be changed by others before the
        next pass, and must not be put back then.
        """
        mine = self._written & self._mine
        self._storages = {key: self._storages[key] for key in mine}
        self._versions = {
            key: (tensor, version)
            for key, (tensor, version) in self._versions.items()
            if tensor.untyped_storage()._cdata in mine
        }
        named = self._mine & self._changed
        self._names = [each for each in self._names if is_function(each[0]) or id(each[0]) in named]
        self._slots = [each for each in self._slots if id(each[0]) in named]
        self._containers = [each for each in self._containers if id(each[0]) in named]

    def _look_at(self, node: Any) -> None:
        # what is added from here on is the node's own; what its class and its surroundings hold is
        # shared with others
        known, counts = set(self._storages), self._counts()
        if not any(_packed(saved) for saved in node._raw_saved_tensors):
            with suppress(RuntimeError):  # freed by an earlier pass: calling it will say so
                for tensor in node.saved_tensors:
                    self._keep(tensor, DEPTH)
        self._keep_names(node, vars(node), DEPTH)
        self._mine |= set(self._storages) - known
        found = (self._names[counts[0] :], self._slots[counts[1] :], self._containers[counts[2] :])
        self._mine |= {id(owner) for owner, *_ in chain(*found) if not isinstance(owner, nn.Module)}
        # the node's type is made by torch for the user's class, which has attributes and a backward
        for kind in type(node)._forward_cls.__mro__:
            if _is_torchs(kind):
                continue
            self._keep_class(kind)
            backward = getattr(kind, "backward", None)
            if isinstance(backward, FunctionType):
                self._keep_surroundings(backward, DEPTH)

    def _counts(self) -> tuple[int, int, int]:
        return len(self._names), len(self._slots), len(self._containers)

    def _keep_class(self, kind: type) -> None:
        names = {k: v for k, v in vars(kind).items() if isinstance(v, SIMPLE) and k[:2] != "__"}
        self._keep_names(kind, names, DEPTH)

    def _keep_surroundings(self, function: FunctionType, depth: int) -> None:
        """Variables that a function uses from around it, and that those it calls do."""
        if depth == 0 or id(function) in self._seen:
            return
        self._seen.add(id(function))
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                value = cell.cell_contents
                if isinstance(value, (*SIMPLE, nn.Module)):
                    self._keep_names(cell, {"cell_contents": value}, DEPTH)
                else:
                    self._keep_used(value, depth)
                    # as torch.library keeps a backward
                    for held in vars(value).values() if hasattr(value, "__dict__") else ():
                        if isinstance(held, FunctionType):
                            self._keep_surroundings(held, depth - 1)
        known = function.__globals__
        if _is_torchs(function):
            return
        for name in function.__code__.co_names:
            if name in known:
                self._keep_used(known[name], depth)
        # globals that it assigns to itself: only the names, since all of a module would be too much
        bound = {each.argval for each in get_instructions(function) if each.opname == BINDS}
        names = {name: known[name] for name in bound if name in known}
        if names:
            self._containers.append((known, names))

    def _keep_used(self, value: Any, depth: int) -> None:
        if isinstance(value, FunctionType):
            self._keep_surroundings(value, depth - 1)
        elif isinstance(value, type):
            if not _is_torchs(value) and value.__module__ != "builtins":
                self._keep_class(value)
        else:
            self._keep(value, DEPTH)

    def _keep_names(self, owner: Any, names: dict[str, Any], depth: int) -> None:
        self._names.append((owner, dict(names)))
        for value in names.values():
            self._keep(value, depth)

    def _keep(self, value: Any, depth: int) -> None:
        if depth == 0 or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, tuple):
            for each in value:
                self._keep(each, depth)
        elif isinstance(value, CONTAINERS) or type(value).__name__ == "ndarray":
            self._seen.add(id(value))
            self._containers.append((value, value.copy()))
            if not isinstance(value, CONTAINERS):
                return
            for each in list(value.values() if isinstance(value, dict) else value):
                self._keep(each, depth - 1)
            self._keep_slots(value, depth - 1)
        # an object of the user's: its attributes. torch's and Python's own hold nothing of his
        elif isinstance(value, nn.Module) or not (
            _is_torchs(type(value)) or type(value).__module__ in ("builtins", "functools")
        ):
            names = getattr(value, "__dict__", None)
            if isinstance(names, dict) and not isinstance(value, (type, FunctionType)):
                self._seen.add(id(value))
                self._keep_names(value, names, depth - 1)
            self._keep_slots(value, depth - 1)

    def _keep_slots(self, value: Any, depth: int) -> None:
        for slot in _slots(type(value)):
            self._seen.add(id(value))
            before = _in_slot(value, slot)
            self._slots.append((value, slot, before))
            self._keep(before, depth)

    def _keep_tensor(self, tensor: Tensor) -> None:
        # weights are not what a backward pass writes to, and copies of them would be large
        if isinstance(tensor, nn.Parameter):
            for held in vars(tensor).values():  # but to what is hung on them
                self._keep(held, 1)
            return
        if isinstance(tensor._base, nn.Parameter):
            return
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a wrapper without memory of its own
            return
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage, _bytes(storage).clone()
        if not tensor.is_inference():
            self._versions.setdefault(id(tensor), (tensor, tensor._version))


def _is_torchs(what: Any) -> bool:
    return (getattr(what, "__module__", None) or "").partition(".")[0] == "torch"


def _packed(saved: Any) -> bool:
    """Whether a checkpoint makes a saved tensor anew each time it is read."""
    return saved.unpack_hook is not None and hasattr(saved.data, "handles")


def _bytes(storage: Any) -> Tensor:
    return torch.zeros(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _put_names_back(owner: Any, before: dict[str, Any]) -> None:
    for name, value in before.items():
        if getattr(owner, name, None) is not value:
            setattr(owner, name, value)
    if not isinstance(owner, type) and "cell_contents" not in before:
        for name in [name for name in vars(owner) if name not in before]:
            delattr(owner, name)


def _names_differ(owner: Any, before: dict[str, Any]) -> bool:
    differ = any(getattr(owner, name, NONE) is not value for name, value in before.items())
    return differ or (hasattr(owner, "__dict__") and bool(vars(owner).keys() - before.keys()))


def _content_differs(container: Any, before: Any) -> bool:
    if isinstance(container, dict):
        return container.keys() != before.keys() or any(
            container[name] is not value for name, value in before.items()
        )
    if not isinstance(container, CONTAINERS):  # an array
        return container.tobytes() != before.tobytes()
    return len(container) != len(before) or any(
        a is not b for a, b in zip(container, before, strict=True)
    )


def _slots(kind: type) -> list[MemberDescriptorType]:
    """Of a class and those it is made of; a name that begins with __ is mangled, these know it."""
    every = [vars(k) for k in kind.__mro__ if "__slots__" in vars(k) and not _is_torchs(k)]
    return [v for own in every for v in own.values() if isinstance(v, MemberDescriptorType)]


def _in_slot(owner: Any, slot: MemberDescriptorType) -> Any:
    try:
        return slot.__get__(owner, type(owner))
    except AttributeError:
        return NONE


def _put_slot_back(owner: Any, slot: MemberDescriptorType, before: Any) -> None:
    if _in_slot(owner, slot) is before:
        return
    if before is NONE:
        slot.__delete__(owner)
    else:  # past what a frozen dataclass forbids
        slot.__set__(owner, before)


def _put_content_back(container: Any, before: Any) -> None:
    if isinstance(before, deque):
        container.clear()
        container.extend(before)
    elif not isinstance(before, (dict, set)):  # a list, or an array
        container[:] = before
    elif isinstance(before, set):
        container.clear()
        container |= before
    elif container is not before:
        if len(container) != len(before) and not _is_globals(container):
            for name in [name for name in container if name not in before]:
                del container[name]
        container.update(before)


def _is_globals(names: dict) -> bool:
    return "__name__" in names and "__builtins__" in names
