"""Each method as one function of a network and its loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.methods import ALL, METHODS, REFERENCE
from gradsurgery.unlearn.objectives.base import Objective, PerSampleLoss
from gradsurgery.unlearn.objectives.classification import cross_entropy
from gradsurgery.unlearn.training import given
from gradsurgery.unlearn.training.config import update
from gradsurgery.unlearn.training.data import Data, batches
from gradsurgery.unlearn.training.modes import modes_kept, values_undone_by_errors
from gradsurgery.unlearn.training.trainer import Callback, Probe


@given.by_name("net", others=("retain_loader", "forget_loader", "val_loader"))
def unlearning(
    net: nn.Module,
    *,
    retain_loader: Data,
    forget_loader: Data,
    val_loader: Data = None,
    method: str = "orthograd",
    loss: PerSampleLoss | Objective = cross_entropy,
    epochs: int | None = None,
    seed: int = 0,
    probe: Probe | None = None,
    callbacks: Sequence[Callback] = (),
    overlap: Literal["error", "allow"] = "error",
    process_group: Any = None,
    **options: Any,
) -> nn.Module:
    """Unlearn the forget loader's samples, as scripts of vision papers call it.

    All but `net` is given by name, so that no set takes the place of another.

    Args:
        net: changed in place. Every module's mode (train or eval) and every `.grad` is afterwards
            as it was; random layers and loaders draw from torch's generators, as in training.
        retain_loader: what is to be kept: a DataLoader of batches, (inputs, labels) or a mapping or
            dataclass with "image" and "label", or all samples as one such batch. Loaders set the
            batch sizes, in place of the options.
        forget_loader: what is to be forgotten, likewise.
        val_loader: held-out samples, for methods that need some (LTU), with the transforms of the
            forget loader; what is later measured on them has been seen.
        method: a name of `METHODS`, or "retrain".
        loss: (net, batch) -> per-sample losses [B], or an `Objective`, a task that is no
            classification. By default cross-entropy, whose labels are integers [B] of any integer
            dtype, in every set given. "scrub" and "bad_teacher" never call a loss function, and
            warn of one that is not cross-entropy.
        epochs: in place of the option `steps`: a method's own epochs where it has some (SCRUB), or
            passes over the retain loader, or over the forget loader where only that is drawn from.
            In memory one is as many whole batches as there are. Without either, the option's
            default is taken, whatever the size of the data.
        seed: order of samples in memory, and a method's own draws.
        probe: as in `Trainer`.
        callbacks: as in `Trainer`.
        overlap: as in `Trainer`.
        process_group: as in `Trainer`.
        **options: of the method's config, by their names there.

    Returns:
        net.

    Whatever is raised, in whatever step and by whose code, leaves net as it was given: for that a
    copy of the parameters that train is held in the CPU's memory. A `Trainer` holds none, and
    leaves net as it was before the step that failed.

    Raises:
        InputError: an unknown method or option, sets that overlap, labels out of range, a task
            that lacks what the method asks, ...
        PositionError: an InputError and a TypeError, where a set was given by position.
        TrainingError: what was not finite, and when.
    """
    given.check_model(net)
    given.check_choice("method", method, (*METHODS, REFERENCE))
    kind = ALL[method]
    fields = [f.name for f in dataclasses.fields(kind.Config)]
    for name in options:
        if name not in fields:
            raise InputError(f"{method} has no option {name}; there are {', '.join(fields)}")
        given.check_plain(name, options[name])
    if epochs is not None and "steps" in options:
        raise InputError("give epochs or steps, not both")
    if epochs is not None:
        epochs = given.check_integer("epochs", epochs, least=0)
    config: Any = update(kind.Config(), options)
    if epochs is not None:
        if "epochs" in fields:
            config.epochs = epochs
        else:
            drawn = "retain" if "retain" in kind.draws else "forget"
            data = retain_loader if drawn == "retain" else forget_loader
            if data is None:
                raise InputError(f"{drawn}: {method} needs this data, got None")
            size = getattr(config, f"{drawn}_batch", 1)
            config.steps = epochs * batches(data, size, seed, drawn).per_epoch
    forget = None if method == REFERENCE else forget_loader
    with modes_kept(net), values_undone_by_errors(net):
        return kind(
            net,
            loss,
            forget=forget,
            retain=retain_loader,
            config=config,
            validation=val_loader,
            seed=seed,
            probe=probe,
            callbacks=callbacks,
            overlap=overlap,
            process_group=process_group,
        ).run()
