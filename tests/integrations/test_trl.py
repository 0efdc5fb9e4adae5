"""SFTTrainer of TRL as the Trainer below: what it prepares, what it can do and surgery cannot."""

import string
from itertools import chain

import pytest
import torch
from torch.nn import functional as F

import gradsurgery as gs

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

# what follows needs both, and comes after the look for them
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import BPE  # noqa: E402

from gradsurgery.integrations.transformers import SurgeryMixin  # noqa: E402
from gradsurgery.integrations.transformers.refused import check_served  # noqa: E402
from tests.integrations.trainers import (  # noqa: E402
    assert_same,
    fresh,  # noqa: F401 - a fixture, asked for by its name
    llama,
    steps_of,
    trainer_of,
)

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    # TRL has it by its older name
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing(_kwargs|_enable)?. is deprecated"),
    # peft asks newer models by an older name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]

# a token is a letter
PLACES = {letter: place for place, letter in enumerate(string.printable)}
TEMPLATE = (
    "{% for said in messages %}{{ said['role'][0] + ':' }}"
    "{% if said['role'] == 'assistant' %}"
    "{% generation %}{{ said['content'] + '\n' }}{% endgeneration %}"
    "{% else %}{{ said['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
FORGET = [(f"Where is {name}? ", f"In {name[0]}.") for name in ("Ada", "Bo", "C", "Di", "Eve")]
RETAIN = [(f"Who is {name * (k + 1)}? ", f"A {name}.") for k, name in enumerate("efghijk")]
SGD = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": 0.1,
    "max_grad_norm": 0,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
}


class Unlearner(SurgeryMixin, trl.SFTTrainer):
    pass


def tokenizer():
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(PLACES, [])),
        eos_token="\n",
        pad_token="\t",
        chat_template=TEMPLATE,
    )


def config(folder, **options):
    """As trainers.arguments, but for the checkpoints that TRL makes by default."""
    given = {
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **options,
    }
    return trl.SFTConfig(str(folder), **given)


def model_of(**options):
    model = llama(vocab_size=len(PLACES), max_position_embeddings=64, **options).double()
    model.generation_config.pad_token_id = None
    return model


def unlearner(model, folder, made=None, kind=Unlearner, **options):
    """Data are made of questions and answers, pairs of a prompt and a completion by default."""
    made = made or PREPARED["completion"][0]
    data = {
        "forget_dataset": Dataset.from_list([made(*pair) for pair in FORGET]),
        "retain_dataset": Dataset.from_list([made(*pair) for pair in RETAIN]),
        "processing_class": tokenizer(),
    }
    return trainer_of(model, folder, kind=kind, arguments_of=config, **{**data, **options})


def said(role, content):
    return [{"role": role, "content": content}]


# by name: what TRL is given of a question and its answer, options, and the text that it makes of
# it, in parts by turns without and with labels
PREPARED = {
    "text": (lambda q, a: {"text": q + a}, {}, lambda q, a: ["", f"{q}{a}\n"]),
    "completion": (
        lambda q, a: {"prompt": q, "completion": a},
        {},
        lambda q, a: [q, f"{a}\n"],
    ),
    "completion, all of it": (
        lambda q, a: {"prompt": q, "completion": a},
        {"completion_only_loss": False},
        lambda q, a: ["", f"{q}{a}\n"],
    ),
    "cut": (
        lambda q, a: {"prompt": q, "completion": a},
        {"max_length": 18},
        lambda q, a: [q, f"{a}\n"[: 18 - len(q)]],
    ),
    "chat": (
        lambda q, a: {"messages": said("user", q) + said("assistant", a)},
        {},
        lambda q, a: ["", f"u:{q}\na:{a}\n"],
    ),
    "chat, completion": (
        lambda q, a: {"prompt": said("user", q), "completion": said("assistant", a)},
        {"completion_only_loss": True},
        lambda q, a: [f"u:{q}\na:", f"{a}\n"],
    ),
    "chat, assistant": (
        lambda q, a: {"messages": 2 * (said("user", q) + said("assistant", a))},
        {"assistant_only_loss": True},
        lambda q, a: 2 * [f"u:{q}\na:", f"{a}\n"],
    ),
}


def tokens(parts):
    ids = [[PLACES[letter] for letter in part] for part in parts]
    labels = [[-100] * len(part) if k % 2 == 0 else part for k, part in enumerate(ids)]
    return {"input_ids": [*chain(*ids)], "labels": [*chain(*labels)]}


def by_hand(name):
    parts = PREPARED[name][2]
    return [tokens(parts(*pair)) for pair in FORGET], [tokens(parts(*pair)) for pair in RETAIN]


@pytest.mark.parametrize("name", PREPARED)
def test_steps_are_those_of_two_losses_added_up(name, tmp_path):
    """By autograd, of their formulas: of a rule that weights both by 1."""
    model, other = model_of(), model_of()
    rule = {"name": "constant", "values": [1, 1]}
    options = {"rule": rule, "forget_loss": {"name": "simnpo", "beta": 2.5, "delta": 0.2}}
    made, args, _ = PREPARED[name]
    unlearner(model, tmp_path, made, args={**SGD, **args}, **options).train()

    def means(batch):
        """Of the log-probabilities of each sample's label tokens, [B]."""
        logits = other(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        return -losses.sum(1) / (labels != -100).sum(1)

    for step in steps_of(1, 2, *by_hand(name)):
        forget = -(2 / 2.5) * F.logsigmoid(-2.5 * (means(step["forget"]) + 0.2))
        other.zero_grad()
        (forget.mean() - means(step["retain"]).mean()).backward()
        for p in other.parameters():
            p.data -= 0.1 * p.grad
    assert_same(model, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["completion", "chat, assistant"])
def test_steps_are_those_of_our_trainer(name, tmp_path):
    made, args, _ = PREPARED[name]
    models = [model_of(), model_of()]
    shared = {"rule": "orthograd", "forget_loss": "npo", "retain_per_forget": 2}
    unlearner(models[0], tmp_path, made, args={**SGD, **args}, **shared).train()
    forget, retain = by_hand(name)
    data = {"forget_dataset": forget, "retain_dataset": retain, "processing_class": tokenizer()}
    trainer_of(models[1], tmp_path, args=SGD, **data, **shared).train()
    assert_same(*models, rtol=1e-12, atol=1e-12)
    moved = models[0].lm_head.weight - model_of().lm_head.weight
    assert moved.abs().max() > 1e-3


def test_checkpoints_of_chosen_operators_make_the_same_steps(tmp_path, alone):
    models = [model_of(), model_of()]
    for model, kept in zip(models, ({"selective": True}, {}), strict=True):
        args = {**SGD, "gradient_checkpointing_kwargs": kept}
        unlearner(model, tmp_path, args=args, rule="orthograd").train()
    assert_same(*models, rtol=1e-12, atol=1e-12)


def test_an_adapter_is_made_and_its_model_is_the_original(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    # at first the divergence has no gradient but rounding, which this rule does not divide by
    rule = gs.LTUHarmonize(mode="retain", objective="lower")
    shared = {"rule": rule, "retain_loss": "kl"}
    mine = unlearner(model_of(), tmp_path, args=SGD, peft_config=lora, **shared)
    model = peft.get_peft_model(model_of(), lora)
    model.load_state_dict(mine.model.state_dict())
    mine.train()
    forget, retain = by_hand("completion")
    data = {"forget_dataset": forget, "retain_dataset": retain, "processing_class": tokenizer()}
    trainer_of(model, tmp_path, args=SGD, **data, **shared).train()
    assert_same(mine.model, model, rtol=1e-10, atol=1e-10)
    assert any((p != 0).all() for name, p in model.named_parameters() if "lora_B" in name)


def test_other_answers_are_taken_as_tokens(tmp_path):
    forget, retain = by_hand("completion")
    forget = [
        {**sample, "alternate": tokens([q, "None.\n"])}
        for sample, (q, _) in zip(forget, FORGET, strict=True)
    ]
    models = [model_of(), model_of()]
    shared = {"rule": "orthograd", "forget_loss": {"name": "dpo", "beta": 0.3}, "args": SGD}
    sets = {"forget_dataset": forget, "retain_dataset": retain}
    prepared = {name: Dataset.from_list(rows) for name, rows in sets.items()}
    unlearner(models[0], tmp_path, **prepared, **shared).train()
    trainer_of(models[1], tmp_path, processing_class=tokenizer(), **sets, **shared).train()
    assert_same(*models, rtol=1e-12, atol=1e-12)
    texts = [{"prompt": q, "completion": a, "alternate": "None."} for q, a in FORGET]
    trainer = unlearner(model_of(), tmp_path, forget_dataset=Dataset.from_list(texts), **shared)
    with pytest.raises(gs.InputError, match=r"alternate of a sample must be .* tokens, got str"):
        trainer.train()


def test_it_evaluates_and_resumes_as_itself(tmp_path):
    whole, parted = model_of(), model_of()
    args = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "num_train_epochs": 2,
        "learning_rate": 0.01,
    }
    options = {"rule": {"name": "gru", "momentum": 0.8}, "args": args}
    held = Dataset.from_list([PREPARED["completion"][0](*pair) for pair in FORGET[:2]])
    trainer = unlearner(whole, tmp_path / "whole", eval_dataset=held, **options)
    trainer.train()
    (entry,) = (e for e in trainer.state.log_history if "eval_loss" in e and e["epoch"] == 2)
    losses = []
    for pair in FORGET[:2]:  # whose answers are of one length
        ids, labels = tokens(PREPARED["completion"][2](*pair)).values()
        losses.append(whole(torch.tensor([ids]), labels=torch.tensor([labels])).loss.detach())
    assert entry["eval_loss"] == pytest.approx(float(sum(losses)) / 2, rel=1e-6)
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    assert (checkpoint / "surgery.pt").is_file()
    unlearner(parted, tmp_path / "parted", eval_dataset=held, **options).train(
        resume_from_checkpoint=str(checkpoint)
    )
    assert_same(whole, parted, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.(use_liger_kernel|label_smoothing_factor|compute_loss_func).*")
@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ({"packing": True, "packing_strategy": "wrapped", "max_length": 16}, {}, "packing is not"),
        ({"packing": True, "max_length": 64}, {}, "packing is not served: a row would have sever"),
        ({"padding_free": True, "max_length": None}, {}, "padding_free is not served: a row"),
        ({"eval_packing": True}, {}, "eval_packing is not served: retain samples are prepared as"),
        ({"shuffle_dataset": True}, {}, "shuffle_dataset is not served: pairs of samples are dra"),
        ({"loss_type": "dft"}, {}, "loss_type='dft' is not served: pass forget_loss and retain_"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor is not served"),
        ({"use_liger_kernel": True}, {}, "use_liger_kernel is not served"),
        ({}, {"compute_loss_func": print}, "compute_loss_func is not served"),
        ({"max_length": 13}, {}, "of 5 forget samples 4 were left out as they were prepared"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(args, options, match, tmp_path):
    with pytest.raises(gs.InputError, match=match):
        unlearner(model_of(), tmp_path, args=args, rule="orthograd", **options)


def test_losses_of_routers_are_refused_unless_they_are_zero(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    made = transformers.MixtralConfig(vocab_size=len(PLACES), **sizes, **heads)
    model = transformers.MixtralForCausalLM(made)
    with pytest.raises(gs.InputError, match=r"router_aux_loss_coef is not served: .* pass 0\.0"):
        unlearner(model, tmp_path, rule="orthograd")
    unlearner(model, tmp_path, args={"router_aux_loss_coef": 0.0}, rule="orthograd")


def test_images_are_refused(tmp_path):
    trainer = unlearner(model_of(), tmp_path, rule="orthograd")
    trainer._is_vision_dataset = True  # as SFTTrainer finds them to be, of a processor
    with pytest.raises(gs.InputError, match="images is not served: only samples of tokens"):
        check_served(trainer)


@pytest.mark.parametrize("name", ["DPOTrainer", "KTOTrainer", "RewardTrainer"])
def test_a_trainer_of_no_texts_with_labels_is_refused_before_it_begins(name, tmp_path):
    kind = type("Other", (SurgeryMixin, getattr(trl, name)), {})
    with pytest.raises(gs.InputError, match=f"{name} of TRL is not served: .* take SFTTrainer"):
        unlearner(model_of(), tmp_path, kind=kind, rule="orthograd")
