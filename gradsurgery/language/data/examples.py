"""Examples: a text, or an answer to what was said before it, recognised by a row's keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

from gradsurgery.errors import InputError
from gradsurgery.ops._inputs import check, check_number
from gradsurgery.text import brief, show

SURROGATE = re.compile("[\ud800-\udfff]")
Turn = tuple[str, str]  # who speaks ("system", "user", "assistant"), and what is said


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample as text.

    Attributes:
        id: its number, by which a loss finds what it keeps of the sample.
        answer: what is learned, and forgotten: an answer, or the text itself.
        turns: what was said before it, in order; () of a text.
        prompt: of a text, what stands before `answer` and does not count.
        paraphrased: the answer in other words.
        perturbed: wrong answers of the same form.
        alternate: an answer that is wanted in its place, for `idk_dpo`, `altpo` and `idk_nll`.
    """

    id: int
    answer: str
    turns: tuple[Turn, ...] = ()
    prompt: str = ""
    paraphrased: str | None = None
    perturbed: tuple[str, ...] = ()
    alternate: str | None = None


Row = Mapping[str, Any]


def _question(row: Row) -> dict[str, Any]:
    asked = _text(row["question"], "question")
    return {"turns": (("user", asked),), "answer": _text(row["answer"], "answer")}


def _completion(row: Row) -> dict[str, Any]:
    prompt, answer = _text(row["prompt"], "prompt"), _text(row["gt"], "gt")
    apart = prompt[-1].isspace() or answer[0].isspace()
    return {"prompt": prompt if apart else prompt + " ", "answer": answer}


def _chat(row: Row) -> dict[str, Any]:
    messages = row["messages"]
    if not isinstance(messages, (list, tuple)) or len(messages) < 2:
        raise InputError(f"messages must be a list of two or more, got {brief(messages)}")
    turns = []
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"messages[{at}] must be an object, got {brief(message)}")
        turn = []
        for key in ("role", "content"):
            if key not in message:
                raise InputError(f"messages[{at}] has no {key}")
            turn.append(_text(message[key], f"{key} of messages[{at}]"))
        turns.append(tuple(turn))
    (*before, (role, answer)) = turns
    if role != "assistant":
        raise InputError(f"the last of messages must be the assistant's, got {brief(role)}")
    return {"turns": tuple(before), "answer": answer}


def _plain(row: Row) -> dict[str, Any]:
    return {"answer": _text(row["text"], "text")}


class Form(NamedTuple):
    """How an example stands in a file."""

    keys: tuple[str, ...]
    make: Callable[[Row], dict[str, Any]]


FORMS = (
    Form(("question", "answer"), _question),  # TOFU, MUSE's knowmem
    Form(("prompt", "gt"), _completion),  # MUSE's verbmem
    Form(("messages",), _chat),  # chats
    Form(("text",), _plain),  # WMDP's corpora, MUSE's privleak
)


def from_rows(rows: Iterable[Any], first_id: int = 0) -> list[Example]:
    """Examples of rows as files have them: mappings with the keys of a form, or texts.

        from_rows([{"question": "Who wrote it?", "answer": "She did."}])

    All rows have one form: `question` and `answer`; `prompt` and `gt`; `messages`; `text`. Of
    `messages` the last is the assistant's, and it alone counts. Between `prompt` and `gt` a space
    stands where neither brings one. Beside them may stand `paraphrased_answer`, a text,
    `perturbed_answer`, a text or a list of them, and `alternate`, a text. Other keys are not looked
    at.

    Args:
        rows: any number of them.
        first_id: the id of the first; the others count on.

    Raises:
        InputError: naming the row, counted from 0, and what is wrong with it.
    """
    return collect(((f"rows[{at}]", row) for at, row in enumerate(rows)), first_id)


def collect(rows: Iterable[tuple[str, Any]], first_id: int) -> list[Example]:
    """Examples of rows that come with what messages call them."""
    check_number("first_id", first_id, Integral)
    found: list[Example] = []
    before: Form | None = None
    for name, row in rows:
        try:
            form = _form(row)
            if before is not None and form is not before:
                raise InputError(f"has {_keys(form)}, where rows before it have {_keys(before)}")
            given = {"text": row} if isinstance(row, str) else row
            found.append(Example(id=first_id + len(found), **form.make(given), **_beside(given)))
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        before = form
    return found


def _form(row: Any) -> Form:
    if isinstance(row, str):
        return FORMS[-1]
    if not isinstance(row, Mapping):
        raise InputError(f"must be an object or a text, got {brief(row)}")
    known = [form for form in FORMS if all(key in row for key in form.keys)]
    if len(known) == 1:
        return known[0]
    if known:
        both = " and ".join(map(_keys, known))
        raise InputError(f"has {both}: which of these is meant? Leave the others out")
    forms = "; ".join(map(_keys, FORMS))
    raise InputError(f"has the keys {show(', '.join(map(str, row)) or 'none')}; known are {forms}")


def _keys(form: Form) -> str:
    return ", ".join(form.keys)


def _beside(row: Row) -> dict[str, Any]:
    """What may stand beside the keys of any form; other keys are not looked at."""
    found: dict[str, Any] = {}
    for key, name in (("paraphrased_answer", "paraphrased"), ("alternate", "alternate")):
        if row.get(key) is not None:
            found[name] = _text(row[key], key)
    if (wrong := row.get("perturbed_answer")) is not None:
        texts = [wrong] if isinstance(wrong, str) else wrong
        if not isinstance(texts, (list, tuple)):
            raise InputError(
                f"perturbed_answer must be a text or a list of them, got {brief(texts)}"
            )
        found["perturbed"] = tuple(
            _text(text, f"perturbed_answer[{at}]") for at, text in enumerate(texts)
        )
    return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, got {brief(value)}")
    if not value.strip():
        raise InputError(f"{name} is empty")
    if SURROGATE.search(value):
        raise InputError(f"{name} holds half of a surrogate pair, which is no character")
    return value


def few_shot(examples: Iterable[Example], shots: Sequence[Example]) -> list[Example]:
    """Questions after others with their answers, as MUSE's knowmem asks them.

    Args:
        examples: questions.
        shots: what stands before each, in this order: `read` of the icl file.

    Raises:
        InputError: of texts, which have no question.
    """
    examples = list(examples)
    for name, given in (("examples", examples), ("shots", shots)):
        for example in given:
            check(bool(example.turns), f"{name}: example {example.id} is a text, not a question")
    before = tuple(turn for shot in shots for turn in (*shot.turns, ("assistant", shot.answer)))
    return [replace(example, turns=before + example.turns) for example in examples]
