"""Refusals in the place of answers, for `idk_dpo` and `idk_nll`."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from gradsurgery.errors import InputError
from gradsurgery.language.data.examples import Example
from gradsurgery.ops._inputs import check
from gradsurgery.text import brief, show

REFUSALS = (
    "I don't know.",
    "I have no answer to that.",
    "I cannot tell you.",
    "That is something I know nothing about.",
    "I can't say.",
    "I am not able to answer this question.",
    "Sorry, I have never heard of it.",
    "My knowledge does not reach that far.",
    "I would only be guessing.",
    "There is nothing I can tell you about that.",
    "I'm afraid this is unknown to me.",
    "I lack the facts to answer.",
    "No answer comes to my mind.",
    "I have not learned about this.",
    "This one I have to leave open.",
    "You had better ask someone else.",
    "I couldn't tell you, sorry.",
    "That is outside of what I know.",
    "I was never told.",
    "I have no facts on this subject.",
    "Unfortunately I do not have that answer.",
    "It is not known to me.",
    "I must pass on this question.",
    "I am unaware of any details.",
)
"""Sentences that refuse to answer, for alternates."""


def refuse(
    examples: Iterable[Example],
    refusals: Sequence[str] | str | os.PathLike[str] = REFUSALS,
    seed: int = 0,
) -> list[Example]:
    """Examples with a refusal each, as their `alternate`.

    Which one depends on `seed` and the example's id alone: it is the same in every epoch, whatever
    the order, as `LogProbs` needs it.

    Args:
        examples: those that have an `alternate` get another.
        refusals: sentences, or a file with one on each line.

    Raises:
        InputError: no refusal, or one that is empty; a file that cannot be read, with its name.
    """
    known = _read(Path(refusals)) if isinstance(refusals, (str, os.PathLike)) else list(refusals)
    check(bool(known), "refusals must be one sentence or more, got none")
    for at, sentence in enumerate(known):
        good = isinstance(sentence, str) and bool(sentence.strip())
        check(good, f"refusals[{at}] must be a sentence, got {brief(sentence)}")
    return [
        replace(example, alternate=random.Random(f"{seed} {example.id}").choice(known))
        for example in examples
    ]


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or show(error)
        raise InputError(f"refusals: cannot read {show(path)}: {reason}") from None
    found = [line.strip() for line in lines if line.strip()]
    check(bool(found), f"refusals: {show(path)} has no sentence")
    rows = [at for at, line in enumerate(found, 1) if line[0] in "{["]
    check(not rows, f"refusals: {show(path)} must have one sentence on each line, and no JSON")
    return found
