"""A run that is resumed from a checkpoint is the run that was not stopped."""

import copy

import pytest
import torch

import gradsurgery as gs
from gradsurgery.language import LogProbs

transformers = pytest.importorskip("transformers")

from tests.integrations.trainers import (  # noqa: E402
    all_forget,
    assert_same,
    fresh,  # noqa: F401 - a fixture, asked for by its name
    llama,
    samples,
    trainer_of,
)

pytestmark = pytest.mark.usefixtures("fresh")


def run(folder, rule, *, checkpoint=None, args=None, model=None, **options):
    """Three epochs of four steps, with dropout, momentum and a schedule; each step is saved."""
    trainer = trainer_of(
        llama(attention_dropout=0.2) if model is None else model,
        folder,
        rule=copy.deepcopy(rule),
        retain_per_forget=2,
        args={
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 3,
            "save_strategy": "steps",
            "save_steps": 1,
            "lr_scheduler_type": "cosine",
            **(args or {}),
        },
        **options,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


# npo looks up the original, GRU remembers an average, PCGrad and GradDrop draw random numbers
CASES = {
    "gru": (gs.GRU(momentum=0.9, objective="lower"), {}),
    "orthograd": (gs.OrthoGrad(objective="lower"), {"mean": "token"}),
    "pcgrad": ("pcgrad", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_same_bit_for_bit(name, tmp_path):
    rule, options = CASES[name]
    options = {"forget_dataset": samples(8, 1), **options}
    whole = run(tmp_path / "whole", rule, **options)
    assert whole.state.global_step == 12
    for step in (3, 4, 7):  # in the middle of an epoch and at its end
        torch.manual_seed(step)
        again = run(
            tmp_path / "again",
            rule,
            checkpoint=str(tmp_path / f"whole/checkpoint-{step}"),
            **options,
        )
        assert_same(again.model, whole.model, rtol=0, atol=0)
        logs = [
            [{k: v for k, v in entry.items() if "runtime" not in k} for entry in log[step:12]]
            for log in (whole.state.log_history, again.state.log_history)
        ]
        assert logs[0] == logs[1]
        for key, value in whole._steps.parts.rule.state_dict().items():
            assert torch.equal(again._steps.parts.rule.state_dict()[key], value)


def test_a_shorter_last_step_of_a_resumed_epoch_is_taken_or_the_run_refused(tmp_path):
    rule, options = CASES["gru"]
    whole = run(tmp_path / "whole", rule, **options)
    assert whole.state.global_step == 12
    for step in (8, 6):
        resumes = {"checkpoint": str(tmp_path / f"whole/checkpoint-{step}"), **options}
        if step == 6 and transformers.__version__ < "5":
            with pytest.raises(gs.InputError, match="leaves out the last, shorter step"):
                run(tmp_path / "again", rule, **resumes)
        else:
            again = run(tmp_path / "again", rule, **resumes)
            assert_same(again.model, whole.model, rtol=0, atol=0)


def test_what_is_known_of_the_original_is_not_of_the_resumed_weights(tmp_path):
    first = run(tmp_path, CASES["orthograd"][0])
    original = LogProbs.of(llama(), [all_forget()]).log_probs(first.model, all_forget())
    resumed = run(tmp_path, CASES["orthograd"][0], checkpoint=True, args={"num_train_epochs": 4})
    found = resumed._steps.parts.log_probs.log_probs(resumed.model, all_forget())
    torch.testing.assert_close(found, original, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (CASES["gru"][0], "the checkpoint does not have what GRU remembers"),
        (CASES["orthograd"][0], "the original's log-probabilities are not in the checkpoint"),
    ],
)
def test_a_checkpoint_of_the_model_only_is_not_gone_on_from(rule, match, tmp_path):
    run(tmp_path, rule, args={"save_only_model": True, "max_steps": 2})
    with pytest.raises(gs.InputError, match=match):
        run(tmp_path, rule, checkpoint=True)


def test_other_forget_samples_than_the_checkpoint_knows_are_named(tmp_path):
    rule = CASES["orthograd"][0]
    run(tmp_path, rule, args={"max_steps": 2})
    with pytest.raises(gs.InputError, match=r"sample \d \(id \d\) had another text"):
        run(tmp_path, rule, checkpoint=True, forget_dataset=samples(7, 8))


@pytest.mark.parametrize("stopped", [1, 4])
def test_a_run_that_stops_in_the_middle_of_a_step_leaves_no_rows_for_the_next(stopped, tmp_path):
    class Stop(transformers.TrainerCallback):
        parts = 0

        def on_substep_end(self, args, state, control, **options):
            self.parts += 1
            if self.parts == stopped:
                raise KeyboardInterrupt

    model, rule = llama(), CASES["orthograd"][0]
    trainer = trainer_of(
        model,
        tmp_path,
        rule=rule,
        callbacks=[Stop()],
        args={"gradient_accumulation_steps": 4, "optim": "sgd", "lr_scheduler_type": "constant"},
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    other = copy.deepcopy(model)
    trainer.train()
    again = trainer_of(
        other,
        tmp_path,
        rule=rule,
        reference=trainer._steps.parts.log_probs,
        args={"gradient_accumulation_steps": 4, "optim": "sgd", "lr_scheduler_type": "constant"},
    )
    again.train()
    assert_same(model, other, rtol=0, atol=0)
