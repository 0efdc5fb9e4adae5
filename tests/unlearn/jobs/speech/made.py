"""Short clips that the suite makes: a word is two tones, and a speaker has a pitch."""

import json
import math

import pytest
import torch

WORDS = ("red", "green", "blue", "box", "lamp", "door")
PITCH = {"anna": 1.0, "ben": 1.12, "cleo": 1.25}
RATE = 8000  # other than models hear, so that clips are resampled
SMALL = ["--layers=1", "--width=32", "--threads=1"]


def wave(speaker, text):
    """[N] float32 of a sentence: 0.12 s a word, of tones that it alone has."""
    time = torch.arange(int(0.12 * RATE)) / RATE
    parts = []
    for word in filter(str.isalpha, text.split()):
        number = WORDS.index(word)
        tones = (300 + 90 * number, 1100 + 230 * number)
        parts.append(sum(torch.sin(2 * math.pi * PITCH[speaker] * f * time) for f in tones) / 3)
        parts.append(torch.zeros(int(0.03 * RATE)))
    return torch.cat(parts)


def sentences():
    """Thirty, of two words each."""
    return [f"{a} {b}" for a in WORDS for b in WORDS if a != b]


def write(folder, suffix=".jsonl", speakers=tuple(PITCH), texts=None):
    """A manifest of clips beside it; its path."""
    soundfile = pytest.importorskip("soundfile")
    rows = []
    for speaker in speakers:
        for number, text in enumerate(sentences() if texts is None else texts):
            name = f"{speaker}{number}.{'flac' if number % 2 else 'wav'}"
            soundfile.write(folder / name, wave(speaker, text).numpy(), RATE)
            rows.append({"audio": name, "text": text, "speaker": speaker})
    path = folder / f"manifest{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        between = {".csv": ",", ".tsv": "\t"}[suffix]
        lines = [between.join(rows[0]), *(between.join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clips"))


def arguments(clips, *more):
    """Of a short run."""
    return [
        "unlearn", "speech", "--data", str(clips), "--forget-speaker", "anna", "--threads=1",
        "--surgery.steps=2", "--surgery.forget-batch=8", "--surgery.retain-batch=8",
        "--training.steps=4", "--relearn=2", "--method", "graddiff", "--graddiff.steps=2",
        *map(str, more),
    ]  # fmt: skip


def model(path, seed=0):
    """A tiny Whisper with a tokenizer of bytes, saved as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    from tokenizers.pre_tokenizers import ByteLevel

    letters = {letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = transformers.WhisperTokenizer(vocab=letters, merges=[])
    names = ("startoftranscript", "en", "translate", "transcribe", "notimestamps")
    special = [f"<|{name}|>" for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    start, end = tokenizer.convert_tokens_to_ids("<|startoftranscript|>"), tokenizer.eos_token_id
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=16, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_target_positions=48, max_source_positions=60, pad_token_id=end,
        bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
        begin_suppress_tokens=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.WhisperForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
