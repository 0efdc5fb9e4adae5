"""Packed batches: several documents in one row of tokens, one after another, without padding."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from gradsurgery.errors import InputError
from gradsurgery.ops._inputs import check

IGNORED = -100  # the label of a token that does not count
BOUNDS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Packing(NamedTuple):
    """Where the tokens of D documents go, of which the longest has T.

    Attributes:
        places: [B, N] int64, of each token as they are packed, its place in [D, T].
        documents: D.
        length: T.
    """

    places: Tensor
    documents: int
    length: int

    def unpack(self, values: Tensor, fill: float = 0) -> Tensor:
        """[B, N, ...] -> [D, T, ...], with `fill` behind the end of each document."""
        flat, places = values.flatten(0, 1), self.places.flatten().to(values.device)
        out = flat.new_full((self.documents * self.length, *flat.shape[1:]), fill)
        return out.index_copy(0, places, flat).unflatten(0, (self.documents, self.length))


def packing(batch: Mapping[str, Any]) -> Packing | None:
    """How the documents of a batch are packed; None where each row is one.

    A document begins with each row, and where `position_ids` do not count on: as transformers has
    it, whose attention keeps documents apart by these where it is given no mask.

    Raises:
        InputError: documents that attention would not keep apart, for there is an `attention_mask`
            too, or it is not by `position_ids` that `seq_idx` or `cu_seq_lens_q` part them, or
            transformers is too old to look at these.
    """
    found = _packing(batch)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if found is not None and isinstance(mask, Tensor) and mask.dim() == 2:
        raise InputError(
            "batch is packed, for its position_ids begin anew within a row, and has an "
            "attention_mask, with which attention does not keep documents apart: leave it out, or "
            "take gradsurgery.language.unpacked(batch)"
        )
    if found is not None and not _parts_documents():
        raise InputError(
            "batch is packed, and attention in this transformers does not keep documents apart: "
            "update to 4.53.1 or newer, or take gradsurgery.language.unpacked(batch)"
        )
    return found


def _parts_documents() -> bool:
    """Whether attention masks are made by `position_ids`; so, too, where no model can be its."""
    if "transformers" not in sys.modules:
        return True
    if importlib.util.find_spec("transformers.masking_utils") is None:
        return False
    masks = importlib.import_module("transformers.masking_utils")
    return hasattr(masks, "find_packed_sequence_indices")


def unpacked(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A packed batch as an ordinary one: a document a sample, padded on the right, [D, T].

    Exact with any attention, and for what takes samples apart, as `micro_batch`. It costs padding:
    the model sees D T tokens, where T are those of the longest document, and not only their own.

    Args:
        batch: as for the losses, [B, N], `position_ids` beginning anew with each document. What is
            of its tokens is unpacked, and `alternate` by itself; `id` may be [D] or [1, D]. A batch
            that is not packed is returned as it is.

    Raises:
        InputError: documents that are not parted by `position_ids`; an entry that is of neither
            tokens nor documents, by name.
    """
    found = _packing(batch)
    if found is None:
        return batch
    shape, made = tuple(found.places.shape), {}
    for name, entry in batch.items():
        if name in (*BOUNDS, "attention_mask"):
            continue
        if name == "alternate":
            made[name] = unpacked(entry)
        elif name == "id":
            made[name] = ids_of(entry, found.documents)
        elif not isinstance(entry, Tensor) or entry.dim() == 0:
            made[name] = entry
        elif tuple(entry.shape[:2]) in (shape, (1, shape[1])):
            rows = entry.expand(shape[0], *entry.shape[1:])
            made[name] = found.unpack(rows, IGNORED if name == "labels" else 0)
        else:
            raise InputError(
                f"{name} of a packed batch must be of its tokens, {list(shape)}, "
                f"got {list(entry.shape)}"
            )
    mask = batch.get("attention_mask")
    known = isinstance(mask, Tensor) and tuple(mask.shape) == shape  # padding behind them all
    ones = torch.ones_like(found.places)
    made["attention_mask"] = found.unpack((mask != 0).to(ones) if known else ones)
    return made


def ids_of(ids: Any, size: int) -> Any:
    """Ids of D samples, which a packed batch may hold as [1, D], like its one row of tokens."""
    return ids[0] if isinstance(ids, Tensor) and tuple(ids.shape) == (1, size) else ids


def _packing(batch: Mapping[str, Any]) -> Packing | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.numel() == 0:
        return None
    if is_functorch_wrapped_tensor(labels):  # under vmap no value decides
        return None
    begins = _by_positions(batch, labels)
    for name, others in _by_bounds(batch, labels).items():
        check(
            torch.equal(begins, others),
            f"batch is packed by {name}, and its position_ids do not begin anew there: these are "
            "what attention keeps documents apart by",
        )
    # where no label follows, what begins is padding
    counted = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
    if not bool((begins & counted)[:, 1:].any()):
        return None
    document = begins.flatten().cumsum(0) - 1  # of each token
    sizes = torch.bincount(document)
    first = sizes.cumsum(0) - sizes
    within = torch.arange(len(document), device=document.device) - first[document]
    length = int(sizes.max())
    return Packing((document * length + within).view_as(labels), len(sizes), length)


def _by_positions(batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Where documents begin, [B, N] bool."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    begins = torch.zeros_like(labels, dtype=torch.bool)
    shapes = tuple(labels.shape), (1, labels.shape[1])
    if isinstance(positions, Tensor) and tuple(positions.shape) in shapes:
        positions = positions.to(labels.device)
        begins[:, 1:] = positions.diff(dim=1) != 1
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            # with a mask positions part nothing: padding has any, and a text may have gaps
            attended = (mask != 0).to(labels.device)
            begins[:, 1:] &= attended[:, 1:] & attended[:, :-1] & (positions == 0)[:, 1:]
    begins[:, 0] = True
    return begins


def _by_bounds(batch: Mapping[str, Any], labels: Tensor) -> dict[str, Tensor]:
    """The same as other entries have it, of those that part rows."""
    found = {}
    index, ends = batch.get("seq_idx"), batch.get("cu_seq_lens_q")
    if isinstance(index, Tensor) and index.shape == labels.shape:
        found["seq_idx"] = torch.ones_like(labels, dtype=torch.bool)
        found["seq_idx"][:, 1:] = (index.diff(dim=1) != 0).to(labels.device)
    if isinstance(ends, Tensor) and len(labels) == 1:
        places = torch.arange(labels.shape[1], device=ends.device)
        found["cu_seq_lens_q"] = torch.isin(places, ends)[None].to(labels.device)
    return {name: begins for name, begins in found.items() if bool(begins[:, 1:].any())}
