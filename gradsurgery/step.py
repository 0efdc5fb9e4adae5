"""One optimizer step with surgery on its gradients."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.jacobian import DenseJacobian, Loss, batch_size, concat, trainable
from gradsurgery.ops._inputs import check
from gradsurgery.surgery import OrthoGrad


@dataclass(frozen=True)
class StepInfo:
    """What one step saw. Losses and gradients are those before the step."""

    forget_loss: float  # mean over the forget batch
    retain_loss: float  # mean over the retain batch
    cosines: Tensor  # [k] float64, of the forget gradient with each retain row
    conflict_rate: float  # share of retain rows whose loss climbing g_u raises: positive cosines
    kept_norm: float  # |g⊥| / |g_u|, in [0, 1]
    rank: float  # of the retain rows; the mean over groups where tensors are projected apart
    frozen: list[str]  # tensors the projection left no unlearning signal, or exempted
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**vars(self), "cosines": self.cosines.tolist()}


class Surgeon:
    """Takes unlearning steps: gradients of a forget and a retain batch, a rule, the optimizer.

    A plain object: the model keeps no wrapper and no hook, and `.grad` is after a step what it
    was before. Where a step raises, the model, `.grad` and the optimizer are as they were.

    Args:
        model: in the mode (train or eval) its losses are wanted in.
        optimizer: any torch optimizer; the parameters it holds are the ones edited.
        rule: what makes one update of the rows.
        chunk_size: retain samples differentiated at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: OrthoGrad,
        *,
        chunk_size: int = 32,
    ) -> None:
        self.model, self.optimizer, self.rule, self.chunk_size = model, optimizer, rule, chunk_size
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.parameters = trainable(model, held)
        plain = isinstance(optimizer, torch.optim.Adam) and not any(
            group["amsgrad"] for group in optimizer.param_groups
        )
        check(
            rule.precondition is None or plain,
            "precondition='optimizer' needs Adam or AdamW without amsgrad, "
            f"got {type(optimizer).__name__}",
        )

    def step(self, *, forget: Any, retain: Any, loss: Loss) -> StepInfo:
        """Raise the forget loss, keep the retain losses, by one optimizer step.

        Args:
            forget: batch whose mean loss is unlearned: any pytree of tensors, leading dimension B.
            retain: batch whose samples are protected.
            loss: (model, batch) -> per-sample losses [B], the loss that training lowers.
        """
        start = time.perf_counter()
        batch_size(forget, "forget")
        batch_size(retain, "retain")
        with _untouched_by_errors(self.model, self.optimizer):
            return self._step(forget, retain, loss, start)

    def _step(self, forget: Any, retain: Any, loss: Loss, start: float) -> StepInfo:
        options = {"parameters": list(self.parameters.values()), "chunk_size": self.chunk_size}
        jacobian = concat(
            [
                DenseJacobian.from_model(self.model, forget, loss, rows="mean", **options),
                DenseJacobian.from_model(
                    self.model, retain, loss, rows=self.rule.retain, **options
                ),
            ]
        )
        solution = self.rule.solve(jacobian, metric=self._metric())
        update = jacobian.combine(solution.weights)
        # a parameter that no loss depends on has no gradient, as in an ordinary step: no decay
        unused = [not (u.any() or b.any()) for u, b in zip(update, jacobian.blocks, strict=True)]
        self._apply([None if skip else u for u, skip in zip(update, unused, strict=True)])
        gram, losses = solution.gramian, cast(Tensor, jacobian.losses)
        norms = gram.diagonal().sqrt()
        scale = norms[0] * norms[1:]
        cosines = torch.where(scale > 0, gram[0, 1:] / scale, 0).clamp(-1, 1).cpu()
        return StepInfo(
            forget_loss=losses[0].item(),
            retain_loss=losses[1:].mean().item(),
            cosines=cosines,
            conflict_rate=(cosines > 0).double().mean().item(),
            kept_norm=solution.kept_norm.item(),
            rank=solution.rank.double().mean().item(),
            frozen=solution.frozen,
            seconds=time.perf_counter() - start,
        )

    def _apply(self, update: list[Tensor | None]) -> None:
        """Step on the update alone: no parameter is moved by a `.grad` from before."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [parameter.grad for parameter in held]
        try:
            for parameter in held:
                parameter.grad = None
            for parameter, grad in zip(self.parameters.values(), update, strict=True):
                parameter.grad = grad
            self.optimizer.step()
        finally:
            for parameter, grad in zip(held, before, strict=True):
                parameter.grad = grad

    def _metric(self) -> list[Tensor] | None:
        """lr / (sqrt(v) + eps) per parameter, of the steps taken so far; None before the first."""
        if self.rule.precondition is None:
            return None
        metric = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if "exp_avg_sq" not in state:
                    if any("exp_avg_sq" in s for s in self.optimizer.state.values()):
                        raise InputError(
                            "precondition: the optimizer has state for some parameters only"
                        )
                    return None
                correction = 1 - group["betas"][1] ** float(state["step"])
                root = (state["exp_avg_sq"] / correction).sqrt()
                metric.append((id(parameter), group["lr"] / (root + group["eps"])))
        by_id = dict(metric)
        return [by_id[id(parameter)] for parameter in self.parameters.values()]


@contextmanager
def _untouched_by_errors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Puts parameters, buffers and optimizer state back if the body raises; `_apply` does `.grad`.

    The copies cost what the parameters and the optimizer's state do, little beside the rows.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {id(t): t for t in (*held, *model.parameters(), *model.buffers())}
    copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items()]
    state = {p: {k: (v, _copy(v)) for k, v in s.items()} for p, s in optimizer.state.items()}
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for module, name, buffer in buffers:
                module._buffers[name] = buffer
            for key, tensor in tensors.items():
                tensor.copy_(copies[key])
            for parameter in [p for p in optimizer.state if p not in state]:
                del optimizer.state[parameter]
            for parameter, entries in state.items():
                for name, (value, saved) in entries.items():
                    kept = value.copy_(saved) if isinstance(value, Tensor) else saved
                    optimizer.state[parameter][name] = kept
            for group, option in zip(optimizer.param_groups, options, strict=True):
                group.update(option)
        raise


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
