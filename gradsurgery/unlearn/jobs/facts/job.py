"""The facts job: a small language model learns made-up authors, and unlearns some."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from gradsurgery.extras import package
from gradsurgery.unlearn.jobs.base import Summary, Texts, with_weights
from gradsurgery.unlearn.jobs.classifiers import counted
from gradsurgery.unlearn.jobs.facts import data
from gradsurgery.unlearn.jobs.facts.data import Fact
from gradsurgery.unlearn.jobs.language import NUMBERS, LanguageConfig, LanguageJob, TextSplit
from gradsurgery.unlearn.jobs.vocabulary import END, PAD
from gradsurgery.unlearn.methods.retrain import RetrainConfig
from gradsurgery.unlearn.training.seeds import derived, seeded
from gradsurgery.unlearn.training.trainer import require

Task = Literal["authors", "facts"]
HELD_OUT = 24  # authors that no model is trained on, half for validation
MEASURED = 120  # facts of the retain set that are looked at when a run ends
LEAST = 5  # facts to forget, that attacks and tests have something to look at


@dataclass
class FactsConfig(LanguageConfig):
    """Teach a small Llama facts of made-up authors, unlearn some, and compare with training again
    without them."""

    task: Task = "authors"
    """What to forget: all facts of some authors, or some facts of any."""
    authors: int = 120
    """How many authors are learned, each with six facts."""
    percent: float = 5.0
    """Of the authors or facts, in (0, 50], those to forget."""
    layers: int = 2
    """Layers of the model."""
    width: int = 128
    """Its hidden size, a multiple of 32."""
    probe_every: int = 2
    """Steps between measurements of the model during unlearning; of a method that may stop early
    its `stop_every`."""
    threads: int = 2
    """CPU threads of torch. Another number can change the last bits of every result."""
    seeds: int = 1
    """How many seeds; each draws its own authors, forget set, weights and order of the data."""
    training: RetrainConfig = field(
        default_factory=lambda: RetrainConfig(
            steps=240, lr=4e-3, weight_decay=0.0, start="given", retain_batch=64
        )
    )
    """How the original and the retrained model are trained."""

    def check(self) -> None:
        super().check()
        most = data.MOST_AUTHORS - HELD_OUT
        require(100 <= self.authors <= most, "authors", f"from 100 to {most}", self.authors)
        require(0 < self.percent <= 50, "percent", "in (0, 50]", f"{self.percent:g}")
        require(1 <= self.layers <= 64, "layers", "from 1 to 64", self.layers)
        fits = self.width % 32 == 0 and 32 <= self.width <= 4096
        require(fits, "width", "a multiple of 32, at most 4096", self.width)
        given = self.training.start == "given"
        require(given, "training.start", "given: the job draws the weights", self.training.start)


class FactsJob(LanguageJob):
    name = "facts"
    about = "made-up authors that a small language model learns: some of them, some facts"
    Config = FactsConfig
    tasks = get_args(Task)
    alike: ClassVar = {"facts": "authors"}
    described = ("model",)

    def split(self, config: FactsConfig, seed: int) -> TextSplit:
        people = data.authors(config.authors + HELD_OUT, seed)
        own = list(enumerate(fact for facts in people[: config.authors] for fact in facts))
        forgotten = _forgotten(config, own, seed)
        world = data.world()
        other = [fact for facts in world.values() for fact in facts]
        kept = [pair for pair in own if pair[0] not in forgotten]
        kept += enumerate(other, start=len(own))
        first = len(own) + len(other)
        unseen = list(enumerate((f for facts in people[config.authors :] for f in facts), first))
        half = len(unseen) // 2
        sets = {
            "forget": [pair for pair in own if pair[0] in forgotten],
            "retain": kept,
            "validation": unseen[:half],
            "test": unseen[half:],
        }
        looked = kept[: len(own) - len(forgotten)]
        looked = random.Random(f"measured {seed}").sample(looked, min(MEASURED, len(looked)))
        samples = {**sets, "retain": sorted(looked), **{k: enumerate(v) for k, v in world.items()}}
        batches: dict[str, Any] = {name: data.batch(facts) for name, facts in sets.items()}
        return TextSplit(
            **batches,
            ids=sorted(forgotten),
            about={"authors": len({fact.who for _, fact in sets["forget"]})},
            samples={name: [data.sample(f) for _, f in facts] for name, facts in samples.items()},
            tokenizer=data.tokenizer(),
        )

    def model(self, config: FactsConfig, seed: int = 0) -> nn.Module:
        package("transformers", "hf", "the facts job")
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = {
            "vocab_size": len(data.tokenizer()),
            "hidden_size": config.width,
            "intermediate_size": 8 * config.width // 3,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.width // 32,
            "max_position_embeddings": 128,
        }
        tokens = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None}
        made = LlamaConfig(
            **sizes,
            **tokens,
            tie_word_embeddings=True,
            initializer_range=0.05,  # at 0.02 so narrow a model begins slowly
        )
        with seeded(seed, torch.device("cpu")):
            return LlamaForCausalLM(made)

    def facts(self, config: FactsConfig) -> dict[str, str | int]:
        count = sum(p.numel() for p in self.model(config).parameters())
        layers = "1 layer" if config.layers == 1 else f"{config.layers} layers"
        return {"model": f"A Llama of {layers} and {count:,} parameters, whose tokens are words"}

    def texts(self, summary: Summary) -> Texts:
        sets = list(summary["forget_sets"].values())
        size = counted(entry["samples"] for entry in sets)
        people = counted(entry["authors"] for entry in sets)
        authors = summary["task"] == "authors"
        what = f"all facts of {people} authors ({size} facts)" if authors else f"{size} facts"
        return Texts(
            title=f"Unlearning made-up {summary['task']}",
            forgotten=what if authors else f"{what}, of {people} authors",
            real="The authors and all that is said of them are made up, by the seed: six facts "
            f"each, as question and answer. Test and validation are {HELD_OUT} further authors. "
            "Who wrote real books and capitals are learned along with them, by Retrain too.",
            doubts="A model that knows nothing but these facts, in one wording each, says little "
            "of one that has read books.",
            price="So small a model retrains in a minute: time is no reason to unlearn here.",
            model=summary["data"]["model"],
            card_title="Made-up authors",
            loading=with_weights(
                "from gradsurgery.unlearn.jobs.facts.job import FactsConfig, FactsJob\n\n"
                "model = FactsJob().model(FactsConfig())  # with the options below, if others were "
                "set"
            ),
            numbers=NUMBERS,
        )


def _forgotten(config: FactsConfig, facts: list[tuple[int, Fact]], seed: int) -> set[int]:
    """Numbers of the facts to forget."""
    draw = random.Random(derived(seed, "forget"))
    if config.task == "facts":
        count = max(LEAST, round(config.percent / 100 * len(facts)))
        return set(draw.sample([number for number, _ in facts], count))
    names = list(dict.fromkeys(fact.who for _, fact in facts))
    chosen = set(draw.sample(names, max(1, round(config.percent / 100 * len(names)))))
    return {number for number, fact in facts if fact.who in chosen}
