"""A Trainer whose steps are updates of a rule: rows of forget and of retain samples."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from gradsurgery.capture.held import Hold
from gradsurgery.errors import InputError
from gradsurgery.integrations.transformers.losses import (
    NamedLoss,
    NamedRule,
    Reference,
    parts_of,
)
from gradsurgery.integrations.transformers.refused import check_base, check_served
from gradsurgery.integrations.transformers.steps import Steps
from gradsurgery.language.batches import (
    Pair,
    PairCollator,
    Pairs,
    PairSampler,
    Sample,
    check_ratio,
    collate,
)
from gradsurgery.ops._inputs import check, one_of

FILE = "surgery.pt"  # beside the optimizer's in a checkpoint
RETAIN = "retained"  # its name among those of evaluation, while a Trainer is made
LOADER = (
    *("drop_last", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor"),
    *("multiprocessing_context", "in_order"),
)


class SurgeryMixin:
    """Makes an unlearning Trainer of a subclass of `transformers.Trainer`, written before it.

        class Unlearner(SurgeryMixin, SFTTrainer): ...

    A step is one update of the rule, from the rows of all micro-batches that the Trainer
    accumulates: the same as that of one batch. It is left in `.grad`, and all that follows is the
    Trainer's own: clipping, callbacks, the optimizer, schedules, saving, evaluation. What the rule
    remembers and what is known of the original are saved with a checkpoint, and found there again.

    Started as several processes, with a replica of the model on each or with shards of it
    (`DistributedDataParallel` or FSDP2, as the Trainer makes it), the rows are those of all of
    them, and so is the update. Pairs are dealt out: up to a pair less than there are processes is
    left out of an epoch.

    `compute_loss` is asked in evaluation alone. Batches are made by the Trainer's own data
    collator, of samples that its own constructor may have prepared, as TRL's tokenizes them. With
    `remove_unused_columns`, samples lose what the model does not take, as always, but for
    `alternate`.

    Logged beside the Trainer's own metrics, as means over the steps since: `forget_loss`,
    `retain_loss`, `cosine_mean` (of the forget gradient with the retain rows), `conflict_rate` and,
    of OrthoGrad, `kept_norm` and `rank`. `loss` is retain_loss + forget_loss where that is to be
    lowered, retain_loss - forget_loss where it is to be raised.

    Args:
        rule: a name of `gs.RULES`, a mapping of a name and options, as
            {"name": "orthograd", "alpha": 0.3}, or a rule of the forget loss's direction, as
            `gradsurgery.language.rule_for` takes it.
        forget_loss: likewise a name of `gradsurgery.language.FORGET`, one with options or a loss.
        retain_loss: likewise, of `RETAIN`.
        forget_dataset: samples that are forgotten, by place: mappings of `input_ids`, `labels` and
            what else the model takes, and `alternate` where the loss wants one. Each is in an
            epoch once. A sample's `id` is its place.
        retain_dataset: samples that are retained, of which some are drawn for each forget sample.
        retain_per_forget: how many, a number above 0, such as 0.5. A micro-batch has
            `per_device_train_batch_size` forget samples, and at least one retain sample, which may
            be on another rank.
        mean: "sequence" weights samples alike; "token" weights them by their tokens, over the
            whole step, as public code does within a batch, in losses that are means over tokens
            (NLL, GradAscent, WGA, SatImp, CE-U, IdkNLL).
        reference: the original, for losses by name that need it. None: its log-probabilities of
            forget samples are computed once, before the first step, and saved; where a loss needs
            the model, an adapter of peft is switched off, and any other model is an error.
        ceiling: a forget sample whose loss is above this no longer pushes; inf is plain ascent. For
            losses that are raised.
        hold: how rows are kept between micro-batches, as in `gs.Surgeon`.
        *args: those of the Trainer.
        **kwargs: those of the Trainer, but `train_dataset`.

    Raises:
        InputError: what does not go together, or is not served: several GPUs in one process,
            DeepSpeed, FSDP1, tensor and context parallelism, reentrant checkpoints, LOMO and other
            optimizers that step within a backward pass, `compute_loss_func`, label smoothing,
            `model_init`, samplers of the Trainer's, packed samples, losses of routers, trainers of
            TRL but SFTTrainer, forget samples that preparing leaves out. The message names it.
    """

    def __init__(
        self,
        *args: Any,
        rule: NamedRule,
        forget_loss: NamedLoss = "npo",
        retain_loss: NamedLoss = "nll",
        forget_dataset: Any,
        retain_dataset: Any,
        retain_per_forget: float = 1,
        mean: Literal["sequence", "token"] = "sequence",
        reference: Reference = None,
        ceiling: float = math.inf,
        hold: Hold = "auto",
        **kwargs: Any,
    ) -> None:
        check_base(type(self))
        check_ratio(retain_per_forget)
        one_of("hold", hold, ("auto", "pairs", "rows"))
        check(
            kwargs.pop("train_dataset", None) is None,
            "train_dataset is made of forget_dataset and retain_dataset: leave it out",
        )
        Pairs(forget_dataset, retain_dataset)  # refuses what is none before a Trainer looks at it
        given = kwargs.pop("eval_dataset", None)
        sets = given if isinstance(given, dict) else {} if given is None else {"eval": given}
        check(RETAIN not in sets, f"eval_dataset: {RETAIN!r} is taken for the retain dataset")
        # a Trainer that prepares samples prepares those of training and of evaluation
        data = {"train_dataset": forget_dataset, "eval_dataset": {**sets, RETAIN: retain_dataset}}
        super().__init__(*args, **data, **kwargs)
        trainer: Any = self
        prepared = dict(trainer.eval_dataset)
        self.train_dataset = Pairs(trainer.train_dataset, prepared.pop(RETAIN))
        self.eval_dataset = prepared if isinstance(given, dict) else prepared.get("eval")
        check_served(trainer)
        count, left = len(forget_dataset), len(trainer.train_dataset)
        check(
            left >= count,
            f"of {count} forget samples {count - left} were left out as they were prepared, and "
            "would not be forgotten: no token of theirs counts, or none within max_length",
        )
        parts = parts_of(
            trainer.model, rule, forget_loss, retain_loss,
            mean=mean, reference=reference, ceiling=ceiling,
        )  # fmt: skip
        self._steps, self._parts_left = Steps(parts, hold), 0
        self._retain_per_forget = retain_per_forget

    # in what follows `super()` is the Trainer that this is put before, which no type can say

    # batches

    def get_train_dataloader(self) -> DataLoader:
        """Pairs in the order that `PairSampler` draws from the seed and the epoch; of several
        processes, each has its own."""
        trainer: Any = self
        args, pairs = trainer.args, trainer.train_dataset
        together = trainer._train_batch_size * args.world_size
        check(
            together * self._retain_per_forget >= 1,
            f"retain_per_forget={self._retain_per_forget} leaves batches of {together} forget "
            f"samples without a retain sample: at least {1 / together:.3g}",
        )
        sampler = PairSampler(
            len(pairs.forget),
            len(pairs.retain),
            retain_per_forget=self._retain_per_forget,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index,
            ranks=args.world_size,
        )
        options = {name: getattr(args, f"dataloader_{name}", None) for name in LOADER}
        known = {name: value for name, value in options.items() if value is not None}
        loader = DataLoader(
            pairs,
            batch_size=trainer._train_batch_size,
            sampler=sampler,
            collate_fn=self._collator(),
            **known,
        )
        if args.world_size == 1:
            return trainer.accelerator.prepare(loader)
        # as of one process: accelerate would deal out once more what the sampler has dealt out
        return prepare_data_loader(loader, args.device, 1, 0, put_on_device=True)

    def _collator(self) -> PairCollator:
        trainer: Any = self
        if not trainer.args.remove_unused_columns:
            return PairCollator(trainer.data_collator)
        trainer._set_signature_columns_if_needed()
        columns = {*trainer._signature_columns, "labels"}
        return PairCollator(partial(_collated, trainer.data_collator, columns))

    def set_initial_training_values(self, args: Any, dataloader: DataLoader, *more: Any) -> Any:
        """As in newer versions: the last step of an epoch counts, which may have fewer parts."""
        found = list(super().set_initial_training_values(args, dataloader, *more))  # type: ignore[misc]
        per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
        if found[1] != per_epoch:  # older ones round down, and end and resume too early
            found[1] = per_epoch
            if args.max_steps > 0:
                found[0] = math.ceil(args.max_steps / per_epoch)
            else:
                found[-1] = math.ceil(args.num_train_epochs * per_epoch)
        return tuple(found)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any
    ) -> Any:
        """The micro-batches of a step; rows of a step that was given up are dropped."""
        trainer: Any = self
        self._steps.discard()
        # older versions ask for too few at the end of an epoch; there are no more than there are
        most = max(num_batches, trainer.args.gradient_accumulation_steps)
        known = super().get_batch_samples  # type: ignore[misc]
        batches, items = known(epoch_iterator, most, *args, **kwargs)
        self._parts_left = len(batches)
        return batches, items

    # steps

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in any Trainer."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._steps.surgeon = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Add the rows of a micro-batch; the last one of a step leaves the update in `.grad`."""
        trainer: Any = self
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        inputs = trainer._prepare_inputs(inputs)
        if self._steps.surgeon is None:
            self._begin(model)
        self._steps.add(inputs["forget"], inputs.get("retain"))
        steps, loss = trainer.accelerator.sync_gradients, 0.0
        self._parts_left -= 1
        check(
            steps or self._parts_left > 0,
            "this version of transformers leaves out the last, shorter step of an epoch that is "
            "resumed in its middle: take gradient_accumulation_steps that divide the batches of "
            "an epoch, or transformers 5",
        )
        if steps:
            loss = self._steps.backward()
        return torch.tensor(loss, device=trainer.args.device)

    def _begin(self, model: nn.Module) -> None:
        trainer: Any = self
        begun, context = trainer.state.global_step > 0, trainer.compute_loss_context_manager
        self._steps.begin(model, trainer.optimizer, self._forget_batches, begun, context)

    def _forget_batches(self) -> Iterator[dict[str, Any]]:
        """All forget samples in order, as the model takes them."""
        trainer: Any = self
        pairs, collator = trainer.train_dataset, self._collator()
        size = trainer.args.eval_batch_size
        for first in range(0, len(pairs), size):
            places = range(first, min(first + size, len(pairs)))
            batch = collator.batch([pairs[Pair(place, ())]["forget"] for place in places])
            yield trainer._prepare_inputs(batch)

    # what else a Trainer asks of batches

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in any Trainer, of plain samples; what the model does not take is left out."""
        plain = {name: entry for name, entry in inputs.items() if name not in ("id", "alternate")}
        return super().prediction_step(model, plain, *args, **kwargs)  # type: ignore[misc]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in any Trainer, of both batches."""
        parts = [inputs[part] for part in ("forget", "retain") if part in inputs]
        known = super().floating_point_ops  # type: ignore[misc]
        return sum(map(known, parts)) if parts else known(inputs)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        for part in ("forget", "retain"):
            if part in inputs:
                super()._track_num_input_tokens(inputs[part])  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in any Trainer; what steps saw goes with the training loss."""
        if "loss" in logs:
            logs.update(self._steps.metrics())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if trainer.args.should_save:
            torch.save(self._steps.state_dict(), os.path.join(output_dir, FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer: Any = self
        args = trainer.args
        if args.device.type == "cpu":
            trainer.args = _WithoutIndex(args)
        try:
            # of the Trainer that this is mixed with, which a checker of types does not know
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        finally:
            trainer.args = args
        if checkpoint is None:
            self._steps.begin_anew()
            return
        path, state = os.path.join(checkpoint, FILE), None
        if os.path.isfile(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
        self._steps.load_state_dict(state, args.device)


class _WithoutIndex:
    """Arguments of a rank on a CPU, where torch.load knows no "cpu:0".

    transformers 4, and early 5, load an optimizer's state to that device.
    """

    device = torch.device("cpu")

    def __init__(self, args: TrainingArguments) -> None:
        self._args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)


class SurgeryTrainer(SurgeryMixin, Trainer):
    """A `transformers.Trainer` that unlearns, by any rule of surgery and any forget loss.

        trainer = SurgeryTrainer(
            model, args, rule=gs.GRU(objective="lower"), forget_loss="npo",
            forget_dataset=forget, retain_dataset=retain,
        )
        trainer.train()

    Batches are padded by `gradsurgery.language.batches.collate`, unless there is a `data_collator`.
    Arguments and errors are those of `SurgeryMixin`.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        rule: NamedRule,
        forget_loss: NamedLoss = "npo",
        retain_loss: NamedLoss = "nll",
        forget_dataset: Any,
        retain_dataset: Any,
        retain_per_forget: float = 1,
        mean: Literal["sequence", "token"] = "sequence",
        reference: Reference = None,
        ceiling: float = math.inf,
        hold: Hold = "auto",
        **trainer_kwargs: Any,
    ) -> None:
        if trainer_kwargs.get("data_collator") is None:
            pad = getattr(trainer_kwargs.get("processing_class"), "pad_token_id", None)
            trainer_kwargs["data_collator"] = partial(collate, pad=pad or 0)
        super().__init__(
            model=model,
            args=args,
            rule=rule,
            forget_loss=forget_loss,
            retain_loss=retain_loss,
            forget_dataset=forget_dataset,
            retain_dataset=retain_dataset,
            retain_per_forget=retain_per_forget,
            mean=mean,
            reference=reference,
            ceiling=ceiling,
            hold=hold,
            **trainer_kwargs,
        )


def _collated(
    collator: Callable[[Sequence[Sample]], Mapping[str, Any]],
    columns: Container[str],
    samples: Sequence[Sample],
) -> Mapping[str, Any]:
    """A batch of the entries that a model takes."""
    kept = [{name: sample[name] for name in sample if name in columns} for sample in samples]
    if not kept[0]:
        raise InputError(
            f"samples have {sorted(map(str, samples[0]))}, and the model takes none of them"
        )
    return collator(kept)
