"""One optimizer step with surgery on its gradients."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import _pytree as pytree

from gradsurgery.capture import FactoredJacobian, tape
from gradsurgery.errors import InputError
from gradsurgery.jacobian import (
    DenseJacobian,
    Loss,
    batch_size,
    concat,
    per_sample_losses,
    trainable,
)
from gradsurgery.ops._inputs import check
from gradsurgery.surgery import OrthoGrad

# Tokens of both batches up to which they go together: reading the parameters twice then costs more
# than large activations do. Measured on two threads: 512 tokens 12 % faster together, 2048 3 % and
# 6272 the same, at up to 1.5 times the memory.
FEW_TOKENS = 1024


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
    was before. Where a loss, the rule or code hung on the optimizer raises, the model's buffers,
    its parameters, `.grad` and the optimizer are as they were. Not undone: what a forward pass does
    to parameters, and an interrupt in the middle of torch's own `optimizer.step()`.

    Args:
        model: in the mode (train or eval) its losses are wanted in.
        optimizer: any torch optimizer; the parameters it holds are the ones edited.
        rule: what makes one update of the rows.
        rows: "captured", from one recorded forward and backward pass, never stored; "stored", one
            gradient of the model's size per retain sample, by torch.func.
        together: captured rows only: whether one pass does for both batches, where these have the
            same structure, dtypes, devices and sample shapes. It reads the parameters once, but
            holds what both batches need. The loss of a sample must not depend on the others of its
            batch, nor on how many there are. None: where that is faster, on few tokens. False:
            always a pass each.
        chunk_size: stored rows only: retain samples differentiated at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: OrthoGrad,
        *,
        rows: Literal["captured", "stored"] = "captured",
        together: bool | None = None,
        chunk_size: int = 32,
    ) -> None:
        check(rows in ("captured", "stored"), f"rows must be 'captured' or 'stored', got {rows!r}")
        self.model, self.optimizer, self.rule = model, optimizer, rule
        self.rows, self.together, self.chunk_size = rows, together, chunk_size
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
        with _buffers_undone_by_errors(self.model):
            return self._step(forget, retain, loss, start)

    def _step(self, forget: Any, retain: Any, loss: Loss, start: float) -> StepInfo:
        rows = self._captured if self.rows == "captured" else self._stored
        jacobian, forget_losses, retain_losses = rows(forget, retain, loss)
        solution = self.rule.solve(jacobian, metric=self._metric(jacobian.names))
        self._apply(jacobian, solution.weights)
        gram = solution.gramian
        norms = gram.diagonal().sqrt()
        scale = norms[0] * norms[1:]
        cosines = torch.where(scale > 0, gram[0, 1:] / scale, 0).clamp(-1, 1)
        kept = forget_losses, retain_losses, solution.rank
        means = [values.to(gram.device).double().mean() for values in kept]
        seen = torch.stack([*means, (cosines > 0).double().mean(), solution.kept_norm]).tolist()
        forget_loss, retain_loss, rank, conflict_rate, kept_norm = seen
        return StepInfo(
            forget_loss=forget_loss,
            retain_loss=retain_loss,
            cosines=cosines.cpu(),
            conflict_rate=conflict_rate,
            kept_norm=kept_norm,
            rank=rank,
            frozen=solution.frozen,
            seconds=time.perf_counter() - start,
        )

    def _captured(
        self, forget: Any, retain: Any, loss: Loss
    ) -> tuple[FactoredJacobian, Tensor, Tensor]:
        """Row 0 the mean forget loss's, the retain rows after it; forget and retain losses."""
        mean = self.rule.retain == "mean"
        b, k = batch_size(forget), batch_size(retain)
        one, each = torch.zeros(b, dtype=torch.int64, device="cpu"), torch.arange(k, device="cpu")
        groups = one, torch.zeros_like(each) if mean else each
        shares = (
            torch.full((b,), 1 / b, dtype=torch.float64, device="cpu"),
            torch.full((k,), 1 / k if mean else 1.0, dtype=torch.float64, device="cpu"),
        )
        whole = joined(forget, retain) if self._one_pass(forget, retain) else None
        if whole is not None:
            both = torch.cat([groups[0], groups[1] + 1])
            jacobian, losses = self._rows_of(whole, loss, both, torch.cat(shares))
            return jacobian, losses[:b], losses[b:]
        first, forget_losses = self._rows_of(forget, loss, groups[0], shares[0])
        second, retain_losses = self._rows_of(retain, loss, groups[1], shares[1])
        return concat([first, second]), forget_losses, retain_losses

    def _one_pass(self, *batches: Any) -> bool:
        if self.together is not None:
            return self.together
        return sum(map(tokens, batches)) <= FEW_TOKENS

    def _rows_of(
        self, batch: Any, loss: Loss, groups: Tensor, shares: Tensor
    ) -> tuple[FactoredJacobian, Tensor]:
        """The rows of losses weighed by shares and summed into groups, and the losses."""
        with (
            torch.enable_grad(),
            tape(self.model, parameters=list(self.parameters.values())) as recorder,
        ):
            losses = per_sample_losses(loss(self.model, batch), len(groups))
            check(losses.requires_grad, "loss does not depend on the model's parameters")
            jacobian = recorder.jacobian(losses * shares.to(losses), groups)
        return jacobian, losses.detach()

    def _stored(self, forget: Any, retain: Any, loss: Loss) -> tuple[DenseJacobian, Tensor, Tensor]:
        """The same rows, explicit."""
        options = {"parameters": list(self.parameters.values()), "chunk_size": self.chunk_size}
        jacobian = concat(
            [
                DenseJacobian.from_model(self.model, forget, loss, rows="mean", **options),
                DenseJacobian.from_model(
                    self.model, retain, loss, rows=self.rule.retain, **options
                ),
            ]
        )
        losses = cast(Tensor, jacobian.losses)
        return jacobian, losses[:1], losses[1:]

    def _apply(self, jacobian: FactoredJacobian | DenseJacobian, weights: Tensor) -> None:
        """Step on wᵀ J alone: no parameter is moved by a `.grad` from before."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [parameter.grad for parameter in held]
        try:
            for parameter in held:
                parameter.grad = None
            if isinstance(jacobian, FactoredJacobian):
                jacobian.backward(weights, release=True)
            else:
                jacobian.backward(weights)
                _drop_unused(jacobian)
            undone = _undone_by_errors(self.model, self.optimizer)
            with undone if _runs_foreign_code(self.optimizer) else nullcontext():
                self.optimizer.step()
        finally:
            for parameter, grad in zip(held, before, strict=True):
                parameter.grad = grad

    def _metric(self, names: list[str]) -> list[Tensor] | None:
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
        return [by_id[id(self.parameters[name])] for name in names]


def tokens(batch: Any) -> int:
    """An estimate, from shapes alone: the same for the same batches.

    Of integers each is one; of numbers, those of the longest dimension of a sample go together.
    """
    return max(
        leaf.numel() // (max((1, *leaf.shape[1:])) if leaf.is_floating_point() else 1)
        for leaf in pytree.tree_leaves(batch)
    )


def joined(first: Any, second: Any) -> Any | None:
    """Two batches as one, samples of the first before those of the second.

    None where they differ in structure, or a pair of tensors in dtype, device or sample shape.
    """
    leaves, structure = pytree.tree_flatten(first)
    others, other_structure = pytree.tree_flatten(second)
    if structure != other_structure:
        return None
    pairs = list(zip(leaves, others, strict=True))
    if any((a.dtype, a.device, a.shape[1:]) != (b.dtype, b.device, b.shape[1:]) for a, b in pairs):
        return None
    return pytree.tree_unflatten([torch.cat(pair) for pair in pairs], structure)


def _drop_unused(jacobian: DenseJacobian) -> None:
    """A parameter that no loss depends on has no gradient, as in an ordinary step: no decay."""
    for parameter, block in zip(jacobian.parameters or (), jacobian.blocks, strict=True):
        if parameter.grad is not None and not (parameter.grad.any() or block.any()):
            parameter.grad = None


def _runs_foreign_code(optimizer: torch.optim.Optimizer) -> bool:
    """Whether anything but torch's own optimizer can raise in `optimizer.step()`."""
    kind = type(optimizer)
    step = vars(optimizer).get("step", kind.step)
    if getattr(step, "_wrapped_by_lr_sched", False):  # counts steps, for a warning
        step = step.__wrapped__
    return (
        not kind.__module__.startswith("torch.optim.")
        or not kind.step.__module__.startswith("torch.optim.")
        or step is not kind.step
        or bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
        or bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks)
    )


@contextmanager
def _buffers_undone_by_errors(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers back if the body raises: a forward pass may update them."""
    owned = [(m, name, b) for m in model.modules() for name, b in m._buffers.items()]
    copies = {id(b): (b, b.detach().clone()) for b in model.buffers()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for module, name, buffer in owned:
                module._buffers[name] = buffer
            for buffer, saved in copies.values():
                buffer.copy_(saved)
        raise


@contextmanager
def _undone_by_errors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Puts parameters and optimizer state back if the body raises; holds a copy of both."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {id(p): p for p in (*held, *model.parameters())}
    copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    state = {p: {k: (v, _copy(v)) for k, v in s.items()} for p, s in optimizer.state.items()}
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        yield
    except BaseException:
        with torch.no_grad():
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
