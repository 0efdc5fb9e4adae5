"""The user's files as sets of tokens: to forget, to retain, held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from gradsurgery.errors import InputError
from gradsurgery.language.batches import collate
from gradsurgery.language.data import REFUSALS, Example, Tags, chunks, read, refuse, tokenize
from gradsurgery.language.tokens import IGNORED
from gradsurgery.text import show
from gradsurgery.unlearn.objectives.base import Batch

Item = dict[str, Any]
PARTS = ("input_ids", "attention_mask", "labels")
QUESTIONS, COMPLETIONS, PIECES = "questions", "completions", "pieces of text"


@dataclass(frozen=True)
class Wanted:
    """How files become tokens."""

    files: Mapping[str, Path | None]
    """By the option that names each: "forget", "retain", "holdout"."""
    max_length: int
    tags: Tags | None
    system: str | None
    date: str
    refusals: Path | None


@dataclass(frozen=True)
class Samples:
    """A set: its samples and what they are called."""

    items: list[Item]
    kind: str

    @property
    def longest(self) -> int:
        return max(len(item["labels"]) for item in self.items)

    def __str__(self) -> str:
        return f"{len(self.items):,} {self.kind}"


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Errors inside begin with the option that they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"--{option}: {error}") from None


def load(wanted: Wanted, tokenizer: Any) -> dict[str, Samples]:
    """Every set there is a file for; ids count on from set to set.

    Raises:
        InputError: a file that is missing or wrong, sets that share a text, a sample of which
            nothing is left.
    """
    given = {}
    for name, path in wanted.files.items():
        if path is not None:
            with naming(name):
                given[name] = read(path)
    _check_apart(given)
    found: dict[str, Samples] = {}
    first = 0
    for name, examples in given.items():
        with naming(name):
            found[name] = _samples(examples, wanted, tokenizer, alternates=name == "forget")
        for item in found[name].items:
            item["id"] += first
        first += len(found[name].items)
    return found


def _check_apart(given: Mapping[str, Sequence[Example]]) -> None:
    """Raise `InputError` where two sets have a text in common."""
    known: dict[tuple[Any, ...], tuple[str, int]] = {}
    for name, examples in given.items():
        for row, one in enumerate(examples, 1):
            key = (one.turns, one.prompt.strip(), one.answer.strip())
            other, at = known.setdefault(key, (name, row))
            if other != name:
                raise InputError(
                    f"--{name}: sample {row}, {show(one.answer, 60)}, is also sample {at} of "
                    f"--{other}: what is to be forgotten, kept and held out must be apart"
                )


def _samples(
    examples: Sequence[Example], wanted: Wanted, tokenizer: Any, *, alternates: bool
) -> Samples:
    if not any(one.turns or one.prompt for one in examples):
        pieces = chunks(examples, tokenizer, max_length=wanted.max_length)
        if not pieces:
            raise InputError("its texts have no two tokens")
        return Samples(pieces, PIECES)
    if wanted.tags is None and any(one.turns for one in examples):
        _check_template(tokenizer)
    wrong = [bool(one.perturbed) for one in examples]
    if any(wrong) and not all(wrong):
        raise InputError(f"sample {wrong.index(False) + 1} has no perturbed_answer, others have")
    if alternates:
        refused = refuse(examples, REFUSALS if wanted.refusals is None else wanted.refusals)
        examples = [
            replace(one, alternate=one.alternate or other.alternate)
            for one, other in zip(examples, refused, strict=True)
        ]
    else:
        examples = [replace(one, alternate=None) for one in examples]
    items = tokenize(
        examples,
        tokenizer,
        max_length=wanted.max_length,
        tags=wanted.tags,
        system=wanted.system,
        # a template that writes today's date would make other tokens tomorrow
        chat_options={"date_string": wanted.date} if wanted.tags is None else None,
        truth=True,
    )
    return Samples(items, QUESTIONS if examples[0].turns else COMPLETIONS)


def _check_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "it has questions, and the tokenizer of --model has no chat template: say with "
            "--user-tag and --assistant-tag what stands around a question and before its answer"
        )


def batch(samples: Samples, length: int) -> Batch:
    """All samples of a set, padded to `length` tokens, with their alternates, if they have some."""
    kept = (*PARTS, "id", "alternate")
    found = collate([{k: v for k, v in item.items() if k in kept} for item in samples.items])
    for part in PARTS:
        fill = IGNORED if part == "labels" else 0
        found[part] = F.pad(found[part], (0, length - found[part].shape[1]), value=fill)
    return found


def every(sets: Mapping[str, Samples]) -> Iterator[Item]:
    """All that a model may be given: samples and their other answers."""
    for item in (item for samples in sets.values() for item in samples.items):
        others = (item.get(name) for name in ("alternate", "paraphrased"))
        yield from (item, *filter(None, others), *item.get("perturbed", ()))


def halves(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Validation and test, the same for every seed.

    Raises:
        InputError: fewer than two samples.
    """
    if len(items) < 2:
        raise InputError("--holdout: one half is for validation, so two samples must be there")
    drawn = random.Random("held out").sample(range(len(items)), len(items))
    first = set(drawn[: len(items) // 2])
    parts = ([], [])
    for at, item in enumerate(items):
        parts[at not in first].append(item)
    return parts


def some(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of a set, in its order, the same for every seed."""
    drawn = random.Random("measured").sample(range(len(items)), min(most, len(items)))
    return [items[at] for at in sorted(drawn)]


def digest(samples: Samples) -> str:
    """SHA-256 of what a model is given of a set: tokens and labels, other answers among them."""
    found = hashlib.sha256()
    for item in every({"": samples}):
        for part in PARTS[::2]:
            found.update(f"{part} {len(item[part])} ".encode())
            found.update(item[part].numpy().tobytes())
    return found.hexdigest()
