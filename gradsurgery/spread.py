"""What several processes or devices hold together is refused, by name: no rows are summed there."""

from functools import lru_cache

import torch
from torch import nn

from gradsurgery.errors import InputError

# where the classes live that spread a module, a parameter or an optimizer over ranks or devices;
# torch.distributed also has wrappers that do not, as for activation checkpoints
MODULES = (
    "torch.nn.parallel.",
    "torch.distributed.fsdp.",
    "torch.distributed._composable.",
    "torch.distributed._shard.",
    "torch.distributed.tensor.",
    "deepspeed.runtime.",
    "fairscale.nn.",
)
OPTIMIZERS = ("torch.distributed.", "deepspeed.", "fairscale.", "horovod.")
# what these classes are called by those who use them
KNOWN = {"FSDPModule": "fully_shard (FSDP2)", "ReplicateModule": "replicate", "DDP": "replicate"}


def check_one_rank(model: nn.Module) -> None:
    """Raise where the model, a part of it or a parameter is spread over ranks or devices."""
    # in every step: names are looked for where there is something to name
    if any(_kind(kind, MODULES) for kind in {type(module) for module in model.modules()}):
        for name, module in model.named_modules():
            kind = _kind(type(module), MODULES)
            if kind is not None:
                raise _refused(f"model: {name} is" if name else "model is", kind)
    if any(_kind_of_parameter(parameter) for parameter in model.parameters()):
        for name, parameter in model.named_parameters():
            kind = _kind_of_parameter(parameter)
            if kind is not None:
                raise _refused(f"model: parameter {name} is", kind)


def check_one_rank_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise where the optimizer is one that several ranks step together."""
    kind = _kind(type(optimizer), OPTIMIZERS)
    if kind is not None:
        raise _refused("optimizer is", kind)


@lru_cache(maxsize=1024)  # a model has many modules and parameters, of few types
def _kind(kind: type, places: tuple[str, ...]) -> str | None:
    found = [base for base in kind.__mro__ if f"{base.__module__}.".startswith(places)]
    if not found:
        return None
    known = [KNOWN[base.__name__] for base in found if base.__name__ in KNOWN]
    return known[0] if known else found[0].__name__


def _kind_of_parameter(parameter: nn.Parameter) -> str | None:
    if getattr(parameter, "_is_flat_param", False):
        return "FullyShardedDataParallel"
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed's ZeRO"
    return _kind(type(parameter), MODULES)


def _refused(what: str, kind: str) -> InputError:
    return InputError(
        f"{what} spread over several processes or devices by {kind}, and rows are not summed over "
        "these: use a model that one process holds on its own"
    )
