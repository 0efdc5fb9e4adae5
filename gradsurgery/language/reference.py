"""The original, as losses need it: its log-probabilities, computed once, or the model, frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from gradsurgery.errors import InputError
from gradsurgery.language.packed import ids_of, packing
from gradsurgery.language.tokens import Batch, known_labels, label_tokens, named, predictions
from gradsurgery.ops._inputs import check

ENCODED = ("input_features",)  # entries of a batch that an encoder is given, not a decoder


class LogProbs:
    """The original's log-probabilities of samples, by sample id: no second model stays in memory.

    Enough for NPO and DPO. Make it before the model moves:

        reference = LogProbs.of(model, loader)

    A batch then needs `id`, [B] integers. Where batches have an `alternate`, as DPO's, its
    answers' are kept too. They are kept for the text and the labels that they are of: a sample that
    comes with others, such as a refusal drawn anew, is an error and never another's number.
    """

    def __init__(self) -> None:
        self._known: dict[int, dict[int, float]] = {}  # by id, by what text and labels hash to

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Batch]) -> LogProbs:
        """Those of all samples in `batches`, by the model as it is, in eval mode."""
        made = cls()
        for batch in batches:
            made.add(model, batch)
        return made

    def add(self, model: nn.Module, batch: Batch) -> None:
        """Those of one batch more.

        Raises:
            InputError: a batch without ids; as `tokens.predictions`.
        """
        parts = [batch, alternate(batch)] if "alternate" in batch else [batch]
        with still(model):
            found = [(_keys(part), summed(model, part).tolist()) for part in parts]
        for keys, values in found:
            for (sample, labels), value in zip(keys, values, strict=True):
                self._known.setdefault(sample, {})[labels] = value

    def __len__(self) -> int:
        """How many samples are known."""
        return len(self._known)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is known, to be saved: ids, hashes of texts and log-probabilities, [n] each."""
        rows = [(i, h, value) for i, known in self._known.items() for h, value in known.items()]
        ids, hashes, values = zip(*rows, strict=True) if rows else ((), (), ())
        return {
            "id": torch.tensor(ids, dtype=torch.int64, device="cpu"),
            "labels": torch.tensor(hashes, dtype=torch.int64, device="cpu"),
            "log_probs": torch.tensor(values, dtype=torch.float64, device="cpu"),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Know what a `state_dict()` has, and no more.

        Raises:
            InputError: it is no such state.
        """
        names, given = ("id", "labels", "log_probs"), state if isinstance(state, Mapping) else {}
        columns = [given[k] for k in names if isinstance(given.get(k), Tensor)]
        alike = len(columns) == 3 and len({column.shape for column in columns}) == 1
        check(alike, f"state must have tensors {', '.join(names)}, each [n]")
        known: dict[int, dict[int, float]] = {}
        for sample, labels, value in zip(*(column.tolist() for column in columns), strict=True):
            known.setdefault(sample, {})[labels] = value
        self._known = known

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the samples of a batch, [B] float64 on the CPU, in nats.

        Raises:
            InputError: a batch without ids, a sample that was not seen or had another text. The
                message has its id.
        """
        if is_functorch_wrapped_tensor(known_labels(batch)):
            raise InputError(
                "reference: LogProbs looks samples up by id, which torch.func hides: take "
                "rows='captured', or Frozen"
            )
        values = []
        for place, (sample, labels) in enumerate(_keys(batch)):
            known = self._known.get(sample)
            if known is None or labels not in known:
                why = "was not seen" if known is None else "had another text or other labels"
                raise InputError(
                    f"reference: {named(batch, place)} {why} when the original's "
                    "log-probabilities were computed; LogProbs.add takes what is new"
                )
            values.append(known[labels])
        return torch.tensor(values, dtype=torch.float64, device="cpu")


class _Original:
    """The original as a model."""

    def running(self, model: nn.Module) -> Any:
        """A context with the original to call, in eval mode and without gradients; the model that
        trains is afterwards as it was."""
        raise NotImplementedError

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        with self.running(model) as original:
            return summed(original, batch)


class Frozen(_Original):
    """A frozen copy of the original, held in memory beside the model that trains.

    Args:
        original: `copy.deepcopy(model)`, made before the model moves. It is called as it is given,
            in eval mode and without gradients.
    """

    def __init__(self, original: nn.Module) -> None:
        got = type(original).__name__
        check(isinstance(original, nn.Module), f"original must be a Module, got {got}")
        self.original = original

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        if model is self.original:
            raise InputError(
                "reference: Frozen holds the model that trains, which moves; give it a copy, "
                "copy.deepcopy(model)"
            )
        with still(self.original):
            yield self.original


class WithoutAdapter(_Original):
    """The model that trains with its adapter switched off, which is the original: no copy is held.

    For models of peft, by their `disable_adapter`. The weights below the adapter must be frozen.
    """

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        disable: Any = getattr(model, "disable_adapter", None)
        if disable is None:
            raise InputError(
                "reference: WithoutAdapter needs a model with disable_adapter, as peft's; "
                f"{type(model).__name__} has none: take Frozen"
            )
        trains = [(p, p.requires_grad) for p in model.parameters()]
        try:
            with still(model), disable():
                yield model
        finally:
            for parameter, flag in trains:  # switched on again, all of an adapter would train
                parameter.requires_grad_(flag)


def summed(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probability of each sample's label tokens together, [B], in nats."""
    found = predictions(model, batch)
    return found.sums(found.log_probs())


def alternate(batch: Batch) -> Batch:
    """The samples of a batch with the answers that are wanted in place of theirs.

    What an encoder is given is the same for both, and stands in the batch alone.

    Raises:
        InputError: the batch has none.
    """
    found = batch.get("alternate")
    if found is None:
        raise InputError(
            f"batch has no alternate, the same samples with other answers, only "
            f"{sorted(map(str, batch))}"
        )
    shared = {name: batch[name] for name in ("id", *ENCODED) if name in batch}
    return {**shared, **found}


def _keys(batch: Batch) -> list[tuple[int, int]]:
    """Of each sample its id, and what text and labels hash to, wherever padding stands."""
    labels, counted, *_ = label_tokens(batch)
    ids = ids_of(batch.get("id"), len(labels))
    if not isinstance(ids, Tensor) or ids.shape != labels.shape[:1] or ids.is_floating_point():
        got = type(ids).__name__
        if isinstance(ids, Tensor):
            got = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        raise InputError(
            f"id of a batch must be integers [{len(labels)}], by which the original's "
            f"log-probabilities are kept, got {got}"
        )
    rows = torch.where(counted, labels, -1).tolist()
    texts = _texts(batch, counted)
    hashes = [
        hash((tuple(token for token in row if token >= 0), *text))
        for row, text in zip(rows, texts, strict=True)
    ]
    return list(zip(ids.tolist(), hashes, strict=True))


def _texts(batch: Batch, counted: Tensor) -> list[list[int]]:
    """Of each sample the tokens attended to, up to the last that counts; empty without any."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return [[] for _ in counted]
    packed = packing(batch)
    if packed is not None:
        ids = packed.unpack(ids, -1)
    elif isinstance(mask, Tensor) and mask.shape == ids.shape:
        ids = torch.where(mask.to(ids.device) != 0, ids, -1)
    ends = counted.shape[1] - counted.flip(1).int().argmax(1)  # token t is predicted at t - 1
    rows = zip(ids.tolist(), ends.tolist(), strict=True)
    return [[token for token in row[: end + 1] if token >= 0] for row, end in rows]


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """No gradients and eval mode inside, each module in the mode it had afterwards."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training
