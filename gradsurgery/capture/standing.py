"""What is there between steps, and while an optimizer steps: the model, and the state of that."""

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import nn

from gradsurgery.capture.memory import Live
from gradsurgery.errors import InputError
from gradsurgery.spread import local

HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def of_model(model: nn.Module) -> int:
    """Bytes of its parameters and buffers, as this rank has them; what is tied counts once."""
    every = [local(tensor) for tensor in (*model.parameters(), *model.buffers())]
    return sum({t.untyped_storage()._cdata: t.numel() * t.element_size() for t in every}.values())


def of_optimizer(optimizer: torch.optim.Optimizer, device: str) -> tuple[int, int]:
    """Bytes of its state once it has stepped, and how many a step makes beside gradients.

    Found out by a step of a copy, on the meta device: nothing of the optimizer changes.

    Args:
        optimizer: as it is to step.
        device: the type of that which it steps on.

    Raises:
        InputError: one that looks at values as it steps.
    """
    made = copy.copy(optimizer)
    vars(made).pop("step", None)  # a scheduler's, which steps the one given
    vars(made).update({name: OrderedDict() for name in HOOKS})
    made.state, made.param_groups, fused = defaultdict(dict), [], False
    for group in optimizer.param_groups:
        like = [nn.Parameter(_meta(p), requires_grad=p.requires_grad) for p in group["params"]]
        for parameter in like:
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        options: dict[str, Any] = {**group, "params": like}
        if "foreach" in group:  # as torch chooses it; nothing is fused on meta
            several = device == "cuda" if group["foreach"] is None else group["foreach"]
            fused |= bool(group.get("fused"))
            options.update(dict.fromkeys({"fused"} & group.keys(), False), foreach=several)
        made.param_groups.append(options)
    with Live() as live:
        try:
            type(optimizer).step(made)
        except RuntimeError as error:
            raise InputError(
                f"optimizer: what {type(optimizer).__name__} keeps depends on values, and is not "
                "known before it steps: leave it out"
            ) from error
        return live.now, 0 if fused else live.peak - live.now


def _meta(parameter: nn.Parameter) -> torch.Tensor:
    return torch.empty_like(local(parameter), device="meta")
