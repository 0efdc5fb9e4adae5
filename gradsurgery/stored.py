"""Rows of a model that are stored: a gradient per sample by torch.func, or one of the mean loss."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.func import functional_call, vjp, vmap

from gradsurgery.apart import Holder, Trial
from gradsurgery.batch import (
    DETACHED,
    Loss,
    batch_size,
    per_sample_losses,
    refilled,
    take,
    tensors,
)
from gradsurgery.capture.graph import roots
from gradsurgery.capture.leaves import without_autocast
from gradsurgery.capture.passing import refuse_passing, several
from gradsurgery.capture.snapshot import functions
from gradsurgery.errors import InputError
from gradsurgery.grads import own
from gradsurgery.ops._inputs import check


class Stored(NamedTuple):
    """Rows [m, *p.shape] by name, the losses [m] they are of, and which parameters these reach."""

    blocks: dict[str, Tensor]
    losses: Tensor
    reached: list[bool]


def check_served(model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
    """Raise, by name, for a module that couples samples and for a hook torch.func does not run."""
    for name, module in model.named_modules():
        kind = f"{name or 'model'} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or not module.track_running_stats
        ):
            raise InputError(
                f"{kind} normalizes over the batch, so samples have no gradients of their own; "
                "call model.eval() or use another norm"
            )
    hooked = [f"parameter {name}" for name, p in named.items() if p._backward_hooks]
    hooked += [
        f"module {name or 'model'}"
        for name, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    check(
        not hooked,
        f"{(hooked or [''])[0]} has a backward hook, which stored rows by torch.func do not run; "
        "remove it, or take captured rows",
    )


def check_alone(trial: Trial) -> None:
    """Raise where the loss of a sample is another when it is taken alone."""
    check(
        trial.coupled is None,
        "loss of a sample depends on the others of its batch, and stored rows take each alone: "
        f"{trial.coupled}; sum over tokens and divide by a constant, or take captured rows "
        "(rows='captured', gs.tape)",
    )


def mean_row(model: nn.Module, named: Mapping[str, nn.Parameter], batch: Any, loss: Loss) -> Stored:
    """One row, the gradient of the mean loss."""
    params = list(named.values())
    with torch.enable_grad():
        losses = per_sample_losses(loss(model, batch), batch_size(batch))
        refuse_passing(losses)
        with without_autocast(losses):
            grads = list(gradients(losses.mean(), params))
    reached = [g is not None for g in grads]
    check(any(reached), DETACHED)
    blocks = [
        torch.zeros_like(p)[None] if g is None else g[None]
        for p, g in zip(params, own(grads), strict=True)
    ]
    return Stored(dict(zip(named, blocks, strict=True)), losses.detach().mean()[None], reached)


def sample_rows(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    batch: Any,
    loss: Loss,
    chunk_size: int,
    moves: Sequence[str],
) -> Stored:
    """A row per sample, each taken alone, `chunk_size` at a time.

    Args:
        moves: buffers of the model that an ordinary forward pass is known to change. Where there
            are some, one of the whole batch is run, last, for what it changes.
    """
    if several():
        devices = {p.device.index or 0 for p in named.values() if p.is_cuda}
        with torch.random.fork_rng(sorted(devices)):
            refuse_passing(first_loss(model, batch, loss))
    holder, size = Holder(model, loss), batch_size(batch)
    # copies, made for each pass anew: what torch.func makes must not stay on the model, and every
    # sample sees buffers as they are before the batch
    buffers = {f"model.{name}": buffer for name, buffer in model.named_buffers()}
    moved = dict.fromkeys(moves)

    def row(values: dict[str, Tensor], sample: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        one = refilled(batch, [leaf.unsqueeze(0) for leaf in sample])

        def of_one(values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            copies = {name: buffer.clone() for name, buffer in buffers.items()}
            losses = functional_call(holder, (values, copies), (one,))
            return per_sample_losses(losses, 1)[0], copies

        found: Any = vjp(of_one, values, has_aux=True)
        value, back, copies = found
        for name, copy in copies.items():
            if is_batchedtensor(copy) or not torch.equal(copy, buffers[name]):
                moved[name] = None
        with without_autocast(value):  # autocast is for the loss
            return back(torch.ones_like(value))[0], value

    rows = vmap(row, in_dims=(None, 0), randomness="different")
    leaves = tensors(batch)
    values = {f"model.{name}": parameter.detach() for name, parameter in named.items()}
    blocks = {name: p.new_empty(size, *p.shape) for name, p in named.items()}
    losses = []
    for start in range(0, size, chunk_size):
        part = slice(start, start + chunk_size)
        try:
            grads, value = rows(values, [leaf[part] for leaf in leaves])
        except (RuntimeError, NotImplementedError) as error:
            why = _unserved(model, batch, loss, list(moves), error)
            if why is None:
                raise
            raise InputError(why) from error
        losses.append(value)
        for name, block in blocks.items():
            block[part] = grads[f"model.{name}"]
    reached = [bool(block.any()) for block in blocks.values()]
    if not all(reached):
        # vmap gives zeros for a loss that was detached, or is of another model; autograd tells it
        # from flat ones
        found = gradients(first_loss(model, batch, loss), list(named.values()))
        reached = [known or grad is not None for known, grad in zip(reached, found, strict=True)]
        check(any(reached), DETACHED)
    if moved:
        with torch.enable_grad():
            loss(model, batch)
    return Stored(blocks, torch.cat(losses), reached)


def gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """Of a scalar, whose graph is freed; None for parameters that it does not depend on."""
    # the loss may have frozen some
    wanted = [each for each in parameters if each.requires_grad]
    if not wanted or not loss.requires_grad:
        return [None] * len(parameters)
    found = dict(zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True))
    return [found.get(each) for each in parameters]


def first_loss(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    """The loss of the first sample, with its graph, a scalar; buffers stay as they are."""
    buffers = {f"model.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    first = take(batch, slice(1))
    with torch.enable_grad():
        losses = functional_call(Holder(model, loss), ({}, buffers), (first,))
    return per_sample_losses(losses, 1)[0]


def _unserved(
    model: nn.Module, batch: Any, loss: Loss, moves: Sequence[str], error: Exception
) -> str | None:
    """What torch.func does not serve; None where the loss raises without it as well."""
    if isinstance(error, torch.OutOfMemoryError):
        return None
    try:
        first = first_loss(model, batch, loss)
    except Exception:
        return None
    text = str(error)
    what = f"torch.func does not run this loss: {text.splitlines()[0].split('. ')[0][:160]}"
    if "setup_context" in text:
        names = {node.name().removesuffix("Backward") for node in functions([roots(first)[0]])}
        named = f" {', '.join(sorted(names))}" if names else ""
        what = f"torch.autograd.Function{named} has no setup_context, which torch.func needs"
    elif any(word in text for word in ("requires_grad_()", "does not require grad", "backward()")):
        what = "the loss calls requires_grad_() or takes a gradient, which torch.func refuses"
    elif ".item()" in text:
        what = "values of samples decide what is computed (.item(), if), which torch.func refuses"
    elif moves:
        what = f"a forward pass changes buffers by values of samples: {', '.join(moves)}"
    return f"stored rows: {what}; take captured rows (rows='captured', gs.tape)"
