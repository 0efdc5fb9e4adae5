"""`gs.check`: what rows of a model are, and what a step takes of one rank or of many."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.batch import Loss
from gradsurgery.capture import Checked, FactoredJacobian, checked
from gradsurgery.capture.held import Hold
from gradsurgery.capture.planner import planned_for
from gradsurgery.capture.standing import of_model
from gradsurgery.ops._inputs import check as require
from gradsurgery.ops._inputs import check_count, one_of, wide
from gradsurgery.ranks.gramian import Exchange, work_of
from gradsurgery.ranks.group import Group
from gradsurgery.ranks.places import Place, place_of
from gradsurgery.ranks.shards import at_once
from gradsurgery.ranks.tape import opened_for


def check(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss,
    groups: Tensor | None = None,
    rtol: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    micro_batch: int | None = None,
    hold: Hold = "auto",
    ranks: int | None = None,
    process_group: Any = None,
    device: str = "cuda",
) -> Checked:
    """Whether this library's rows of your model are right, and what they will cost.

    The captured rows of two samples are compared with a loop of backward passes over the same two
    losses, and so is what their weighted sums leave in `.grad`: at once, and after gradients were
    changed in place and added to. All else is counted on runs of two and four samples. The model,
    its buffers, `.grad` and torch's random numbers are as they were afterwards. Hooks that run
    after accumulation are not called.

    A model on the meta device takes no memory, and has no values that could be compared: then only
    the costs are counted, as they would be on another `device`.

    Args:
        model: in the mode (train or eval) its losses are wanted in. One in
            `DistributedDataParallel` stands for the module inside. One in `fully_shard` or
            `replicate` is checked by all its ranks together, each with a batch of its own.
        batch: any pytree of tensors with leading dimension B; handed to `loss`, some samples of it.
            That of one rank.
        loss: (model, batch) -> per-sample losses [B], not reduced.
        groups: int64 [B], the row each loss is summed into, as for `Tape.jacobian`. A row that sums
            several samples is one of all ranks, as that of a forget batch.
        rtol: relative error up to which rows are exact: 1e-10 in float64, 1e-4 in float32, 3e-2 in
            bfloat16, 4e-3 in float16.
        optimizer: that of the steps planned, whose state counts; it takes no step.
        micro_batch: samples in one pass, as for `Surgeon`. Of a forget and a retain batch of so
            many each, it is a pass for either. None: all at once.
        hold: what is kept between passes, as for `Surgeon`.
        ranks: how many are to step together, each with replicas of the model and such a batch. What
            leaves a rank in a step is then counted. None: those of `process_group`.
        process_group: as for `gs.tape`. Each rank checks its own rows.
        device: the type of device that a model on the meta device is planned for.

    Raises:
        InputError: a reduced loss, or one without gradient, an empty or ragged batch, bad groups.
            Of a model on the meta device: a loss that looks at values, an operation that has to be
            asked with some, an optimizer whose state depends on them. Rows that are refused are no
            error here: see `Checked.refused`.
    """
    require(isinstance(model, nn.Module), f"model must be a Module, got {type(model).__name__}")
    if ranks is not None:
        check_count("ranks", ranks, " or None")
    if optimizer is not None:
        kind = type(optimizer).__name__
        require(
            isinstance(optimizer, torch.optim.Optimizer),
            f"optimizer must be an Optimizer or None, got {kind}",
        )
    one_of("device", device, ("cuda", "cpu"))
    module, group = opened_for(model, process_group)
    count = group.size if ranks is None else ranks
    kinds = {parameter.device.type for parameter in module.parameters()} - {"meta"}
    places = {name: place_of(parameter) for name, parameter in module.named_parameters()}
    with planned_for(kinds.pop() if kinds else device), at_once(module, group) as taken:
        report, whole = checked(
            module,
            batch,
            loss,
            groups=groups,
            rtol=rtol,
            optimizer=optimizer,
            micro_batch=micro_batch,
            hold=hold,
        )
        if whole is None or count == 1:
            return report
        sent, buffers = _sent(whole, groups, count, places)
    parts = {**report.needs_parts, "step": report.needs_parts["step"] + buffers}
    if taken:
        parts["model"] = of_model(module) + taken
    return replace(report, ranks=count, sent=sent, needs=sum(parts.values()), needs_parts=parts)


def _sent(
    whole: FactoredJacobian, groups: Tensor | None, ranks: int, places: Mapping[str, Place | None]
) -> tuple[dict[str, int], int]:
    """Bytes that leave a rank in a step, and those of the buffers they lie in.

    By the formulas that steps of many ranks choose and send by, as if all had such rows.

    Args:
        whole: a rank's rows.
        groups: that they are made by.
        ranks: how many there are.
        places: of parameters that they have shards of.
    """
    rows = torch.arange(whole.m, device="cpu") if groups is None else groups[groups >= 0].cpu()
    shared = rows.bincount(minlength=whole.m) > 1  # of all ranks, which have a part each
    m = int(shared.sum()) + ranks * int((~shared).sum())
    factors = torch.where(shared, 1 / ranks, 1.0).double()
    exchange = Exchange(whole, Group(), torch.arange(whole.m, device="cpu"), factors, m)
    entries = [exchange.entries(exchange.uses(False), False)] * ranks
    _, work = work_of(whole, entries, [whole.m] * ranks, False)
    sizes = [[each.size(0, other) for other in range(ranks)] for each in work]
    named = zip(whole.names, whole.parameters, whole.reached, strict=True)
    trained = {name: p for name, p, used in named if used}
    update = sum(
        p.numel() * wide(p.detach().new_empty(0)).dtype.itemsize * _passed(ranks, places.get(name))
        for name, p in trained.items()
    )
    passed = _passed(ranks, None)
    sent = {
        "Gramian": sum(sum(each[1:]) for each in sizes) + int(passed * (m * m + 2) * 8),
        "update": int(update),
        "plain": int(passed * sum(p.numel() * p.element_size() for p in trained.values())),
    }
    return sent, 4 * max(map(sum, sizes), default=0)


def _passed(ranks: int, place: Place | None) -> float:
    """How often what is summed over ranks leaves one; what is dealt out is not put together."""
    if place is None:
        return 2 * (ranks - 1) / ranks
    replicas = ranks / place.pieces
    return (place.pieces - 1 + 2 * (replicas - 1) / replicas) / place.pieces
