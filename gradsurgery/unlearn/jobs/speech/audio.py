"""Clips of speech: read from a manifest of the user's, all as 16 kHz."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.text import show

RATE = 16_000  # samples a second of all that a model hears
LONGEST = 30.0  # seconds that Whisper hears at once
COLUMNS = ("audio", "text", "speaker")


@dataclass(frozen=True)
class Clip:
    """A sentence as somebody speaks it."""

    speaker: str
    text: str
    wave: Tensor  # [N] float32 at `RATE`, in [-1, 1]

    @property
    def seconds(self) -> float:
        return len(self.wave) / RATE


def read(path: Path) -> Tensor:
    """A WAV, FLAC or other file that libsndfile reads, its channels' mean, [N] float32 at `RATE`.

    Raises:
        InputError: naming a file that cannot be read, is empty or longer than Whisper hears at
            once.
    """
    soundfile = package("soundfile", "speech", "the speech job")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:  # LibsndfileError is one of the latter
        raise InputError(f"{show(path)} is no audio that can be read: {show(error)}") from None
    seconds = len(samples) / rate
    if not 0 < seconds <= LONGEST:
        raise InputError(
            f"{show(path)} must last over 0 and at most {LONGEST:g} seconds, got {seconds:g}"
        )
    return resampled(torch.from_numpy(samples.mean(1)), rate)


def resampled(wave: Tensor, rate: int) -> Tensor:
    """Samples [N] at `rate` a second, at `RATE` a second."""
    if rate == RATE:
        return wave
    common = gcd(rate, RATE)
    up, down = RATE // common, rate // common
    made = package("scipy.signal", "speech", "the speech job").resample_poly(wave.numpy(), up, down)
    return torch.from_numpy(made).float()


def manifest(path: Path) -> list[Clip]:
    """Clips that a file lists: .jsonl, .csv or .tsv with audio, text and speaker in each row.

    A path of audio is taken from the folder of the manifest.

    Raises:
        InputError: naming the row that is wrong, and what it lacks.
    """
    clips = []
    for number, row in enumerate(_rows(path), 1):
        where = f"{show(path)}, row {number}"
        given = {name: row.get(name) for name in COLUMNS}
        for name, value in given.items():
            if not isinstance(value, str) or not value.strip():
                has = show(", ".join(map(str, row)), 120)
                raise InputError(f"{where} has no {name}, text that is not empty; it has {has}")
        audio, text, speaker = (str(value).strip() for value in given.values())
        if not any(map(str.isalnum, text)):
            raise InputError(f"{where} has no word in its text, {show(text, 40)}")
        try:
            clips.append(Clip(speaker, " ".join(text.split()), read(path.parent / audio)))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    if not clips:
        raise InputError(f"{show(path)} lists no clip")
    return clips


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    kinds = {".csv": ",", ".tsv": "\t"}
    if path.suffix not in (".jsonl", *kinds):
        raise InputError(f"{show(path)} must be .jsonl, .csv or .tsv")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix in kinds:
                reader = csv.DictReader(file, delimiter=kinds[path.suffix])
                yield from ({k: v for k, v in row.items() if k is not None} for row in reader)
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"{show(path)}, line {number} is no object of JSON")
                yield row
    except OSError as error:
        raise InputError(f"{show(path)} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise InputError(f"{show(path)} cannot be read: {show(error)}") from None
