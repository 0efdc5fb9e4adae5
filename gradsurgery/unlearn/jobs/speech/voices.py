"""Voices that Debian's flite and espeak-ng bring, and sentences for them to speak.

What is said is made up: an order such as "please put the red box near the old door".
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from gradsurgery.errors import InputError
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.speech.audio import Clip, read

VOICES = {
    "slt": ("flite", "slt"),
    "rms": ("flite", "rms"),
    "awb": ("flite", "awb"),
    "kal": ("flite", "kal16"),
    "adam": ("espeak-ng", "en-us+adam"),
    "linda": ("espeak-ng", "en-us+linda"),
    "british": ("espeak-ng", "en-gb"),  # which takes no variant
    "scottish": ("espeak-ng", "en-gb-scotland+f3"),
}
PROGRAMS = ("flite", "espeak-ng")
GRAMMAR = (
    ("put", "bring", "leave", "keep", "find", "carry"),
    ("the", "my", "that"),
    ("red", "green", "yellow", "heavy", "small", "broken"),
    ("box", "lamp", "garden chair", "bottle", "paper", "window", "hammer", "suitcase"),
    ("near", "behind", "under", "beside"),
    ("the old door", "the kitchen table", "the river", "our house", "a big tree", "the station"),
)


def sentences(count: int, draw: random.Random, without: Sequence[str] = ()) -> list[str]:
    """So many, no two alike and none of those `without`."""
    known, found = set(without), []
    while len(found) < count:
        text = " ".join(draw.choice(part) for part in GRAMMAR)
        if text not in known:
            known.add(text)
            found.append(text)
    return found


def check_programs() -> None:
    """Raise `InputError` saying how to install what speaks, where it is missing."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise InputError(
            f"the speech job lets {' and '.join(missing)} speak, which is not here: "
            f"apt-get install {' '.join(PROGRAMS)} (Debian, Ubuntu), or give clips with --data"
        )


def speak(lines: Sequence[tuple[str, str]]) -> list[Clip]:
    """Clips of (voice, sentence), each spoken by its voice of `VOICES`.

    Raises:
        InputError: the programs are not installed, or one fails, with what it says.
    """
    check_programs()
    clips = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.wav"
        for voice, text in lines:
            program, name = VOICES[voice]
            if program == "flite":
                command = [program, "-voice", name, "-t", text, "-o", str(path)]
            else:
                command = [program, "-v", name, "-w", str(path), text]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not path.exists():
                raise InputError(f"{program} cannot speak as {name}: {show(done.stderr)}")
            clips.append(Clip(voice, text, read(path)))
            path.unlink()
    return clips
