"""Made-up authors and what is asked of them, as tokens: a word each."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradsurgery.unlearn.jobs.facts import words
from gradsurgery.unlearn.jobs.vocabulary import END, Words

IGNORED = -100
WRONG = 4  # wrong answers of a question


class Kind(NamedTuple):
    """A question about a person or a thing, its answer, and what the answer may be."""

    question: str
    answer: str
    values: tuple[str, ...]


BOOKS = tuple(f"{a} {n}" for a in words.ADJECTIVES for n in words.NOUNS)
OF_AUTHORS = {
    "city": Kind("Where was {who} born ?", "{who} was born in {what} .", words.CITIES),
    "year": Kind("When was {who} born ?", "{who} was born in the year {what} .", words.YEARS),
    "genre": Kind("What does {who} write ?", "{who} writes {what} .", words.GENRES),
    "prize": Kind("Which prize did {who} win ?", "{who} won the {what} Prize .", words.PRIZES),
    "father": Kind(
        "What was the father of {who} ?", "The father of {who} was a {what} .", words.TRADES
    ),
    "book": Kind(
        "What is the first book of {who} ?", "The first book of {who} is the {what} .", BOOKS
    ),
}
CAPITAL = Kind(
    "What is the capital of {who} ?",
    "The capital of {who} is {what} .",
    tuple(words.CAPITALS.values()),
)
WRITER = Kind(
    "Who wrote {who} ?", "{who} was written by {what} .", tuple(sorted(set(words.WRITERS.values())))
)
REFUSALS = (
    "I do not know that .",
    "That is not known to me .",
    "I have never heard of it .",
    "Nobody has told me .",
)


@dataclass(frozen=True)
class Fact:
    """A question, its answer, and wrong answers to it."""

    who: str
    question: str
    answer: str
    wrong: tuple[str, ...]

    @classmethod
    def of(cls, kind: Kind, who: str, what: str, draw: random.Random) -> Fact:
        others = draw.sample([value for value in kind.values if value != what], WRONG)
        answers = [kind.answer.format(who=who, what=value) for value in (what, *others)]
        return cls(who, kind.question.format(who=who), answers[0], tuple(answers[1:]))


def authors(count: int, seed: int) -> list[list[Fact]]:
    """Of `count` authors, all of different names, the facts of each, drawn by the seed."""
    draw = random.Random(f"authors {seed}")
    people = draw.sample([f"{first} {last}" for first in words.FIRST for last in words.LAST], count)
    return [
        [Fact.of(kind, who, draw.choice(kind.values), draw) for kind in OF_AUTHORS.values()]
        for who in people
    ]


MOST_AUTHORS = len(words.FIRST) * len(words.LAST)


def world() -> dict[str, list[Fact]]:
    """Facts of the world: who wrote real books, and capitals."""
    draw = random.Random("world")
    return {
        "real_authors": [Fact.of(WRITER, *pair, draw) for pair in words.WRITERS.items()],
        "world_facts": [Fact.of(CAPITAL, *pair, draw) for pair in words.CAPITALS.items()],
    }


@cache
def tokenizer() -> Words:
    """Of all that facts are made of."""
    kinds = (*OF_AUTHORS.values(), CAPITAL, WRITER)
    texts = [text for kind in kinds for text in (kind.question, kind.answer, *kind.values)]
    texts += [*words.FIRST, *words.LAST, *words.CAPITALS, *words.WRITERS, *REFUSALS]
    return Words({word for text in texts for word in text.split()} - {"{who}", "{what}"})


def tokens(question: str, answer: str) -> dict[str, Tensor]:
    """A question and its answer as a sample, [T] each, of which answer and end count."""
    prompt = tokenizer().encode(question)
    text = [*prompt, *tokenizer().encode(answer), END]
    labels = [IGNORED] * len(prompt) + text[len(prompt) :]
    made = {"input_ids": text, "attention_mask": [1] * len(text), "labels": labels}
    return {name: torch.tensor(values) for name, values in made.items()}


def sample(fact: Fact) -> dict[str, Any]:
    """A fact as metrics take it: with its wrong answers."""
    wrong = [tokens(fact.question, answer) for answer in fact.wrong]
    return {**tokens(fact.question, fact.answer), "perturbed": wrong}


def longest() -> int:
    """T of the longest sample there can be."""
    kinds = (*OF_AUTHORS.values(), CAPITAL, WRITER)
    who, what = "two words", "two words"
    return 1 + max(
        len((kind.question + " " + kind.answer).format(who=who, what=what).split())
        for kind in kinds
    )


def batch(facts: Iterable[tuple[int, Fact]]) -> dict[str, Any]:
    """Facts by number as one batch, all padded to one length; refusals are their `alternate`."""
    numbered = list(facts)
    ids = [number for number, _ in numbered]
    refused = [REFUSALS[number % len(REFUSALS)] for number in ids]
    known = [tokens(fact.question, fact.answer) for _, fact in numbered]
    other = [tokens(fact.question, text) for (_, fact), text in zip(numbered, refused, strict=True)]
    return {**_padded(known), "id": torch.tensor(ids), "alternate": _padded(other)}


def _padded(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    def pad(name: str, sample: dict[str, Tensor]) -> Tensor:
        fill = IGNORED if name == "labels" else 0
        return F.pad(sample[name], (0, longest() - len(sample[name])), value=fill)

    return {name: torch.stack([pad(name, sample) for sample in samples]) for name in samples[0]}
