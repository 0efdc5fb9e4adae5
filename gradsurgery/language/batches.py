"""Padded batches of samples, and forget samples paired with retain samples drawn for each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from gradsurgery.errors import InputError
from gradsurgery.language.tokens import IGNORED
from gradsurgery.ops._inputs import check, check_count, check_number
from gradsurgery.text import show

Sample = Mapping[str, Any]
Collate = Callable[[Sequence[Sample]], Mapping[str, Any]]


def collate(samples: Sequence[Sample], pad: int = 0) -> dict[str, Any]:
    """Samples as one batch, padded on the right to the longest of them.

    Sequences [T], as lists, arrays or tensors, become [B, T]: `input_ids` are padded with `pad`,
    `labels` with -100 and all others with 0. Numbers, such as `id`, become [B]. `alternate`, the
    same sample with another answer, is padded by itself. Where samples have no `attention_mask`
    there is one, for else padding would be attended to.

    Raises:
        InputError: naming the entry that is neither, that a sample lacks, or that is not as long
            as the others of its sample.
    """
    check(len(samples) > 0, "samples: there are none to make a batch of")
    for k, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise InputError(f"sample {k} must be a mapping, got {type(sample).__name__}")
        other = sorted(map(str, set(sample) ^ set(samples[0])))
        check(not other, f"samples of a batch must have the same entries: {other[:3]} differ")
    batch: dict[str, Any] = {}
    lengths: list[dict[int, str]] = [{} for _ in samples]
    for name in samples[0]:
        entries = [sample[name] for sample in samples]
        if name == "alternate":
            batch[name] = collate(entries, pad)
            continue
        values = [_values(name, k, entry) for k, entry in enumerate(entries)]
        for known, value in zip(lengths, values, strict=True):
            if value.dim():
                known.setdefault(len(value), name)
        batch[name] = _padded(name, values, _padding(name, pad))
    for k, known in enumerate(lengths):
        said = ", ".join(f"{name} {length}" for length, name in known.items())
        check(len(known) < 2, f"sample {k}: sequences must be of one length, got {said}")
    if "input_ids" in batch and "attention_mask" not in batch:
        ones = [torch.ones(next(iter(known)), dtype=torch.int64, device="cpu") for known in lengths]
        batch["attention_mask"] = _padded("attention_mask", ones, 0)
    return batch


class Pair(NamedTuple):
    """Places of a forget sample and of the retain samples drawn for it."""

    forget: int
    retain: tuple[int, ...]


class Pairs(Dataset):
    """Forget samples, each with retain samples: `pairs[Pair(f, (r, ...))]` has both.

    A sample gets an `id`: its place in its set, that of retain samples after all forget samples.

    Args:
        forget: what has a length and samples by place: mappings that `collate` takes.
        retain: likewise.
    """

    def __init__(self, forget: Any, retain: Any) -> None:
        for name, samples in (("forget", forget), ("retain", retain)):
            sized = hasattr(samples, "__len__") and hasattr(samples, "__getitem__")
            if not sized or isinstance(samples, (str, bytes, Mapping)):
                got = type(samples).__name__
                raise InputError(
                    f"{name} dataset must have a length and samples by place, as a list or a "
                    f"map-style dataset, got {got}"
                )
            check(len(samples) > 0, f"{name} dataset is empty")
        self.forget, self.retain = forget, retain

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, pair: Pair) -> dict[str, Any]:
        forget, retain = pair
        return {
            "forget": _numbered(self.forget, forget, 0, "forget"),
            "retain": [_numbered(self.retain, k, len(self.forget), "retain") for k in retain],
        }


class PairSampler(Sampler):
    """Every forget sample once an epoch, in drawn order, with retain samples drawn for it.

    Retain samples come in drawn order too, all of them before any comes again. What is drawn
    follows from the seed and the epoch alone: not from torch's random numbers, so that a run
    resumes as it was, and not from how many ranks there are, so that together they see the same.

    Args:
        forget: how many samples there are.
        retain: likewise.
        retain_per_forget: retain samples for each forget sample, a number above 0. At 1.5 pairs
            have one and two by turns, at 0.25 each fourth pair has one, and so has the last.
        seed: a whole number.
        rank: the first pair that this process takes.
        ranks: every so many pairs it takes another. All have as many: up to `ranks - 1` pairs of an
            epoch are left out.
    """

    def __init__(
        self,
        forget: int,
        retain: int,
        *,
        retain_per_forget: float = 1,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        check_count("forget", forget)
        check_count("retain", retain)
        check_ratio(retain_per_forget)
        check_count("ranks", ranks)
        check_number("seed", seed, int)
        known = isinstance(rank, int) and 0 <= rank < ranks <= forget
        check(known, f"rank must be in [0, ranks) and ranks at most {forget}, got {rank}, {ranks}")
        self.forget, self.retain, self.retain_per_forget = forget, retain, retain_per_forget
        self.seed, self.rank, self.ranks, self.epoch = seed, rank, ranks, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw those of another epoch from here on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.forget // self.ranks

    def __iter__(self) -> Iterator[Pair]:
        generator = torch.Generator(device="cpu").manual_seed(_mixed(self.seed, self.epoch))
        each = self.retain_per_forget

        def order(count: int) -> Tensor:
            return torch.randperm(count, generator=generator, device="cpu")

        forget, pairs = order(self.forget).tolist(), len(self) * self.ranks
        rounds = math.ceil((self.forget * each + 1) / self.retain)
        retain = torch.cat([order(self.retain) for _ in range(rounds)]).tolist()
        for place in range(self.rank, pairs, self.ranks):
            first, end = math.floor(place * each), math.floor((place + 1) * each)
            end += first == end and place == pairs - 1
            yield Pair(forget[place], tuple(retain[first:end]))


def check_ratio(retain_per_forget: float) -> None:
    """Raise `InputError` unless it is a number above 0."""
    check_number("retain_per_forget", retain_per_forget)
    check(retain_per_forget > 0, f"retain_per_forget must be above 0, got {retain_per_forget}")


class PairCollator:
    """Pairs as two batches, {"forget": ..., "retain": ...}, of the samples of each.

    Where no pair has a retain sample, there is no "retain".

    Args:
        collate: makes a batch of samples; `id` need not be known to it.
    """

    def __init__(self, collate: Collate = collate) -> None:
        self.collate = collate

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        forget = [pair["forget"] for pair in pairs]
        retain = [sample for pair in pairs for sample in pair["retain"]]
        parts = {"forget": forget, "retain": retain}
        return {part: self.batch(samples) for part, samples in parts.items() if samples}

    def batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """One batch of numbered samples.

        Raises:
            InputError: `collate` put several samples into a row.
        """
        ids = torch.tensor([sample["id"] for sample in samples], device="cpu")
        plain = [{k: v for k, v in sample.items() if k != "id"} for sample in samples]
        if len({"alternate" in sample for sample in plain}) > 1:
            raise InputError("samples of a batch must all have an alternate, or none")
        if "alternate" in plain[0]:
            others = [sample.pop("alternate") for sample in plain]
            for other in others:
                if not isinstance(other, Mapping):
                    raise InputError(
                        "alternate of a sample must be a mapping of input_ids and labels, which "
                        f"are tokens, got {type(other).__name__}"
                    )
            alternate = self.collate(others)
            made = {**self.collate(plain), "alternate": dict(alternate)}
        else:
            made = dict(self.collate(plain))
        labels = made.get("labels")
        rows = list(labels.shape) if isinstance(labels, Tensor) else None
        check(
            rows is None or rows[:1] == [len(samples)],
            f"data collator must give labels a row for each of {len(samples)} samples, got {rows}: "
            "several in a row, as padding_free and packing have them, are not served",
        )
        return {**made, "id": ids}


def _numbered(samples: Any, place: int, first: int, what: str) -> dict[str, Any]:
    sample = samples[place]
    if not isinstance(sample, Mapping):
        got = type(sample).__name__
        raise InputError(f"sample {place} of the {what} dataset must be a mapping, got {got}")
    return {**sample, "id": first + place}


def _mixed(seed: int, epoch: int) -> int:
    """A seed of 64 bits for each of two whole numbers: near ones must not give like draws."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _padding(name: str, pad: int) -> int:
    return {"labels": IGNORED, "input_ids": pad}.get(name, 0)


def _values(name: str, k: int, entry: Any) -> Tensor:
    """A number or a sequence as a tensor on the CPU, [] or [T]."""
    try:
        value = torch.as_tensor(entry, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(entry).__name__
        raise InputError(
            f"{show(name)} of sample {k} must be a number or a sequence of numbers, got {got}"
        ) from error
    shape = list(value.shape)
    check(value.dim() < 2, f"{show(name)} of sample {k} must be one sequence, got {shape}")
    return value


def _padded(name: str, values: Sequence[Tensor], padding: int) -> Tensor:
    kinds = {value.dim() for value in values}
    check(len(kinds) == 1, f"{show(name)} is a number of some samples and a sequence of others")
    if kinds == {0}:
        return torch.stack(list(values))
    return torch.nn.utils.rnn.pad_sequence(list(values), True, padding)
