"""The network of an images job: one of ours or a function of the user's own, and its weights."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery
from gradsurgery.errors import InputError
from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs.networks import SmallCNN, SmallViT, resnet18
from gradsurgery.unlearn.objectives.classification import logits
from gradsurgery.unlearn.training.modes import evaluating

NETWORKS = {
    "cnn": SmallCNN,
    "cnn-narrow": partial(SmallCNN, width=16),
    "resnet18": resnet18,
    "resnet18-narrow": partial(resnet18, width=16),
    "vit": SmallViT,
}
PICKLES = (".pt", ".pth", ".bin")
ENTRIES = ("state_dict", "model")  # where a checkpoint of more than weights has them
# where lines of a traceback are not of the user's own code
NOT_THEIRS = ("<frozen", *(package.__path__[0] for package in (importlib, torch, gradsurgery)))
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def network(spec: str, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """A network for images [B, channels, *size] whose logits are [B, classes].

    Args:
        spec: a name in NETWORKS; or module:function of the user's own, imported with the current
            directory on the path. The function is given those of `channels`, `size` and `classes`
            that its signature has, by name.

    Raises:
        InputError: naming --model, and where code of the user's own failed.
    """
    if spec in NETWORKS:
        try:
            return NETWORKS[spec](channels, size, classes)
        except InputError as error:
            raise InputError(f"--model {spec}: {error}") from None
    name, colon, function = spec.partition(":")
    if not (name and colon and function):
        raise InputError(
            f"--model must be one of {', '.join(NETWORKS)}, or module:function of your own, got "
            f"{show(spec, 80)}"
        )
    given = {"channels": channels, "size": size, "classes": classes}
    option = f"--model {show(spec, 80)}"
    with _current_directory_first():
        with _failing(f"{option}: importing {show(name, 80)}"):
            module = importlib.import_module(name)
        make = getattr(module, function, None)
        if not callable(make):
            found = "no function" if make is None else "no function but a value"
            where = show(getattr(module, "__file__", None) or name)
            raise InputError(f"{option}: {where} has {found} named {show(function, 80)}")
        with _failing(f"{option}: {show(function, 80)}"):
            model = make(**_taken(make, given))
        if not isinstance(model, nn.Module):
            got = type(model).__name__
            raise InputError(f"{option}: {show(function, 80)} must return an nn.Module, got {got}")
        _try_out(model, given, option)
    return model


def _taken(function: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function takes by name."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return given
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {parameter.name for parameter in parameters if parameter.kind in by_name}
    return {name: value for name, value in given.items() if name in names}


def _try_out(model: nn.Module, given: dict[str, Any], option: str) -> None:
    """Raise `InputError` unless logits of two blank images are [2, classes]."""
    parameter = next((p for p in model.parameters() if p.requires_grad), None)
    if parameter is None:
        raise InputError(f"{option}: the model has no parameters to train")
    blank = torch.zeros(2, given["channels"], *given["size"], device=parameter.device)
    where = f"{option}: the model, given images {list(blank.shape)},"
    # in evaluation mode blank images leave no trace in running statistics
    with _failing(where), evaluating(model), torch.no_grad(), torch.random.fork_rng([]):
        found = logits(model, (blank, torch.zeros(2, dtype=torch.int64)))
    if found.shape[1] != given["classes"]:
        wanted = [2, given["classes"]]
        raise InputError(f"{where} must return logits {wanted}, got {list(found.shape)}")
    if not found.isfinite().all():
        raise InputError(f"{where} must return finite logits")


@contextmanager
def _current_directory_first() -> Iterator[None]:
    """Modules of the current directory can be imported inside, as by `python -m`."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        if "" in sys.path:  # code of the user's own may have changed it
            sys.path.remove("")


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Whatever is raised inside is an `InputError` that names `what`, the error and its place."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what} failed: {error}") from None
    except (Exception, SystemExit) as error:
        lines = traceback.extract_tb(error.__traceback__)
        theirs = [line for line in lines if not line.filename.startswith(NOT_THEIRS)][-1:]
        place = "".join(f" ({show(line.filename)}, line {line.lineno})" for line in theirs)
        raise InputError(f"{what} failed: {type(error).__name__}: {show(error)}{place}") from error


# -- weights


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Put the weights of a file into a model: all of them, or none where anything is wrong.

    A .safetensors file, or one of torch.save, .pt, .pth or .bin, of which nothing is run. The
    tensors by name may lie under "state_dict" or "model". Where every name begins as DataParallel's
    or a compiled model's do, that is taken off.

    Raises:
        InputError: naming --checkpoint, the file, and the first tensor that is missing, not of the
            model, of another shape or not finite.
    """
    where = f"--checkpoint: {show(path)}"
    found = _read(path, where)
    wanted = model.state_dict()
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in found) and not any(
            name.startswith(prefix) for name in wanted
        ):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    wrong = []
    if missing:
        wrong.append(f"it has no {show(missing[0], 80)}{_and_more(missing)}")
    if unexpected:
        wrong.append(f"the model has no {show(unexpected[0], 80)}{_and_more(unexpected)}")
    if wrong:
        raise InputError(f"{where} is not of this model: {', and '.join(wrong)}")
    copies = {}
    for name, old in wanted.items():
        new = found[name]
        if new.shape != old.shape:
            raise InputError(
                f"{where}: {show(name, 80)} must be {list(old.shape)}, got {list(new.shape)}"
            )
        if _kind(new) != _kind(old):
            raise InputError(
                f"{where}: {show(name, 80)} cannot be put into {_text(old)}, it is {_text(new)}"
            )
        copies[name] = new.to(old.dtype)
        if not copies[name].isfinite().all():
            raise InputError(f"{where}: {show(name, 80)} holds values that are not finite")
    model.load_state_dict(copies)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What must be the same of two tensors for one to be copied into the other without loss."""
    plain = tensor.layout, tensor.is_meta, tensor.is_quantized
    return *plain, tensor.is_floating_point(), tensor.is_complex()


def _text(tensor: Tensor) -> str:
    """dense float32, say"""
    layout = "dense" if tensor.layout == torch.strided else str(tensor.layout)
    return f"{layout} {tensor.dtype}".replace("torch.", "")


def _and_more(names: list[str]) -> str:
    return f" nor {len(names) - 1} more" if len(names) > 1 else ""


def _read(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *PICKLES):
        raise InputError(f"{where} must end in .safetensors, {', '.join(PICKLES)}")
    if not os.path.isfile(path):
        raise InputError(f"{where} is {'a folder' if os.path.isdir(path) else 'not there'}")
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles it was not made for, which it then refuses
            found = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        asked = f", {show(name[1], 80)} for one" if name else ""
        raise InputError(
            f"{where} holds more than tensors, numbers and text{asked}, and to read that would run "
            "code of the file: save model.state_dict() alone"
        ) from None
    except Exception as error:  # safetensors has an exception of its own, and torch.load several
        kind = "safetensors" if suffix == ".safetensors" else "torch.save"
        reason = show(" ".join(f"{type(error).__name__}: {error}".split()))
        raise InputError(f"{where} is not a whole file of {kind}: {reason}") from None
    for entry in ENTRIES:
        if isinstance(found, Mapping) and isinstance(found.get(entry), Mapping):
            found = found[entry]
    if not isinstance(found, Mapping) or not found:
        got = type(found).__name__ if found else "nothing"
        raise InputError(f"{where} must hold tensors by name, as model.state_dict(), got {got}")
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            got = type(value).__name__
            raise InputError(
                f"{where} must hold tensors by name, as model.state_dict(), got {got} under "
                f"{brief(name)}"
            )
    return dict(found)
