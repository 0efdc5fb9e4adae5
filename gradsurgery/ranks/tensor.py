"""Rows of a model that `parallelize_module` split: every rank has all samples, and some columns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradsurgery.capture import FactoredJacobian
from gradsurgery.capture.split import stand_in
from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.grads import add_to, run_hooks
from gradsurgery.ops._inputs import check
from gradsurgery.ranks.group import Group
from gradsurgery.spread import ALONE, is_split, local, mesh_of, served

# operations that pass tensors between ranks, and those of them that do not
PASSING = ("_c10d_functional", "_dtensor", "c10d")
WAITING = ("wait_tensor", "_wrap_tensor_autograd")
LOOKED_AT = 1 << 24  # values of Gramians up to which rows are compared by parameter


def tensor_group(model: nn.Module, process_group: Any) -> Group | None:
    """The ranks over which `parallelize_module` split the model; None where it did not.

    Raises:
        InputError: ranks beside these, or a process group.
    """
    mesh = mesh_of(model)
    if mesh is None:
        return None
    check(
        process_group is None,
        "process_group: parallelize_module has its own, that of its mesh; leave it out",
    )
    check(
        mesh.size() == dist.get_world_size(),
        f"model is split over {mesh.size()} ranks of {dist.get_world_size()}: tensor parallelism "
        f"beside replicas or shards is not served; use one of them, or {ALONE}",
    )
    return Group(mesh.get_group() if mesh.size() > 1 else None)


@contextmanager
def split_passes(model: nn.Module, ranks: Group) -> Iterator[None]:
    """Inside, the model is served, and no rank waits in a pass for one that has raised."""
    with served(model), _Meetings(ranks):
        yield


class _Meetings(TorchDispatchMode):
    """Before each collective of a pass ranks meet, and see that all of them come to it."""

    def __init__(self, ranks: Group) -> None:
        super().__init__()
        self.ranks = ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # so that it does what it does with the shards in here
        if func.namespace in PASSING and func._opname not in WAITING and not self.ranks.meeting:
            self.ranks.settled(f"{func._opname} in a pass")
        return func(*args, **(kwargs or {}))


class TensorJacobian:
    """The rows of a model in tensor parallel; every method is to be called by all ranks.

    The Gramian of a parameter is the sum of those of its shards; one that all ranks have whole
    counts once. Updates of shards need no other rank.

    Args:
        own: rows of this rank's shards, and of the parameters that are not split.
        parameters: of the model, DTensors where they are split.
        ranks: those that the model is split over.
    """

    def __init__(
        self, own: FactoredJacobian, parameters: Sequence[nn.Parameter], ranks: Group
    ) -> None:
        self.names, self.m, self.ranks = own.names, own.m, ranks
        self.parameters, self.sizes = list(parameters), [p.numel() for p in parameters]
        self.losses, self.reached = own.losses, own.reached
        shards = [k for k, p in enumerate(parameters) if _is_shard(p)]
        whole = [k for k in range(len(parameters)) if k not in set(shards)]
        # of each the columns, and their rows
        self._parts = [(ks, own.columns(ks)) for ks in (shards, whole) if ks]
        self._shards = shards
        self._grams: dict[bool, Tensor] = {}

    def gramian(
        self,
        *,
        per: Literal["model", "tensor"] = "model",
        metric: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Inner products of the rows, [m, m] float64, or [L, m, m] by parameter; on every rank.

        Raises:
            NonFiniteError: a row with NaN or infinity; the message names row and parameter.
            InputError: ranks that were given other samples, or whose copies of a parameter differ.
        """
        check(per in ("model", "tensor"), f"per must be 'model' or 'tensor', got {per!r}")
        check(metric is None, "metric: rows in tensor parallel have none")
        apart = per == "tensor"
        if apart not in self._grams:
            self._grams[apart] = self._made(apart)
        return self._grams[apart].clone()

    def _made(self, apart: bool) -> Tensor:
        count, like = len(self.parameters) if apart else 1, self.losses
        total = like.new_zeros(count, self.m, self.m, dtype=torch.float64)
        sums, sizes = torch.zeros_like(total), {}
        with self.ranks.agreed("Gramian") as said:
            for ks, part in self._parts:
                if ks is not self._shards:
                    sizes = self._sizes(part, ks)
                gram = part.gramian(per="tensor" if apart else "model")
                (sums if ks is self._shards else total)[ks if apart else 0] += gram
            said.mine = self.losses.tolist(), sizes
        self._check_same(said.every)
        total += self.ranks.sum_(sums)
        if not bool(total.isfinite().all()):
            raise NonFiniteError("losses: the squared norm of a row overflows float64")
        return total if apart else total[0]

    def _sizes(self, part: FactoredJacobian, ks: Sequence[int]) -> dict[str, tuple[float, float]]:
        """Norms of parameters that are not split, and of their rows: the same on all ranks."""
        norms = [float(local(self.parameters[k]).double().norm()) for k in ks]
        if len(ks) * self.m**2 <= LOOKED_AT:
            rows = part.gramian(per="tensor").diagonal(dim1=-2, dim2=-1).sum(-1)
        else:
            rows = part.gramian().trace().expand(len(ks))
        names = [self.names[k] for k in ks]
        return dict(zip(names, zip(norms, rows.sqrt().tolist(), strict=True), strict=True))

    def _check_same(self, every: Sequence[tuple[list[float], dict[str, Any]]]) -> None:
        """Raise where ranks do not compute the same rows."""
        (losses, sizes), near = every[0], max(1e-6, 8 * torch.finfo(self.losses.dtype).eps)
        size = max((rows for _, rows in sizes.values()), default=0.0)

        def same(a: float, b: float, least: float = 0.0) -> bool:
            return a == b or (a != a and b != b) or abs(a - b) <= near * max(abs(a), abs(b), least)

        for rank, (other, found) in enumerate(every):
            both = f"{self.ranks.name(0)} and {self.ranks.name(rank)}"
            for a, b in zip(losses, other, strict=True):
                check(
                    same(a, b),
                    f"loss: {both} have {a} and {b}: ranks that a model is split over are to be "
                    "given the same samples, and the same random numbers",
                )
            for name, (norm, rows) in sizes.items():
                check(
                    same(norm, found[name][0]),
                    f"model: parameter {name} differs between {both}: load one checkpoint on all",
                )
                check(
                    same(rows, found[name][1], size),
                    f"model: rows of {name} differ between {both}: it is not split, and meets "
                    "activations that are, as a norm under SequenceParallel; have "
                    "parallelize_module make it a DTensor",
                )

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T J as a list like the parameters."""
        out: list[Tensor] = [torch.zeros_like(p) for p in self.parameters]
        weights = self.ranks.weights(weights)
        for ks, part in self._parts:
            mine = part.combine(weights[ks] if weights.dim() == 2 else weights)
            for k, grad in zip(ks, mine, strict=True):
                out[k] = _like(grad, self.parameters[k])
        return out

    def backward(self, weights: Tensor, *, release: bool = False) -> None:
        """Add w^T J to the parameters' `.grad`, to that of each its shard."""
        weights = self.ranks.weights(weights)
        for ks, part in self._parts:
            mine = weights[ks] if weights.dim() == 2 else weights
            split = [k for k in ks if is_split(self.parameters[k])]
            shards = [stand_in(self.parameters[k]) for k in split]
            try:
                part.backward(mine, release=release)
                for k, shard in zip(split, shards, strict=True):
                    if shard.grad is not None:
                        parameter = self.parameters[k]
                        add_to(parameter, _like(shard.grad, parameter))
                        run_hooks(parameter)
            finally:
                for shard in shards:
                    shard.grad = None

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """Inner products of every row with `vectors`, tensor by tensor, [L, m] float64."""
        out = torch.zeros(
            len(self.parameters), self.m, dtype=torch.float64, device=self.losses.device
        )
        for ks, part in self._parts:
            out[ks] = part.products([local(vectors[k]) for k in ks])
        out[self._shards] = self.ranks.sum_(out[self._shards])
        return out

    def row_norms(self) -> Tensor:
        """Euclidean norms of the rows, [m] float64."""
        return self.gramian().diagonal().clamp_min(0).sqrt()

    def materialize(self) -> Tensor:
        """Refused: no rank has the rows."""
        raise InputError("rule: it needs the rows themselves, of which ranks have parts each")


def _is_shard(parameter: nn.Parameter) -> bool:
    # here and below: that a parameter may be a DTensor, its type does not say
    return is_split(parameter) and parameter.placements[0].is_shard()  # type: ignore[attr-defined]


def _like(shard: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's part of a gradient, as the parameter is placed."""
    if not is_split(parameter):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard.detach(),
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
