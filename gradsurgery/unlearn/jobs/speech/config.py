"""Options of the speech job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gradsurgery.errors import InputError
from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs.base import Method
from gradsurgery.unlearn.jobs.device import check_device
from gradsurgery.unlearn.jobs.language import LanguageConfig
from gradsurgery.unlearn.jobs.pretrained import Adapter
from gradsurgery.unlearn.methods.retrain import RetrainConfig
from gradsurgery.unlearn.training.trainer import require

Task = Literal["speaker"]
FORGOTTEN = "slt"  # of the voices that speak here
OURS = 3e-3  # rate at which the small model is trained


@dataclass
class SpeechConfig(LanguageConfig):
    """Teach a small Whisper several voices, unlearn one of them, and compare with training again
    without it; or do so with a model and clips of your own."""

    task: Task = "speaker"
    """What to forget: all that one speaker says."""
    forget_speaker: str = ""
    """Who is forgotten, as --data calls them. None: slt, of the voices that speak here."""
    data: Path | None = None
    """Clips of your own: .jsonl, .csv or .tsv of audio (a path), text and speaker. None: sentences
    that voices of flite and espeak-ng speak."""
    model: str = ""
    """A model of Whisper's architecture: a directory with config.json, safetensors and a tokenizer,
    or the name of one in Hugging Face's cache on this machine. None: a small one, trained here."""
    model_is: Literal["start", "original"] = "start"
    """What --model is: start, what the original and the retrained model are trained from;
    original, a model that was trained on all the clips, the only one not trained here."""
    retrain_model: str = ""
    """With --model-is original, a model trained without the speaker, to be compared with."""
    language: str | None = None
    """What is spoken, where --model knows several languages: en, de, ..."""
    lora: int = 0
    """Rank of an adapter that is trained (LoRA) above the frozen weights of --model; 0: all are."""
    lora_alpha: float = 16.0
    """Scale of the adapter: what it adds is multiplied by this over the rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Modules that it is put on, by the ends of their names."""
    cut: bool = True
    """The encoder of --model hears as much as the longest clip lasts, in place of 30 seconds that
    are mostly silence. The same for all clips: a sample's loss must depend on that sample alone."""
    sentences: int = 48
    """Sentences that each voice speaks to be learned."""
    unseen: int = 32
    """Sentences that no model is trained on, spoken by all voices, half for validation."""
    layers: int = 2
    """Layers of the small model, of its encoder and of its decoder."""
    width: int = 96
    """Its hidden size, a multiple of 32."""
    device: str = "cpu"
    """Where models are trained: cpu, cuda, cuda:1, ..."""
    measured: int = 200
    """Retained clips that are looked at when a run ends, at most."""
    at_once: int = 32
    """Clips in a forward pass that measures."""
    relearn: int = 30
    """Steps of training on the forget set in which a model may learn it again, at most; 0: that is
    not measured."""
    loss: tuple[str, ...] = ("npo",)
    rule: tuple[str, ...] = ("orthograd",)
    method: tuple[Method, ...] = ("orthograd", "graddiff", "finetune")
    """Further methods, on the plain loss, or all that go with a language model."""
    seeds: int = 1
    """How many seeds; each draws its own weights and order of the data."""
    training: RetrainConfig = field(
        default_factory=lambda: RetrainConfig(
            steps=300, lr=OURS, weight_decay=0.0, start="given", retain_batch=32
        )
    )
    """How the original and the retrained model are trained."""

    @property
    def speaker(self) -> str:
        return self.forget_speaker or ("" if self.data else FORGOTTEN)

    @property
    def adapter(self) -> Adapter | None:
        if not self.lora:
            return None
        return Adapter(self.lora, self.lora_alpha, self.lora_targets, task=None)

    def check(self) -> None:
        super().check()
        require(bool(self.speaker), "forget-speaker", "given with --data", "none")
        require(0 <= self.lora <= 4096, "lora", "from 0 to 4096", brief(self.lora))
        scaled = 0 < self.lora_alpha <= 1e6
        require(scaled, "lora-alpha", "positive, at most a million", self.lora_alpha)
        require(len(self.lora_targets) > 0, "lora-targets", "one or more", "none")
        counts = {"measured": 1, "at_once": 1, "relearn": 0, "sentences": 1, "unseen": 2}
        for name, least in counts.items():
            value, option = getattr(self, name), name.replace("_", "-")
            require(least <= value <= 10_000, option, f"from {least} to 10000", brief(value))
        require(1 <= self.layers <= 64, "layers", "from 1 to 64", self.layers)
        fits = self.width % 32 == 0 and 32 <= self.width <= 4096
        require(fits, "width", "a multiple of 32, at most 4096", self.width)
        given = self.training.start == "given"
        require(given, "training.start", "given: the job draws the weights", self.training.start)
        self._check_model()
        check_device(self.device)

    def _check_model(self) -> None:
        """Raise `InputError` where options ask for a model that is not given."""
        for name in ("lora", "retrain_model", "language"):
            if getattr(self, name) and not self.model:
                raise InputError(f"--{name.replace('_', '-')} goes with --model, and none is given")
        if self.model_is == "start":
            alone = "left out unless --model-is is original"
            require(not self.retrain_model, "retrain-model", alone, show(self.retrain_model, 80))
            return
        require(bool(self.model), "model", "given where --model-is is original", "none")
        require(len(self.variants) > 0, "loss", "one or more, or --method", "none")
        for name in ("shadows", "second_retrain"):
            if getattr(self, name):
                raise InputError(
                    f"--{name.replace('_', '-')} are trained as the original was, which is not "
                    "known of --model; --model-is start trains it here"
                )
        compared = not self.tune or bool(self.retrain_model)
        require(compared, "tune", "0 without --retrain-model, by which draws are told", self.tune)
