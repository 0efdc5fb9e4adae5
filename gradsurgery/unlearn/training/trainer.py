"""The protocol every unlearning method follows: one step at a time, resumable bit for bit.

A method is a `Trainer` with `gradients`: it draws batches, fills `.grad` and says what it saw. The
optimizer's step, order of data, schedule, probes, stopping and checkpoints are the same for all.
"""

from __future__ import annotations

import copy
import time
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from gradsurgery.errors import InputError
from gradsurgery.ranks.shards import Shards, kind_of
from gradsurgery.ranks.wrappers import opened
from gradsurgery.spread import check_one_rank, served
from gradsurgery.unlearn.objectives.base import (
    Objective,
    PerSampleLoss,
    check_has,
    to_device,
)
from gradsurgery.unlearn.objectives.classification import (
    Classification,
    as_objective,
    cross_entropy,
)
from gradsurgery.unlearn.training import given, resume
from gradsurgery.unlearn.training.asking import C as C
from gradsurgery.unlearn.training.asking import differentiable as differentiable
from gradsurgery.unlearn.training.data import Data
from gradsurgery.unlearn.training.described import Asked, Described
from gradsurgery.unlearn.training.loop import Callback as Callback
from gradsurgery.unlearn.training.loop import Loop
from gradsurgery.unlearn.training.loop import Probe as Probe
from gradsurgery.unlearn.training.loop import Record as Record
from gradsurgery.unlearn.training.modes import grads_kept, values_undone_by_errors
from gradsurgery.unlearn.training.options import TrainerConfig as TrainerConfig
from gradsurgery.unlearn.training.options import finite as finite
from gradsurgery.unlearn.training.options import make_optimizer as make_optimizer
from gradsurgery.unlearn.training.options import rate_share as rate_share
from gradsurgery.unlearn.training.options import require as require
from gradsurgery.unlearn.training.seeds import derived
from gradsurgery.unlearn.training.sets import Sets
from gradsurgery.unlearn.training.shared import check_shared


class Trainer(Described, Loop[C], ABC):
    """One unlearning method on one model.

    Subclasses set `Config` and `draws` (the sets they draw batches from; the config has a
    `<set>_batch` for each) and write `gradients`. A loss given here is per sample and is one that
    training would lower; a method that climbs it does so itself.

    Model and loss may be given by position, all else by name: a set in the place of another would
    be unlearned. What is wrong with an argument is an `InputError` before anything has changed, and
    a step that raises leaves everything as it was before that step.

    Args:
        model: changed in place.
        loss: `loss(model, batch)` -> [B], not reduced, of a classifier; or an `Objective`, a task
            of another kind. With `classification.cross_entropy`, and in sets whose labels a method
            looks at itself, a classifier's labels must be integers [B]. SCRUB and BadTeacher work
            on outputs and warn of any other loss function, which they never call.
        forget: samples to forget, tensors with leading dimension N in tuples, mappings or
            dataclasses, or a DataLoader of such batches. May be None for methods that never look
            at them.
        retain: samples to keep, likewise. None of them may be in `forget` as well.
        config: the method's own `Config`.
        validation: held-out samples, likewise, for methods that need some.
        probe: measures the model during the run; must give `forget_accuracy` (and
            `validation_accuracy`) where `config.stop` needs them. None with such a stop: these are
            measured of the sets given, every `config.stop_every` steps.
        probe_every: steps between probes; the first and the last step are always probed.
        seed: order of the data, and the initial weights where a method draws them.
        optimizer: makes the optimizer of the parameters, in place of the config's; the config's
            schedule is of its rates.
        schedule: makes a torch scheduler of the optimizer, stepped once a step, in place of the
            config's.
        callbacks: called with the trainer and each record.
        overlap: "error" where a sample of `forget` is in `retain` or `validation` too, or "allow",
            for data that has duplicates.
        process_group: as of `Surgeon`, where torch.distributed runs several ranks: all ranks are
            given the same samples, options and weights, each takes its part of every batch, and a
            step is that of the whole. Records are the same on all, but for seconds. None for a
            model that `fully_shard` was called on, whose ranks are those of its mesh.
    """

    Config: ClassVar[type[TrainerConfig]] = TrainerConfig
    draws: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()  # sets it cannot do without and draws no batches from
    passes_over: ClassVar[tuple[str, ...]] = ()  # sets of which it uses no batch of one sample
    uses_optimizer: ClassVar[bool] = True
    sharded: ClassVar[bool] = True  # whether the model may be in fully_shard
    instead_of_loss: ClassVar[str] = ""  # what it computes where it never calls `loss`
    # attributes, modules or lists of tensors, that a resumed run must find again
    keeps: ClassVar[tuple[str, ...]] = ()

    @given.by_name("self", "model", "loss", others=("forget", "retain", "config"))
    def __init__(
        self,
        model: nn.Module,
        loss: PerSampleLoss | Objective,
        *,
        forget: Data,
        retain: Data,
        config: C,
        validation: Data = None,
        probe: Probe | None = None,
        probe_every: int = 10,
        seed: int = 0,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        callbacks: Sequence[Callback] = (),
        overlap: Literal["error", "allow"] = "error",
        process_group: Any = None,
    ) -> None:
        name = type(self).__name__
        given.check_model(model)
        sharded = process_group is not False and bool(kind_of(model)[0])
        with served(model) if sharded else nullcontext():
            check_one_rank(model)
        _, self.ranks = opened(model, process_group)
        self.process_group = process_group
        self.shards = Shards(model, self.ranks) if sharded else None
        if sharded and not self.sharded:
            raise InputError(
                f"model: it is in fully_shard, and {name} needs all of it at once: give each rank "
                "a replica, and process_group="
            )
        given.check_loss(loss)
        given.check_instance("config", config, self.Config)
        try:
            config.check(name)
        except InputError as error:  # named as on a command line
            raise InputError(str(error).removeprefix("--")) from None
        given.check_functions(probe=probe, optimizer=optimizer, schedule=schedule)
        given.check_callbacks(callbacks)
        seed = given.check_integer("seed", seed)
        probe_every = given.check_integer("probe_every", probe_every, least=1)
        given.check_choice("overlap", overlap, ("error", "allow"))
        self.trained = given.trained(model)
        self.parameters = list(self.trained.values())
        self.device = self.parameters[0].device
        self.model, self.config, self.seed = model, config, seed
        self.objective = as_objective(loss)
        check_has(self.objective, self.asked(), name)
        self.probe, self.probe_every = probe, probe_every
        self.callbacks = tuple(callbacks)
        self.data = {"forget": forget, "retain": retain, "validation": validation}
        labeled, own_loss = (), False
        if isinstance(self.objective, Classification):
            self.objective = copy.copy(self.objective)  # it counts the classes of this model
            own_loss = self.objective.loss is not cross_entropy
            labeled = self.labeled_sets() if own_loss else tuple(self.data)
        needed = (*self.draws, *self.needs)
        self.sets = Sets(self.data, labeled, needed, overlap, name, self.objective)
        self.samples, self.batches = self.sets.samples, self.sets.batches
        if config.stop != "never" and probe is None:
            self.probe, self.probe_every = self._stop_probe(), config.stop_every
        for kind in self.draws:
            self.sets.draw_from(kind, getattr(config, f"{kind}_batch"), derived(seed, kind))
        self._check_batch_norm()
        self.generator = torch.Generator().manual_seed(derived(seed, "draws"))
        self.step, self.stopped = 0, False
        # Retrain draws the weights anew before an optimizer can be wrong
        with values_undone_by_errors(model), grads_kept(model):
            start = time.perf_counter()
            self.prepare()
            self.seconds = time.perf_counter() - start
            make = optimizer or (lambda parameters: make_optimizer(parameters, config))
            self.optimizer = given.checked_optimizer(make(self.parameters), model)
            self.schedule = None if schedule is None else schedule(self.optimizer)
            if schedule is not None:
                given.check_schedule(self.schedule)
            about = f"{name}, {config}, seed {seed}"
            trained, made = self.trained, self.optimizer
            check_shared(self.ranks, about, self.data, model, trained, made)
        # those that a function for `optimizer` left out stay where they are
        self._left_out = self.trained.keys() - self.held().keys()
        self._peaks: list[float] = []
        self._note_peaks()
        if self.instead_of_loss and own_loss:
            given.warn_of_unused_loss(name, self.instead_of_loss)

    def _stop_probe(self) -> Probe:
        """Measures the accuracies that `config.stop` compares."""
        stop = self.config.stop
        check_has(self.objective, ("outputs",), f"stop = {stop}")
        kinds = ("forget",) if stop == "target" else ("forget", "validation")
        for kind in kinds:
            if self.data[kind] is None:
                raise InputError(f"{kind}: stop = {stop} needs this data, or a probe, got None")

        def measure(model: nn.Module) -> dict[str, float]:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):  # loaders draw from torch's
                return {f"{kind}_accuracy": self._share_right(kind, model) for kind in kinds}

        return measure

    def _share_right(self, kind: str, model: nn.Module) -> float:
        found = [self.outputs(batch, model) for batch in self.whole(kind)]
        right = torch.cat([each.logits.argmax(1) == each.labels for each in found])
        return right.double().mean().item()

    def _check_batch_norm(self) -> None:
        """Raise `InputError` where batch norm in training mode would meet what it cannot take."""
        norms = [
            f"{path or 'model'} ({type(module).__name__})"
            for path, module in self.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        if not norms or self.config.batch_norm == "eval":
            return
        part = "process_group" if self.ranks else "micro_batch"
        if self.config.micro_batch is not None or self.ranks:
            raise InputError(
                f"{part}: {norms[0]} would normalize over a part of the batch; set "
                "batch_norm = eval, or take whole batches"
            )
        used = [kind for kind in self.draws if kind not in self.passes_over]
        self.sets.check_lone(used, self.model, self.objective.losses, self.device)

    # -- what a method writes

    def prepare(self) -> None:
        """What is done once, before the optimizer is made; it counts as time of the method."""

    def asked(self) -> frozenset[Asked]:
        """What this run asks of the task: `asks`, unless an option asks more or less."""
        return self.asks

    def labeled_sets(self) -> tuple[str, ...]:
        """Sets whose class labels the method looks at itself, whatever the loss function."""
        return ()

    def extra_state(self) -> dict[str, Any]:
        """What later steps depend on besides model, optimizer, order of data and draws."""
        held = {name: getattr(self, name) for name in self.keeps}
        return {k: v.state_dict() if isinstance(v, nn.Module) else v for k, v in held.items()}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        """Raise `InputError` naming what in another's `extra_state()` does not fit."""
        resume.check_kept(self, state)

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from `extra_state()`."""
        for name, value in state.items():
            held = getattr(self, name)
            if isinstance(held, nn.Module):
                held.load_state_dict(value)
            else:
                setattr(self, name, to_device(value, self.device))

    # -- its state

    def _generators(self) -> dict[str, torch.Generator]:
        """Those that loaders of the sets draw their order from, where these have their own."""
        loaders = {kind: d for kind, d in self.data.items() if isinstance(d, DataLoader)}
        return {kind: d.generator for kind, d in loaders.items() if d.generator is not None}

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on: tensors and numbers, safe for `weights_only` loading.

        Of several ranks all must call it, and any one's serves all. Tensors are copies. A model
        that is no longer finite is a `TrainingError`: what was saved before stays the last good
        state.
        """
        self._check_model()
        return resume.state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a trainer made with the same arguments.

        Raises:
            InputError: naming what does not fit: another method, optimizer or schedule, other
                groups of parameters, sets or tensors, damage. Nothing has changed then.
        """
        self._note_peaks()
        resume.load(self, state)
