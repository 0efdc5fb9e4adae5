"""A tokenizer whose tokens are words, for small models that learn a few of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gradsurgery.errors import InputError
from gradsurgery.text import show

PAD, END, START = 0, 1, 2
SPECIAL = {PAD: "<pad>", END: "<end>", START: "<start>"}


class Words:
    """The words given, in their order in the alphabet, after `<pad>`, `<end>` and, if a text is to
    begin with one, `<start>`."""

    pad_token_id, eos_token_id = PAD, END

    def __init__(self, known: Iterable[str], *, start: bool = False) -> None:
        self.special = (PAD, END, START) if start else (PAD, END)
        self.words = [*(SPECIAL[token] for token in self.special), *sorted(set(known))]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Raises `InputError` naming a word that it has not."""
        words = text.split()
        for word in words:
            if word not in self.numbers:
                raise InputError(f"{show(word, 40)} is none of the {len(self)} words known")
        return [self.numbers[word] for word in words]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        kept = [t for t in tokens if not (skip_special_tokens and t in self.special)]
        return " ".join(self.words[token] for token in kept)
