"""Adapters, other Trainers, float16; what a Trainer can do and surgery in it cannot."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery import language
from gradsurgery.language import Frozen, LogProbs, WithoutAdapter
from tests.language.tiny import made

transformers = pytest.importorskip("transformers")

from gradsurgery.integrations.transformers import SurgeryMixin  # noqa: E402
from tests.integrations.trainers import (  # noqa: E402
    FORGET,
    RETAIN,
    assert_same,
    fresh,  # noqa: F401 - a fixture, asked for by its name
    llama,
    samples,
    steps_of,
    trainer_of,
)

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    # peft asks newer models by an older name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]
LOWER = gs.OrthoGrad(objective="lower")
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1}


def adapted(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, **options)
    return peft.get_peft_model(llama(), config)


@pytest.mark.parametrize("retain", ["nll", "kl"])
def test_an_adapter_alone_moves_and_the_model_below_it_is_the_original(retain, tmp_path):
    model = adapted()
    other = copy.deepcopy(model)
    # at first the divergence has no gradient but rounding, which this rule does not divide by
    rule = LOWER if retain == "nll" else gs.LTUHarmonize(mode="retain", objective="lower")
    trainer = trainer_of(
        model,
        tmp_path,
        rule=rule,
        retain_loss=retain,
        args={**SGD, "gradient_accumulation_steps": 7, "num_train_epochs": 3, "max_grad_norm": 0},
    )
    trainer.train()
    original = Frozen(llama())
    options = {} if retain == "nll" else {"reference": original}
    losses = language.NPO(reference=original), language.retain_loss(retain, **options)
    trained = [p for p in other.parameters() if p.requires_grad]
    surgeon = gs.Surgeon(other, torch.optim.SGD(trained, lr=0.1), rule)
    for step in steps_of(3, 7):
        surgeon.add(forget=step["forget"], loss=losses[0])
        surgeon.add(retain=step["retain"], loss=losses[1])
        surgeon.step()
    assert_same(model, other, rtol=1e-5, atol=1e-6)
    below = model.get_base_model().model.embed_tokens.weight
    assert torch.equal(below, llama().model.embed_tokens.weight)
    trainer.train()  # goes on from there
    assert trainer._steps.surgeon is None


def test_an_adapter_that_has_learned_is_not_taken_off_for_the_original(tmp_path):
    model = adapted(init_lora_weights=False)
    options = {"rule": LOWER, "retain_loss": "kl", "args": {"max_steps": 1}}
    with pytest.raises(gs.InputError, match=r"without its adapter the model is not the one"):
        trainer_of(model, tmp_path, **options).train()
    trainer_of(model, tmp_path, reference=WithoutAdapter(), **options).train()
    trainer_of(model, tmp_path, rule=LOWER, args={"max_steps": 1}).train()  # log-probabilities


class Preparing(transformers.Trainer):
    """As SFTTrainer of TRL: texts become tokens in its constructor, and its collator's columns are
    others; it computes a loss and logs metrics of its own, and saves a card."""

    def __init__(self, model=None, args=None, *, train_dataset, eval_dataset=None, **options):
        sets = {key: self.prepared(rows) for key, rows in (eval_dataset or {}).items()}
        rows = self.prepared(train_dataset)
        options["data_collator"] = self.collated
        super().__init__(model, args, train_dataset=rows, eval_dataset=sets, **options)
        self.asked, self.saved = [], []

    @staticmethod
    def prepared(rows):
        return [{"input_ids": row["text"], "seq_lengths": [len(row["text"])]} for row in rows]

    @staticmethod
    def collated(rows):
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        assert [row["seq_lengths"] for row in rows] == [[len(row)] for row in ids]
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, True),
            "labels": pad(ids, True, -100),
            "attention_mask": pad([torch.ones_like(row) for row in ids], True),
        }

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "labels", "seq_lengths"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert not model.training
        self.asked.append(sorted(inputs))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, *args, **options) -> torch.Tensor:
        raise AssertionError("no step is taken twice")

    def log(self, logs, start_time=None):
        super().log({**logs, "mine": 1.0}, start_time)

    def _save_checkpoint(self, model, trial):
        self.saved.append(self.state.global_step)
        super()._save_checkpoint(model, trial)


class Unlearner(SurgeryMixin, Preparing):
    pass


def test_another_trainer_becomes_one_that_unlearns(tmp_path):
    def texts(rows):
        return [{"text": row["input_ids"]} for row in rows]

    def plain(rows):
        return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]

    models = [llama(), llama()]
    args = {"gradient_accumulation_steps": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
    shared = {"rule": LOWER, "args": args, "retain_per_forget": 2}
    trainer = trainer_of(
        models[0],
        tmp_path,
        kind=Unlearner,
        forget_dataset=texts(FORGET),
        retain_dataset=texts(RETAIN),
        eval_dataset={"held": texts(samples(3, 9))},
        **shared,
    )
    trainer.train()
    assert trainer.saved == [4, 8]
    assert trainer.asked == [["attention_mask", "input_ids", "labels"]] * 2
    entry = trainer.state.log_history[0]
    assert {"mine", "forget_loss", "kept_norm", "grad_norm"} <= set(entry)
    assert any("eval_held_loss" in entry for entry in trainer.state.log_history)
    assert list(trainer.eval_dataset) == ["held"]
    same = trainer_of(
        models[1],
        tmp_path,
        forget_dataset=plain(FORGET),
        retain_dataset=plain(RETAIN),
        eval_dataset=plain(samples(3, 9)),
        **shared,
    )
    same.train()
    assert_same(*models, rtol=0, atol=0)


@pytest.mark.parametrize("explodes", [False, True])
def test_losses_scaled_up_for_float16_make_the_same_steps(explodes, tmp_path):
    """As on a GPU, where accelerate makes the scaler: steps that overflow are left out."""

    class Scaled(transformers.TrainerCallback):
        def on_train_begin(self, *_, **options):  # the model is not wrapped in autocast
            trainer.accelerator.native_amp = True
            trainer.accelerator.state._mixed_precision = "fp16"

    model, args = made(), {**SGD, "max_grad_norm": 0.1}
    other = copy.deepcopy(model)
    trainer = trainer_of(model, tmp_path, rule=LOWER, args=args, callbacks=[Scaled()])
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38 if explodes else 1024.0)
    trainer.accelerator.scaler = scaler
    if explodes:
        model.float()
        start = copy.deepcopy(model)
        trainer.args.max_steps = 2
        trainer.train()
        assert_same(model, start, rtol=0, atol=0)
        assert scaler.get_scale() == pytest.approx(1e38 / 4)
        assert "forget_loss" not in trainer.state.log_history[0]
        return
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 1024
    trainer.accelerator.state._mixed_precision = "no"
    trainer_of(other, tmp_path, rule=LOWER, args=args).train()
    assert_same(model, other, rtol=1e-9, atol=1e-9)


def loss_options():
    """What does not go together, and what is said of it."""
    nll, token = language.NLL(), language.NLL(as_published=True)
    return {
        "direction": ({"rule": gs.GRU()}, "rule: GRU has objective='raise', and NPO is to be low"),
        "lowered": (
            {"rule": LOWER, "forget_loss": "grad_ascent"},
            "OrthoGrad has objective='lower', and GradAscent is to be raised",
        ),
        "rule": ({"rule": "gruu"}, "there is no rule 'gruu'; there are orthograd"),
        "of rule": ({"rule": {"name": "gru", "a": 1}}, "gru has no option a; it has"),
        "no rule": ({"rule": 3}, "rule must be a name, a mapping .*, or a rule, got 3"),
        "name": ({"forget_loss": "np"}, "there is no forget loss 'np'; there are grad_ascent, wga"),
        "option": ({"forget_loss": {"name": "npo", "b": 1}}, "npo has no option b; it has beta"),
        "kind": ({"forget_loss": nn.MSELoss()}, "forget_loss must be a name, .*, got MSELoss"),
        "unnamed": ({"retain_loss": {}}, "retain_loss must be a name"),
        "raised": ({"retain_loss": language.GradAscent()}, "retain_loss must be one to lower"),
        "model": ({"retain_loss": "kl"}, "retain_loss kl needs the original model: pass reference"),
        "too little": (
            {"retain_loss": "kl", "reference": LogProbs()},
            "KL needs the original's model: reference= must be Frozen or WithoutAdapter",
        ),
        "reference": ({"reference": made()}, "reference must be LogProbs, .*, got Model"),
        "mean": ({"mean": "tokens"}, r"mean must be one of \('sequence', 'token'\)"),
        "means": ({"retain_loss": token}, r"mean='sequence' and NLL\(as_published=True\), whose"),
        "no tokens": (
            {"mean": "token", "retain_loss": language.KL(reference=Frozen(made()))},
            "neither NPO nor KL is one",
        ),
        "pdu": ({"mean": "token", "forget_loss": "pdu"}, "mean='token' of PDU is that of its publ"),
        "ceiling": ({"ceiling": 3.0}, "ceiling is for forget losses that are raised; NPO is lower"),
        "no ceiling": ({"ceiling": math.nan}, "ceiling must be a number, got nan"),
        "none": ({"retain_per_forget": 0}, "retain_per_forget must be above 0, got 0"),
        "empty": ({"retain_dataset": []}, "retain dataset is empty"),
        "stream": ({"forget_dataset": iter(FORGET)}, "forget dataset must have a length"),
        "train": ({"train_dataset": FORGET, "retain_loss": nll}, "train_dataset is made of"),
    }


@pytest.mark.parametrize("name", loss_options())
def test_what_does_not_go_together_is_named(name, tmp_path):
    options, match = loss_options()[name]
    with pytest.raises(gs.InputError, match=match) as raised:
        trainer_of(made(), tmp_path, **{"rule": LOWER, **options})
    assert len(str(raised.value)) < 400


OLD = transformers.__version__ < "5"
CHECKPOINTING = "gradient_checkpointing" if OLD else "activation_checkpointing"
REENTRANT = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
BY_LENGTH = {"group_by_length": True} if OLD else {"train_sampling_strategy": "group_by_length"}


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor is not served"),
        ({"optim": "lomo"}, {}, "optim='lomo' is not served"),
        ({"optim": "galore_adamw_layerwise"}, {}, "optim='galore_adamw_layerwise' is not served"),
        ({}, {"compute_loss_func": print}, "compute_loss_func is not served: losses of samples"),
        (BY_LENGTH, {}, f"{next(iter(BY_LENGTH))}.* is not served: pairs"),
        (REENTRANT, {}, "use_reentrant': True} is not served"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(args, options, match, tmp_path):
    with pytest.raises(gs.InputError, match=match):
        trainer_of(llama(), tmp_path, rule=LOWER, args=args, **options)


def test_what_takes_several_devices_is_refused_by_name(tmp_path, monkeypatch):
    from gradsurgery.integrations.transformers.refused import check_served

    trainer = trainer_of(llama(), tmp_path, rule=LOWER)
    args = SimpleNamespace(**{**vars(trainer.args), "n_gpu": 1, "world_size": 1})
    fake = SimpleNamespace(
        args=args,
        accelerator=SimpleNamespace(distributed_type="NO", state=None),
        is_deepspeed_enabled=False,
        model_init=None,
    )
    check_served(fake)
    for change, match in (
        ({"n_gpu": 2}, "2 GPUs in one process is not served: .* CUDA_VISIBLE_DEVICES"),
        ({"world_size": 4}, "4 processes of NO is not served: each is to have a replica"),
        ({"use_liger_kernel": True}, "use_liger_kernel is not served"),
        ({"activation_offloading": True}, "activation_offloading is not served"),
    ):
        changed = SimpleNamespace(**{**vars(args), **change})
        with pytest.raises(gs.InputError, match=match):
            check_served(SimpleNamespace(**{**vars(fake), "args": changed}))
    with pytest.raises(gs.InputError, match="deepspeed is not served"):
        check_served(SimpleNamespace(**{**vars(fake), "is_deepspeed_enabled": True}))
    with pytest.raises(gs.InputError, match="fsdp_config xla is not served"):
        check_served(SimpleNamespace(**{**vars(fake), "is_fsdp_xla_enabled": True}))
    for version, sizes, match in (
        (1, None, "fsdp version 1 is not served: .* take version 2"),
        (2, 2, "parallelism_config is not served: .* take dp_replicate_size"),
        (2, 1, None),
    ):
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
        parallel = sizes and SimpleNamespace(non_data_parallel_size=sizes)
        sharded = SimpleNamespace(distributed_type="FSDP", state=state, parallelism_config=parallel)
        args.world_size = 4
        given = SimpleNamespace(**{**vars(fake), "accelerator": sharded})
        if match is None:
            check_served(given)
            continue
        with pytest.raises(gs.InputError, match=match):
            check_served(given)
    args.world_size = 1
    with pytest.raises(gs.InputError, match="model_init is not served"):
        trainer_of(None, tmp_path, rule=LOWER, model_init=lambda: llama())


def test_noise_on_embeddings_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="neftune_noise_alpha: the noise depends"):
        trainer_of(llama(), tmp_path, rule=LOWER, args={"neftune_noise_alpha": 5.0})


def test_checkpoints_are_not_reentrant_unless_asked_for(tmp_path):
    args = {CHECKPOINTING: True, "max_steps": 1}
    trainer_of(llama(), tmp_path, rule=LOWER, args=args).train()
    model = llama()
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises((gs.InputError, RuntimeError), match="use_reentrant=True"):
        trainer_of(model, tmp_path, rule=LOWER, args={"max_steps": 1}).train()
