"""Trainers of transformers on small models and data."""

import copy

import accelerate
import pytest
import torch
import transformers
from torch import nn

import gradsurgery as gs
from gradsurgery import language
from gradsurgery.integrations.transformers import SurgeryTrainer
from gradsurgery.language import GradAscent, LogProbs
from gradsurgery.language.batches import Pair, PairCollator, Pairs, PairSampler
from tests.language.tiny import WORDS


@pytest.fixture
def fresh(monkeypatch):
    """No accumulation and no precision goes on in the next test: accelerate's are one for all."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def samples(count, seed, alternate=False):
    """Texts of 5 to 12 tokens, of which the first two do not count."""
    generator = torch.Generator().manual_seed(seed)

    def drawn():
        length = int(torch.randint(5, 13, (), generator=generator))
        ids = torch.randint(1, WORDS, (length,), generator=generator).tolist()
        return {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}

    return [{**drawn(), "alternate": drawn()} if alternate else drawn() for _ in range(count)]


FORGET, RETAIN = samples(7, 1), samples(9, 2)
CLIP = 0.5


def llama(**options):
    config = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        **options,
    }
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def arguments(folder, **options):
    given = {
        "per_device_train_batch_size": 1,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    return transformers.TrainingArguments(str(folder), **given)


def trainer_of(model, folder, *, kind=SurgeryTrainer, arguments_of=arguments, **options):
    """Options of TrainingArguments are in `args`, all others are the trainer's."""
    args = arguments_of(folder, **options.pop("args", {}))
    data = {"forget_dataset": FORGET, "retain_dataset": RETAIN}
    return kind(model, args, **{**data, **options})


def steps_of(epochs, size, forget=FORGET, retain=RETAIN, each=1, seed=42, ranks=1):
    """The batches of each step, whole: of all micro-batches of all ranks together."""
    pairs, collator = Pairs(forget, retain), PairCollator()
    sampler = PairSampler(len(forget), len(retain), retain_per_forget=each, seed=seed)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        drawn = list(sampler)[: len(forget) // ranks * ranks]  # as many on each
        for first in range(0, len(drawn), size):
            yield collator([pairs[pair] for pair in drawn[first : first + size]])


def all_forget(forget=FORGET):
    return PairCollator().batch(
        [Pairs(forget, RETAIN)[Pair(k, ())]["forget"] for k in range(len(forget))]
    )


def assert_same(model, other, rtol=1e-10, atol=1e-10):
    state = other.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=rtol, atol=atol, msg=f"{name} differs")


def plain(model, rule, steps, forget, retain, optimizer=None, autocast=False):
    """A loop of one's own: a linear schedule and clipping; and what steps saw."""
    steps = list(steps)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    total = len(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / total)
    surgeon, infos, norms = gs.Surgeon(model, optimizer, copy.deepcopy(rule)), [], []
    for step in steps:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            surgeon.add(forget=step["forget"], loss=forget)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            surgeon.add(retain=step["retain"], loss=retain)
        infos.append(surgeon.backward())
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return infos, norms


# rule, forget loss, retain loss, options of the trainer; micro-batches end in the middle of a step
CASES = {
    "npo": (gs.OrthoGrad(objective="lower"), "npo", "nll", {}),
    "ascent": (gs.OrthoGrad(), "grad_ascent", "nll", {"retain_per_forget": 2}),
    "average": (gs.GRU(momentum=0.8), "wga", "nll", {}),
    "tokens": (gs.OrthoGrad(), "grad_ascent", "nll", {"mean": "token"}),
    "answers": (gs.NGDiff(objective="lower"), {"name": "dpo", "beta": 0.3}, "nll", {}),
    "tasks": ("upgrad", "simnpo", "nll", {}),
    "tasks raised": ({"name": "pcgrad", "seed": 3}, "grad_ascent", "nll", {"hold": "rows"}),
}

TASKS = {
    "tasks": gs.TwoDirections(rule=gs.UPGrad(), objective="lower"),
    "tasks raised": gs.TwoDirections(rule=gs.PCGrad(seed=3)),
}


def losses_of(name, model, data):
    """Of a case, as one who writes a loop makes them."""
    known = LogProbs.of(model, [all_forget(data)])
    token = name == "tokens"
    nll = language.NLL(as_published=token)
    return {
        "npo": language.NPO(reference=known),
        "ascent": GradAscent(),
        "average": language.WGA(),
        "tokens": GradAscent(as_published=token),
        "answers": language.DPO(beta=0.3, reference=known),
        "tasks": language.SimNPO(),
        "tasks raised": GradAscent(),
    }[name], nll
