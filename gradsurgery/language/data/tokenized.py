"""Token ids and labels of examples, by any tokenizer of transformers or one that looks like it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.language.data.examples import Example, Turn
from gradsurgery.language.tokens import IGNORED
from gradsurgery.ops._inputs import check, check_number
from gradsurgery.text import brief, show

Item = dict[str, Any]
MARK = "\ue000"  # of private use: no text has it


@dataclass(frozen=True, kw_only=True)
class Tags:
    r"""What stands before and after each turn, for models without a chat template.

    What follows an answer stands between turns alone: the last answer ends with the tokenizer's
    end token. Llama 2's are Tags(user=("[INST] ", " [/INST]"), assistant=(" ", " ")).
    """

    user: tuple[str, str] = ("Question: ", "\n")
    assistant: tuple[str, str] = ("Answer: ", "\n\n")
    system: tuple[str, str] = ("", "\n\n")

    def __post_init__(self) -> None:
        for role, pair in vars(self).items():
            good = isinstance(pair, tuple) and len(pair) == 2
            good = good and all(isinstance(tag, str) for tag in pair)
            check(good, f"{role} of Tags must be two texts, got {brief(pair)}")

    def before(self, turns: Sequence[Turn]) -> str:
        """All that stands before an answer."""
        pairs = vars(self)
        unknown = [role for role, _ in turns if role not in pairs]
        check(not unknown, f"Tags have {', '.join(pairs)}, and none for {brief(unknown[:1])}")
        said = (pairs[role][0] + text + pairs[role][1] for role, text in turns)
        return "".join(said) + self.assistant[0]


def tokenize(
    examples: Iterable[Example],
    tokenizer: Any,
    *,
    max_length: int = 512,
    tags: Tags | None = None,
    system: str | None = None,
    chat_options: Mapping[str, Any] | None = None,
    truth: bool = False,
    drop: bool = False,
) -> list[Item]:
    """Items to be batched: `input_ids`, `attention_mask`, `labels`, [T] int64, and `id`.

    Labels are not shifted. They are -100 on all that stands before the answer; a token with
    characters of both counts. After the answer to a question the end token counts, too. A text
    without a prompt counts whole, but for its first token, which none predicts; no end token is
    put after texts. Examples with an `alternate` have that entry as well, an item like the rest.

    Args:
        examples: of `read`, `from_rows`, ...
        tokenizer: of transformers, or one that can be called like it and has `eos_token_id`. If it
            is not a fast one (`is_fast`), it gives no offsets: an example whose prompt is not the
            beginning of the whole, in tokens, is then an error.
        max_length: tokens, of all; what is longer loses its end.
        tags: for a tokenizer without a chat template, or in its place.
        system: what the system says first, where an example has no such turn.
        chat_options: more for the chat template. Llama 3's writes today's date into every prompt
            unless told another, {"date_string": "26 Jul 2024"}.
        truth: items of examples with `perturbed` answers have these too, a list of items, and
            `paraphrased`, an item, where there is one: for truth ratios, not for batches.
        drop: leave out examples no token of whose answer is left, in place of the error.

    Raises:
        InputError: no chat template and no tags; a template that changes the answer; an example
            that has nothing left of its answer within `max_length`. The message has the id.
    """
    _check_length(max_length)
    check(tags is None or not chat_options, "chat_options are for a chat template, not for tags")
    head = _head(tokenizer)
    writer = _Writer(tokenizer, max_length, tags, system, chat_options or {}, head, truth)
    found = (writer.sample(example, drop) for example in examples)
    return [item for item in found if item is not None]


class _NothingLeftError(InputError):
    """A sample is too long to have anything of its answer left."""


def chunks(
    examples: Iterable[Example],
    tokenizer: Any,
    *,
    max_length: int = 2048,
    separator: str = "\n\n",
    first_id: int = 0,
) -> list[Item]:
    """Texts joined and cut into items of `max_length` tokens, as MUSE's raw texts are.

    The last is shorter. Each begins with the token that the tokenizer begins texts with, if any.

    Args:
        examples: texts without prompts.
        max_length: tokens of an item, that one among them.
        separator: what stands between two texts.
        first_id: the id of the first item; the others count on.

    Raises:
        InputError: a question, which `tokenize` takes; no text.
    """
    _check_length(max_length)
    check_number("first_id", first_id, Integral)
    examples = list(examples)
    check(bool(examples), "examples must be one text or more, got none")
    for example in examples:
        plain = not (example.turns or example.prompt)
        check(plain, f"example {example.id} has a prompt: chunks takes texts, tokenize takes it")
    head = _head(tokenizer)
    text = separator.join(example.answer for example in examples)
    ids = _called(tokenizer, text)["input_ids"]
    pieces = _pieces(ids, head, max_length)
    return [_item(piece, 1, first_id + at) for at, piece in enumerate(pieces)]


def _pieces(ids: list[int], head: list[int], length: int) -> Iterator[list[int]]:
    step = length - len(head)
    check(step > 0, f"max_length must be more than {len(head)}, got {length}")
    for start in range(0, len(ids), step):
        piece = head + ids[start : start + step]
        if len(piece) > 1:  # of a single token nothing is predicted
            yield piece


@dataclass(frozen=True)
class _Writer:
    tokenizer: Any
    max_length: int
    tags: Tags | None
    system: str | None
    options: Mapping[str, Any]
    head: list[int]
    truth: bool

    def sample(self, example: Example, drop: bool) -> Item | None:
        """An item with those that belong to it, or None where it is to be left out."""
        try:
            item = self.item(example, example.answer)
            if example.alternate is not None:
                item["alternate"] = self.item(example, example.alternate)
            if self.truth and example.perturbed:
                item["perturbed"] = [self.item(example, answer) for answer in example.perturbed]
                if example.paraphrased is not None:
                    item["paraphrased"] = self.item(example, example.paraphrased)
        except _NothingLeftError:
            if drop:
                return None
            raise
        return item

    def item(self, example: Example, answer: str) -> Item:
        try:
            ids, start = self._written(example, answer)
        except InputError as error:
            raise InputError(f"example {example.id}: {error}") from None
        ids, start = ids[: self.max_length], max(start, 1)
        if start >= len(ids):
            raise _NothingLeftError(
                f"example {example.id}: nothing is left of its answer in max_length="
                f"{self.max_length} tokens; take more, or drop=True, which leaves it out"
            )
        return _item(ids, start, example.id)

    def _written(self, example: Example, answer: str) -> tuple[list[int], int]:
        """Tokens, and the first of the answer's."""
        if not example.turns:
            return self._ids(self.head, example.prompt, answer)
        turns = example.turns
        if self.system is not None and all(role != "system" for role, _ in turns):
            turns = (("system", self.system), *turns)
        if self.tags is not None:
            ids, start = self._ids(self.head, self.tags.before(turns), answer)
            return [*ids, _end(self.tokenizer)], start
        before, said, close = self._templated(turns, answer)
        # a template says itself what a text begins with
        ids, start = self._ids([], before, said + close)
        return ids if close else [*ids, _end(self.tokenizer)], start

    def _templated(self, turns: Sequence[Turn], answer: str) -> tuple[str, str, str]:
        """What stands before the answer, the answer, and what closes it, as the template says."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template: give tags=Tags(...)")
        before, mark, after = self._chat(turns, MARK).partition(MARK)
        whole = self._chat(turns, answer)
        trimmed = (answer, answer.strip(), answer.lstrip(), answer.rstrip())
        said = next((text for text in trimmed if whole == before + text + after), None)
        if not mark or said is None:
            raise InputError("the chat template changes the answer")
        return before, said, after.rstrip()

    def _chat(self, turns: Sequence[Turn], answer: str) -> str:
        said = [{"role": role, "content": text} for role, text in (*turns, ("assistant", answer))]
        try:
            return self.tokenizer.apply_chat_template(said, **{**self.options, "tokenize": False})
        except Exception as error:  # whatever a template raises
            raise InputError(f"the chat template refuses it: {show(error)}") from error

    def _ids(self, head: list[int], before: str, after: str) -> tuple[list[int], int]:
        """Tokens of the whole, and the first that has something of `after`."""
        if getattr(self.tokenizer, "is_fast", False):
            found = _called(self.tokenizer, before + after, return_offsets_mapping=True)
            ends = [end for _, end in found["offset_mapping"]]
            start = next((at for at, end in enumerate(ends) if end > len(before)), len(ends))
            return head + found["input_ids"], len(head) + start
        ids = _called(self.tokenizer, before + after)["input_ids"]
        first = _called(self.tokenizer, before)["input_ids"] if before else []
        if ids[: len(first)] != first:
            raise InputError(
                "the tokenizer joins the prompt's end with the answer, and gives no offsets to "
                "tell them apart: take a fast tokenizer, or other tags"
            )
        return head + ids, len(head) + len(first)


def _called(tokenizer: Any, text: str, **options: Any) -> Mapping[str, list]:
    return tokenizer(text, add_special_tokens=False, **options)


def _head(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before every text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    places = range(len(whole) - len(bare) + 1)
    return whole[: next((at for at in places if whole[at : at + len(bare)] == bare), 0)]


def _end(tokenizer: Any) -> int:
    end = getattr(tokenizer, "eos_token_id", None)
    if not isinstance(end, int):
        raise InputError("the tokenizer has no end token, eos_token_id")
    return end


def _item(ids: list[int], start: int, id: int) -> Item:
    tokens = torch.tensor(ids)
    labels: Tensor = tokens.clone()
    labels[:start] = IGNORED
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": labels,
        "id": id,
    }


def _check_length(max_length: int) -> None:
    check_number("max_length", max_length, Integral)
    check(max_length > 1, f"max_length must be 2 or more, got {max_length}")
