"""Clips from files, and spoken by the programs, where they are there."""

import json
import random
import shutil

import pytest
import torch

import gradsurgery as gs
from gradsurgery.unlearn.jobs.speech import audio, data, voices
from tests.unlearn.jobs.speech.made import RATE, sentences, wave, write

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("scipy")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_a_manifest_lists_clips_beside_it(tmp_path, suffix):
    clips = audio.manifest(write(tmp_path, suffix, texts=["red box", "blue lamp"]))
    assert [clip.speaker for clip in clips] == ["anna"] * 2 + ["ben"] * 2 + ["cleo"] * 2
    assert clips[1].text == "blue lamp"
    assert clips[1].seconds == pytest.approx(0.3) and clips[1].wave.dtype == torch.float32


def test_a_tone_keeps_its_pitch_at_another_rate(tmp_path):
    time = torch.arange(RATE) / RATE
    tone = torch.sin(2 * torch.pi * 440 * time)
    both = torch.stack([tone, torch.zeros(RATE)], 1)  # of two channels the mean
    soundfile.write(tmp_path / "tone.flac", both.numpy(), RATE)
    found = audio.read(tmp_path / "tone.flac")
    assert len(found) == audio.RATE
    spectrum = torch.fft.rfft(found).abs()
    assert int(spectrum.argmax()) == 440
    assert found[1000:-1000].abs().max() == pytest.approx(0.5, abs=0.01)


def test_what_is_wrong_with_a_row_is_said(tmp_path):
    path = tmp_path / "manifest.jsonl"
    soundfile.write(tmp_path / "one.wav", wave("anna", "red").numpy(), RATE)
    soundfile.write(tmp_path / "long.wav", torch.zeros(31 * RATE).numpy(), RATE)
    (tmp_path / "no.wav").write_text("no sound")
    good = {"audio": "one.wav", "text": "red", "speaker": "anna"}
    for change, message in (
        ({"speaker": None}, "row 2 has no speaker"),
        ({"text": " "}, "row 2 has no text"),
        ({"text": "..."}, "row 2 has no word in its text"),
        ({"audio": "two.wav"}, "row 2: .*two.wav is no audio"),
        ({"audio": "no.wav"}, "row 2: .*no.wav is no audio"),
        ({"audio": "long.wav"}, "at most 30 seconds, got 31"),
    ):
        path.write_text(f"{json.dumps(good)}\n{json.dumps({**good, **change})}\n")
        with pytest.raises(gs.InputError, match=message):
            audio.manifest(path)
    for text, message in (("", "lists no clip"), ("{", "cannot be read"), ("[]", "line 1 is no")):
        path.write_text(text)
        with pytest.raises(gs.InputError, match=message):
            audio.manifest(path)
    with pytest.raises(gs.InputError, match=r"must be \.jsonl, \.csv or \.tsv"):
        audio.manifest(tmp_path / "one.wav")
    with pytest.raises(gs.InputError, match="No such file"):
        audio.manifest(tmp_path / "none.csv")


def test_unseen_sentences_are_nobodys_in_training(tmp_path):
    sets = data.divided(audio.manifest(write(tmp_path)))
    assert (len(sets.train), len(sets.validation), len(sets.test)) == (72, 9, 9)
    texts = {
        name: {sets.clips[n].text for n in getattr(sets, name)}
        for name in ("train", "validation", "test")
    }
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) == len(sentences())
    forget, retain = sets.of("forget", "ben"), sets.of("retain", "ben")
    assert {sets.clips[n].speaker for n in forget} == {"ben"}
    assert sorted([*forget, *retain]) == list(sets.train)


def test_missing_programs_are_named_with_how_to_install_them(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "flite" else name)
    with pytest.raises(gs.InputError, match=r"flite speak, .* apt-get install flite espeak-ng"):
        voices.speak([("slt", "put the red box near the river")])


@pytest.mark.skipif(
    not all(map(shutil.which, voices.PROGRAMS)), reason="flite and espeak-ng are not installed"
)
def test_every_voice_speaks_in_its_own_way():
    (text,) = voices.sentences(1, random.Random(0))
    clips = voices.speak([(voice, text) for voice in voices.VOICES])
    assert [clip.speaker for clip in clips] == list(voices.VOICES)
    assert all(1 < clip.seconds < 6 and clip.wave.abs().max() > 0.1 for clip in clips)
    assert len({tuple(clip.wave[8000:8100].tolist()) for clip in clips}) == len(clips)
    (again,) = voices.speak([("slt", text)])
    assert torch.equal(again.wave, clips[0].wave)


def test_sentences_are_unlike():
    found = voices.sentences(300, random.Random(0))
    others = voices.sentences(300, random.Random(0), without=found)
    assert len({*found, *others}) == 600
