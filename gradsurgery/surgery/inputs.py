"""Steps kept orthogonal to what weights have been given: OWM and the null space of features."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery.batch import Loss, batch_size, per_sample_losses, take
from gradsurgery.buffers import buffers_undone
from gradsurgery.capture import tape
from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ops._inputs import check, check_number, check_rtol, one_of
from gradsurgery.optimizers import after_steps
from gradsurgery.ranks import Group
from gradsurgery.ranks.places import grad_of, place_of, whole_of
from gradsurgery.ranks.shards import at_once, group_of, kind_of
from gradsurgery.ranks.wrappers import opened
from gradsurgery.spread import local
from gradsurgery.surgery.seen import Seen, both, check_fits, copied, made, moved, of_all, rounding
from gradsurgery.surgery.trial import acting_otherwise, sensitive

PROJECTED = "a projected step"


class InputProjection:
    """What a step of new data may change of a model, for outputs on data observed to stay.

    A weight W that multiplies inputs x changes what it gives for them by ΔW x. Of a step ΔW only
    ΔW P is taken, with a projector P made of the inputs observed, so that ΔW P x is small for
    these. Give one to `Surgeon(project=...)`: it is the step that is projected, whatever optimizer,
    momentum or decay it comes from. `with kept.steps(): optimizer.step()` does so in a loop of
    one's own.

    Held are, orthogonal to the inputs of data observed: weights of linear layers and convolutions,
    grouped and transposed ones too, any parameter that multiplies activations as a matrix; rows of
    embeddings and embedding bags that were read. A parameter used several times is held for all its
    uses. Free to move: what the losses of observed data do not depend on. Not held, but frozen
    unless others="leave": `not_held`.

    What stays are outputs as they were observed, in the same mode and precision. What a weight W
    that has moved by ΔW gives for an input x changes by up to r σ |ΔW|, σ the largest singular
    value of all inputs and r = 1e-10 in float64, 3e-8 sqrt(d) in fewer bits, where d inputs are
    only known to that; and by up to n u |W| |x| from rounding W in each of n steps, u = 1e-16 in
    float64, 6e-8 in float32, 4e-3 in bfloat16. So in float64 thousands of steps leave outputs to
    1e-6, and in float32 hundreds to 1e-4.

    Args:
        model: the model whose parameters are meant, by their names; or one in
            `DistributedDataParallel`, which stands for the module inside. One in `fully_shard` or
            `replicate` is observed and stepped by all its ranks, as it is.
        others: what happens to parameters that do something else than multiply inputs (biases,
            norms, scales, positions added, weights under a parametrization as weight norm, what an
            operation without a rule takes, what acts past autograd's graph as DoRA's norms do):
            "freeze" has none of them move; "leave" lets them, and then outputs move.
    """

    def __init__(self, model: nn.Module, others: Literal["freeze", "leave"] = "freeze") -> None:
        check(isinstance(model, nn.Module), f"model must be a Module, got {type(model).__name__}")
        one_of("others", others, ("freeze", "leave"))
        inside = isinstance(model, nn.parallel.DistributedDataParallel)
        self.model, self.others = model.module if inside else model, others
        self._wrapped = model
        self._seen: dict[str, Seen] = {}
        self._projectors: dict[str, dict[int, Tensor]] = {}

    @property
    def not_held(self) -> list[str]:
        """Names of the parameters that observed data depend on otherwise than by their products."""
        return [name for name, seen in self._seen.items() if seen is None]

    def observe(self, batch: Any, loss: Loss, *, process_group: Any = None) -> None:
        """Remember the inputs of all weights on a batch; a backward and some forward passes.

        A weight of d inputs takes up to three matrices [d, d] of float64, however many batches
        there are: its inputs, or 2d rows that stand for them, and the projector.
        The forward passes after the first try whether losses stay where weights move off inputs:
        off those of all samples for all losses, and off those of one sample for its own. What acts
        past autograd's graph on other samples alone is not seen where the inputs of all leave no
        direction to try. The model is left as it was.

        Args:
            batch: any pytree of tensors, leading dimension B.
            loss: (model, batch) -> per-sample losses [B], of all outputs that are to stay.
            process_group: whose batches are observed, as for `Surgeon`. All ranks must call this,
                and see the same inputs then; `batch` may be None on some of them.

        Raises:
            InputError: samples that depend on each other; random numbers drawn, as by dropout:
                outputs would stay for these alone; losses that are flat, all of them, as of
                ignored labels or of margins that are met.
            NonFiniteError: a loss or an input with NaN or infinity.
        """
        _, ranks = opened(self._wrapped, process_group)
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        with at_once(self.model, ranks), ranks.agreed("observe") as said:
            check(callable(loss), f"loss must be a function, got {type(loss).__name__}")
            none = batch is None and bool(ranks)
            found = None if none else self._observed(batch, loss)
            said.mine = found if found is None or not ranks else moved(found, torch.device("cpu"))
        if ranks:
            devices = {name: p.device for name, p in self.model.named_parameters()}
            found = of_all(said.every, sizes, devices, ranks)
        assert found is not None
        # what was not there, or frozen, when other data were observed, may act on these unseen
        names = [name for name in found if name in self._seen or not self._seen]
        check(
            len(names) > 0, "no parameter trained now was trained when inputs were observed before"
        )
        self._seen = {
            name: both(self._seen.get(name, {}), found[name], sizes[name]) for name in names
        }
        self._projectors = {}

    def _observed(self, batch: Any, loss: Loss) -> dict[str, Seen]:
        size = count = batch_size(batch)
        if size == 1:  # the gradient of one sample alone is formed and not kept as tokens
            batch, size = take(batch, [0, 0]), 2
        found = self._look(batch, loss, size)
        for seen in found.values():
            for rows in (seen or {}).values():
                rows *= math.sqrt(count / size)
        return found

    def _look(self, batch: Any, loss: Loss, size: int) -> dict[str, Seen]:
        """What trained parameters see of a batch."""
        with buffers_undone(self.model):
            drawn = _generators(self.model)
            with torch.enable_grad(), tape(self.model) as recorder:
                losses = per_sample_losses(loss(self.model, batch), size)
            self._check_not_drawn(drawn)
            jacobian = recorder.jacobian(losses)
            rows = dict(zip(jacobian.names, jacobian.inputs_stacked(), strict=True))
            found = dict(zip(jacobian.names, jacobian.inputs_seen(), strict=True))
        for name, seen in [*rows.items(), *found.items()]:
            for part in (seen or {}).values():
                if not bool(part.isfinite().all()):
                    raise NonFiniteError(f"inputs of {name} are not finite")
        parameters = dict(zip(jacobian.names, jacobian.parameters, strict=True))
        before = losses.detach()

        def again() -> Tensor:
            with buffers_undone(self.model):
                return loss(self.model, batch)

        products = {name: seen for name, seen in found.items() if seen is not None}
        acting = {name: parameters[name] for name, seen in products.items() if seen}
        row = sensitive(acting, again, before) if acting else 0
        if row is None:
            raise InputError(
                "loss is flat on the data observed: it shows of no output that it stays, so of no "
                "parameter what it acts on; observe a loss of the outputs, such as their squares"
            )
        one = dict(zip(jacobian.names, jacobian.inputs_seen(row=row), strict=True))
        del jacobian, losses
        otherwise = acting_otherwise(parameters, products, again, before)
        # the inputs of one sample leave directions to try where those of all leave none
        rest = {name: one[name] or {} for name in products if name not in otherwise}
        otherwise += acting_otherwise(parameters, rest, lambda: again()[row], before[row])
        return {**rows, **dict.fromkeys(otherwise)}

    def __call__(self, names: list[str], update: list[Tensor]) -> list[Tensor]:
        """A step, shaped like the parameters of these names, as far as it may be taken.

        Before anything is observed, it is what it was.
        """
        check(len(names) == len(update), f"update has {len(update)} tensors for {len(names)} names")
        self._prepare(names)
        pairs = zip(names, map(whole_of, update), strict=True)
        wholes = [self._project(name, part) for name, part in pairs]
        return [grad_of(w, part) for w, part in zip(wholes, update, strict=True)]

    def check_holds(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise `InputError` for the first of these that is no parameter of the model."""
        own = {id(parameter) for parameter in self.model.parameters()}
        for name, parameter in parameters.items():
            if id(parameter) not in own:
                raise InputError(
                    f"project: {name} is no parameter of the model that project holds, which may "
                    "be a copy, and would move freely: make the projection of the model trained"
                )

    @contextmanager
    def steps(
        self, parameters: Iterable[nn.Parameter] | None = None, *, ranks: Group | None = None
    ) -> Iterator[None]:
        """Of what the body does to parameters, leaves what may be; if it raises, nothing.

        All ranks of a sharded model enter it; where one raises, all do.

        Args:
            parameters: None for all of the model. Those of others are let be.
            ranks: those of a sharded model, where they are met elsewhere too. None: looked up.

        Raises:
            InputError: before the body, a parameter that was frozen or not there when inputs were
                observed; inputs that leave no weight a direction to move in; parameters of which
                none is the model's.
        """
        if not any(kind_of(self.model)):
            ranks = Group()
        elif ranks is None:
            ranks = Group(group_of(self.model), alone=True)
        with ranks.agreed(PROJECTED, wait=False):
            yield from self._steps(parameters, ranks)

    def _steps(self, parameters: Iterable[nn.Parameter] | None, ranks: Group) -> Iterator[None]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        given = list(self.model.parameters() if parameters is None else parameters)
        check(
            not given or any(id(p) in names for p in given),
            "parameters are of another model than the projection's, which may be a copy: none of "
            "them would be held",
        )
        mine = {names[id(p)]: p for p in given if id(p) in names} if self._seen else {}
        trained = [name for name, p in mine.items() if p.requires_grad]
        self._prepare(trained)
        before = {name: p.detach().clone() for name, p in mine.items()}
        after: dict[str, Tensor] = {}

        def hold() -> None:
            with torch.no_grad():
                # what was held before, as it is: of what is rounded twice some is lost
                moved = {
                    name: p
                    for name, p in mine.items()
                    if name not in after or not torch.equal(local(p), local(after[name]))
                }
                if ranks:  # of a parameter in shards all of it is needed, mostly
                    every = ranks.settled(PROJECTED, mine=set(moved))
                    moved = {name: p for name, p in mine.items() if name in set().union(*every)}
                for name, p in moved.items():
                    old = before[name]
                    if name in trained:
                        self._move(name, old, p)
                    else:
                        local(p).copy_(local(old))
                    after[name] = p.detach().clone()

        try:
            with after_steps(mine.values(), hold):
                yield
            hold()
        except BaseException:
            with torch.no_grad():
                for name, p in mine.items():
                    local(p).copy_(local(before[name]))
            raise

    def state_dict(self) -> dict[str, Any]:
        """By parameter: None if it is not held, else rows [g, r, d] that stand for its inputs."""
        return {name: copied(seen) for name, seen in self._seen.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            InputError: an entry of another model, or of no projection; nothing has changed.
        """
        check(isinstance(state, dict), f"state must be a dict, got {type(state).__name__}")
        known = dict(self.model.named_parameters())
        for name, seen in state.items():
            check(name in known, f"state is of a parameter {name}, which the model has not")
            check_fits(name, seen, known[name].shape)
        self._seen = {name: copied(seen, known[name].device) for name, seen in state.items()}
        self._projectors = {}

    def _prepare(self, names: Iterable[str]) -> None:
        """All that can be wrong with a step of these parameters, before it is taken."""
        if not self._seen:
            return
        moves, stuck = False, ""
        for name in names:
            if name not in self._seen:
                raise InputError(
                    f"{name} was frozen, or not there, when inputs were observed: observe all data "
                    "again in a new projection"
                )
            seen = self._seen[name]
            if seen is None:
                moves |= self.others == "leave"
                continue
            if name not in self._projectors:
                self._projectors[name] = self._made(name, seen)
            empty = not all(bool(p.any()) for p in self._projectors[name].values())
            moves, stuck = moves or not empty, stuck or (name if empty else "")
        check(moves or not stuck, f"the inputs observed leave no direction to {stuck}{self._hint}")

    _hint = ""

    def _made(self, name: str, seen: dict[int, Tensor]) -> dict[int, Tensor]:
        dtype = self.model.get_parameter(name).dtype
        return {
            dim: made(rows, partial(self._share, least=rounding(dtype, rows.shape[-1])))
            for dim, rows in seen.items()
        }

    def _project(self, name: str, part: Tensor) -> Tensor:
        if not self._seen:
            return part
        if self._seen[name] is None:
            return torch.zeros_like(part) if self.others == "freeze" else part
        wide = part.double()
        for dim, projector in self._projectors[name].items():
            g, d, _ = projector.shape
            projector = projector.to(part.device)
            planes = wide.reshape(g, d, -1) if dim == 0 else wide.reshape(g, -1, d)
            wide = projector @ planes if dim == 0 else planes @ projector
        return wide.reshape(part.shape).to(part.dtype)

    def _after(self, name: str, before: Tensor, now: Tensor) -> Tensor:
        """The parameter after the part of a step that may be taken."""
        seen = self._seen[name]
        if seen is None:
            return before if self.others == "freeze" else now
        if not seen:
            return now
        step = now.double() - before.double()
        return (before.double() + self._project(name, step)).to(before.dtype)

    def _move(self, name: str, before: Tensor, now: Tensor) -> None:
        """Leave in a parameter, which is `now`, what may be taken of its step."""
        place, projectors = place_of(now), self._projectors.get(name, {})
        # each line by itself: a shard is some of these
        by_line = all(dim == 1 and len(each) == 1 for dim, each in projectors.items())
        if place is None or (by_line and place.dim == 0):
            local(now).copy_(self._after(name, local(before), local(now)))
        else:
            local(now).copy_(place.own(self._after(name, whole_of(before), whole_of(now))))

    def _share(self, values: Tensor, least: float) -> Tensor:
        """Of directions with these singular values [g, k] of inputs, what P leaves.

        least: the singular value, of the largest as 1, up to which they are rounding.
        """
        raise NotImplementedError

    def _check_not_drawn(self, before: list[Tensor]) -> None:
        after = _generators(self.model)
        if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            return
        names = [
            name
            for name, module in self.model.named_modules()
            if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p
        ]
        what = f" by {', '.join(names[:4])}" if names else ""
        raise InputError(
            f"random numbers were drawn{what} while inputs were observed, and outputs would stay "
            "for these alone: call model.eval()"
        )


def _generators(model: nn.Module) -> list[Tensor]:
    """The states of the generators that a forward pass draws from."""
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


class OWM(InputProjection):
    """P = (1 + Σ x xᵀ / alpha)⁻¹ over all inputs observed, or its limit for alpha to 0.

    The paper's recursion P ← P - k kᵀ / (alpha + xᵀ k), k = P x, one input at a time, in one go:
    the same by the Sherman-Morrison formula. Of a step along an eigenvector of Σ x xᵀ with
    eigenvalue λ it leaves alpha / (alpha + λ). So outputs move, and the further the longer a weight
    is trained: what W gives for all inputs observed changes, in the root of the sum of squares, by
    up to sqrt(alpha) |ΔW| / 2, ΔW the sum of the optimizer's steps as they were before P. In the
    limit outputs stay as `NullSpace` holds them, and a weight that has seen inputs in all
    directions does not move.

    Args:
        alpha: 0 for the limit; above 0 for the paper's P, such as 1e-3: the smaller, the less is
            left along inputs observed.

    Continual Learning of Context-Dependent Processing in Neural Networks, Zeng et al. 2018
    (arXiv:1810.01256).
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 0.0,
        others: Literal["freeze", "leave"] = "freeze",
    ) -> None:
        super().__init__(model, others)
        check_number("alpha", alpha)
        check(alpha >= 0, f"alpha must be at least 0, got {alpha}")
        self.alpha = alpha
        self._hint = (
            "" if alpha else ": observe fewer, or let outputs move a little by alpha above 0"
        )

    def _share(self, values: Tensor, least: float) -> Tensor:
        if self.alpha == 0:
            return _apart(values, least)
        return self.alpha / (self.alpha + values.square())


class NullSpace(InputProjection):
    """P projects on the directions in which the inputs observed have next to nothing.

    Args:
        rtol: eigenvectors of Σ x xᵀ are left where their eigenvalue is at most rtol times the
            largest, in [0, 1). 0 holds outputs up to rounding, and leaves nothing to a weight
            with as many independent inputs as it takes. Above that, a step ΔW changes what W
            gives for all inputs observed, in the root of the sum of squares, by up to
            sqrt(rtol λ) |ΔW|, λ the largest eigenvalue: the paper's choice, for data that fill
            all directions.

    Training Networks in Null Space of Feature Covariance for Continual Learning, Wang et al. 2021
    (arXiv:2103.07113).
    """

    _hint = ": observe fewer, or let outputs move a little by rtol above 0"

    def __init__(
        self,
        model: nn.Module,
        rtol: float = 0.0,
        others: Literal["freeze", "leave"] = "freeze",
    ) -> None:
        super().__init__(model, others)
        check_rtol(rtol)
        self.rtol = rtol

    def _share(self, values: Tensor, least: float) -> Tensor:
        return _apart(values, max(least, math.sqrt(self.rtol)))


def _apart(values: Tensor, least: float) -> Tensor:
    """1 for what inputs have next to nothing of, else 0."""
    return (values <= least * values.amax(-1, keepdim=True)).to(values.dtype)
