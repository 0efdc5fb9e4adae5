"""What an error or an interrupt must not leave half done: buffers, parameters, memories."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from operator import methodcaller
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.buffers import Buffers
from gradsurgery.capture.hooks import register
from gradsurgery.optimizers import Note, runs_foreign_code
from gradsurgery.spread import local
from gradsurgery.surgery import Rule


class Undo:
    """Around a step, twice (`with undo, undo:`), for an interrupt may come while the first ends.

    At the end `.grad` of what the optimizer holds is as it was, unless gradients were kept. Unless
    parameters have moved, or all was kept, so are the model's buffers, what the rule remembers and
    the optimizer.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, rule: Rule | None = None
    ) -> None:
        self.optimizer, self._memory = optimizer, {} if rule is None else rule._state
        self.held = [p for group in optimizer.param_groups for p in group["params"]]
        self._grads = [parameter.grad for parameter in self.held]
        self._buffers, self._differentiates = Buffers(model), torch.is_grad_enabled()
        self._remembered = dict(self._memory)  # tensors in it are replaced, never changed
        self._model = model
        self._done: list[Any] = []
        self._kept: list[Tensor | None] | None = None  # gradients that stay
        self._versions: list[int] | None = None
        self._taken: _Taken | None = None
        self._counts: list[tuple[Tensor, Tensor]] = []

    def begin(self, *, copies: bool = False) -> None:
        """To be called just before parameters move.

        Args:
            copies: of parameters and the optimizer's state, to put these back too. Always made
                where code that is not torch's own runs in the optimizer's step.
        """
        if copies or runs_foreign_code(self.optimizer):
            self._taken = _Taken(self._model, self.optimizer)
        else:
            self._counts = _counts(self.optimizer)
        self._known = set(self.optimizer.state)
        self._versions = [local(parameter)._version for parameter in self.held]

    @property
    def grads(self) -> list[tuple[Tensor, Tensor | None]]:
        """What the optimizer holds, with the gradients from before."""
        return list(zip(self.held, self._grads, strict=True))

    @contextmanager
    def begun_by_step(self, *, copies: bool = False) -> Iterator[None]:
        """`begin` for code inside that calls the optimizer's step itself.

        What a forward pass writes to parameters, as `nn.Embedding(max_norm=...)` does, is no step.
        """
        if copies or runs_foreign_code(self.optimizer):
            self.begin(copies=True)
            yield
            return
        note = Note(lambda: self.begin() if self._versions is None else None)
        handle = register(self.optimizer.register_step_pre_hook, note)
        try:
            yield
        finally:
            handle.remove()

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """The optimizer's step, or a scaler's of it, and the note that it is done."""
        # in one call of C: an interrupt comes between lines of Python, and there are none here
        if scaler is None:
            self._done.extend(map(methodcaller("step"), (self.optimizer,)))
        else:
            self._done.extend(map(methodcaller("step", self.optimizer), (scaler,)))

    def keep(self, *, grads: bool = False) -> None:
        """There is nothing to put back any more; `grads`: in `.grad` neither.

        Tensors that were gradients before get the new values, for others may hold them.
        """
        if not grads:
            self._done.append(None)
            return
        self._kept, olds, news = [], [], []
        for parameter, old in self.grads:
            new = parameter.grad
            if old is not None and new is not None and old.layout == new.layout == torch.strided:
                olds.append(local(old))
                news.append(local(new))
                new = old
            self._kept.append(new)
        with torch.no_grad():
            if olds:  # and the note, in one call of C
                self._done.extend(map(torch.ops.aten._foreach_copy_, (olds,), (news,)))
            else:
                self._done.append(None)

    def __enter__(self) -> "Undo":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not self._done and not self._moved():
                self._put_back()
        except Exception:
            if error is None:  # else what went wrong first is told
                raise
        finally:
            grads = self._grads if self._kept is None or not self._done else self._kept
            for parameter, grad in zip(self.held, grads, strict=True):
                parameter.grad = grad
            # an interrupt inside of torch.no_grad's own code leaves it on
            torch.set_grad_enabled(self._differentiates)

    def _moved(self) -> bool:
        """Whether torch's own optimizer has changed a parameter."""
        if self._versions is None or self._taken is not None:
            return False
        return [local(parameter)._version for parameter in self.held] != self._versions

    def _put_back(self) -> None:
        with torch.no_grad():
            self._buffers.put_back()
            self._memory.clear()
            self._memory.update(self._remembered)
            if self._versions is not None:
                for parameter in [p for p in self.optimizer.state if p not in self._known]:
                    del self.optimizer.state[parameter]
            for count, saved in self._counts:
                count.copy_(saved)
            if self._taken is not None:
                self._taken.put_back()


class _Taken:
    """Copies of parameters and of an optimizer's state and options."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        held = [p for group in optimizer.param_groups for p in group["params"]]
        tensors = {id(p): p for p in (*held, *model.parameters())}
        self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
        self._state = {
            p: {name: (value, _copy(value)) for name, value in entries.items()}
            for p, entries in optimizer.state.items()
        }
        self._listed = optimizer.param_groups
        self._groups = list(self._listed)
        self._options: list[dict[str, tuple[Any, Any]]] = [
            {
                name: (value, list(value) if name == "params" else _copy_option(value))
                for name, value in group.items()
            }
            for group in self._groups
        ]

    def put_back(self) -> None:
        for tensor, saved in self._copies:
            tensor.copy_(saved)
        for parameter, entries in self._state.items():
            for name in set(self.optimizer.state[parameter]) - set(entries):
                del self.optimizer.state[parameter][name]
            for name, (value, saved) in entries.items():
                kept = value.copy_(saved) if isinstance(value, Tensor) else saved
                self.optimizer.state[parameter][name] = kept
        self.optimizer.param_groups = self._listed
        self._listed[:] = self._groups
        for group, options in zip(self._groups, self._options, strict=True):
            for name in set(group) - set(options):
                del group[name]
            for name, (value, saved) in options.items():
                if name == "params":
                    value[:] = saved
                kept = value.copy_(saved) if isinstance(value, Tensor) else saved
                group[name] = value if name == "params" else kept


def _counts(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """A state's tensors of one value, as the steps taken, which are counted before all that may
    raise in an optimizer of torch, with copies."""
    found = [
        local(value)
        for entries in optimizer.state.values()
        for value in entries.values()
        if isinstance(value, Tensor) and value.numel() == 1
    ]
    # in few launches on a GPU
    copies = torch._foreach_add(found, 0) if found else ()  # type: ignore[attr-defined]
    return list(zip(found, copies, strict=True))


def _copy_option(value: Any) -> Any:
    """As `_copy`, of what can be changed in place; what else an option may be stays itself."""
    return _copy(value) if isinstance(value, (Tensor, list, tuple, dict, set)) else value


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
