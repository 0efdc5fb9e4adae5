"""Surgery on gradients: rows of batches, a rule, and its update in `.grad` or stepped along."""

import math
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gradsurgery import given
from gradsurgery.apart import Trial
from gradsurgery.batch import AnyLoss
from gradsurgery.capture.held import Hold
from gradsurgery.capture.leaves import without_autocast
from gradsurgery.collect import Added, Known, Summary
from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.grads import check_held
from gradsurgery.info import StepInfo, seen
from gradsurgery.ops._inputs import check, check_count, check_number, one_of
from gradsurgery.optimizers import (
    check_needs_no_closure,
    check_stage,
    check_steps_now,
    forget_stage,
    note_skipped,
    runs_foreign_code,
    scaler_of,
    steppable,
)
from gradsurgery.passes import Passes
from gradsurgery.ranks import Group
from gradsurgery.ranks.alike import check_alike, check_stepped, columns_of, fingerprint
from gradsurgery.ranks.buffers import SharedBuffers
from gradsurgery.ranks.shards import Shards, kind_of
from gradsurgery.ranks.tensor import split_passes, tensor_group
from gradsurgery.ranks.wrappers import called_inside, check_apart, check_wrapper, opened
from gradsurgery.spread import check_whole, served
from gradsurgery.surgery import InputProjection, Rule
from gradsurgery.undo import Undo
from gradsurgery.update import add_update, fits, solve


class Surgeon:
    """Edits gradients: rows of batches, a rule, its update in `.grad`, and the optimizer's step.

    `step` does all of it. In a loop that is not ours, `add` takes the rows of each micro-batch and
    `backward` leaves the update in `.grad`, as `loss.backward()` would, to be clipped and stepped
    along by whoever does so. Both give the same update: it is that of all samples at once.

    A plain object: the model keeps no wrapper and no hook, and `.grad` is after a step what it
    was before. Where a loss, the rule or code hung on the optimizer raises, or where the step is
    interrupted, the model's buffers, its parameters, `.grad`, the optimizer and what the rule
    remembers are as they were; or the step is whole. Not undone: what a forward pass does to
    parameters, and an interrupt in the middle of torch's own `optimizer.step()`.

    Parameters are looked up each time: what the optimizer holds, of the model, and is not
    frozen has rows and is moved. Parameters that the optimizer holds and the model does not, such
    as learned weights of losses, have no part in the rule: they get the ordinary gradient of the
    losses, weighted as the rule weights their rows.

    Where samples are taken one by one (`rows="stored"`), in parts (`add`, `micro_batch`) or both
    batches at once (`together`), the first step with a loss tries whether that changes it: it calls
    the loss three or four times more, on six samples at most, and up to twelve times where it
    differs. The model's buffers, its mode and random numbers are put back. A loss that draws random
    numbers is tried in eval mode; not tried are one that draws there too, one that differs at each
    call, and one that raises on so few samples. Differences of rounding pass: in 16 bits, a few
    percent. Where hooks are on the way, each step tries two samples for what these make of sums.

    Args:
        model: in the mode (train or eval) its losses are wanted in. One in `fully_shard` is
            gathered part by part as passes use it, and all of it at once with rows="stored".
        optimizer: its parameters are the ones edited; one wrapped by accelerate is looked through.
        rule: what makes one update of the rows.
        rows: "captured", from one recorded forward and backward pass, never stored; "stored", one
            gradient of the model's size per row, by torch.func, each sample taken alone. Where a
            forward pass changes buffers, one of the whole batch follows.
        together: captured rows only: whether one pass does for both batches, where these have the
            same structure, dtypes, devices and sample shapes. It reads the parameters once, but
            holds what both batches need. The loss of a sample must not depend on the others of its
            batch, nor on how many there are. None: where that is faster, on a GPU or of few
            tokens, and where it does not. False: always a pass each.
        chunk_size: stored rows only: samples differentiated at a time.
        micro_batch: captured rows only: most samples in one forward and backward pass. A larger
            batch goes in parts, to the same rows: what the rows need is kept, a pass's graph is
            not. None: whole batches.
        hold: captured rows only: what is kept of samples' rows while others are made: "rows", or
            the "pairs" of activations and gradients that these are made of; "auto" keeps, of each
            parameter, the smaller. Rows that are means over a batch are summed as they come.
        scaler: a `torch.amp.GradScaler`, for float16: losses are scaled up as it says, and so is
            what `backward` leaves in `.grad`; `step` calls its `step` and `update`. Where scaled
            rows overflow, `.grad` is made infinite, for the scaler to leave the step out, and the
            rule remembers what it did before. None: that of accelerate's wrapper, or none.
        project: keeps every step of the optimizer off inputs observed (`OWM`, `NullSpace`).
        process_group: whose samples a step is of, where torch.distributed runs several ranks: a
            ProcessGroup or a DeviceMesh of one dimension, which all have replicas of the model;
            False for this rank alone, whose replica may part from the others; None for the group of
            `DistributedDataParallel`, or that of the mesh of `fully_shard` or `replicate`. Rows,
            the Gramian and the update are then those of all ranks, and all must call `step`, or
            `backward`, equally often; of a sharded model `add`, too. A rank may have no samples.
            None also for a model that `parallelize_module` split, whose ranks have the same ones.

    Raises:
        InputError: an option, by name; an optimizer that needs sparse gradients; a model or an
            optimizer spread over several processes or devices in a way that is not served; several
            ranks and no process group; a projection of another model, as of a copy.
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
        hold: Hold = "auto",
        scaler: torch.amp.GradScaler | None = None,
        project: InputProjection | None = None,
        process_group: Any = None,
    ) -> None:
        one_of("rows", rows, ("captured", "stored"))
        one_of("hold", hold, ("auto", "pairs", "rows"))
        given.check_kinds(model, optimizer, rule)
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
        self._wrapped = optimizer
        self.rows: Literal["captured", "stored"] = rows
        self.together, self.chunk_size, self.micro_batch = together, chunk_size, micro_batch
        self.hold: Hold = hold
        self.scaler = scaler_of(optimizer, scaler)
        check(
            self.scaler is None or rows == "captured",
            "scaler is for captured rows; stored ones are not scaled",
        )
        self._added = Added(hold)
        self.process_group = process_group
        self._split = tensor_group(model, process_group)
        if self._split is None:
            self._module, self._ranks = opened(model, process_group)
        else:
            self._module, self._ranks = model, Group()
            given.check_split(rule, rows, project)
        self._all = self._split or self._ranks  # that are told of errors
        spread = bool(self._ranks) and any(kind_of(self._module))
        self._shards = Shards(self._module, self._ranks) if spread else None
        self._alike = False  # whether ranks have looked at each other's replicas
        self._failed = False  # whether the optimizer's last step did, where others' may not have
        self._observed: Any = None  # what the projection then had seen
        self.project = project
        self._trials: dict[Hashable, Trial] = {}
        self._linear: set[Hashable] = set()
        self._known: dict[str, nn.Parameter] = {}  # all that were looked up, as they were last
        self._looked_up()
        given.check_precondition(rule, self.optimizer)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those of the model that the next step has rows of, by name."""
        return self._looked_up()[0]

    def add(
        self,
        *,
        loss: AnyLoss,
        forget: Any = None,
        retain: Any = None,
        batch: Any = None,
        second: Any = None,
        memory: Any = None,
    ) -> None:
        """Take the rows of a micro-batch, any number of times before `backward`.

        Sizes, and lengths of samples, may differ from one time to the next. Batches of several
        names may come together or by turns. Means, as that of the forget loss, are over all samples
        added, or over their tokens where the loss returns `gs.WeightedLosses`. The losses of a
        sample must not depend on the others of its micro-batch, nor on how many there are.

        Arguments and errors are those of `step`. What raises leaves the rows added before. A rank
        of a sharded model gives no batch where it has none and others do.
        """
        with self._all.agreed("add", wait=False):
            parts = {"forget": forget, "retain": retain, "batch": batch}
            batches = given.batches(self.rule, **parts, second=second, memory=memory)
            columns = self._looked_up()
            undo = Undo(self._module, self.optimizer, self.rule)
            with undo, undo:
                known = self._take("add", batches, loss, columns, adds=True)
                check(known, f"add: no batch was given; {given.takes(self.rule)}")
                undo.keep()
            self._added.settle()

    def backward(
        self,
        scale: float = 1.0,
        *,
        loss: AnyLoss | None = None,
        forget: Any = None,
        retain: Any = None,
        batch: Any = None,
        second: Any = None,
        memory: Any = None,
    ) -> StepInfo:
        """Leave the update of all rows added, and of batches, in `.grad`, added to what is there.

        As after `loss.backward()`, the caller clips and steps: `clip_grad_norm_`, schedulers and
        accelerate's or a `GradScaler`'s `step` find what they expect. Where it raises, `.grad` and
        the rule are as they were. Rows are used up, or dropped where no update comes of them; what
        is wrong with an argument leaves them.

        Args:
            scale: what the update is multiplied by, besides the scaler's scale.
            loss: as for `step`.
            forget: as for `step`.
            retain: as for `step`.
            batch: as for `step`.
            second: as for `step`.
            memory: as for `step`.

        Raises:
            InputError: as for `step`; there are not all rows that the rule needs; parameters were
                frozen, unfrozen, replaced or moved since rows were added.
            NonFiniteError: as for `step`.
        """
        start = time.perf_counter()
        parts = {"forget": forget, "retain": retain, "batch": batch}
        parts |= {"second": second, "memory": memory}
        with self._all.agreed("backward", wait=False), self._rows_used_up():
            undo = Undo(self._module, self.optimizer, self.rule)
            with undo, undo:
                check_number("scale", scale)
                check(
                    self.project is None,
                    "project= is of steps, and backward takes none: leave it out, and step "
                    "within `with kept.steps(): optimizer.step()`",
                )
                columns = self._taken("backward", parts, loss)
                every = self._met("backward", columns, scale)
                for parameter, grad in undo.grads:  # copies, which hooks may see grow
                    parameter.grad = None if grad is None else grad.clone()
                info = self._update(columns, scale, every)
                self._all.leave()
                undo.keep(grads=True)
        return replace(info, seconds=time.perf_counter() - start)

    def __getstate__(self) -> dict[str, Any]:
        check(
            not self._added,
            "Surgeon: rows were added, which are not copied: call backward() or discard() first",
        )
        return {**vars(self), "_trials": {}, "_linear": set()}  # which are code

    def discard(self) -> None:
        """Drop the rows added so far."""
        self._added = Added(self.hold)

    def step(
        self,
        *,
        loss: AnyLoss | None = None,
        forget: Any = None,
        retain: Any = None,
        batch: Any = None,
        second: Any = None,
        memory: Any = None,
    ) -> StepInfo:
        """One optimizer step along the rule's update: `add`, `backward` and `optimizer.step()`.

        Either `forget` and `retain`, for rules that tell them apart (OrthoGrad, GRU, ...): raise
        the forget loss, or lower one made to forget (their `objective`), and keep the retain
        losses; or `batch`, for all others (PCGrad, UPGrad, ...): lower the losses of all rows.
        Batches are containers of tensors of the same leading dimension B, in any nesting: tuples,
        lists, dicts and other mappings (what a tokenizer gives), named tuples, dataclasses, attrs
        classes. `loss` gets them in the same types. None, strings and tensors without dimensions
        are of no sample: they go whole to `loss`, and so do lists of them. A list of batches,
        containers of one type as a loader gives, is one of micro-batches, each taken as by `add`;
        a tuple of them is one batch. Rows added before are stepped along, too; batches may then be
        left out. `.grad` has no part in the step, and is afterwards what it was.

        Args:
            loss: (model, batch) -> per-sample losses [B], those that training lowers, or
                `gs.WeightedLosses`; for `batch`, `second` and `memory` also [B, T], a column for
                each of T tasks, and then a row is the mean of a task and not one sample's (captured
                rows only). [B, 1] is neither.
            forget: its mean loss is unlearned.
            retain: its samples are protected, each, or in the mean, as the rule says.
            batch: one row for each sample or task.
            second: another batch of the same tasks, drawn apart, for rules that compare both
                (MoDo, SDMGrad).
            memory: samples, or tasks on them, not to be opposed, one row each, for rules with
                memory rows (OrthoGrad, UPGrad, DualProj, GEM, AGEM).

        Raises:
            InputError: a step that accelerate's `accumulate` would leave out, or that a Trainer
                takes itself; an optimizer that needs a closure; batches the rule has no use for; an
                entry of one that is no tensor of samples; losses that are no rows, do not depend on
                the model, or do on other samples where these are taken apart; parameters of the
                loss that get no weights from the rule. The message names it, nothing has changed.
            NonFiniteError: a row that is not finite, or an update that overflows its dtype.
        """
        start = time.perf_counter()
        parts = {"forget": forget, "retain": retain, "batch": batch}
        parts |= {"second": second, "memory": memory}
        with self._all.agreed("step", wait=False), self._rows_used_up():
            undo = Undo(self._module, self.optimizer, self.rule)
            with undo, undo:
                check_steps_now(self._wrapped)
                check_needs_no_closure(self.optimizer)
                if self.scaler is not None:
                    check_stage(self.scaler, self.optimizer)
                columns = self._taken("step", parts, loss)
                every = self._met("step", columns, 1.0)
                for parameter, _ in undo.grads:  # no parameter is moved by an old gradient
                    parameter.grad = None
                info = self._update(columns, 1.0, every)
                foreign = bool(self._split) and runs_foreign_code(self.optimizer)
                self._move(undo, foreign or any(known.runs_foreign_code for known in every))
                if self.scaler is not None:
                    self.scaler.update()
                    note_skipped(self._wrapped, info.skipped)
        return replace(info, seconds=time.perf_counter() - start)

    def _move(self, undo: Undo, shared: bool) -> None:
        """The optimizer's step, all of it or none.

        Args:
            undo: what to put back.
            shared: whether, on one of several ranks, more runs in it than torch's own code. Where
                that raises, all put back what moved; else a rank that runs out of memory there is
                alone with it: in its next step replicas are looked at anew, and shards refused.
        """
        undo.begin(copies=shared or self.project is not None)
        if self.project is None and not shared:
            self._all.leave()
            self._alike, before = False, self._alike
            self._failed = True
            undo.step(self.scaler)
            self._alike, self._failed = before, False
            return
        with (
            self._all.agreed("the optimizer's step"),
            nullcontext()
            if self.project is None
            else self.project.steps(undo.held, ranks=self._ranks),
        ):
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
        self._all.leave()
        undo.keep()

    @contextmanager
    def _rows_used_up(self) -> Iterator[None]:
        """Rows that an error leaves half used are dropped."""
        before = self._added.count
        try:
            yield
        except BaseException:
            if self._added.count != before or self._added.torn:
                self.discard()
            if self.scaler is not None:
                forget_stage(self.scaler, self.optimizer)
            raise

    def _taken(self, where: str, parts: dict[str, Any], loss: AnyLoss | None) -> given.Columns:
        """Add the rows of batches, if there are any, after all that is wrong with them is told."""
        batches = given.batches(self.rule, **parts)
        if not self._ranks:
            given.check_complete(self.rule, self._added, *batches)
        columns = self._looked_up()
        if self._take(where, batches, loss, columns, adds=bool(self._added)):
            self._added.settle()
        return columns

    def _met(self, where: str, columns: given.Columns, scale: float) -> list[Known]:
        """What each of several ranks has, when it is known that all are about to do the same."""
        ranks, like = self._ranks, next(iter(columns[0].values()))
        if not ranks:
            return []
        known = Known(self._added.summary(), runs_foreign_code(self.optimizer))
        alike = columns_of(columns), scale, self._scale(like)
        seen = self.project and self.project._seen  # which is replaced by another observation
        every = ranks.settled(where, mine=(known, alike, self._alike and seen is self._observed))
        if not all(looked and theirs[0] == alike[0] for _, theirs, looked in every):
            mine = fingerprint(self._module, columns, self.rule, self.optimizer, self.project)
            found = ranks.settled("the first step", mine=(mine, self._failed))
            if self._shards is not None:
                check_stepped([failed for _, failed in found], ranks)
            check_alike([theirs for theirs, _ in found], ranks)
            self._alike, self._observed = True, seen
        for k, name in ((1, "scale"), (2, "scaler")):
            found = sorted({theirs[k] for _, theirs, _ in every})
            check(len(found) == 1, f"{name}: ranks have different ones, {found}")
        return [known for known, *_ in every]

    def _take(
        self,
        where: str,
        batches: list[dict[str, Any]],
        loss: AnyLoss | None,
        columns: given.Columns,
        adds: bool,
    ) -> bool:
        """Add the rows of batches; where it raises, nothing is added. Whether any rank has some."""
        named, outside = columns
        if batches:
            if loss is None or not callable(loss):
                raise InputError(f"loss must be a function, got {type(loss).__name__}")
            self._added.check_columns({**named, **outside})
        if self._shards is None:
            if batches:
                self._pass(batches, cast(AnyLoss, loss), columns, named, adds)
            return bool(batches)
        # parameters are gathered by all ranks together, and for those that have samples
        if not any(self._ranks.settled(where, mine=bool(batches))):
            return False
        with self._shards.gathered(named, whole=self.rows == "stored") as whole:
            if batches:
                self._pass(batches, cast(AnyLoss, loss), columns, whole, adds)
        return True

    def _pass(
        self,
        batches: list[dict[str, Any]],
        loss: AnyLoss,
        columns: given.Columns,
        whole: dict[str, nn.Parameter],
        adds: bool,
    ) -> None:
        """The passes over batches; `whole`: the model's parameters, as these have them."""
        named, outside = columns
        if self._ranks:
            check_apart(self._module)
        passes = Passes(
            model=self._module,
            rule=self.rule,
            loss=loss,
            named=whole,
            outside=outside,
            rows=self.rows,
            together=self.together,
            chunk_size=self.chunk_size,
            micro_batch=self.micro_batch,
            adds=adds or len(batches) > 1,
            ranks=bool(self._ranks),
            scale=self._scale(next(iter(named.values()))),
            trials=self._trials,
            attempt=(self._split or Group()).attempt,
            linear=self._linear,
            kept=None if self._shards is None else self._shards.kept,
        )
        overflows = self.scaler is not None
        with called_inside(self.model, self._module), self._in_passes():
            self._added.take(passes, batches, {**named, **outside}, overflows)

    def _in_passes(self) -> AbstractContextManager[None]:
        return nullcontext() if self._split is None else split_passes(self._module, self._split)

    def _served(self) -> AbstractContextManager[None]:
        return nullcontext() if self._split is None else served(self._module)

    def _scale(self, like: Tensor) -> float:
        """What the scaler multiplies losses by; asked in this way, for it is made when it is."""
        if self.scaler is None:
            return 1.0
        one = torch.ones((), dtype=torch.float32, device=like.device)
        return float(cast(Tensor, self.scaler.scale(one)))

    def _update(self, columns: given.Columns, scale: float, every: Sequence[Known]) -> StepInfo:
        """Add the update of all rows, times `scale`, to `.grad`; the rows are used up."""
        named, outside = columns
        added, summaries = self._added, [known.summary for known in every]
        overflowed = added.overflowed or any(summary.overflowed for summary in summaries)
        if self._ranks and not overflowed:
            given.check_complete(self.rule, added, *(summary.parts for summary in summaries))
        scale = scale * self._scale(next(iter(named.values())))
        added.check_columns({**named, **outside})
        self.discard()
        remembered = dict(self.rule._state)
        info = None
        try:
            if overflowed:
                raise NonFiniteError("rows: scaled losses overflow")
            stand_ins = None if self._shards is None else self._shards.stand_ins(named)
            rows = added.collected(
                self.rule, columns, self._ranks, summaries, stand_ins, self._split
            )
            with without_autocast(next(iter(named.values()))):  # autocast is for the loss
                solution, update = solve(self.rule, self.optimizer, rows, self._ranks)
                self.rule.note_columns(rows.jacobian.names)
                # all that may raise comes before the parameters move; it waits for a GPU no more
                # than what follows does
                info, weights = seen(self.rule, rows, solution)
                add_update(rows, solution, update, weights, scale)
            in_range = fits(weights, info.gramian, named, scale)
            check_held(outside if in_range else {**named, **outside})
        except NonFiniteError:
            if self.scaler is None:
                raise
            info = None
        # `.grad` may be infinite on one rank alone, where others' was added to
        if self._all_have(info is not None, summaries):
            return cast(StepInfo, info)
        for parameter in {**named, **outside}.values():
            parameter.grad = torch.full_like(parameter, math.inf)
        self.rule._state.clear()
        self.rule._state.update(remembered)
        return StepInfo.of_none()

    def _all_have(self, made: bool, summaries: Sequence[Summary]) -> bool:
        """Whether every rank has made an update; buffers that are to be alike then are."""
        if self._split is not None:
            found = self._split.settled("update", mine=(made, self._failed))
            check_stepped([failed for _, failed in found], self._split)
            return all(made for made, _ in found)
        if not self._ranks:
            return made
        buffers = SharedBuffers(self.model)
        every = self._ranks.settled("update", mine=(made, buffers.size))
        sizes = sorted({size for _, size in every})
        check(len(sizes) == 1, f"model: ranks have buffers of different sizes, {sizes} bytes")
        if buffers.bytes is not None:
            called = [bool(summary.parts) or summary.overflowed for summary in summaries]
            self._ranks.first_(buffers.bytes, called.index(True) if any(called) else 0)
            buffers.put()
        return all(made for made, _ in every)

    def _looked_up(self) -> given.Columns:
        """What the optimizer holds and is not frozen: the model's parameters, and others."""
        check_wrapper(self.model)
        if self._shards is None:
            with self._served():
                named, outside = given.looked_up(self._module, self.optimizer, self._known)
        else:
            self._shards.rest()
            with served(self._module):
                named, outside = given.looked_up(self._module, self.optimizer, self._known)
            check_whole(outside)
        if not self._ranks and self._split is None:
            opened(self.model, self.process_group)  # there may be more ranks than there were
        self.rule.check_columns(list(named))
        if self.project is not None:
            self.project.check_holds(named)
        self._known = {**self._known, **named}
        return named, outside
