"""Steps in the loops of accelerate and of transformers' Trainer: as in one's own, or refused."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.models import batch, classification, mlp

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def fresh():
    """No accumulation goes on in the next test: accelerate's state is one for all."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def twins():
    model = mlp()
    return [model, copy.deepcopy(model)]


def assert_same_parameters(models):
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# accelerate


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_metric_is_that_of_the_optimizer_in_accelerates_wrapper(kind):
    models = twins()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(models[0], kind(models[0].parameters(), lr=0.01))
    rules = [gs.OrthoGrad(precondition="optimizer") for _ in models]
    surgeons = [
        gs.Surgeon(model, optimizer, rules[0]),
        gs.Surgeon(models[1], kind(models[1].parameters(), lr=0.01), rules[1]),
    ]
    data, infos = {}, []
    for _ in range(4):
        data = {"forget": batch(3), "retain": batch(4)}
        infos = [surgeon.step(**data, loss=classification) for surgeon in surgeons]
    # of inner products in Adam's metric, which is there from the second step on
    assert_same_parameters(models)
    torch.testing.assert_close(infos[0].gramian, infos[1].gramian)
    jacobian = gs.DenseJacobian.from_model(model, data["retain"], classification)
    assert infos[0].gramian.diagonal()[1:].lt(0.9 * jacobian.row_norms() ** 2).any()


def test_the_metric_of_another_optimizer_in_the_wrapper_is_refused():
    model = mlp()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(gs.InputError, match=r"precondition='optimizer' needs Adam .*, got SGD"):
        gs.Surgeon(model, optimizer, gs.OrthoGrad(precondition="optimizer"))


def test_a_step_in_each_part_of_an_accumulation_is_refused():
    models = twins()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer = accelerator.prepare(
        models[0], torch.optim.AdamW(models[0].parameters(), lr=0.1)
    )
    surgeon = gs.Surgeon(model, optimizer, gs.PCGrad())
    for k in range(4):
        with accelerator.accumulate(model):
            if k < 3:
                with pytest.raises(
                    gs.InputError, match=r"leaves this step out.* call add for each"
                ):
                    surgeon.step(batch=batch(2), loss=classification)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_parameters(models)


def test_parts_of_an_accumulation_are_added_and_stepped_along_by_the_last():
    models, data = twins(), [batch(2) for _ in range(4)]
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    kind = torch.optim.AdamW
    model, optimizer = accelerator.prepare(models[0], kind(models[0].parameters(), lr=0.1))
    surgeon = gs.Surgeon(model, optimizer, gs.PCGrad())
    for part in data:
        with accelerator.accumulate(model):
            if accelerator.sync_gradients:
                surgeon.step(batch=part, loss=classification)
            else:
                surgeon.add(batch=part, loss=classification)
            optimizer.step()  # there is no gradient: it moves nothing
            optimizer.zero_grad()
    other = gs.Surgeon(models[1], kind(models[1].parameters(), lr=0.1), gs.PCGrad())
    other.step(batch=data, loss=classification)
    assert_same_parameters(models)


def test_schedulers_hear_of_steps_that_the_scaler_leaves_out():
    model = mlp().float()
    accelerate.Accelerator(cpu=True)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), scaler=torch.amp.GradScaler("cpu")
    )
    schedule = accelerate.scheduler.AcceleratedScheduler(
        torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1, gamma=0.5), optimizer
    )
    surgeon = gs.Surgeon(model, optimizer, gs.PCGrad())
    x, y = batch(3)

    def explodes(net, given):
        return net(given[0]).sum(1) * 1e36

    for loss, rate in ((classification, 0.5), (explodes, 0.5), (classification, 0.25)):
        info = surgeon.step(batch=(x.float(), y), loss=loss)
        assert info.skipped == optimizer.step_was_skipped == (loss is explodes)
        schedule.step()
        assert schedule.get_last_lr() == [rate]


# transformers


class Classifier(nn.Module):
    """As the Trainer calls it."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.body(x), labels, reduction="none")


def each(model, data):
    return model(data["x"], data["labels"])


def samples(size):
    x, y = batch(size)
    return [{"x": row, "labels": label} for row, label in zip(x, y, strict=True)]


def collated(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trainer_of(kind, model, data, folder, **options):
    args = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return kind(model, args, train_dataset=data, data_collator=collated)


class Adding(transformers.Trainer):
    """The loop of the documentation."""

    surgeon = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        if self.surgeon is None:
            self.surgeon = gs.Surgeon(model, self.optimizer, gs.UPGrad())
        self.surgeon.add(batch=inputs, loss=each)
        if self.accelerator.sync_gradients:
            return self.surgeon.backward().losses.mean()
        return torch.zeros(())


class Stepping(Adding):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.surgeon = gs.Surgeon(model, self.optimizer, gs.PCGrad())
        return self.surgeon.step(batch=inputs, loss=each).losses.mean()


class SteppingInLoss(Adding):
    training_step = transformers.Trainer.training_step

    def compute_loss(self, model, inputs, *_, **options):
        self.surgeon = gs.Surgeon(model, self.optimizer, gs.PCGrad())
        return self.surgeon.step(batch=inputs, loss=each).losses.mean()


@pytest.mark.parametrize("parts", [1, 3])
def test_a_trainers_loop_clips_and_steps_along_the_rows_of_all_parts(parts, tmp_path):
    models, data = [Classifier()], samples(2 * parts)
    models.append(copy.deepcopy(models[0]))
    trainer = trainer_of(
        Adding, models[0], data, tmp_path, gradient_accumulation_steps=parts, max_grad_norm=0.01
    )
    trainer.train()
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.1)
    surgeon = gs.Surgeon(models[1], optimizer, gs.UPGrad())
    surgeon.backward(batch=collated(data), loss=each)
    assert nn.utils.clip_grad_norm_(models[1].parameters(), 0.01) > 0.01
    optimizer.step()
    assert_same_parameters(models)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", [Stepping, SteppingInLoss])
def test_a_step_within_a_trainers_step_is_refused(kind, parts, tmp_path):
    models, data = [Classifier()], samples(2 * parts)
    models.append(copy.deepcopy(models[0]))
    trainer = trainer_of(kind, models[0], data, tmp_path, gradient_accumulation_steps=parts)
    with pytest.raises(gs.InputError, match="step: a Trainer clips gradients and steps itself"):
        trainer.train()
    assert_same_parameters(models)


def test_a_step_beside_a_trainers_steps_is_taken(tmp_path):
    model, data, infos = Classifier(), samples(4), []

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *_, model, optimizer, **options):
            surgeon = gs.Surgeon(model, optimizer, gs.PCGrad())
            infos.append(surgeon.step(batch=collated(data), loss=each))

    trainer = trainer_of(Adding, model, data, tmp_path)
    trainer.add_callback(Callback())
    trainer.train()
    assert len(infos) == 2
