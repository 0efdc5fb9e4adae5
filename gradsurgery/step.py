"""One optimizer step with surgery on its gradients."""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery.apart import Trial
from gradsurgery.batch import Loss, batch_size, trainable
from gradsurgery.capture.leaves import unmixed
from gradsurgery.collect import Collected, Collector
from gradsurgery.diagnosis import Diagnosis, diagnose
from gradsurgery.errors import InputError
from gradsurgery.grads import add_to, check_held, own, run_hooks
from gradsurgery.jacobian import DenseJacobian
from gradsurgery.ops._inputs import check, check_count
from gradsurgery.optimizers import check_not_accumulating, steppable
from gradsurgery.ranks import check_alone, check_one_rank
from gradsurgery.surgery import InputProjection, Rule, Solution
from gradsurgery.undo import Undo


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
    was before. Where a loss, the rule or code hung on the optimizer raises, or where the step is
    interrupted, the model's buffers, its parameters, `.grad`, the optimizer and what the rule
    remembers are as they were; or the step is whole. Not undone: what a forward pass does to
    parameters, and an interrupt in the middle of torch's own `optimizer.step()`.

    Parameters are looked up in every step: what the optimizer holds, of the model, and is not
    frozen has rows and is moved. Parameters that the optimizer holds and the model does not, such
    as learned weights of losses, have no part in the rule: they get the ordinary gradient of the
    losses, weighted as the rule weights their rows.

    Where samples are taken one by one (`rows="stored"`), in parts (`micro_batch`) or both batches
    at once (`together`), the first step with a loss tries whether that changes it: it calls the
    loss three or four times more, on six samples at most, and up to twelve times where it differs.
    The model's buffers, its mode and random numbers are put back. A loss that draws random numbers
    is tried in eval mode; not tried are one that draws there too, one that differs at each call,
    and one that raises on so few samples. Differences of rounding pass: in 16 bits, a few percent.

    Args:
        model: in the mode (train or eval) its losses are wanted in, held by one process.
        optimizer: any that steps on `.grad` alone; the parameters it holds are the ones edited.
        rule: what makes one update of the rows.
        rows: "captured", from one recorded forward and backward pass, never stored; "stored", one
            gradient of the model's size per row, by torch.func, each sample taken alone. Where a
            forward pass changes buffers, one of the whole batch follows.
        together: captured rows only: whether one pass does for both batches, where these have the
            same structure, dtypes, devices and sample shapes. It reads the parameters once, but
            holds what both batches need. The loss of a sample must not depend on the others of its
            batch, nor on how many there are. None: where that is faster, on few tokens, and where
            it does not. False: always a pass each.
        chunk_size: stored rows only: samples differentiated at a time.
        micro_batch: captured rows only: most samples in one forward and backward pass. A larger
            batch goes in parts, to the same rows: what the rows need is kept, a pass's graph is
            not. None: whole batches.
        project: keeps every step of the optimizer off inputs observed (`OWM`, `NullSpace`).
        process_group: where torch.distributed runs several ranks, False says that this one steps
            alone, on its own rows; None refuses, since replicas would part.

    Raises:
        InputError: an option, by name; an optimizer that needs a closure or sparse gradients; a
            model or an optimizer spread over several processes or devices; a projection of another
            model, as of a copy.
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
        process_group: Literal[False] | None = None,
    ) -> None:
        check(rows in ("captured", "stored"), f"rows must be 'captured' or 'stored', got {rows!r}")
        for name, given, kind in (
            ("model", model, nn.Module),
            ("optimizer", optimizer, torch.optim.Optimizer),
            ("rule", rule, Rule),
        ):
            got = given.__name__ if isinstance(given, type) else type(given).__name__
            check(isinstance(given, kind), f"{name} must be a {kind.__name__}, got {got}")
        check(
            together is None or isinstance(together, bool),
            f"together must be True, False or None, got {type(together).__name__}",
        )
        check_count("chunk_size", chunk_size)
        if micro_batch is not None:
            check_count("micro_batch", micro_batch, " or None")
            check(
                rows == "captured", "micro_batch is for captured rows; stored ones have chunk_size"
            )
        check(
            project is None or isinstance(project, InputProjection),
            f"project must be an OWM or a NullSpace, got {type(project).__name__}",
        )
        self.model, self.optimizer, self.rule = model, steppable(optimizer), rule
        self._given = optimizer
        self.rows: Literal["captured", "stored"] = rows
        self.together, self.chunk_size, self.micro_batch = together, chunk_size, micro_batch
        self.process_group = process_group
        self.project = project
        self._trials: dict[Hashable, Trial] = {}
        self._known: dict[str, nn.Parameter] = {}  # all that were looked up, as they were last
        self._looked_up()
        plain = isinstance(self.optimizer, torch.optim.Adam) and not any(
            group["amsgrad"] for group in self.optimizer.param_groups
        )
        check(
            rule.precondition is None or plain,
            "precondition='optimizer' needs Adam or AdamW without amsgrad, "
            f"got {type(self.optimizer).__name__}",
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those of the model that the next step has rows of, by name."""
        return self._looked_up()[0]

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
        ...): lower the losses of all rows. Batches are containers of tensors of the same leading
        dimension B, in any nesting: tuples, lists, dicts and other mappings (what a tokenizer
        gives), named tuples, dataclasses, attrs classes. `loss` gets them in the same types.

        Args:
            loss: (model, batch) -> per-sample losses [B], those that training lowers; for `batch`
                and its `memory` also [B, T], a column for each of T tasks, and then a row is the
                mean of a task and not one sample's (captured rows only). [B, 1] is neither.
            forget: its mean loss is unlearned.
            retain: its samples are protected, each, or in the mean, as the rule says.
            batch: one row for each sample or task.
            memory: samples, or tasks on them, not to be opposed, one row each, for rules with
                memory rows (OrthoGrad, UPGrad, DualProj, GEM, AGEM).

        Raises:
            InputError: a step that accelerate's `accumulate` would leave out, batches the rule has
                no use for, an entry of one that is no tensor of
                samples, losses that are no rows or do not depend on the model, or on other samples
                where these are taken apart, parameters of the loss that get no weights from the
                rule. The message names it, nothing has changed.
            NonFiniteError: a row that is not finite, or an update that overflows its dtype.
        """
        start = time.perf_counter()
        check_not_accumulating(self._given)
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
        check(callable(loss), f"loss must be a function, got {type(loss).__name__}")
        named, outside = self._looked_up()
        collector = Collector(
            model=self.model,
            rule=self.rule,
            loss=loss,
            named=named,
            outside=outside,
            rows=self.rows,
            together=self.together,
            chunk_size=self.chunk_size,
            micro_batch=self.micro_batch,
            trials=self._trials,
        )
        undo = Undo(self.model, self.optimizer, self.rule)
        with undo, undo:
            rows = collector.collect(parts)
            with unmixed(next(iter(named.values()))):  # autocast is for the loss
                solution, update = self._solve(rows)
                self.rule.note_columns(rows.jacobian.names)
                # all that may raise comes before the parameters move; it waits for a GPU no more
                # than what follows does
                info = _seen(self.rule, rows, solution)
                self._set_grads(rows, solution, update)
            if _fits(solution, named):
                check_held(outside)
            else:
                check_held({**named, **outside})
            undo.begin(copies=self.project is not None)
            if self.project is None:
                undo.step()
            else:
                with self.project.steps(undo.held):
                    self.optimizer.step()
                undo.keep()
        return replace(info, seconds=time.perf_counter() - start)

    def _looked_up(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """What the optimizer holds and is not frozen: the model's parameters, and others."""
        held, outside = {}, {}
        own = {id(parameter) for parameter in self.model.parameters()}
        for g, group in enumerate(self.optimizer.param_groups):
            for k, parameter in enumerate(group["params"]):
                held[id(parameter)] = parameter
                if parameter.requires_grad and id(parameter) not in own:
                    names = group.get("param_names")
                    name = names[k] if names else f"optimizer.param_groups[{g}]['params'][{k}]"
                    outside[name] = parameter
        foreign = held.keys() - own
        gone = {name for name, known in self._known.items() if id(known) in foreign}
        for name, parameter in self.model.named_parameters() if gone else ():
            if name in gone and parameter.requires_grad and id(parameter) not in held:
                check_one_rank(self.model)  # what spreads a model replaces parameters too
                raise InputError(
                    f"model: parameter {name} was replaced, and the optimizer holds the one from "
                    "before: make an optimizer and a Surgeon of the model as it is"
                )
        named = trainable(self.model, list(held.values()))
        check_alone(self.process_group)
        self.rule.check_columns(list(named))
        if self.project is not None:
            self.project.check_holds(named)
        self._known = {**self._known, **named}
        return named, outside

    def _solve(self, rows: Collected) -> tuple[Solution, Tensor | list[Tensor]]:
        """What the rule says of the rows, and the update: weights, or a tensor per parameter."""
        jacobian, given = rows.jacobian, {}
        if "memory" in rows.counts:
            given["memory"] = slice(jacobian.m - rows.counts["memory"], None)
        if "retain_loss" in self.rule.roles:
            given["retain_loss"] = rows.losses["retain"].mean()
        update: Any
        if self.rule.weighted:
            solution = self.rule.solve(jacobian, metric=self._metric(rows), **given)
            update = solution.weights
        else:
            solution = Solution(torch.empty(0), jacobian.gramian())
            update = self.rule(jacobian, **given)
        return solution, update

    def _set_grads(
        self, rows: Collected, solution: Solution, update: Tensor | list[Tensor]
    ) -> None:
        """wᵀ J, or a given update, alone in `.grad`: no parameter is moved by an old one."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if rows.outside is not None:
            rows.outside.backward(solution.weights)
        jacobian = rows.jacobian
        if isinstance(update, Tensor) and not isinstance(jacobian, DenseJacobian):
            jacobian.backward(update, release=True)
            return
        whole = jacobian.combine(update) if isinstance(update, Tensor) else own(update)
        parameters = jacobian.parameters or []
        for parameter, grad, used in zip(parameters, whole, rows.reached, strict=True):
            # one that no loss depends on has no gradient, as in an ordinary step: no decay
            if used:
                add_to(parameter, grad.to(parameter.dtype))
                with torch.no_grad():
                    run_hooks(parameter)

    def _metric(self, rows: Collected) -> list[Tensor] | None:
        """lr / (sqrt(v) + eps) per parameter, of the steps taken so far; None before the first."""
        if self.rule.precondition is None:
            return None
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        state = self.optimizer.state
        names = rows.jacobian.names
        known = [name for name in names if "exp_avg_sq" in state.get(self._known[name], {})]
        if not known:
            return None
        metric = []
        for name, reached in zip(names, rows.reached, strict=True):
            parameter = self._known[name]
            if not reached and name not in known:  # its rows are zero in any metric
                metric.append(torch.ones_like(parameter))
                continue
            check(
                name in known,
                f"precondition: the optimizer has state for some parameters only, none for {name}: "
                "let it take a step with a rule without precondition",
            )
            group, seen = groups[id(parameter)], state[parameter]
            correction = 1 - group["betas"][1] ** float(seen["step"])
            root = (seen["exp_avg_sq"] / correction).sqrt()
            metric.append(group["lr"] / (root + group["eps"]))
        return metric


def _fits(solution: Solution, parameters: dict[str, nn.Parameter]) -> bool:
    """Whether an update is known to be in range: no value is larger than its norm, sqrt(wᵀ G w)."""
    weights, gram = solution.weights.double(), solution.gramian
    if weights.shape != gram.shape[:1]:  # one for each tensor, or none
        return False
    limit = min(torch.finfo(parameter.dtype).max for parameter in parameters.values())
    square = weights.to(gram.device) @ gram @ weights.to(gram.device)
    return bool(square.clamp_min(0).sqrt() <= limit / 2)


def _seen(rule: Rule, rows: Collected, solution: Solution) -> StepInfo:
    """What a step tells of its rows; `seconds` are to come."""
    jacobian, losses, gram = rows.jacobian, rows.losses, solution.gramian
    norms = gram.diagonal().sqrt()
    scale = norms[:, None] * norms
    cosines = torch.where(scale > 0, gram / torch.where(scale > 0, scale, 1), 0).clamp(-1, 1)
    if "forget" in losses:
        cosines = cosines[0, 1:]
        lowered = getattr(rule, "objective", "raise") == "lower"
        rate = (cosines < 0 if lowered else cosines > 0).double().mean()
    else:
        above = cosines.triu(1)
        rate = (above < 0).double().sum() / max(jacobian.m * (jacobian.m - 1) / 2, 1)
    wanted: dict[str, Tensor | None] = {
        "conflict_rate": rate,
        "kept_norm": solution.kept_norm,
        "rank": None if solution.rank is None else solution.rank.double().mean(),
        "forget_loss": losses["forget"].mean() if "forget" in losses else None,
        "retain_loss": losses["retain"].mean() if "retain" in losses else None,
    }
    seen = {name: value for name, value in wanted.items() if value is not None}
    values = torch.stack([value.to(gram.device).double() for value in seen.values()]).tolist()
    means = torch.cat([_row_losses(each, rows.counts[part]) for part, each in losses.items()])
    return StepInfo(
        losses=means.double().cpu(),
        cosines=cosines.cpu(),
        gramian=gram.cpu(),
        frozen=solution.frozen,
        seconds=0.0,
        **dict(zip(seen, values, strict=True)),
    )


def _row_losses(losses: Tensor, rows: int) -> Tensor:
    """[rows]: of the samples [B], their mean, or of tasks [B, T] the means."""
    if losses.dim() == 2:
        return losses.mean(0) if rows == losses.shape[1] else losses.mean().reshape(1)
    return losses if len(losses) == rows else losses.mean(0, keepdim=True)
