"""Training in a Trainer is that of a plain loop with a Surgeon on whole batches."""

import copy
import math

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery import language
from gradsurgery.language import GradAscent, LogProbs
from tests.language.tiny import made

transformers = pytest.importorskip("transformers")

from tests.integrations.trainers import (  # noqa: E402
    CASES,
    CLIP,
    FORGET,
    RETAIN,
    TASKS,
    all_forget,
    assert_same,
    fresh,  # noqa: F401 - a fixture, asked for by its name
    llama,
    losses_of,
    plain,
    samples,
    steps_of,
    trainer_of,
)

pytestmark = pytest.mark.usefixtures("fresh")
EPOCHS = 2


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_a_plain_loop_on_whole_batches(name, tmp_path):
    rule, forget, retain, options = CASES[name]
    data = samples(7, 1, alternate=name == "answers")
    model = made()
    other, losses = copy.deepcopy(model), losses_of(name, model, data)
    trainer = trainer_of(
        model,
        tmp_path,
        rule=copy.deepcopy(rule),
        forget_loss=forget,
        retain_loss=retain,
        forget_dataset=data,
        args={"gradient_accumulation_steps": 4, "max_grad_norm": CLIP},
        **options,
    )
    trainer.train()
    steps = list(steps_of(EPOCHS, 4, data, each=options.get("retain_per_forget", 1)))
    assert [len(step["forget"]["id"]) for step in steps] == [4, 3, 4, 3]
    made_rule = TASKS.get(name, rule)
    infos, norms = plain(other, made_rule, steps, *losses)
    assert_same(model, other)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["grad_norm"] for entry in logs] == pytest.approx(norms, rel=1e-10)
    for entry, info in zip(logs, infos, strict=True):
        sign = 1 if losses[0].objective == "lower" else -1
        loss = info.retain_loss + sign * info.forget_loss  # older versions round it
        assert entry["loss"] == pytest.approx(loss, abs=1e-4)
        seen = {**info.to_dict(), "cosine_mean": float(info.cosines.mean())}
        for key in ("forget_loss", "retain_loss", "cosine_mean", "conflict_rate"):
            assert entry[key] == pytest.approx(seen[key], rel=1e-9), key
        if isinstance(rule, gs.OrthoGrad):
            assert entry["kept_norm"] == pytest.approx(info.kept_norm, rel=1e-9)
            assert entry["rank"] == info.rank


def test_fewer_retain_than_forget_samples(tmp_path):
    data, rule = samples(7, 1), gs.OrthoGrad(objective="lower")
    model = made()
    other, losses = copy.deepcopy(model), losses_of("npo", model, data)
    options = {
        "rule": copy.deepcopy(rule), "forget_loss": "npo", "retain_loss": "nll",
        "forget_dataset": data, "retain_per_forget": 0.5,
    }  # fmt: skip
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer_of(model, tmp_path, args={**args, "max_grad_norm": CLIP}, **options).train()
    steps = list(steps_of(EPOCHS, 4, data, each=0.5))
    assert [len(step["retain"]["id"]) for step in steps] == [2, 2, 2, 2]
    plain(other, rule, steps, *losses)
    assert_same(model, other)
    with pytest.raises(gs.InputError, match=r"batches of 1 forget samples .* at least 1"):
        trainer_of(made(), tmp_path, **options).train()


def micro_batches(folder, parts, model, data, args):
    """The model after two steps of eight forget samples, each in so many parts."""
    sizes = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    args = {**sizes, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": CLIP, **args}
    data = {"forget_dataset": data[0], "retain_dataset": data[1]}
    trainer_of(model, folder, rule="orthograd", args=args, **data).train()


@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast")  # of older versions
@pytest.mark.parametrize("how", ["plain", "tied", "checkpoints", "bf16", "weights in bf16"])
def test_eight_micro_batches_are_one_batch(how, tmp_path):
    args = {"bf16": how == "bf16"}
    if how == "checkpoints":
        old = transformers.__version__ < "5"
        args["gradient_checkpointing" if old else "activation_checkpointing"] = True
    start = llama(tie_word_embeddings=how == "tied")
    if how == "weights in bf16":
        start.to(torch.bfloat16)
    models, data = [copy.deepcopy(start) for _ in range(3)], (samples(8, 1), samples(8, 2))
    for model, parts in zip(models, (1, 8), strict=False):
        micro_batches(tmp_path, parts, model, data, args)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
        known = LogProbs.of(start, [all_forget(data[0])])
    sgd = torch.optim.SGD(models[2].parameters(), lr=1.0)
    losses = language.NPO(reference=known), language.NLL()
    steps = steps_of(EPOCHS, 8, *data)
    plain(models[2], gs.OrthoGrad(objective="lower"), steps, *losses, sgd, how == "bf16")
    start, one, parts, loop = (
        nn.utils.parameters_to_vector(model.parameters()).detach() for model in (start, *models)
    )
    assert float((one - start).abs().max()) > 0.05
    assert float((one - loop).abs().max()) <= 1e-6
    # in 16 bits matrices of other sizes are rounded otherwise: 1e-3 was seen
    assert float((one - parts).abs().max()) <= (3e-3 if "bf16" in how else 1e-6)


def test_the_original_is_asked_before_the_first_step_as_the_model_is_called(tmp_path):
    model = llama(attention_dropout=0.5)
    before = LogProbs.of(model, [all_forget()])
    trainer = trainer_of(model, tmp_path, rule=gs.GRU(objective="lower"))
    trainer.train()
    # the original's answers are as likely as the model's, but for dropout
    assert abs(trainer.state.log_history[0]["forget_loss"] - 20 * math.log(2)) > 1e-3
    known = trainer._steps.parts.log_probs
    found = known.log_probs(model, all_forget())
    torch.testing.assert_close(found, before.log_probs(model, all_forget()), rtol=1e-5, atol=1e-5)
    now = LogProbs.of(model, [all_forget()]).log_probs(model, all_forget())
    assert float((now - found).abs().max()) > 0.1
    trainer.train()  # what is original stays so
    assert torch.equal(known.log_probs(model, all_forget()), found)


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_a_forget_sample_above_the_ceiling_no_longer_pushes(mean, tmp_path):
    model = made()
    losses, counts = GradAscent(as_published=True)(model, all_forget())
    ceiling = float(losses.detach().sort().values[2:4].mean())  # three samples are below
    other = copy.deepcopy(model)
    args = {"per_device_train_batch_size": 7, "max_steps": 1, "max_grad_norm": 1e9}
    trainer = trainer_of(
        model,
        tmp_path,
        rule=gs.OrthoGrad(alpha=0.0),
        forget_loss="grad_ascent",
        mean=mean,
        ceiling=ceiling,
        args={**args, "optim": "sgd", "lr_scheduler_type": "constant"},
    )
    trainer.train()
    (step,) = steps_of(1, 7)
    below = losses.detach() < ceiling
    mine = below[step["forget"]["id"]]
    low = {name: entry[mine] for name, entry in step["forget"].items()}
    share = counts[below].sum() / counts.sum() if mean == "token" else 3 / 7
    loss = GradAscent(as_published=mean == "token")
    surgeon = gs.Surgeon(other, torch.optim.SGD(other.parameters()), gs.OrthoGrad(alpha=0.0))
    surgeon.add(forget=low, retain=step["retain"], loss=loss)
    surgeon.backward()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter -= 0.01 * share * parameter.grad
    assert_same(model, other)


class Strict(transformers.LlamaForCausalLM):
    """Takes what it knows alone."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None):
        return super().forward(input_ids, attention_mask, labels=labels)


@pytest.mark.parametrize(("remove", "several"), [(True, False), (False, False), (True, True)])
def test_evaluation_is_that_of_plain_samples(remove, several, tmp_path):
    model = Strict(llama().config)
    held = [{**sample, "id": k} for k, sample in enumerate(samples(4, 5, alternate=True))]
    if remove:
        held = [{**sample, "index": 3} for sample in held]
    trainer = trainer_of(
        model,
        tmp_path,
        rule=gs.GRU(objective="lower"),
        eval_dataset={"a": held} if several else held,
        args={
            "remove_unused_columns": remove,
            "eval_strategy": "epoch",
            "per_device_eval_batch_size": 1,
        },
    )
    trainer.train()
    found = trainer.state.log_history[-2]["eval_a_loss" if several else "eval_loss"]
    model.eval()
    rows = [torch.tensor([[row["input_ids"], row["labels"]]]) for row in held]
    losses = [model(row[:, 0], labels=row[:, 1]).loss.item() for row in rows]
    assert found == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_callbacks_see_clipped_gradients_before_each_step(tmp_path):
    seen = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, **options):
            grads = [parameter.grad.flatten() for parameter in model.parameters()]
            seen.append(float(torch.cat(grads).norm()))

    trainer = trainer_of(
        made(),
        tmp_path,
        rule=gs.OrthoGrad(objective="lower"),
        callbacks=[Look()],
        args={"gradient_accumulation_steps": 3, "max_grad_norm": 1e-3},
    )
    trainer.train()
    assert seen == pytest.approx([1e-3] * 6, rel=1e-3)


def test_samples_lose_what_the_model_does_not_take(tmp_path):
    def extra(data):
        return [{**sample, "question": "why?", "index": k} for k, sample in enumerate(data)]

    models = [llama(), llama()]
    for model, change in zip(models, (extra, list), strict=True):
        trainer_of(
            model,
            tmp_path,
            rule=gs.GRU(objective="lower"),
            forget_dataset=change(FORGET),
            retain_dataset=change(RETAIN),
            args={"max_steps": 2},
        ).train()
    assert_same(*models, rtol=0, atol=0)
    trainer = trainer_of(
        models[0],
        tmp_path,
        rule=gs.GRU(objective="lower"),
        forget_dataset=extra(FORGET),
        args={"remove_unused_columns": False},
    )
    with pytest.raises(gs.InputError, match="question of sample 0 must be a number or a sequence"):
        trainer.train()
