"""The speech job: a recognizer that hears several speakers unlearns one of them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.base import (
    COSTS,
    GAP,
    HeldOut,
    Measured,
    Metric,
    Summary,
    Texts,
)
from gradsurgery.unlearn.jobs.classifiers import counted
from gradsurgery.unlearn.jobs.language import MEMBERSHIP, LanguageJob, Looking
from gradsurgery.unlearn.jobs.pretrained import FOLDER, folder, load, publish
from gradsurgery.unlearn.jobs.pretrained import digest as model_digest
from gradsurgery.unlearn.jobs.remembered import Remembered
from gradsurgery.unlearn.jobs.speech import audio, data, whisper
from gradsurgery.unlearn.jobs.speech.config import OURS, SpeechConfig, Task
from gradsurgery.unlearn.jobs.speech.data import Sets, Side, SpeechSplit, Writing
from gradsurgery.unlearn.jobs.speech.measured import (
    PAIR,
    Heard,
    by_speaker,
    examples,
    hear,
    measures,
)
from gradsurgery.unlearn.jobs.vocabulary import Words
from gradsurgery.unlearn.methods import METHODS
from gradsurgery.unlearn.training.config import update

if TYPE_CHECKING:
    from gradsurgery.unlearn.jobs.directory import RunDirectory, Stage

THEIRS = 1e-5  # rate at which a model that is given is trained
MADE = (
    "The voices are machines', flite's and espeak-ng's, and what they say is made up, "
    "other sentences for each."
)
GIVEN = "The clips were given. A fifth of their sentences is held out, with all who speak them."
WHOLE = """from transformers import WhisperForConditionalGeneration

model = WhisperForConditionalGeneration.from_pretrained({!r})"""
ADAPTED = """from peft import PeftModel
from transformers import WhisperForConditionalGeneration

base = WhisperForConditionalGeneration.from_pretrained({!r})
model = PeftModel.from_pretrained(base, {!r})"""
RATES, LOSSES = "Word error rate", "Loss"
SIDES = {
    "forget": "forgotten speaker",
    "retain": "other speakers",
    "unseen": "others, unseen sentences",
    "unseen_forgotten": "forgotten speaker, unseen sentences",
}
SHORT = {"forget": "forgotten", "retain": "others", "unseen": "unseen"}
NUMBERS = (
    "A word error rate is words changed, left out and put in over the words said, in lower case "
    "and without punctuation; above 1 it counts as 1. Losses are nats a token, probabilities those "
    "of whole transcripts, exp of minus the mean loss of a token. Attacks tell what the forgotten "
    "speaker said in training from unseen sentences of the same speaker: 0.5 is guessing. "
    "The informed attack knows Retrain's loss of each clip, and so how hard it is to a model that "
    "never heard it. In pictures, accuracy is the share of tokens that are right."
)


class SpeechJob(LanguageJob):
    name = "speech"
    about = "one of the voices that a small Whisper learns to write down, or a model of your own"
    Config = SpeechConfig
    tasks = get_args(Task)
    early = ("task", "model", "lora")
    makes = ()
    described = ("voices", "speaker", "model", "source", "rank", "trained", "sets")
    metrics = (
        *(
            Metric(f"{side}/wer", name, RATES, short=SHORT.get(side, ""), compared=True)
            for side, name in SIDES.items()
        ),
        *(
            Metric(f"{side}/loss", name, LOSSES, short="loss" if side == "forget" else "")
            for side, name in SIDES.items()
        ),
        *(
            Metric(f"{side}/probability", name, "Probability", compared=True)
            for side, name in SIDES.items()
        ),
        GAP,
        Metric("attack/loss", "AUC of the loss", MEMBERSHIP, short="attack", compared=True),
        Metric("attack/min_k", "AUC of min-k", MEMBERSHIP),
        Metric("attack/min_k_plus_plus", "AUC of min-k++", MEMBERSHIP),
        Metric("attack/reference", "AUC of the informed attack", MEMBERSHIP, short="informed"),
        Metric("relearn", "steps to relearn", "Relearning", digits=0),
        *COSTS,
    )

    def __init__(self) -> None:
        self._read: tuple[object, tuple[Sets, Writing, Tensor]] | None = None
        self.heard: Remembered[Heard] = Remembered(hear)

    # -- options

    def defaults(self, task: str | None = None, model: Any = None, lora: Any = None) -> Any:
        """As those of every job, with rates that suit what is trained."""
        config = super().defaults(task)
        if not model:
            return config
        rate = THEIRS if str(lora or 0).strip() == "0" else 10 * THEIRS
        usual = {"lr": rate, "steps": 60, "forget_batch": 8, "retain_batch": 8}
        sections = {name: getattr(config, name) for name in METHODS}
        changes: dict[str, Any] = {
            name: {key: value for key, value in usual.items() if hasattr(section, key)}
            for name, section in sections.items()
        }
        training = {"lr": rate, "steps": 200, "retain_batch": 8}
        return update(config, {**changes, "training": training})

    def check(self, config: SpeechConfig) -> None:
        config.check()
        if config.lora and "bad_teacher" in config.methods:
            raise InputError(
                "--method: BadTeacher draws a second teacher anew, and what lies below an adapter "
                "stays: take --lora 0"
            )
        super().check(config)

    def check_model(self, config: SpeechConfig, model: Any) -> None:
        sets, writing, _ = self._data(config)
        longest = max(len(writing.tokens(clip.text)) for clip in sets.clips)
        if longest > model.config.max_target_positions:
            raise InputError(
                f"--data: a text has {longest} tokens, and --model writes "
                f"{model.config.max_target_positions}"
            )
        if config.retrain_model:
            other: Any = self.standing(config, "retrain", 0)
            for name, what in (("vocab_size", "tokens"), ("num_mel_bins", "spectrograms")):
                if getattr(other.config, name) != getattr(model.config, name):
                    raise InputError(f"--retrain-model: it has other {what} than --model")

    # -- data and models

    def _data(self, config: SpeechConfig) -> tuple[Sets, Writing, Tensor]:
        """All clips, how they are written, and their spectrograms, made once."""
        key = (config.data, config.model, config.language, config.cut)
        key += (config.sentences, config.unseen)
        if self._read is None or self._read[0] != key:
            self._read = key, self._made(config)
        return self._read[1]

    def _made(self, config: SpeechConfig) -> tuple[Sets, Writing, Tensor]:
        package("jiwer", "speech", "the speech job")  # before anything is trained
        if config.data is None:
            sets = data.spoken(config.sentences, config.unseen)
        else:
            sets = data.divided(audio.manifest(config.data))
        count = data.columns(sets.clips)
        if not config.model:
            known = {word for clip in sets.clips for word in clip.text.split()}
            writing = whisper.own_writing(Words(known, start=True))
            return sets, writing, data.heard(sets.clips, whisper.extractor(whisper.BINS), count)
        path = folder(config.model, "model")
        bins, most = whisper.spectrogram(path)
        if count > most:
            longest, hears = (columns * data.HOP / audio.RATE for columns in (count, most))
            raise InputError(
                f"--data: a clip lasts {longest:g} seconds, and --model hears {hears:g}"
            )
        writing = whisper.writing(path, config.language)
        made = data.heard(sets.clips, whisper.extractor(bins, path), count if config.cut else most)
        return sets, writing, made

    def split(self, config: SpeechConfig, seed: int) -> SpeechSplit:
        sets, writing, features = self._data(config)
        data.check_speaker(sets, config.speaker)
        length = max(len(writing.tokens(clip.text)) for clip in sets.clips)
        numbers = {
            name: sets.of(name, config.speaker)
            for name in ("forget", "retain", "validation", "test")
        }
        for name in ("forget", "retain"):  # so that any part of one is of all there is
            random.Random(name).shuffle(numbers[name])
        batches = {
            name: data.batch(each, sets.clips, features, writing, length)
            for name, each in numbers.items()
        }
        rate = OURS / 10 if not config.model else THEIRS * (10 if config.lora else 1)
        return SpeechSplit(
            **batches,
            ids=sorted(numbers["forget"]),
            about={"speaker": config.speaker},
            forgotten=config.speaker,
            sides={
                name: data.sides(
                    sets.clips,
                    numbers,
                    batches,
                    name,
                    config.speaker,
                    config.measured,
                    writing=writing,
                    at_once=config.at_once,
                )
                for name in ("validation", "test")
            },
            looking=Looking(
                at_once=config.at_once,
                relearn_steps=config.relearn,
                relearn_batch=min(16, config.at_once),
                relearn_lr=rate,
            ),
        )

    def model(self, config: SpeechConfig, seed: int = 0) -> nn.Module:
        return self._model(config, "model", config.model, seed)

    def _model(self, config: SpeechConfig, option: str, name: str, seed: int) -> nn.Module:
        sets, writing, features = self._data(config)
        columns = features.shape[2]
        if not name:
            words = len(writing.tokenizer)
            longest = max(len(writing.tokens(clip.text)) for clip in sets.clips)
            room = longest + 16  # for what is written beyond
            sizes = (words, columns, room, config.layers, config.width)
            return whisper.small(*sizes, seed).to(config.device)
        made = load(folder(name, option), option, "float32", config.device, "speech")
        if config.cut:
            whisper.cut(made, columns)
        return made if config.adapter is None else config.adapter.on(made, seed)

    def trained(self, config: SpeechConfig) -> tuple[str, ...]:
        if config.model_is == "original" and not config.retrain_model:
            return ("original",)
        return super().trained(config)

    def standing(self, config: SpeechConfig, name: str, seed: int) -> nn.Module | None:
        if config.model_is == "start":
            return None
        if name == "original":
            return self.model(config, seed)
        return self._model(config, "retrain-model", config.retrain_model, seed)

    def publish(self, config: SpeechConfig, directory: RunDirectory, stage: Stage) -> None:
        """As `save_pretrained` writes it, whatever the encoder heard here."""
        made: Any = self.model(config)
        directory.load_model(made, stage)
        if config.model and config.cut and not config.lora:
            whole = load(folder(config.model, "model"), "model", "float32", "cpu", "speech")
            made = whisper.uncut(made, whole)
        tokens = self._data(config)[1].tokenizer
        theirs = config.model and not config.lora
        publish(made, directory, bool(config.lora), tokens if theirs else None)
        if not config.model:
            directory.write_json(f"{FOLDER}/words.json", {"words": tokens.words})

    # -- what is measured

    def evaluate(
        self,
        model: nn.Module,
        split: Any,
        held_out: HeldOut = "test",
        retrain: nn.Module | None = None,
    ) -> Measured:
        every = split.sides[held_out]
        theirs = {}
        if retrain is not None:
            theirs = {name: self.heard(retrain, every[name]) for name in PAIR if name in every}
        return measures(self._heard(model, every), theirs, every)

    def _heard(self, model: nn.Module, every: Mapping[str, Side]) -> dict[str, Heard]:
        return {name: self.heard(model, side) for name, side in every.items()}

    def losses(self, model: nn.Module, split: Any) -> dict[str, list[float]]:
        """Of what the speaker said in training, and of sentences that were not in there."""
        every = split.sides["test"]
        found: dict[str, list[float]] = {"forget": [], "test": []}
        for name, side in zip(found, PAIR, strict=True):
            if side in every:
                found[name] = [score.loss for score in self.heard(model, every[side]).scores]
        return found

    def details(self, model: nn.Module, split: Any, first: bool) -> dict[str, Any]:
        every = split.sides["test"]
        heard = self._heard(model, every)
        return {
            "tables": by_speaker(heard, every, split.forgotten),
            "examples": examples(heard, every, pictured=first),
            "note": "Pictures are spectrograms of whole clips, low sounds at the bottom.",
        }

    # -- what people are told

    def facts(self, config: SpeechConfig) -> dict[str, str | int]:
        sets, _, features = self._data(config)
        made: Any = self.model(config)
        own = sum(p.numel() for p in made.parameters())
        trains = sum(p.numel() for p in made.parameters() if p.requires_grad)
        names = sorted({clip.speaker for clip in sets.clips})
        window = features.shape[2] * data.HOP / audio.RATE
        known = f"{own - trains if config.lora else own:,} parameters, which hears {window:g} s"
        found: dict[str, str | int] = {
            "voices": "made" if config.data is None else "given",
            "speaker": config.speaker,
            "model": f"A Whisper of {known} at once",
            "trains": f"{trains:,} parameters" + (", an adapter" if config.lora else ""),
            "rank": config.lora,
            "source": str(folder(config.model, "model")) if config.model else "",
            "trained": config.model_is if config.model else "here",
            "sets": f"{len(sets.clips):,} clips of {len(names)} speakers: {len(sets.train):,} to "
            f"train, {len(sets.validation):,} for validation, {len(sets.test):,} for test",
            "speakers": show(", ".join(names), 500),
            "retrain": "given" if config.retrain_model else "",
            "data_sha256": data.digest(sets),
        }
        if config.model:
            found["model_sha256"] = model_digest(folder(config.model, "model"))
        if config.retrain_model:
            found["retrain_sha256"] = model_digest(folder(config.retrain_model, "retrain-model"))
        return found

    def texts(self, summary: Summary) -> Texts:
        known = summary["data"]
        made, rank, trained = known["voices"] == "made", int(known["rank"]), str(known["trained"])
        size = counted(entry["samples"] for entry in summary["forget_sets"].values())
        real = MADE if made else GIVEN
        doubts = {
            "here": "So small a model, which heard a few orders from machines, says little of one "
            "that heard the world."
            if made
            else "",
            "start": "What --model had heard before is not known: Retrain starts from it too, and "
            "may know the speaker or others like them.",
            "original": "How the original was trained is not known"
            + (
                ", and that Retrain never heard the speaker is taken on trust."
                if known["retrain"]
                else "."
            ),
        }[trained]
        return Texts(
            title="Unlearning a speaker",
            forgotten=f"the speaker {known['speaker']} ({size} clips)",
            real=f"{real} {known['sets']}.",
            doubts=doubts,
            price="A bar that ends left of it took less time than training again."
            if trained != "original"
            else "What training again would take is not known here.",
            model=str(known["model"])
            + (f", given, with an adapter (LoRA) of rank {rank}" if rank else "")
            + (", given" if known["source"] and not rank else ""),
            card_title="Speech recognizer",
            loading=ADAPTED.format(str(known["source"]), FOLDER) if rank else WHOLE.format(FOLDER),
            numbers=NUMBERS,
        )
