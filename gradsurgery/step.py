"""One optimizer step with surgery on its gradients."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradsurgery.capture import FactoredJacobian, tape
from gradsurgery.diagnosis import Diagnosis, diagnose
from gradsurgery.errors import InputError
from gradsurgery.jacobian import (
    DenseJacobian,
    Loss,
    SummedRows,
    batch_size,
    concat,
    per_sample_losses,
    trainable,
)
from gradsurgery.ops._inputs import check
from gradsurgery.surgery import InputProjection, Rule, Solution
from gradsurgery.undo import buffers_undone_by_errors, runs_foreign_code, undone_by_errors

# Tokens of both batches up to which they go together: reading the parameters twice then costs more
# than large activations do. Measured on two threads: 512 tokens 12 % faster together, 2048 3 % and
# 6272 the same, at up to 1.5 times the memory.
FEW_TOKENS = 1024


@dataclass(frozen=True)
class StepInfo:
    """What one step saw. Losses and gradients are those before the step."""

    losses: Tensor  # [m] float64, of the rows: the mean over the batch where a row is of a batch
    cosines: Tensor  # float64: [k], of the forget gradient with each other row; else [m, m]
    # share of the other rows whose loss forgetting raises: positive cosines, or negative ones where
    # the forget loss is to be lowered; of tasks the share of pairs of rows with a negative one
    conflict_rate: float
    seconds: float
    gramian: Tensor  # [m, m] float64, of the rows, on the CPU
    forget_loss: float | None = None  # means over the batches
    retain_loss: float | None = None
    kept_norm: float | None = None  # OrthoGrad: |g⊥| / |g_u|, in [0, 1]
    rank: float | None = None  # OrthoGrad: of the rows; the mean over groups of tensors
    frozen: Sequence[str] = ()  # tensors a projection left no unlearning signal, or exempted

    @property
    def diagnosis(self) -> Diagnosis:
        """Cosines, norms, ranks and conflicts of the rows, from the Gramian the step had."""
        return diagnose(self.gramian)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; without the Gramian."""
        known = {name: value for name, value in vars(self).items() if name != "gramian"}
        lists = {"losses": self.losses.tolist(), "cosines": self.cosines.tolist()}
        return {**known, **lists, "frozen": list(self.frozen)}


class Surgeon:
    """Takes steps: gradients of batches, a rule, the optimizer.

    A plain object: the model keeps no wrapper and no hook, and `.grad` is after a step what it
    was before. Where a loss, the rule or code hung on the optimizer raises, the model's buffers,
    its parameters, `.grad`, the optimizer and what the rule remembers are as they were. Not undone:
    what a forward pass does to parameters, and an interrupt in the middle of torch's own
    `optimizer.step()`.

    Args:
        model: in the mode (train or eval) its losses are wanted in.
        optimizer: any torch optimizer; the parameters it holds are the ones edited.
        rule: what makes one update of the rows.
        rows: "captured", from one recorded forward and backward pass, never stored; "stored", one
            gradient of the model's size per row, by torch.func.
        together: captured rows only: whether one pass does for both batches, where these have the
            same structure, dtypes, devices and sample shapes. It reads the parameters once, but
            holds what both batches need. The loss of a sample must not depend on the others of its
            batch, nor on how many there are. None: where that is faster, on few tokens. False:
            always a pass each.
        chunk_size: stored rows only: samples differentiated at a time.
        micro_batch: captured rows only: most samples in one forward and backward pass. A larger
            batch goes in parts, to the same rows: what the rows need is kept, a pass's graph is
            not. None: whole batches.
        project: keeps every step of the optimizer off inputs observed (`OWM`, `NullSpace`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        *,
        rows: Literal["captured", "stored"] = "captured",
        together: bool | None = None,
        chunk_size: int = 32,
        micro_batch: int | None = None,
        project: InputProjection | None = None,
    ) -> None:
        check(rows in ("captured", "stored"), f"rows must be 'captured' or 'stored', got {rows!r}")
        for name, given, kind in (
            ("model", model, nn.Module),
            ("optimizer", optimizer, torch.optim.Optimizer),
            ("rule", rule, Rule),
        ):
            got = given.__name__ if isinstance(given, type) else type(given).__name__
            check(isinstance(given, kind), f"{name} must be a {kind.__name__}, got {got}")
        self.model, self.optimizer, self.rule = model, optimizer, rule
        self.rows, self.together, self.chunk_size = rows, together, chunk_size
        check(
            micro_batch is None or micro_batch >= 1,
            f"micro_batch must be 1 or more or None, got {micro_batch}",
        )
        check(
            micro_batch is None or rows == "captured",
            "micro_batch is for captured rows; stored ones have chunk_size",
        )
        self.micro_batch = micro_batch
        check(
            project is None or isinstance(project, InputProjection),
            f"project must be an OWM or a NullSpace, got {type(project).__name__}",
        )
        self.project = project
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

    def step(
        self,
        *,
        loss: Loss,
        forget: Any = None,
        retain: Any = None,
        batch: Any = None,
        memory: Any = None,
    ) -> StepInfo:
        """One optimizer step along the rule's update.

        Either `forget` and `retain`, for rules that tell them apart (OrthoGrad, GRU, ...): raise
        the forget loss and keep the retain losses; or `batch`, for all others (PCGrad, UPGrad,
        ...): lower the losses of all rows. Batches are pytrees of tensors, leading dimension B.

        Args:
            loss: (model, batch) -> per-sample losses [B], those that training lowers; for `batch`
                and its `memory` also [B, T], a column for each of T tasks, and then a row is the
                mean of a task and not one sample's (captured rows only).
            forget: its mean loss is unlearned.
            retain: its samples are protected, each, or in the mean, as the rule says.
            batch: one row for each sample or task.
            memory: samples, or tasks on them, not to be opposed, one row each, for rules with
                memory rows (OrthoGrad, UPGrad, DualProj, GEM, AGEM).
        """
        start = time.perf_counter()
        name, roles = type(self.rule).__name__, self.rule.roles
        parts = {"forget": forget, "retain": retain, "batch": batch, "memory": memory}
        parts = {part: given for part, given in parts.items() if given is not None}
        check("memory" in roles or memory is None, f"{name} has no memory rows")
        if "forget" in roles:
            check(batch is None, f"{name} takes forget= and retain=, got {list(parts)}")
            parts = {"forget": forget, "retain": retain, **parts}
        else:
            check(
                batch is not None and forget is None and retain is None,
                f"{name} lowers every loss it is given: it takes batch=, got {list(parts)}",
            )
        for part, given in parts.items():
            batch_size(given, part)
        remembered = dict(self.rule._state)  # tensors in it are replaced, never changed
        try:
            with buffers_undone_by_errors(self.model):
                return self._step(parts, loss, start)
        except BaseException:
            self.rule._state.clear()
            self.rule._state.update(remembered)
            raise

    def _step(self, parts: dict[str, Any], loss: Loss, start: float) -> StepInfo:
        rows = self._captured if self.rows == "captured" else self._stored
        jacobian, counts, losses = rows(parts, loss)
        given: dict[str, Any] = {}
        if "memory" in parts:
            given["memory"] = slice(jacobian.m - counts["memory"], None)
        if "retain_loss" in self.rule.roles:
            given["retain_loss"] = losses["retain"].mean()
        update: Any
        if self.rule.weighted:
            solution = self.rule.solve(jacobian, metric=self._metric(jacobian.names), **given)
            update = solution.weights
        else:
            solution = Solution(torch.empty(0), jacobian.gramian())
            update = self.rule(jacobian, **given)
        self._apply(jacobian, update)

        gram = solution.gramian
        norms = gram.diagonal().sqrt()
        scale = norms[:, None] * norms
        cosines = torch.where(scale > 0, gram / torch.where(scale > 0, scale, 1), 0).clamp(-1, 1)
        if "forget" in parts:
            cosines = cosines[0, 1:]
            lowered = getattr(self.rule, "objective", "raise") == "lower"
            rate = (cosines < 0 if lowered else cosines > 0).double().mean()
        else:
            above = cosines.triu(1)
            rate = (above < 0).double().sum() / max(jacobian.m * (jacobian.m - 1) / 2, 1)
        wanted: dict[str, Tensor | None] = {
            "conflict_rate": rate,
            "kept_norm": solution.kept_norm,
            "rank": None if solution.rank is None else solution.rank.double().mean(),
            "forget_loss": losses["forget"].mean() if "forget" in parts else None,
            "retain_loss": losses["retain"].mean() if "retain" in parts else None,
        }
        seen = {name: value for name, value in wanted.items() if value is not None}
        values = torch.stack([value.to(gram.device).double() for value in seen.values()]).tolist()
        means = torch.cat([_row_losses(losses[part], counts[part]) for part in parts])
        return StepInfo(
            losses=means.double().cpu(),
            cosines=cosines.cpu(),
            gramian=gram.cpu(),
            frozen=solution.frozen,
            seconds=time.perf_counter() - start,
            **dict(zip(seen, values, strict=True)),
        )

    def _captured(
        self, parts: dict[str, Any], loss: Loss
    ) -> tuple[FactoredJacobian | SummedRows, dict[str, int], dict[str, Tensor]]:
        """The rows of the parts in order, how many each part has, and the losses of each."""
        sizes = {part: batch_size(batch) for part, batch in parts.items()}
        if self.micro_batch is not None and max(sizes.values()) > self.micro_batch:
            return self._captured_in_parts(parts, sizes, loss)
        whole = None
        if set(parts) == {"forget", "retain"} and self._one_pass(*parts.values()):
            whole = joined(*parts.values())
        if whole is None:
            found = [
                self._rows_of({part: batch}, batch, loss, sizes) for part, batch in parts.items()
            ]
        else:
            found = [self._rows_of(parts, whole, loss, sizes)]
        jacobians = [jacobian for jacobian, _, _ in found]
        jacobian = concat(jacobians) if len(jacobians) > 1 else jacobians[0]
        counts = {part: n for _, known, _ in found for part, n in known.items()}
        return jacobian, counts, {part: v for _, _, values in found for part, v in values.items()}

    def _captured_in_parts(
        self, parts: dict[str, Any], sizes: dict[str, int], loss: Loss
    ) -> tuple[SummedRows, dict[str, int], dict[str, Tensor]]:
        """As `_captured`, with no more than `micro_batch` samples in a pass."""
        jacobians, rows = [], []
        counts, losses = dict.fromkeys(parts, 0), {}
        for part, batch in parts.items():
            above = sum(counts.values())
            values = []
            for at in range(0, sizes[part], cast(int, self.micro_batch)):
                piece = pytree.tree_map(
                    lambda leaf, at=at: leaf[at : at + cast(int, self.micro_batch)], batch
                )
                jacobian, known, seen = self._rows_of({part: piece}, piece, loss, sizes)
                summed = self._merges(part) or seen[part].dim() == 2  # over samples
                first = above if summed else above + counts[part]
                counts[part] = known[part] if summed else counts[part] + known[part]
                rows += range(first, first + known[part])
                jacobians.append(jacobian)
                values.append(seen[part])
            losses[part] = torch.cat(values)
        return SummedRows(concat(jacobians), rows), counts, losses

    def _one_pass(self, *batches: Any) -> bool:
        if self.together is not None:
            return self.together
        return sum(map(tokens, batches)) <= FEW_TOKENS

    def _rows_of(
        self, parts: dict[str, Any], whole: Any, loss: Loss, totals: dict[str, int]
    ) -> tuple[FactoredJacobian, dict[str, int], dict[str, Tensor]]:
        """As `_captured`, from one pass over `whole`, the parts' samples in order.

        `totals` has the samples of each part's whole batch, which a mean is over.
        """
        sizes = {part: batch_size(batch) for part, batch in parts.items()}
        with (
            torch.enable_grad(),
            tape(self.model, parameters=list(self.parameters.values())) as recorder,
        ):
            losses = loss(self.model, whole)
            several = set(parts) <= {"batch", "memory"}
            if several and isinstance(losses, Tensor) and losses.dim() == 2:
                ((part, size),) = sizes.items()
                tasks, merged = losses.shape[1], self._merges(part)
                check(
                    losses.shape[0] == size and tasks > 0,
                    f"loss must return [{size}] or [{size}, tasks], got {list(losses.shape)}",
                )
                counts = {part: 1 if merged else tasks}
                groups = torch.arange(tasks, device="cpu").expand(size, tasks)
                groups = torch.zeros_like(groups) if merged else groups
                share = 1 / (totals[part] * (tasks if merged else 1))
                shares = torch.full((size, 1), share, dtype=torch.float64, device="cpu")
            elif several and not isinstance(losses, Tensor):
                got = type(losses).__name__
                raise InputError(
                    f"loss must return a Tensor, [B] or [B, tasks], got {got}: torch.stack(..., 1)"
                )
            else:
                losses = per_sample_losses(losses, sum(sizes.values()))
                counts, groups, shares = self._layout(sizes, totals)
            check(losses.requires_grad, "loss does not depend on the model's parameters")
            jacobian = recorder.jacobian(losses * shares.to(losses), groups)
        detached = losses.detach().split(list(sizes.values()))
        return jacobian, counts, dict(zip(parts, detached, strict=True))

    def _layout(
        self, sizes: dict[str, int], totals: dict[str, int]
    ) -> tuple[dict[str, int], Tensor, Tensor]:
        """How many rows each part has, the row of each sample, and its share in that row."""
        counts, groups, shares = {}, [], []
        for part, size in sizes.items():
            merged = self._merges(part)
            each = torch.arange(size, device="cpu")
            groups.append((torch.zeros_like(each) if merged else each) + sum(counts.values()))
            share = 1 / totals[part] if merged else 1.0
            shares.append(torch.full((size,), share, dtype=torch.float64, device="cpu"))
            counts[part] = 1 if merged else size
        return counts, torch.cat(groups), torch.cat(shares)

    def _merges(self, part: str) -> bool:
        """Whether the rule asks for the mean of a batch only."""
        return part == "forget" or part in self.rule.merges

    def _stored(
        self, parts: dict[str, Any], loss: Loss
    ) -> tuple[DenseJacobian, dict[str, int], dict[str, Tensor]]:
        """The same rows, explicit."""
        options = {"parameters": list(self.parameters.values()), "chunk_size": self.chunk_size}
        found = {}
        for part, batch in parts.items():
            kind = "mean" if self._merges(part) else "samples"
            found[part] = DenseJacobian.from_model(self.model, batch, loss, rows=kind, **options)
        counts = {part: jacobian.m for part, jacobian in found.items()}
        losses = {part: cast(Tensor, jacobian.losses) for part, jacobian in found.items()}
        return concat(list(found.values())), counts, losses

    def _apply(
        self, jacobian: FactoredJacobian | SummedRows | DenseJacobian, update: Tensor | list[Tensor]
    ) -> None:
        """Step on wᵀ J, or on a given update, alone: no parameter is moved by an old `.grad`."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [parameter.grad for parameter in held]
        try:
            for parameter in held:
                parameter.grad = None
            if isinstance(update, list):
                # a parameter that no loss depends on has no gradient, as in an ordinary step
                squares = jacobian.gramian(per="tensor").diagonal(dim1=-2, dim2=-1)
                reached = (squares != 0).any(-1).tolist()
                for name, grad, used in zip(jacobian.names, update, reached, strict=True):
                    parameter = self.parameters[name]
                    parameter.grad = grad.to(parameter.dtype) if used else None
            elif isinstance(jacobian, (FactoredJacobian, SummedRows)):
                jacobian.backward(update, release=True)
            else:
                jacobian.backward(update)
                _drop_unused(jacobian)
            undone = undone_by_errors(self.model, self.optimizer)
            kept = nullcontext() if self.project is None else self.project.steps(held)
            with undone if runs_foreign_code(self.optimizer) else nullcontext(), kept:
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


def _row_losses(losses: Tensor, rows: int) -> Tensor:
    """[rows]: of the samples [B], their mean, or of tasks [B, T] the means."""
    if losses.dim() == 2:
        return losses.mean(0) if rows == losses.shape[1] else losses.mean().reshape(1)
    return losses if len(losses) == rows else losses.mean(0, keepdim=True)


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
