"""The text job: unlearn samples of your own from a language model of your own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.language.data import Tags
from gradsurgery.text import brief
from gradsurgery.unlearn.jobs.base import Method, Summary, Texts
from gradsurgery.unlearn.jobs.device import check_device
from gradsurgery.unlearn.jobs.language import (
    ALONE,
    NUMBERS,
    LanguageConfig,
    LanguageJob,
    Looking,
    TextSplit,
)
from gradsurgery.unlearn.jobs.pretrained import (
    FOLDER,
    Adapter,
    dealt_out,
    digest,
    folder,
    load,
    publish,
    tokenizer,
)
from gradsurgery.unlearn.jobs.text import data
from gradsurgery.unlearn.methods import METHODS
from gradsurgery.unlearn.methods.retrain import RetrainConfig
from gradsurgery.unlearn.training.config import update
from gradsurgery.unlearn.training.trainer import require

if TYPE_CHECKING:
    from gradsurgery.unlearn.jobs.directory import RunDirectory, Stage

Task = Literal["samples"]
RANK = 8
RATES = {True: 1e-4, False: 1e-5}  # with an adapter, of all weights; as public code has them
USUAL = {"optimizer": "adamw", "forget_batch": 8, "retain_batch": 8, "steps": 0}
SETS = {"forget": "to forget", "retain": "to keep", "holdout": "held out"}
WHOLE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({!r})"""
ADAPTED = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({!r})
model = PeftModel.from_pretrained(base, {!r})"""


@dataclass
class TextConfig(LanguageConfig):
    """Unlearn samples of your own from a language model of your own, and measure what is left."""

    task: Task = "samples"
    """What to forget: the samples of --forget."""
    model: str = ""
    """The model to unlearn from: a directory with config.json, safetensors and a tokenizer, or the
    name of one in Hugging Face's cache on this machine. It is not changed."""
    forget: Path | None = None
    """Samples to forget: .jsonl, .json, .txt (or these with .gz) or .parquet, of questions and
    answers, chats, prompts and what follows, or texts."""
    retain: Path | None = None
    """Samples to keep, likewise."""
    holdout: Path | None = None
    """Samples like those to forget that the model never saw, half for validation, half for test.
    None: no attack is measured."""
    retrain_model: str = ""
    """A model trained without --forget, to be compared with: as --model. None given: nothing
    says how near the methods come to one."""
    lora: int = RANK
    """Rank of the adapter that is trained (LoRA), above frozen weights; 0: all weights are."""
    lora_alpha: float = 16.0
    """Scale of the adapter: what it adds is multiplied by this over the rank."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Modules that it is put on, by the ends of their names; all-linear: all but the head."""
    max_length: int = 512
    """Tokens of a sample; a longer answer loses its end, longer texts are cut into several."""
    user_tag: tuple[str, ...] = ()
    r"""What stands before and after a question, in place of the chat template; \n: a new line."""
    assistant_tag: tuple[str, ...] = ()
    """What stands before an answer, and after one that others follow, likewise."""
    system: str | None = None
    """What the system says first, where a chat has no such turn."""
    date: str = "26 Jul 2024"
    """For chat templates that write a date, which would be another one tomorrow."""
    refusals: Path | None = None
    """File of sentences, one a line, to answer in place of what is forgotten (idk_dpo, idk_nll,
    random_label), where samples bring no alternate. None: 24 of ours."""
    device: str = "cpu"
    """Where the model is trained: cpu, cuda, cuda:1, ..."""
    fully_shard: bool = False
    """Deal out weights, gradients and the optimizer's state over the processes (FSDP2), block by
    block, for a model that is too large for each to have whole."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; an adapter's are float32."""
    epochs: int = 10
    """Passes over the forget set that methods are run for, where their steps are 0."""
    measured: int = 200
    """Retained samples that are looked at when a run ends, at most; of the forget and held-out
    samples all are."""
    at_once: int = 8
    """Samples in a forward pass that measures."""
    max_new_tokens: int = 64
    """Of an answer that the model writes, at most; 0: it writes none. Pieces of text it does not
    continue."""
    relearn: int = 20
    """Steps of training on the forget set in which a model may learn it again, at most; 0: that is
    not measured."""
    loss: tuple[str, ...] = ("npo",)
    rule: tuple[str, ...] = ("orthograd",)
    method: tuple[Method, ...] = ()
    """Further methods, on the plain loss, or all that go with a language model."""
    seeds: int = 1
    """How many seeds; each draws its own adapter and order of the data."""
    probe_every: int = 10
    """Steps between measurements of the model during unlearning; of a method that may stop early
    its `stop_every`."""
    threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads of torch. Another number can change the last bits of every result."""
    training: RetrainConfig = field(default_factory=RetrainConfig)
    """Not of this job: the models are given, and none is trained anew."""

    @property
    def tags(self) -> Tags | None:
        pairs = {"user": self.user_tag, "assistant": self.assistant_tag}
        given = {
            role: tuple(tag.replace("\\n", "\n") for tag in (*pair, "")[:2])
            for role, pair in pairs.items()
            if pair
        }
        return Tags(**given) if given else None  # type: ignore[arg-type]

    @property
    def adapter(self) -> Adapter | None:
        return Adapter(self.lora, self.lora_alpha, self.lora_targets) if self.lora else None

    def check(self) -> None:
        super().check()
        for name in ("model", "forget", "retain"):
            require(bool(getattr(self, name)), name, "given", "none")
        require(len(self.variants) > 0, "loss", "one or more, or --method", "none")
        require(0 <= self.lora <= 4096, "lora", "from 0 to 4096", brief(self.lora))
        scaled = 0 < self.lora_alpha <= 1e6
        require(scaled, "lora-alpha", "positive, at most a million", self.lora_alpha)
        require(len(self.lora_targets) > 0, "lora-targets", "one or more", "none")
        for name in ("user_tag", "assistant_tag"):
            tag = getattr(self, name)
            option = name.replace("_", "-")
            require(len(tag) <= 2, option, "one text or two, before and after", len(tag))
        counts = {"max_length": 2, "epochs": 1, "measured": 1, "at_once": 1}
        for name, least in {**counts, "max_new_tokens": 0, "relearn": 0}.items():
            value, option = getattr(self, name), name.replace("_", "-")
            require(least <= value < 2**31, option, f"{least} or more", brief(value))
        anew = self.training != RetrainConfig() or self.second_retrain
        option = "second-retrain" if self.second_retrain else "training"
        require(not anew, option, "left as it is: this job trains no model anew", "another")
        require(
            not self.shadows,
            "shadows",
            "0: they would be trained as --model was, which is not known",
            self.shadows,
        )
        compared = not self.tune or bool(self.retrain_model)
        require(compared, "tune", "0 without --retrain-model, by which draws are told", self.tune)
        self._check_held_out()
        check_device(self.device)

    def _check_held_out(self) -> None:
        """Raise `InputError` where something needs held-out samples and there are none."""
        if self.holdout is not None:
            return
        for name in dict.fromkeys(variant.method for variant in self.variants):
            stop, kind = getattr(self, name).stop, METHODS[name]
            if stop == "validation":
                raise InputError(
                    f"--{name.replace('_', '-')}.stop: validation needs held-out samples: give "
                    "--holdout"
                )
            if "validation" in (*kind.draws, *kind.needs):
                raise InputError(f"--method: {kind.title} needs held-out samples: give --holdout")


class TextJob(LanguageJob):
    name = "text"
    about = "samples of your own, from a language model of your own"
    Config = TextConfig
    tasks = get_args(Task)
    early = ("task", "lora")
    makes = ()
    described = ("kind", "sets", "source", "rank", "retrain")

    def __init__(self) -> None:
        self._read: tuple[object, tuple[dict[str, data.Samples], Any]] | None = None

    # -- options

    def defaults(self, task: str | None = None, lora: Any = None) -> Any:
        """As those of every job, with steps and rates that suit what is trained."""
        config = super().defaults(task)
        whole = str(lora).strip() == "0"
        usual = {**USUAL, "lr": RATES[not whole]}
        sections = {name: getattr(config, name) for name in METHODS}
        changes: dict[str, Any] = {
            name: {key: value for key, value in usual.items() if hasattr(section, key)}
            for name, section in sections.items()
        }
        return update(config, {**changes, **({"lora": 0} if whole else {})})

    def resolved(self, config: TextConfig) -> TextConfig:
        """With the steps that its epochs make."""
        config.check()
        forget = len(self._data(config)[0]["forget"].items)
        changes: dict[str, Any] = {}
        for name in METHODS:
            section = getattr(config, name)
            if section.steps == 0:
                size = getattr(section, "forget_batch", USUAL["forget_batch"])
                changes[name] = {"steps": config.epochs * max(1, forget // size)}
        return update(config, changes)

    def check(self, config: TextConfig) -> None:
        if config.lora and "bad_teacher" in config.methods:
            raise InputError(
                "--method: BadTeacher draws a second teacher anew, and what lies below an adapter "
                "stays: take --lora 0"
            )
        if self._data(config)[0]["forget"].kind == data.PIECES:
            for name in config.methods:
                if "relabel" in METHODS[name].asks:
                    raise InputError(
                        f"--method: {METHODS[name].title} needs other answers to learn, and texts "
                        "have none"
                    )
        super().check(config)

    def check_model(self, config: TextConfig, model: nn.Module) -> None:
        sets, _ = self._data(config)
        items = list(data.every(sets))
        largest = max(int(item["input_ids"].max()) for item in items)
        longest = max(len(item["labels"]) for item in items)
        prompt = max(int((item["labels"] < 0).sum()) for item in items)
        written = 0 if sets["forget"].kind == data.PIECES else prompt + config.max_new_tokens
        given: dict[str, Any] = {"model": model}
        if config.retrain_model:
            given["retrain-model"] = self.standing(config, "retrain", 0)
        for option, one in given.items():
            words = one.get_input_embeddings().weight.shape[0]
            if largest >= words:
                raise InputError(
                    f"--{option}: it has {words} tokens, and the tokenizer of --model makes number "
                    f"{largest}"
                )
            room = getattr(one.config, "max_position_embeddings", None) or math.inf
            needed = {"max-length": longest, "max-new-tokens": written}
            for asked, tokens in needed.items():
                if tokens > room:
                    raise InputError(
                        f"--{asked}: --{option} takes {room} tokens, and {tokens} would be needed"
                    )

    # -- data and models

    def _data(self, config: TextConfig) -> tuple[dict[str, data.Samples], Any]:
        """The sets and the tokenizer, read once."""
        files = {name: getattr(config, name) for name in SETS}
        wanted = data.Wanted(
            files, config.max_length, config.tags, config.system, config.date, config.refusals
        )
        key = (config.model, wanted)
        if self._read is None or self._read[0] != key:
            known = tokenizer(folder(config.model, "model"))
            self._read = key, (data.load(wanted, known), known)
        return self._read[1]

    def split(self, config: TextConfig, seed: int) -> TextSplit:
        sets, known = self._data(config)
        length = max(samples.longest for samples in sets.values())
        forget, retain = sets["forget"], sets["retain"]
        samples = {"forget": forget.items, "retain": data.some(retain.items, config.measured)}
        held: dict[str, Any] = {"validation": None, "test": None}
        if "holdout" in sets:
            kind = sets["holdout"].kind
            for name, part in zip(held, data.halves(sets["holdout"].items), strict=True):
                samples[name] = part
                held[name] = data.batch(data.Samples(part, kind), length)
        pieces = forget.kind == data.PIECES
        return TextSplit(
            forget=data.batch(forget, length),
            retain=data.batch(retain, length),
            **held,
            ids=[item["id"] for item in forget.items],
            about={},
            samples=samples,
            tokenizer=known,
            looking=Looking(
                at_once=config.at_once,
                new_tokens=0 if pieces else config.max_new_tokens,
                relearn_steps=config.relearn,
                relearn_batch=config.at_once,
                relearn_lr=RATES[config.lora > 0],
            ),
        )

    def model(self, config: TextConfig, seed: int = 0) -> nn.Module:
        return self._model(config, "model", config.model, seed)

    def _model(self, config: TextConfig, option: str, name: str, seed: int) -> nn.Module:
        device = "cpu" if config.fully_shard else config.device  # where there is room for all
        made = load(folder(name, option), option, config.dtype, device)
        made = made if config.adapter is None else config.adapter.on(made, seed)
        return dealt_out(made, config.device) if config.fully_shard else made

    def _whole(self, config: TextConfig) -> nn.Module:
        """The model, in one process alone."""
        if config.fully_shard:
            config = replace(config, fully_shard=False, device="cpu")
        return self.model(config)

    def trained(self, config: TextConfig) -> tuple[str, ...]:
        return ("original", "retrain") if config.retrain_model else ("original",)

    def standing(self, config: TextConfig, name: str, seed: int) -> nn.Module | None:
        if name == "original":
            return self.model(config, seed)
        # with an adapter as well, so that gradients and relearning are of the same parameters
        return self._model(config, "retrain-model", config.retrain_model, seed)

    def publish(self, config: TextConfig, directory: RunDirectory, stage: Stage) -> None:
        made: Any = self._whole(config)
        directory.load_model(made, stage)
        publish(made, directory, bool(config.lora), None if config.lora else self._data(config)[1])

    # -- what people are told

    def facts(self, config: TextConfig) -> dict[str, str | int]:
        sets, _ = self._data(config)
        path, made = folder(config.model, "model"), self._whole(config)
        trains = sum(p.numel() for p in made.parameters() if p.requires_grad)
        own = sum(p.numel() for p in made.parameters()) - (trains if config.lora else 0)
        kind = type(made.get_base_model() if config.lora else made).__name__  # type: ignore[operator]
        found: dict[str, str | int] = {
            "kind": f"{kind} of {own:,} parameters",
            "trains": f"{trains:,} parameters, an adapter" if config.lora else "all parameters",
            "rank": config.lora,
            "source": str(path),
            "sets": ", ".join(f"{samples} {SETS[name]}" for name, samples in sets.items()),
            "retrain": "given" if config.retrain_model else "",
            **{f"{name}_sha256": data.digest(samples) for name, samples in sets.items()},
            "model_sha256": digest(path),
        }
        if config.retrain_model:
            found["retrain_sha256"] = digest(folder(config.retrain_model, "retrain-model"))
        return found

    def texts(self, summary: Summary) -> Texts:
        known = summary["data"]
        rank, source = int(known["rank"]), str(known["source"])
        retrained, held = bool(known["retrain"]), "holdout_sha256" in known
        size = next(iter(summary["forget_sets"].values()))["samples"]
        halves = " Of those held out, one half is for validation and one for test." if held else ""
        doubts = ["How the model was trained, and on what besides these samples, is not known."]
        if retrained:
            doubts.append(
                "That Retrain never saw the forget set, and was trained as the original was "
                "otherwise, is taken on trust."
            )
        if not held:
            doubts.append("No held-out samples were given, so no attack was tried.")
        return Texts(
            title="Unlearning samples of a language model",
            forgotten=f"the {size:,} samples of --forget",
            real=f"Samples: {known['sets']}.{halves} The model was given, and not trained here.",
            doubts=" ".join(doubts),
            price="What training again would take is not known here.",
            model=f"A {known['kind']}, given"
            + (f", with an adapter (LoRA) of rank {rank}" if rank else ", all of it unlearned"),
            card_title="Language model",
            loading=ADAPTED.format(source, FOLDER) if rank else WHOLE.format(FOLDER),
            numbers=NUMBERS if retrained else ALONE,
        )
