"""Parameters that `fully_shard` or `replicate` spread over ranks, whole where passes use them."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from gradsurgery.batch import trainable
from gradsurgery.capture import FactoredJacobian
from gradsurgery.capture.leaves import without_autocast
from gradsurgery.capture.uses import Use
from gradsurgery.errors import InputError
from gradsurgery.jacobian import DenseJacobian
from gradsurgery.ops._inputs import check
from gradsurgery.ranks.blocks import GROUPS, Blocks
from gradsurgery.ranks.group import Group
from gradsurgery.spread import check_whole, is_served, served

KEPT = "_gradsurgery_blocks"  # in the state of a module that `fully_shard` was called on


def kind_of(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Modules that `fully_shard` made, and those of the `replicate` that is a DDP; mostly none."""
    # whoever wrapped a model has imported these; nobody else should wait for that
    fsdp = sys.modules.get("torch.distributed.fsdp")
    ddp = sys.modules.get("torch.distributed._composable.replicate")
    modules = list(model.modules()) if fsdp or ddp else []
    return (
        [m for m in modules if fsdp is not None and isinstance(m, fsdp.FSDPModule)],
        [m for m in modules if ddp is not None and isinstance(m, ddp.DDP)],
    )


def group_of(model: nn.Module) -> Any:
    """The process group that holds the parameters together; None where none does.

    Raises:
        InputError: parameters on several meshes, or placed in another way than over one dimension.
    """
    sharded, replicas = kind_of(model)
    if not sharded:
        return None if not replicas else _group_of_replicas(replicas)
    check(not replicas, "model: parts of it are in replicate, others in fully_shard; use one")
    known: dict[str, Any] = {}
    for module in sharded:
        module.reshard()
    for name, parameter in model.named_parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            continue
        placements = cast(Any, parameter).placements
        kinds = [type(placement).__name__ for placement in placements]
        check(
            set(kinds) <= {"Replicate", "Shard"} and kinds.count("Shard") <= 1 and len(kinds) <= 2,
            f"model: parameter {name} is placed as {placements}; served are one dimension of "
            "shards, and one of replicas",
        )
        known.setdefault(name, mesh)
    check(len(known) > 0, "model: fully_shard has no parameter of it; leave it out")
    (first, mesh), *others = known.items()
    for name, other in others:
        check(
            torch.equal(other.mesh, mesh.mesh),
            f"model: parameters {first} and {name} are on different meshes, {mesh} and {other}",
        )
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return mesh._flatten().get_group()


def _group_of_replicas(replicas: list[Any]) -> Any:
    check(len(replicas) == 1, "model: several parts of it are in replicate; wrap the whole")
    return _begun(replicas[0]).process_group


def _begun(module: Any) -> nn.parallel.DistributedDataParallel:
    """The DDP behind `replicate`, which is made by the first forward pass, or here."""
    state = sys.modules["torch.distributed._composable.replicate"].replicate.state(module)
    if state._init_args or state._init_kwargs:
        state.lazy_init()
    return state._ddp


def rest(model: nn.Module) -> None:
    """The model's parameters are the shards, though a forward pass left them whole."""
    for module in kind_of(model)[0]:
        module.reshard()


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Inside, ranks may make other passes of a sharded model than others; any other is as it is.

    To be entered by all ranks.
    """
    if not any(kind_of(model)) or is_served(model):
        yield
        return
    with Shards(model, Group(group_of(model), alone=True)).gathered({}):
        yield


class Shards:
    """What a step does with a model that `fully_shard` or `replicate` holds on several ranks.

    Nothing of these wrappers takes part in its passes but their casts: `Blocks` gathers parameters
    where they are used. So ranks may make different passes, or none. Rows that outlive them have
    stand-ins.

    Args:
        model: with modules in `fully_shard` or `replicate`.
        ranks: all that hold it.
    """

    def __init__(self, model: nn.Module, ranks: Group) -> None:
        self.model, self.ranks = model, ranks
        self._blocks: Blocks | None = None
        self._stand_ins: dict[str, nn.Parameter] = {}

    @property
    def taken(self) -> int:
        """Bytes of the parts that passes have whole at once, at most."""
        return 0 if self._blocks is None else self._blocks.taken

    def rest(self) -> None:
        """The model's parameters are the shards, though a forward pass left them whole."""
        rest(self.model)

    @contextmanager
    def gathered(
        self, named: Mapping[str, nn.Parameter], whole: bool = False, again: bool = False
    ) -> Iterator[dict[str, nn.Parameter]]:
        """Inside, the model computes with whole parameters; to be entered by all ranks.

        Args:
            named: those that have rows, as the optimizer holds them.
            whole: whether all are gathered at once, and stay.
            again: whether a graph made inside is used when this is entered another time.

        Yields:
            The same, whole, in the dtype that forward passes have them in. Only while a pass uses
            them do they have values.
        """
        sharded, replicas = kind_of(self.model)
        with ExitStack() as stack:
            stack.enter_context(served(self.model))
            self._blocks = self._looked_up(sharded)
            for module in sharded:
                stack.enter_context(without_hooks(module))
            for module in replicas:
                stack.enter_context(_without_reducer(_begun(module)))
            stack.enter_context(self._blocks.used(whole, again))
            own = dict(self.model.named_parameters())
            check_whole(own)
            found = {name: own[name] for name in named}
            for name, parameter in found.items():
                self._stand_in(name, parameter)
            yield found

    def _looked_up(self, sharded: list[Any]) -> Blocks:
        """The blocks, as they were for whoever had them last, where parameters are the same."""
        if not sharded:
            return Blocks(self.model, sharded, self.ranks)
        kept = vars(sharded[0]._get_fsdp_state())  # as long as there is what they are of
        known = kept.get(KEPT)
        if known is None or known.model is not self.model or not known.are_of(self.model):
            known = kept[KEPT] = Blocks(self.model, sharded, self.ranks)
        return known

    def _stand_in(self, name: str, parameter: nn.Parameter) -> None:
        known = self._stand_ins.get(name)
        like = parameter.shape, parameter.dtype, parameter.device
        if known is None or (known.shape, known.dtype, known.device) != like:
            value = parameter.new_full((), float("nan")).expand(parameter.shape)
            self._stand_ins[name] = nn.Parameter(value)

    def stand_ins(self, named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """For whole parameters: their shapes, dtypes and devices, and no values."""
        return {name: self._stand_ins[name] for name in named}

    def kept(self, jacobian: FactoredJacobian | DenseJacobian) -> FactoredJacobian | DenseJacobian:
        """The same rows, without need of the gathered parameters."""
        parameters = jacobian.parameters or []
        pairs = zip(jacobian.names, parameters, strict=False)
        known = [self._stand_ins.get(name, parameter) for name, parameter in pairs]
        if isinstance(jacobian, DenseJacobian):
            jacobian.parameters = known
            return jacobian
        blocks = cast(Blocks, self._blocks)
        with torch.no_grad(), without_autocast(parameters[0]):
            # ways back from what was computed of parameters: these would be gone
            through = jacobian._through_derived()
            uses = [
                [*(_alone(use, blocks) for use in mine), *through.get(k, ())]
                for k, mine in enumerate(jacobian._uses)
            ]
        made = FactoredJacobian(
            jacobian.names,
            known,
            jacobian.m,
            jacobian.losses,
            uses,
            fallbacks=jacobian.fallbacks,
            unsettled=jacobian._unsettled,
        )
        made.bent = jacobian.bent
        return made


@contextmanager
def at_once(model: nn.Module, ranks: Group) -> Iterator[int]:
    """Inside, all parameters of a sharded model are whole; any other model is as it is.

    Args:
        model: which nothing is to train inside.
        ranks: that hold it, and all enter.

    Yields:
        Bytes that steps would have whole at once, where parts are gathered one after another.
    """
    if not (ranks and any(kind_of(model))):
        yield 0
        return
    with ranks.agreed("gathering"):
        shards = Shards(model, ranks)
        shards.rest()
        with served(model):
            named = trainable(model)
    with shards.gathered(named, whole=True):
        yield shards.taken


def _alone(use: Use, blocks: Blocks) -> Use:
    """The use, with copies of what is in a parameter's memory: as of tokens that are learned."""
    if any(map(blocks.has, use.values)):
        return use._with(lambda t: t.clone() if blocks.has(t) else t)
    return use


@contextmanager
def without_hooks(module: Any) -> Iterator[None]:
    """A module of `fully_shard` casts what goes in and out, and does nothing else."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    # as while a checkpoint recomputes within a backward pass: parameters are there, hooks too
    state = module._get_fsdp_state()
    casts = hasattr(state, "_cast_forward_inputs") and hasattr(state, "_cast_output_dtype")
    policy = state._mp_policy
    check(
        casts or (policy.param_dtype is None and policy.output_dtype is None),
        "model: in this torch, fully_shard(mp_policy=...) does not cast in all passes: update it, "
        "or use torch.autocast in the loss",
    )
    before, groups = state._training_state, vars(state).get(GROUPS)
    state._training_state = TrainingState.PRE_BACKWARD
    if groups is not None:  # which would be gathered
        vars(state)[GROUPS] = []
    try:
        yield
    finally:
        state._training_state = before
        if groups is not None:
            vars(state)[GROUPS] = groups
        state._modules_to_run_forward.clear()


@contextmanager
def _without_reducer(ddp: Any) -> Iterator[None]:
    """The DDP of `replicate` passes on what goes in and out."""
    if getattr(ddp, "mixed_precision", None) is not None:
        raise InputError(
            "model: replicate(mixed_precision=...) casts parameters by hooks of its own forward "
            "pass, which a step leaves out: use torch.autocast in the loss"
        )
    before = ddp._use_python_reducer
    ddp._use_python_reducer = True
    try:
        yield
    finally:
        ddp._use_python_reducer = before
