"""What everybody says of batches: their tensors, their size, their losses, who is trained."""

import copy
import dataclasses
from collections import UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradsurgery.errors import InputError
from gradsurgery.ops._inputs import check
from gradsurgery.spread import check_one_rank, is_split
from gradsurgery.text import show

# (model, batch) -> per-sample losses [B], where it is asked for them also [B, tasks] or weighted
Loss = Callable[[nn.Module, Any], Tensor]
AnyLoss = Callable[[nn.Module, Any], "Tensor | WeightedLosses"]
DETACHED = (
    "loss does not depend on the model's parameters: it was detached, computed under "
    "torch.no_grad, from comparisons (as an accuracy is), or by another model, such as a copy"
)
WHOLE = (type(None), str, bytes)  # what is of no sample


class WeightedLosses(NamedTuple):
    """What a loss may return, for means over tokens or whatever else samples have several of.

    The mean of a batch, or of several micro-batches, is then Σ weights · losses / Σ weights, and a
    sample's row is its gradient times weights / mean(weights), so that rows have that mean, too.

    Attributes:
        losses: [B], of a sample the mean over its own tokens, finite for one without any; or
            [B, tasks].
        weights: [B], not negative: how many tokens a sample has.
    """

    losses: Tensor
    weights: Tensor

    def checked(self, size: int) -> "tuple[Tensor, Tensor]":
        """The losses, and the weights as float64 on the CPU, if these are [size]."""
        weights = self.weights
        check(
            isinstance(weights, Tensor) and weights.shape == (size,),
            f"weights of losses must be one for each sample, [{size}], got "
            + (str(list(weights.shape)) if isinstance(weights, Tensor) else type(weights).__name__),
        )
        check(
            weights.layout == torch.strided and not (weights.is_complex() or weights.is_meta),
            "weights of losses must be real numbers, one for each sample",
        )
        weights = weights.detach().to("cpu", torch.float64)
        fine = bool((weights.isfinite() & (weights >= 0)).all())
        check(fine, "weights of losses must be finite and not negative")
        return self.losses, weights


class _Container(NamedTuple):
    """A part of a batch that holds others."""

    labels: list[str]  # of its entries, as they are written in Python
    entries: list[Any]
    filled: Callable[[list[Any]], Any]  # one like it, of other entries


def map_batch(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """`batch` with `function` applied to each of its tensors, in containers of the same types.

    Served are the pytrees of torch (tuples, lists, dicts, named tuples, what was registered), other
    mappings, such as `transformers.BatchEncoding`, and instances of dataclasses and attrs classes.
    What is neither a container nor a tensor stays as it is.
    """
    container = _opened(batch)
    if container is None:
        return function(batch) if isinstance(batch, Tensor) else batch
    return container.filled([map_batch(function, entry) for entry in container.entries])


def named_leaves(batch: Any) -> list[tuple[str, Any]]:
    """All that a batch holds, tensors or not, each as it is written in Python behind the batch."""
    return [(label, leaf) for label, leaf in _walk(batch, "") if not isinstance(leaf, _Opened)]


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch that have samples, in the order in which `map_batch` meets them."""
    return [leaf for _, leaf in _walk(batch, "") if _has_samples(leaf)]


def refilled(batch: Any, values: Sequence[Tensor]) -> Any:
    """`batch` with other samples, given in the order of `tensors`."""
    following = iter(values)
    return map_batch(lambda leaf: next(following) if _has_samples(leaf) else leaf, batch)


def take(batch: Any, index: slice | Sequence[int]) -> Any:
    """Those samples of a batch, with all that is of no sample (see `batch_size`)."""
    if isinstance(index, slice):
        return refilled(batch, [leaf[index] for leaf in tensors(batch)])
    return refilled(
        batch, [leaf[torch.tensor(index, device=leaf.device)] for leaf in tensors(batch)]
    )


def batch_size(batch: Any, name: str = "batch") -> int:
    """B, the leading dimension that all tensors of a batch share, but those without dimensions.

    The latter, None and strings are of no sample: they go whole to the loss, and to that of each
    part where a batch is taken in parts. So do lists of these, of any length.

    Raises:
        InputError: an entry, which is named, that is neither; no tensor with samples at all;
            different sizes; no samples.
    """
    entries = batch.values() if type(batch) is dict else batch
    if type(batch) in (dict, list, tuple) and all(map(_has_samples, entries)):
        known = {entry.shape[0] for entry in entries}  # nothing to name, where they are alike
        if len(known) == 1 and 0 not in known:
            return known.pop()
    sizes: dict[int, str] = {}
    for label, leaf in _walk(batch, name):
        if _has_samples(leaf):
            sizes.setdefault(leaf.shape[0], show(label, 40))
        elif not isinstance(leaf, (*WHOLE, Tensor, _Opened)) or leaf is batch:
            where = "" if label == name else f" in {label}"
            advice = "" if where or leaf is None else "; pass a dict, tuple or dataclass of tensors"
            if where and isinstance(leaf, (bool, int, float)):
                advice = "; make it a tensor"
            raise InputError(
                f"{name} must hold tensors with a leading batch dimension, "
                f"got {_described(leaf)}{where}{advice}"
            )
    check(len(sizes) > 0, f"{name} holds no tensor with a leading batch dimension")
    check(
        len(sizes) == 1,
        f"{name} holds tensors of different batch sizes: {sorted(sizes)[:9]}, as "
        + " and ".join([*sizes.values()][:2]),
    )
    size = next(iter(sizes))
    check(size > 0, f"{name} is empty")
    return size


def sample_count(loss: Any, batch: Any) -> int:
    """How many losses a loss has of a batch: its size, unless the loss has a `count_samples`.

    As those of `gradsurgery.language` have: packed batches have several documents in a row.
    """
    own: Callable[[Any], int] | None = getattr(loss, "count_samples", None)
    return batch_size(batch) if own is None else own(batch)


def micro_batches(batch: Any) -> list[Any]:
    """The entries of a list of batches; of any other batch itself alone.

    A list is one of batches where its entries are containers of one type, as a loader's are: dicts,
    tuples, lists, instances of a dataclass. A list of tensors is one batch, and so is a tuple of
    anything.
    """
    alike = type(batch) is list and len({type(entry) for entry in batch}) == 1
    return batch if alike and _opened(batch[0]) is not None else [batch]


def joined(first: Any, second: Any) -> Any | None:
    """Two batches as one, samples of the first before those of the second.

    None where they differ in structure, in what they hold beside their samples, or a pair of
    tensors in dtype, device or sample shape.
    """
    sides = [list(_walk(batch, "")) for batch in (first, second)]
    if len(sides[0]) != len(sides[1]):
        return None
    pairs = []
    for (label, a), (other, b) in zip(*sides, strict=True):
        if label != other:
            return None
        if _has_samples(a) and _has_samples(b):
            if (a.dtype, a.device, a.shape[1:]) != (b.dtype, b.device, b.shape[1:]):
                return None
            pairs.append((a, b))
        elif a is not b and not _same(a, b):
            return None
    return refilled(first, [torch.cat(pair) for pair in pairs])


def tokens(batch: Any) -> int:
    """An estimate, from shapes alone: the same for the same batches.

    Of integers each is one; of numbers, those of the longest dimension of a sample go together.
    """
    return max(
        leaf.numel() // (max((1, *leaf.shape[1:])) if leaf.is_floating_point() else 1)
        for leaf in tensors(batch)
    )


def trainable(
    model: nn.Module, parameters: Sequence[nn.Parameter] | None = None
) -> dict[str, nn.Parameter]:
    """The model's parameters that require gradients, by name; only `parameters` if given.

    Raises:
        InputError: there is none, or the model is spread over several processes or devices.
    """
    every = check_one_rank(model)
    wanted = None if parameters is None else {id(parameter) for parameter in parameters}
    named = {
        name: parameter
        for name, parameter in every.items()
        if parameter.requires_grad and (wanted is None or id(parameter) in wanted)
    }
    check(len(named) > 0, "model has no parameter to differentiate: all are frozen or left out")
    return named


def per_sample_losses(losses: Any, size: int) -> Tensor:
    """`losses`, if they are [size]."""
    check(isinstance(losses, Tensor), f"loss must return a Tensor, got {type(losses).__name__}")
    check(
        losses.shape == (size,),
        f"loss must return one value per sample, [{size}], got {list(losses.shape)}"
        + ("; use reduction='none'" if losses.dim() == 0 else ""),
    )
    check_floating(losses)
    return losses


def check_floating(losses: Tensor) -> None:
    check(not is_split(losses), "losses are a DTensor: return losses.full_tensor()")
    check(
        losses.is_floating_point(),
        f"loss must be floating point, got {losses.dtype}: whole numbers, as of an accuracy, have "
        "no gradient",
    )


def _has_samples(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


class _Opened(NamedTuple):
    """Stands for a container in a walk: like another with the same type and the same beside."""

    kind: type
    beside: Any = None  # what it holds beside its entries


def _same(a: Any, b: Any) -> bool:
    """Whether they are equal; not where they do not say so in a word, as arrays do not."""
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and _same([*a.values()], [*b.values()])
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    try:
        return a is b or (a == b) is True
    except Exception:
        return False


def _beside(node: Any, entries: Sequence[Any]) -> dict[str, Any]:
    """What a container holds beside its entries: attributes, and what its type was told of it."""
    own = {id(entry) for entry in entries}
    held = {
        name: value
        for name, value in getattr(node, "__dict__", {}).items()
        if name != "_encodings"
        # None and strings may be the same objects as entries, by chance
        and (id(value) not in own or isinstance(value, WHOLE))
        and not _stores(value, own)
    }
    if isinstance(node, defaultdict):
        held["default_factory"] = node.default_factory
    elif type(node) in pytree.SUPPORTED_NODES and not isinstance(node, dict):
        held["context"] = pytree.SUPPORTED_NODES[type(node)].flatten_fn(node)[1]
    return held


def _stores(value: Any, own: set[int]) -> bool:
    """Whether it is where a mapping has its entries, as `UserDict.data`."""
    return isinstance(value, Mapping) and own.issuperset(map(id, value.values()))


def _strays(value: Any, own: set[int], depth: int = 4) -> bool:
    """Whether it is or holds a tensor, but not in one of its own."""
    if id(value) in own or depth == 0:
        return False
    if isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
        inside = value.values() if isinstance(value, Mapping) else value
        return any(_strays(part, own, depth - 1) for part in inside)
    return isinstance(value, Tensor)


def _walk(batch: Any, label: str) -> Iterator[tuple[str, Any]]:
    """All that a batch is made of, each with its label: containers before what they hold."""
    container = _opened(batch)
    if container is None:
        yield label, batch
        return
    yield label, _Opened(type(batch), _beside(batch, container.entries))
    for part, entry in zip(container.labels, container.entries, strict=True):
        yield from _walk(entry, label + part)


def _opened(node: Any) -> _Container | None:
    """None for what is no container: a tensor, or what no batch may hold."""
    if isinstance(node, (Tensor, str, bytes)):
        return None
    if type(node) in pytree.SUPPORTED_NODES or pytree.is_namedtuple_instance(node):
        return _of_pytree(node)
    if isinstance(node, Mapping):
        keys = list(node)
        made = lambda values: _of_mapping(node, dict(zip(keys, values, strict=True)))  # noqa: E731
        return _Container([f"[{key!r}]" for key in keys], [node[key] for key in keys], made)
    names = _fields(node)
    if names:
        made = lambda values: _of_fields(node, dict(zip(names, values, strict=True)))  # noqa: E731
        return _Container([f".{name}" for name in names], [getattr(node, n) for n in names], made)
    return None


def _of_pytree(node: Any) -> _Container:
    if type(node) in (list, tuple):  # as torch has it, a tenth of the time
        return _Container([f"[{k}]" for k in range(len(node))], list(node), type(node))

    def is_leaf(part: Any) -> bool:
        return part is not node

    entries, structure = pytree.tree_flatten(node, is_leaf=is_leaf)
    try:
        paths = pytree.tree_flatten_with_path(node, is_leaf=is_leaf)[0]
        labels = [pytree.keystr(path) for path, _ in paths]
    except ValueError:  # registered without names for its entries
        labels = [f"[{k}]" for k in range(len(entries))]
    return _Container(labels, entries, lambda values: pytree.tree_unflatten(values, structure))


def _fields(node: Any) -> list[str]:
    """Of an instance of a dataclass or of an attrs class; none of anything else."""
    if isinstance(node, type) or type(node) in pytree.SUPPORTED_NODES or isinstance(node, Mapping):
        return []
    if dataclasses.is_dataclass(node):
        return [field.name for field in dataclasses.fields(node)]
    return [field.name for field in getattr(type(node), "__attrs_attrs__", ())]


def _of_mapping(node: Mapping, values: dict[Any, Any]) -> Any:
    """A mapping like `node`."""
    if not isinstance(node, (dict, UserDict)):  # a copy might share what it stores its entries in
        try:
            return type(node)(values)  # type: ignore[call-arg]
        except Exception as error:
            raise InputError(
                f"a {type(node).__name__} cannot be made of other tensors: pass dict(batch)"
            ) from error
    made: Any = copy.copy(node)
    for key, value in values.items():
        made[key] = value
    _same_elsewhere(node, made, [(node[key], value) for key, value in values.items()])
    return made


def _of_fields(node: Any, values: dict[str, Any]) -> Any:
    """An instance like `node`; no `__init__` and no `__post_init__` sees its values again."""
    made = copy.copy(node)
    for name, value in values.items():
        object.__setattr__(made, name, value)  # of a frozen one too
    _same_elsewhere(node, made, [(getattr(node, name), value) for name, value in values.items()])
    return made


def _same_elsewhere(node: Any, made: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
    """What `made` holds in attributes, beside its entries, follows them: or other samples' stay."""
    new = {id(value): changed for value, changed in pairs}
    own = {id(changed) for _, changed in pairs}
    for name, value in list(getattr(made, "__dict__", {}).items()):
        if id(value) in new:
            object.__setattr__(made, name, new[id(value)])
        elif _strays(value, own):
            raise InputError(
                f"a {type(node).__name__} holds a tensor as attribute {name!r}, beside its "
                "entries: pass a dict of all its tensors"
            )
        elif name == "_encodings":  # what a tokenizer knows of all samples
            object.__setattr__(made, name, None)


def _described(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return "a tensor of shape []"
    if leaf is None or type(leaf) in (bool, int, float):
        return repr(leaf)
    return f"a {type(leaf).__name__}"
