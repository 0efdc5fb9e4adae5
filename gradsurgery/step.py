"""One optimizer step with surgery on its gradients."""

import time
from dataclasses import dataclass
from typing import Any

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
    conflict_rate: float  # share of retain rows with a negative cosine, in [0, 1]
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
        check(
            rule.precondition is None or "betas" in optimizer.defaults,
            f"precondition='optimizer' needs Adam or AdamW, got {type(optimizer).__name__}",
        )

    def step(self, *, forget: Any, retain: Any, loss: Loss) -> StepInfo:  # noqa: ANN401
        """Raise the forget loss, keep the retain losses, by one optimizer step.

        Args:
            forget: batch whose mean loss is unlearned: any pytree of tensors, leading dimension B.
            retain: batch whose samples are protected.
            loss: (model, batch) -> per-sample losses [B], the loss that training lowers.
        """
        start = time.perf_counter()
        batch_size(forget, "forget"), batch_size(retain, "retain")
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
        self._apply(jacobian.combine(solution.weights))
        gram, losses = solution.gramian, jacobian.losses
        norms = gram.diagonal().sqrt()
        scale = norms[0] * norms[1:]
        cosines = torch.where(scale > 0, gram[0, 1:] / scale, 0).clamp(-1, 1).cpu()
        return StepInfo(
            forget_loss=losses[0].item(),
            retain_loss=losses[1:].mean().item(),
            cosines=cosines,
            conflict_rate=(cosines < 0).double().mean().item(),
            kept_norm=solution.kept_norm.item(),
            rank=solution.rank.double().mean().item(),
            frozen=solution.frozen,
            seconds=time.perf_counter() - start,
        )

    def _apply(self, update: list[Tensor]) -> None:
        before = [parameter.grad for parameter in self.parameters.values()]
        try:
            for parameter, grad in zip(self.parameters.values(), update, strict=True):
                parameter.grad = grad
            self.optimizer.step()
        finally:
            for parameter, grad in zip(self.parameters.values(), before, strict=True):
                parameter.grad = grad

    def _metric(self) -> list[Tensor] | None:
        """1 / (sqrt(v) + eps) per parameter, from the steps taken so far; None before the first."""
        if self.rule.precondition is None:
            return None
        metric = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if "exp_avg_sq" not in state:
                    if any("exp_avg_sq" in s for s in self.optimizer.state.values()):
                        raise InputError("precondition: the optimizer has state for some parameters only")
                    return None
                correction = 1 - group["betas"][1] ** float(state["step"])
                root = (state["exp_avg_sq"] / correction).sqrt()
                metric.append((id(parameter), 1 / (root + group["eps"])))
        by_id = dict(metric)
        return [by_id[id(parameter)] for parameter in self.parameters.values()]
