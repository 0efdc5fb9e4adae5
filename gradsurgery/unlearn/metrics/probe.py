"""A linear probe: can what was forgotten still be read off the features that a classifier sees?

Outputs can be changed in the last layer alone, with all before it as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.text import show
from gradsurgery.unlearn.objectives import classification
from gradsurgery.unlearn.objectives.base import Batch, take
from gradsurgery.unlearn.objectives.classification import integers
from gradsurgery.unlearn.training.data import whole
from gradsurgery.unlearn.training.modes import evaluating

AT_ONCE = 2048  # samples


@torch.no_grad()
def last_linear(model: nn.Module, samples: Batch) -> str | None:
    """The name of the `nn.Linear` that is called last and makes the logits of features [B, D].

    None where there is none: no linear layer is called, or the last one has other outputs than the
    model has classes or is given more than a row a sample.

    Args:
        model: a classifier in any mode, which stays.
        samples: some; the first of them is looked at.
    """
    calls: list[tuple[str, torch.Size]] = []
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}

    def note(name: str) -> Callable[[Tensor], None]:
        return lambda given: calls.append((name, given.shape))

    first = next(whole(take(samples, slice(0, 1)), 1, _device(model)))
    with evaluating(model), _told({layer: note(name) for name, layer in layers.items()}):
        classes = classification.logits(model, first).shape[1]
    if not calls:
        return None
    name, shape = calls[-1]
    return name if len(shape) == 2 and layers[name].out_features == classes else None


@torch.no_grad()
def features(
    model: nn.Module, samples: Batch, layer: str | None = None, at_once: int = AT_ONCE
) -> Tensor:
    """What a classifier's last layer is given, [N, D], float64 on the CPU.

    Args:
        model: in any mode, which stays; features are those of evaluation.
        samples: N of them, as the model takes them.
        layer: the name of a module of the model, whose first input is taken; None: `last_linear`.
        at_once: samples that go through the model together.

    Raises:
        InputError: a model without such a layer, or a layer that is not called once on [B, D].
    """
    kind = type(model).__name__
    name = last_linear(model, samples) if layer is None else layer
    if name is None:
        raise InputError(
            f"model: {kind} makes its logits by no linear layer of features [B, D]; name with "
            "layer= the module whose input is to be probed"
        )
    modules = dict(model.named_modules())
    if name not in modules:
        raise InputError(f"layer: {kind} has no module named {show(name, 80)}")
    seen: list[Tensor] = []
    with evaluating(model), _told({modules[name]: lambda given: seen.append(given.cpu().double())}):
        parts = whole(samples, at_once, _device(model))
        sizes = [len(classification.logits(model, part)) for part in parts]
    got = [list(each.shape) for each in seen]
    if [shape[0] for shape in got if len(shape) == 2] != sizes or len(got) != len(sizes):
        raise InputError(
            f"layer: {show(name, 80)} of {kind} must be given features [B, D] once a batch, got "
            f"{got[0] if got else 'none'}"
        )
    return torch.cat(seen)


def linear_probe(known: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A logistic regression that says the class of features [M, D], as labels [M].

    Features are scaled to a variance of 1 over `known`; every class counts alike, however many
    samples it has. The share of forget samples that it says rightly, beside the same of Retrain,
    is how well features still know them: Retrain's features tell samples apart that it never saw.

    Args:
        known: features of samples that may be known, as the retain set's, [N, D].
        labels: [N], of at least two classes; a class that is not among them is never said.

    Understanding intermediate layers using linear classifier probes, Alain and Bengio
    (arXiv:1610.01644). Retrain as the measure of it is inferred.
    """
    package("sklearn", "jobs", "a probe")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted_on = _checked(known, "known")
    wanted = integers(labels, len(fitted_on), of="row of known").cpu()
    if len(wanted.unique()) < 2:
        raise InputError(f"labels must be of two classes at least, got {wanted.unique().tolist()}")
    regression = LogisticRegression(class_weight="balanced", max_iter=1000)
    probe = make_pipeline(StandardScaler(), regression)
    with warnings.catch_warnings():  # one that is still on its way says what it says by then
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(fitted_on.numpy(), wanted.numpy())

    def says(asked: Tensor) -> Tensor:
        rows = _checked(asked, "asked")
        if rows.shape[1] != fitted_on.shape[1]:
            wanted = f"[M, {fitted_on.shape[1]}] like known"
            raise InputError(f"asked must be {wanted}, got {list(rows.shape)}")
        return torch.from_numpy(probe.predict(rows.numpy()))

    return says


def _checked(found: Tensor, name: str) -> Tensor:
    """`found` [N, D] in float64 on the CPU, N above 0 and every number finite."""
    if found.dim() != 2 or len(found) == 0:
        raise InputError(f"{name} must be features [N, D], N > 0, got {list(found.shape)}")
    rows = found.detach().cpu().double()
    bad = (~rows.isfinite()).any(dim=1).nonzero()
    if len(bad):
        raise InputError(f"{name} must be finite, and are not in row {int(bad[0])}")
    return rows


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def _told(heard: dict[nn.Module, Callable[[Tensor], object]]) -> Iterator[None]:
    """Every one of some modules gives its first input to a function before it runs."""

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            heard[module](given[0])

    handles = [module.register_forward_pre_hook(hook) for module in heard]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
