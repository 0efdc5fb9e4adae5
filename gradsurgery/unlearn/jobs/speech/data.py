"""Clips as samples: what an encoder hears, what a decoder is to write, and sets of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.language.packed import IGNORED
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.language import TextSplit
from gradsurgery.unlearn.jobs.speech import voices
from gradsurgery.unlearn.jobs.speech.audio import RATE, Clip
from gradsurgery.unlearn.objectives.base import Batch, take

HOP = 160  # samples between two columns of a spectrogram
STRIDE = 2  # columns that the encoder makes one of
HELD_OUT = 5  # one of so many sentences of the user's is held out


@dataclass(frozen=True)
class Writing:
    """How a transcript is tokens: a prompt, the text, an end."""

    tokenizer: Any
    prompt: tuple[int, ...]
    end: int
    space: str = ""
    """What stands before a text: a space, where Whisper's tokens begin with one."""

    def tokens(self, text: str) -> list[int]:
        if self.space:
            ids = self.tokenizer(f" {text}", add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer.encode(text)
        return [*self.prompt, *ids, self.end]

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()


@dataclass(frozen=True)
class Sets:
    """All clips by their numbers, and which are in the training set."""

    clips: Sequence[Clip]
    train: Sequence[int]
    validation: Sequence[int]
    test: Sequence[int]

    def of(self, name: str, speaker: str) -> list[int]:
        """Clips of a set by number; forget and retain are what it has of the speaker and of the
        others."""
        if name not in ("forget", "retain"):
            return list(getattr(self, name))
        own = name == "forget"
        return [n for n in self.train if (self.clips[n].speaker == speaker) == own]


@dataclass(frozen=True)
class Side:
    """Clips that are measured together, as samples in the same order."""

    samples: Batch
    clips: Sequence[Clip]
    writing: Writing
    at_once: int


@dataclass(frozen=True)
class SpeechSplit(TextSplit):
    """`sides` are what is measured, with either set that is held out, by name: forget, retain,
    unseen sentences of the others and of the forgotten speaker, whichever there are."""

    forgotten: str = ""
    """The speaker."""
    sides: Mapping[str, Mapping[str, Side]] = field(default_factory=dict)


def spoken(sentences: int, unseen: int) -> Sets:
    """Each voice speaks so many sentences of its own, and all speak the unseen ones, of which half
    is for validation."""
    draw = random.Random("speech")
    held = voices.sentences(unseen, draw)
    lines = [
        (voice, text)
        for voice in voices.VOICES
        for text in voices.sentences(sentences, draw, without=held)
    ]
    train = range(len(lines))
    lines += [(voice, text) for text in held for voice in voices.VOICES]
    clips, half = voices.speak(lines), len(train) + unseen // 2 * len(voices.VOICES)
    return Sets(clips, train, range(len(train), half), range(half, len(lines)))


def divided(clips: Sequence[Clip]) -> Sets:
    """Clips of the user's, of which a fifth of the sentences is held out with all who speak them,
    the same for every seed: half for validation, half for test.

    Raises:
        InputError: too few sentences to hold some out.
    """
    texts = sorted({clip.text.lower() for clip in clips})
    if len(texts) < 2 * HELD_OUT:
        raise InputError(
            f"--data: {len(texts)} different sentences are too few to hold some out: "
            f"{2 * HELD_OUT} or more are needed"
        )
    held = random.Random("held out").sample(texts, len(texts) // HELD_OUT)
    validation, test = set(held[: len(held) // 2]), set(held[len(held) // 2 :])
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for number, clip in enumerate(clips):
        text = clip.text.lower()
        name = "validation" if text in validation else "test" if text in test else "train"
        parts[name].append(number)
    return Sets(clips, **parts)


def check_speaker(sets: Sets, speaker: str) -> None:
    """Raise `InputError` where a speaker to forget, or anybody else, has no clip to train on."""
    known = sorted({clip.speaker for clip in sets.clips})
    if speaker not in known:
        there = show(", ".join(known), 200)
        raise InputError(f"--forget-speaker must be one of {there}, got {show(speaker, 80)}")
    for name, whose in (("forget", show(speaker, 80)), ("retain", "anybody else")):
        if not sets.of(name, speaker):
            raise InputError(f"--forget-speaker: no clip of {whose} is left to train on")


def columns(clips: Sequence[Clip]) -> int:
    """How many columns of a spectrogram the longest clip has, to be a whole number of strides."""
    return STRIDE * ceil(max(len(clip.wave) for clip in clips) / HOP / STRIDE)


def heard(clips: Sequence[Clip], extractor: Any, count: int) -> Tensor:
    """Log-mel spectrograms, [B, bins, columns] float32, of clips followed by silence."""
    waves = [clip.wave.numpy() for clip in clips]
    found = extractor(
        waves, sampling_rate=RATE, padding="max_length", max_length=count * HOP, return_tensors="pt"
    )
    return found["input_features"].float()


def batch(
    numbers: Sequence[int], clips: Sequence[Clip], features: Tensor, writing: Writing, length: int
) -> Batch:
    """Clips by number as a batch, texts padded to `length` tokens.

    Their `alternate` is another transcript: that of the next clip which says something else.
    """
    texts = [clips[number].text for number in numbers]
    others = [_other(texts, place) for place in range(len(texts))]
    index = torch.tensor(list(numbers), dtype=torch.int64)
    return {
        "input_features": features[index],
        **_written(texts, writing, length),
        "id": index,
        "alternate": _written(others, writing, length),
    }


def sides(
    clips: Sequence[Clip],
    numbers: Mapping[str, Sequence[int]],
    batches: Mapping[str, Batch],
    held_out: str,
    forgotten: str,
    measured: int,
    **options: Any,
) -> dict[str, Side]:
    """What is measured with a held-out set: all of the sets, but of retain at most `measured`.

    Args:
        numbers: of the clips in each set, in the order of its batch.
        options: of every `Side`.
    """

    def side(name: str, rows: Sequence[int]) -> Side:
        chosen = take(batches[name], torch.tensor(list(rows), dtype=torch.int64))
        return Side(chosen, [clips[numbers[name][row]] for row in rows], **options)

    own, others = [], []
    for row, number in enumerate(numbers[held_out]):
        (own if clips[number].speaker == forgotten else others).append(row)
    found = {
        "forget": side("forget", range(len(numbers["forget"]))),
        "retain": side("retain", range(min(measured, len(numbers["retain"])))),
        "unseen": side(held_out, others),
        "unseen_forgotten": side(held_out, own),
    }
    return {name: each for name, each in found.items() if each.clips}


def _other(texts: Sequence[str], place: int) -> str:
    after = [*texts[place + 1 :], *texts[:place]]
    return next((text for text in after if text != texts[place]), texts[place])


def _written(texts: Sequence[str], writing: Writing, length: int) -> dict[str, Tensor]:
    ids = torch.full((len(texts), length), writing.end)
    labels = torch.full((len(texts), length), IGNORED)
    for row, text in enumerate(texts):
        tokens = torch.tensor(writing.tokens(text))
        ids[row, : len(tokens)] = tokens
        labels[row, len(writing.prompt) : len(tokens)] = tokens[len(writing.prompt) :]
    return {"decoder_input_ids": ids, "labels": labels}


def digest(sets: Sets) -> str:
    """SHA-256 of all clips: who speaks, what is said, how it sounds, in which set."""
    found = hashlib.sha256()
    for number, clip in enumerate(sets.clips):
        found.update(f"{number} {clip.speaker!r} {clip.text!r} {len(clip.wave)}\n".encode())
        found.update(clip.wave.contiguous().numpy().tobytes())
    found.update(repr([list(sets.train), list(sets.validation), list(sets.test)]).encode())
    return found.hexdigest()
