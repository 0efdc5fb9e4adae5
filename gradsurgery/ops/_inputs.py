"""What every operator accepts as rows, checked in one place."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ops._backend import _C

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Rows = Tensor | Sequence[Tensor]


def check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def shown(value: object) -> str:
    """A value for a message: if it is short itself, else its kind."""
    plain = value is None or isinstance(value, (str, bytes, Real))
    text = repr(value) if plain else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    known = any(type(value) is type(option) and value == option for option in allowed)
    if not known:
        raise InputError(f"{name} must be one of {tuple(allowed)}, got {shown(value)}")


def is_number(value: Any, kind: Any = Real) -> bool:
    """`kind`: Integral for whole ones."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_number(name: str, value: Any, kind: Any = Real) -> None:
    """A number that is finite."""
    if not (is_number(value, kind) and math.isfinite(value)):
        what = "a whole number" if kind is Integral else "a number"
        raise InputError(f"{name} must be {what}, got {shown(value)}")


def check_per(per: object) -> None:
    known = isinstance(per, str) and per in ("model", "tensor")
    check(known, f"per must be 'model' or 'tensor', got {shown(per)}")


def check_weights_finite(weights: Tensor) -> None:
    """Of [m] or [L, m]; waits for the device."""
    if not bool(weights.isfinite().all()):
        at = (~weights.isfinite()).nonzero()[0]
        places = at.tolist()
        of = f"tensor {places[0]}, row {places[1]}" if len(places) > 1 else f"row {places[0]}"
        raise InputError(f"weights must be finite, got {float(weights[tuple(at)])} of {of}")


def check_rtol(rtol: Any) -> None:
    if not (is_number(rtol) and 0 <= rtol < 1):
        raise InputError(f"rtol must be in [0, 1), got {shown(rtol)}")


def check_dense(tensor: Any, name: str, k: int | None = None) -> None:
    """A Tensor with strides: one that is nested or sparse has no rows to look at.

    `k`: its place in a sequence of that name.
    """
    if isinstance(tensor, Tensor) and not tensor.is_nested and tensor.layout == torch.strided:
        return
    name = name if k is None else f"{name}[{k}]"
    check(isinstance(tensor, Tensor), f"{name} must be a Tensor, got {type(tensor).__name__}")
    check(not tensor.is_nested, f"{name} must be a dense tensor, got a nested one")
    check(tensor.layout == torch.strided, f"{name} must be a dense tensor, got {tensor.layout}")


def check_values(tensor: Any, name: str) -> None:
    """A dense Tensor whose values can be looked at."""
    check_dense(tensor, name)
    check(not tensor.is_meta, f"{name} must have values, got a meta tensor")


def as_blocks(rows: Rows, name: str = "rows") -> list[Tensor]:
    """The blocks of a Jacobian, [m, *p.shape] each, from [m, n] or a sequence of blocks."""
    if isinstance(rows, Tensor):
        check_dense(rows, name, 0)
        if rows.dim() != 2:
            raise InputError(
                f"{name} must be [m, n], got {list(rows.shape)}; "
                "pass a sequence for rows shaped like parameters, [m, *p.shape]"
            )
        blocks = [rows]
    else:
        blocks = _as_list(rows, name)
        check(len(blocks) > 0, f"{name} is an empty sequence: the number of rows is unknown")
    _check_tensors(blocks, name)
    # texts are made where they are raised: to make them took longer than to multiply a few rows
    for k, block in enumerate(blocks):
        if block.dim() == 0:
            raise InputError(f"{name}[{k}] must be [m, *p.shape], got a scalar")
        if block.shape[0] != blocks[0].shape[0]:
            raise InputError(
                f"{name}[{k}] has {block.shape[0]} rows, {name}[0] has {blocks[0].shape[0]}"
            )
    return blocks


def as_vector(vector: Rows, name: str) -> list[Tensor]:
    """One gradient as a list of tensors shaped like the parameters."""
    tensors = [vector] if isinstance(vector, Tensor) else _as_list(vector, name)
    check(len(tensors) > 0, f"{name} is an empty sequence")
    _check_tensors(tensors, name)
    return tensors


def check_alike(
    vector: list[Tensor], name: str, shapes: list[torch.Size], like: Tensor, of: str
) -> None:
    """`vector` must match `shapes` tensor by tensor, and `like` in dtype and device."""
    if len(vector) != len(shapes):
        raise InputError(f"{name} has {len(vector)} tensors, {of} has {len(shapes)}")
    for k, (tensor, shape) in enumerate(zip(vector, shapes, strict=True)):
        if tensor.shape != shape:
            raise InputError(
                f"{name}[{k}] must be {list(shape)} to match {of}, got {list(tensor.shape)}"
            )
    first = vector[0]
    if first.dtype != like.dtype:
        raise InputError(f"{name} is {first.dtype}, {of} is {like.dtype}")
    if first.device != like.device:
        raise InputError(f"{name} is on {first.device}, {of} is on {like.device}")


def check_shapes(given: Sequence[Tensor], name: str, shapes: Sequence[Sequence[int]]) -> None:
    """`given` must be one tensor per parameter, of these shapes."""
    wanted, plain = [list(shape) for shape in shapes], isinstance(given, Sequence)
    got: object = type(given).__name__
    if plain:
        got = [list(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in given]
    check(got == wanted, f"{name} must be like the parameters, {wanted}, got {got}")


def check_count(name: str, value: object, otherwise: str = "") -> None:
    """`value` must be an int of 1 or more."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    got = repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
    check(whole and cast(int, value) >= 1, f"{name} must be 1 or more{otherwise}, got {got}")


def _as_list(tensors: Iterable[Tensor], name: str) -> list[Tensor]:
    kind = type(tensors).__name__
    check(
        isinstance(tensors, Iterable) and not isinstance(tensors, (str, bytes, type)),
        f"{name} must be a Tensor or a sequence of Tensors, got {kind}",
    )
    if isinstance(tensors, Mapping):
        raise InputError(f"{name} must be a Tensor or a sequence of Tensors, got {kind}: .values()")
    return list(tensors)


def _check_tensors(tensors: list[Tensor], name: str) -> None:
    first: Tensor | None = None
    for k, tensor in enumerate(tensors):
        check_dense(tensor, name, k)
        first = tensor if first is None else first
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"{name}[{k}] must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
        if tensor.dtype != first.dtype:
            raise InputError(f"{name}[{k}] is {tensor.dtype}, {name}[0] is {first.dtype}")
        if tensor.device != first.device:
            raise InputError(f"{name}[{k}] is on {tensor.device}, {name}[0] is on {first.device}")


def flat(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Each block as [m, n_k]; a view wherever strides allow one."""
    known = [block.resolve_neg() for block in blocks]
    return [
        block if block.dim() == 2 else block.reshape(block.shape[0], block.shape[1:].numel())
        for block in known
    ]


def wide(tensor: Tensor) -> Tensor:
    """16-bit values as float32, to be computed with."""
    return tensor.float() if tensor.dtype.itemsize == 2 and tensor.is_floating_point() else tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What `wide` makes of values of a dtype."""
    return torch.float32 if dtype.itemsize == 2 and dtype.is_floating_point else dtype


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor there; from the CPU to a GPU without waiting for what that still has to do."""
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def of_one_shape(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel takes them together, by their addresses, 16 bytes at a time."""
    first = tensors[0]
    known = first.shape, first.stride(), first.dtype
    step = 16 // first.itemsize
    return (
        first.is_floating_point()
        and first.stride(-1) == 1
        and all(stride % step == 0 for stride in first.stride()[:-1])
        and all((each.shape, each.stride(), each.dtype) == known for each in tensors)
        and all(each.data_ptr() % 16 == 0 for each in tensors)
    )


def addresses(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Where the values of each are, int64, for a kernel on their device."""
    known = [[each.data_ptr() for each in some] for some in tensors]
    return to_device(torch.tensor(known, device="cpu"), tensors[0][0].device)


class Leaving:
    """Tensors on their way to the CPU, from a GPU as float64; on a CPU they stay as they are.

    Who asks for them waits for the GPU, if it was not waited for since.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._left = [tensor.detach() for tensor in tensors], None
        away = [tensor for tensor in self._tensors if tensor.is_cuda]
        if away:
            device = away[0].device
            flat = torch.cat([tensor.to(device, torch.float64).flatten() for tensor in away])
            there = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
            parts = iter(there.copy_(flat, non_blocking=True).split([t.numel() for t in away]))
            self._tensors = [next(parts).view(t.shape) if t.is_cuda else t for t in self._tensors]
            self._left = torch.cuda.Event()
            self._left.record(torch.cuda.current_stream(device))

    def here(self) -> list[Tensor]:
        if self._left is not None:
            self._left.synchronize()
        return self._tensors


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the CPU, as `Leaving` has them; a GPU is waited for once."""
    return Leaving(tensors).here()


def alike(*tensors: Tensor) -> list[Tensor]:
    """Tokens in one dtype: 16-bit ones as they are, if all are of one kind."""
    if all(tensor.dtype == tensors[0].dtype for tensor in tensors):
        return list(tensors)
    kinds = [torch.float32 if tensor.dtype.itemsize == 2 else tensor.dtype for tensor in tensors]
    kind = torch.float64 if torch.float64 in kinds else torch.float32
    return [tensor.to(kind) for tensor in tensors]


def as_gramian(gramian: Tensor) -> Tensor:
    """A Gramian [..., m, m] as float64; what is not finite is found on a CPU.

    On a GPU it is not looked for, for want of a host sync.
    """
    check_dense(gramian, "gramian")
    if gramian.dtype not in DTYPES:
        raise InputError(f"gramian must be floating point, got {gramian.dtype}")
    shape = gramian.shape
    if len(shape) < 2 or shape[-2] != shape[-1]:
        raise InputError(f"gramian must be [..., m, m], got {list(shape)}")
    return gramian.double()


def check_beside(tensor: Tensor, name: str, gramian: Tensor) -> None:
    """On the Gramian's device."""
    if tensor.device != gramian.device:
        raise InputError(f"{name} is on {tensor.device}, gramian is on {gramian.device}")


def check_gramian_finite(gramian: Tensor) -> None:
    """Raise, naming the row: NaN compares as a zero row would."""
    if not gramian.is_cpu:
        return
    known = gramian.detach() if gramian.requires_grad else gramian
    while is_functorch_wrapped_tensor(known):  # of all samples that a transform has
        gramian = known = get_unwrapped(known)
    if seems_finite(known):
        return
    if not bool(gramian.isfinite().all()):
        row = (~gramian.isfinite()).any(-1).nonzero()[0, -1]
        raise NonFiniteError(f"gramian is not finite in row {int(row)}")


def seems_finite(values: Tensor) -> bool:
    """Whether values on the CPU are finite; where it says no, they may be so all the same."""
    if _C is not None and values.dtype == torch.float64 and values.is_contiguous():
        return _C.all_finite_cpu(values)
    return math.isfinite(values.sum())  # of what is finite, the sum may overflow


def check_finite(diagonal: Tensor, blocks: Sequence[Tensor], name: str) -> None:
    """Raise, naming row and tensor, where a Gramian's diagonal [..., m] is not finite.

    The diagonal holds the squared norms, so the check costs no pass over the rows; only the
    message does.
    """
    if not bool(diagonal.isfinite().all()):
        bad = (~diagonal.isfinite()).reshape(-1, diagonal.shape[-1]).any(0).nonzero()
        why = f"the squared norm of row {int(bad[0])} overflows float64; scale the row down"
        raise_not_finite(blocks, name, why)


def raise_not_finite(blocks: Sequence[Tensor], name: str, otherwise: str) -> NoReturn:
    """Raise for the first row that holds NaN or infinity; if none does, say `otherwise`."""
    for i in range(blocks[0].shape[0]):
        for k, block in enumerate(blocks):
            count = int((~block[i].isfinite()).sum())
            if count:
                where = f"tensor {k}, " if len(blocks) > 1 else ""
                total = block[i].numel()
                raise NonFiniteError(
                    f"{name}: row {i} is not finite: {where}"
                    f"{count} of {total} values are nan or inf"
                )
    raise NonFiniteError(f"{name}: {otherwise}")
