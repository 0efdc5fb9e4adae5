"""What a Jacobian is to the rest of the library, and `DenseJacobian`, rows that exist."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from gradsurgery.apart import Trial, in_parts
from gradsurgery.batch import Loss, batch_size, sample_count, trainable
from gradsurgery.errors import InputError
from gradsurgery.grads import add_to, run_hooks
from gradsurgery.ops import combine, gramian
from gradsurgery.ops._inputs import (
    as_blocks,
    check,
    check_count,
    check_shapes,
    flat,
    to_device,
    wide,
)
from gradsurgery.ops._range import factors
from gradsurgery.stored import check_alone, check_served, mean_row, sample_rows

if TYPE_CHECKING:
    from gradsurgery.capture import FactoredJacobian


class Jacobian(Protocol):
    """m rows, one gradient each, over the tensors named `names`; stored or not."""

    names: list[str]
    sizes: list[int]  # numel of each tensor
    m: int

    def gramian(
        self,
        *,
        per: Literal["model", "tensor"] = "model",
        metric: Sequence[Tensor] | None = None,
    ) -> Tensor: ...
    def combine(self, weights: Tensor) -> list[Tensor]: ...
    def backward(self, weights: Tensor) -> None: ...
    def products(self, vectors: Sequence[Tensor]) -> Tensor: ...
    def row_norms(self) -> Tensor: ...
    def materialize(self) -> Tensor: ...


def found_gramian(
    jacobian: Jacobian, per: Literal["model", "tensor"], metric: Sequence[Tensor] | None
) -> Tensor:
    """The Gramian where it was found to be right: a small one of a GPU's rows is on the CPU."""
    found = getattr(jacobian, "_gramian_found", jacobian.gramian)
    return found(per=per, metric=metric)


class DenseJacobian:
    """Rows that exist: m gradients stored as one block [m, *p.shape] per parameter.

    Costs m times the model's memory: for small models and as the oracle of everything faster.

    Args:
        blocks: [m, n], a sequence of [m, *p.shape], or a mapping from names to such blocks.
        parameters: the parameters that `backward` adds to, one per block.
        losses: the losses whose gradients the rows are, [m], kept for the record.
    """

    def __init__(
        self,
        blocks: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        parameters: Sequence[nn.Parameter] | None = None,
        losses: Tensor | None = None,
    ) -> None:
        if isinstance(blocks, Mapping):
            self.blocks = as_blocks(list(blocks.values()), "blocks")
            self.names = list(blocks)
        else:
            self.blocks = as_blocks(blocks, "blocks")
            self.names = [str(k) for k in range(len(self.blocks))]
        self.parameters = list(parameters) if parameters is not None else None
        self.losses = losses
        self.reached: list[bool] | None = None  # by the losses; None where it is not known
        self.m = self.blocks[0].shape[0]
        self.sizes = [block.shape[1:].numel() for block in self.blocks]
        if self.parameters is not None:
            shapes = [list(parameter.shape) for parameter in self.parameters]
            got = [list(block.shape[1:]) for block in self.blocks]
            check(shapes == got, f"parameters have shapes {shapes}, blocks have rows of {got}")

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        batch: Any,
        loss: Loss,
        *,
        rows: Literal["samples", "mean"] = "samples",
        parameters: Sequence[nn.Parameter] | None = None,
        chunk_size: int = 32,
    ) -> "DenseJacobian":
        """Gradients of a model's losses, in its present mode, by torch.func.

        Args:
            model: its parameters that require gradients make the columns.
            batch: any pytree of tensors with leading dimension B; handed to `loss`.
            loss: (model, batch) -> per-sample losses [B], not reduced.
            rows: "samples", one row per sample, free of any 1/B; "mean", one row, the gradient
                of the mean loss.
            parameters: keep only these of the model's parameters.
            chunk_size: samples differentiated at a time by vmap.

        Samples are taken one by one. So the loss is first tried on three of them, together and
        each alone. The model's buffers are afterwards what a forward pass of the batch makes them:
        where it changes some, one is run.

        Raises:
            InputError: a reduced loss, an empty or ragged batch, a module that couples samples, a
                loss that does so, such as a mean over the tokens of its batch; what torch.func does
                not run: a backward hook on a module or a parameter, a `torch.autograd.Function`
                without `setup_context`, a gradient taken inside of the loss, values that decide.
        """
        return cls._of(model, batch, loss, rows, parameters, chunk_size)

    @classmethod
    def _of(
        cls,
        model: nn.Module,
        batch: Any,
        loss: Loss,
        rows: Literal["samples", "mean"],
        parameters: Sequence[nn.Parameter] | None,
        chunk_size: int,
        trial: Callable[[], Trial] | None = None,
    ) -> "DenseJacobian":
        """As `from_model`; `trial` tells whether samples are coupled, in place of a new one."""
        check(rows in ("samples", "mean"), f"rows must be 'samples' or 'mean', got {rows!r}")
        check_count("chunk_size", chunk_size)
        named = trainable(model, parameters)
        check_served(model, named)
        check(
            sample_count(loss, batch) == batch_size(batch),
            "stored rows take samples apart, and batch has several in a row of tokens: take "
            "gradsurgery.language.unpacked(batch), or captured rows",
        )
        if rows == "mean":
            found = mean_row(model, named, batch, loss)
        else:
            known = in_parts(model, loss, batch, 1) if trial is None else trial()
            check_alone(known)
            found = sample_rows(model, named, batch, loss, chunk_size, known.moves)
        made = cls(found.blocks, list(named.values()), found.losses)
        made.reached = found.reached
        return made

    def gramian(
        self,
        *,
        per: Literal["model", "tensor"] = "model",
        metric: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Inner products of the rows in float64 arithmetic, [m, m] or [L, m, m] per tensor.

        `metric`, one tensor [*p.shape] of weights per block, makes them <a, metric * b>.

        Raises:
            NonFiniteError: a row with NaN or infinity.
            InputError: a row of float64, not zero, of norm under 1e-140, whose square float64 does
                not hold: it would count as zero.
        """
        if metric is None:
            gram = gramian(self.blocks, per=per, precise=True)
            squares = gram.diagonal(dim1=-2, dim2=-1)
            self._check_range(squares if per == "model" else squares.sum(0))
            return gram
        check(per in ("model", "tensor"), f"per must be 'model' or 'tensor', got {per!r}")
        check_shapes(metric, "metric", self._shapes())
        grams = [
            gramian([block * weight.sqrt()], precise=True)
            for block, weight in zip(self.blocks, metric, strict=True)
        ]
        return torch.stack(grams) if per == "tensor" else torch.stack(grams).sum(0)

    def _check_range(self, squares: Tensor) -> None:
        if is_functorch_wrapped_tensor(squares):  # under vmap no value decides
            return
        short = factors(flat(self.blocks), squares)
        if short is not None:
            row = int((short != 1).nonzero()[0])
            raise InputError(f"rows: float64 does not hold the square of row {row}: scale it up")

    def combine(self, weights: Tensor) -> list[Tensor]:
        """wᵀ J as a list like the parameters; weights [m], or [L, m] per tensor."""
        return list(combine(self.blocks, weights))

    def backward(self, weights: Tensor) -> None:
        """Add wᵀ J to the parameters' `.grad`, as `Tensor.backward` would.

        Hooks registered by `register_post_accumulate_grad_hook` run, each once its parameter's
        gradient is there. Where one raises, the parameters after it have none of theirs.
        """
        if self.parameters is None:
            raise InputError("backward: this Jacobian was made without parameters")
        update = self.combine(weights)
        with torch.no_grad():
            for parameter, grad in zip(self.parameters, update, strict=True):
                add_to(parameter, grad)
                run_hooks(parameter)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """Inner products of every row with `vectors`, tensor by tensor, [L, m] float64.

        Args:
            vectors: one [*p.shape] per block. Their sum over tensors is J v.
        """
        check_shapes(vectors, "vectors", self._shapes())
        return torch.stack(
            [
                block.reshape(self.m, -1).double() @ vector.reshape(-1).double()
                for block, vector in zip(self.blocks, vectors, strict=True)
            ]
        )

    def _shapes(self) -> list[torch.Size]:
        return [block.shape[1:] for block in self.blocks]

    def row_norms(self) -> Tensor:
        """Euclidean norms of the rows, [m] float64."""
        return self.gramian().diagonal().sqrt()

    def materialize(self) -> Tensor:
        """The rows as one matrix, [m, n]."""
        return torch.cat(flat(self.blocks), dim=1)

    @classmethod
    def concat(cls, jacobians: "Sequence[DenseJacobian]") -> "DenseJacobian":
        """As `gradsurgery.concat`, which checks that they go together."""
        first = jacobians[0]
        blocks = [torch.cat(blocks) for blocks in zip(*(j.blocks for j in jacobians), strict=True)]
        losses = [j.losses for j in jacobians if j.losses is not None]
        whole = torch.cat(losses) if len(losses) == len(jacobians) else None
        made = cls(dict(zip(first.names, blocks, strict=True)), first.parameters, whole)
        known = [j.reached for j in jacobians if j.reached is not None]
        if len(known) == len(jacobians):
            made.reached = [any(each) for each in zip(*known, strict=True)]
        return made


J = TypeVar("J", DenseJacobian, "FactoredJacobian")


def concat(jacobians: Iterable[J]) -> J:
    """The rows of several Jacobians of the same parameters, in order, as one.

    Stored rows are copied; those of a tape are not, so they may come from several tapes.

    Raises:
        InputError: none at all, other names, shapes, dtypes, devices or parameters, or a mixture
            of stored and captured rows.
    """
    kind = type(jacobians).__name__
    many = isinstance(jacobians, Iterable) and not isinstance(jacobians, (Tensor, Mapping, str))
    check(many, f"jacobians must be a sequence of Jacobians, got {kind}")
    parts: list[Any] = list(jacobians)
    check(len(parts) > 0, "jacobians is an empty sequence")
    first = parts[0]
    for i, other in enumerate(parts):
        check(
            callable(getattr(type(other), "concat", None)),
            f"jacobians[{i}] must be a DenseJacobian or the Jacobian of a tape, "
            f"got {type(other).__name__}",
        )
        kinds = type(other).__name__, type(first).__name__
        check(
            type(other) is type(first),
            f"jacobians[{i}] is a {kinds[0]}, jacobians[0] a {kinds[1]}: rows of one kind only",
        )
        check(
            other.names == first.names,
            f"jacobians[{i}] is over {other.names}, jacobians[0] over {first.names}",
        )
        columns = _columns(other), _columns(first)
        for name, got, expected in zip(first.names, *columns, strict=True):
            if got == expected:
                continue
            check(
                got[0] == expected[0],
                f"jacobians[{i}] has rows of {got[0]} for {name}, jacobians[0] of {expected[0]}",
            )
            for a, b in zip(got[1:], expected[1:], strict=True):
                check(a == b, f"jacobians[{i}] is {a} for {name}, jacobians[0] is {b}")
        same = [id(p) for p in other.parameters or ()] == [id(p) for p in first.parameters or ()]
        check(
            same or isinstance(other, DenseJacobian),
            f"jacobians[{i}] is of other parameters than jacobians[0]: of another model, or a copy",
        )
    return type(first).concat(parts)


class DenseSums:
    """Rows of several Jacobians, added up in float32 or wider."""

    def __init__(self, like: DenseJacobian) -> None:
        self._like, self.reached = like, [False] * len(like.names)
        self._totals = [torch.zeros_like(wide(block)) for block in like.blocks]

    def add(self, jacobian: DenseJacobian, weight: float) -> None:
        """The rows of another, times `weight`."""
        for total, block in zip(self._totals, jacobian.blocks, strict=True):
            total.add_(block, alpha=weight)
        reached = jacobian.reached or [True] * len(self.reached)
        self.reached = [a or b for a, b in zip(self.reached, reached, strict=True)]

    def jacobian(self) -> DenseJacobian:
        """Of the sums, in the dtype of the rows."""
        named = zip(self._like.names, self._totals, self._like.blocks, strict=True)
        blocks = {name: total.to(block.dtype) for name, total, block in named}
        made = DenseJacobian(blocks, self._like.parameters)
        made.reached = self.reached
        return made


class SummedRows:
    """A Jacobian whose rows are weighted sums of another's, as of batches taken in parts.

    Args:
        jacobian: of the parts, M rows.
        sums: [m, M] float64, on the CPU.
    """

    def __init__(self, jacobian: "DenseJacobian | FactoredJacobian", sums: Tensor) -> None:
        shape = list(sums.shape)
        check(
            sums.dim() == 2 and shape[1] == jacobian.m, f"sums must be [m, {jacobian.m}]: {shape}"
        )
        self.parts, self.names, self.sizes = jacobian, jacobian.names, jacobian.sizes
        self.parameters = jacobian.parameters
        self.m, self._sums = shape[0], sums

    def gramian(
        self,
        *,
        per: Literal["model", "tensor"] = "model",
        metric: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return self._summed(self.parts.gramian(per=per, metric=metric))

    def _gramian_found(
        self, per: Literal["model", "tensor"], metric: Sequence[Tensor] | None
    ) -> Tensor:
        return self._summed(found_gramian(self.parts, per, metric))

    def _summed(self, gram: Tensor) -> Tensor:
        sums = to_device(self._sums, gram.device)
        return sums @ gram @ sums.mT

    def combine(self, weights: Tensor) -> list[Tensor]:
        return self.parts.combine(self._spread(weights))

    def backward(self, weights: Tensor, **options: Any) -> None:
        self.parts.backward(self._spread(weights), **options)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        products = self.parts.products(vectors)
        return products @ self._sums.to(products.device).mT

    def row_norms(self) -> Tensor:
        return self.gramian().diagonal().clamp_min(0).sqrt()

    def materialize(self) -> Tensor:
        rows = wide(self.parts.materialize())
        return self._sums.to(rows) @ rows

    def _spread(self, weights: Tensor) -> Tensor:
        """Weights of the parts' rows, [..., M]: each has its sum's."""
        return weights.double() @ self._sums.to(weights.device)


def _columns(
    jacobian: "DenseJacobian | FactoredJacobian",
) -> list[tuple[list[int], torch.dtype, torch.device]]:
    """Shape, dtype and device of a row, tensor by tensor."""
    if isinstance(jacobian, DenseJacobian):
        return [(list(b.shape[1:]), b.dtype, b.device) for b in jacobian.blocks]
    return [(list(p.shape), p.dtype, p.device) for p in jacobian.parameters]
