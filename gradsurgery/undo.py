"""What an error or an interrupt must not leave half done: buffers, parameters, memories."""

import copy
from operator import methodcaller
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.buffers import Buffers
from gradsurgery.optimizers import runs_foreign_code
from gradsurgery.surgery import Rule


class Undo:
    """Around a step, twice (`with undo, undo:`), for an interrupt may come while the first ends.

    At the end `.grad` of what the optimizer holds is as it was. Unless parameters have moved, so
    are the model's buffers, what the rule remembers and the optimizer.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, rule: Rule | None = None
    ) -> None:
        self.optimizer, self._memory = optimizer, {} if rule is None else rule._state
        self.held = [p for group in optimizer.param_groups for p in group["params"]]
        self._grads = [parameter.grad for parameter in self.held]
        self._buffers = Buffers(model)
        self._remembered = dict(self._memory)  # tensors in it are replaced, never changed
        self._model = model
        self._done: list[None] = []
        self._versions: list[int] | None = None
        self._taken: _Taken | None = None

    def begin(self, *, copies: bool = False) -> None:
        """To be called just before parameters move.

        Args:
            copies: of parameters and the optimizer's state, to put these back too. Always made
                where code that is not torch's own runs in the optimizer's step.
        """
        if copies or runs_foreign_code(self.optimizer):
            self._taken = _Taken(self._model, self.optimizer)
        self._known = set(self.optimizer.state)
        self._versions = [parameter._version for parameter in self.held]

    def step(self) -> None:
        """The optimizer's step, and the note that it is done."""
        # in one call of C: an interrupt comes between lines of Python, and there are none here
        self._done.extend(map(methodcaller("step"), (self.optimizer,)))

    def keep(self) -> None:
        """In place of `step`, when all have moved: there is nothing to put back any more."""
        self._done.append(None)

    def __enter__(self) -> "Undo":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._done and not self._moved():
            self._put_back()
        for parameter, grad in zip(self.held, self._grads, strict=True):
            parameter.grad = grad

    def _moved(self) -> bool:
        """Whether torch's own optimizer has changed a parameter."""
        if self._versions is None or self._taken is not None:
            return False
        return [parameter._version for parameter in self.held] != self._versions

    def _put_back(self) -> None:
        with torch.no_grad():
            self._buffers.put_back()
            self._memory.clear()
            self._memory.update(self._remembered)
            if self._versions is not None:
                for parameter in [p for p in self.optimizer.state if p not in self._known]:
                    del self.optimizer.state[parameter]
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
        self._options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
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
        for group, options in zip(self.optimizer.param_groups, self._options, strict=True):
            group.update(options)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
