"""Trainers of transformers on small models and data."""

import accelerate
import pytest
import torch
import transformers

from gradsurgery.integrations.transformers import SurgeryTrainer
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


def steps_of(epochs, size, forget=FORGET, retain=RETAIN, each=1, seed=42):
    """The batches of each step, whole: of all micro-batches together."""
    pairs, collator = Pairs(forget, retain), PairCollator()
    sampler = PairSampler(len(forget), len(retain), retain_per_forget=each, seed=seed)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
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
