"""Parts of a model in `fully_shard`, gathered where a pass computes with them, and freed again.

A part is whole from its first use to the first use of the next; what autograd saves of it is not
the values but where they are, and a backward pass has them gathered again. Ranks need not use the
same parts in the same order, nor make as many passes: before each part is gathered they meet, each
says which part it waits for, and all gather one of these. A rank that is done answers until all
are.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from gradsurgery.capture.hooks import register
from gradsurgery.errors import InputError
from gradsurgery.ranks.group import Group

DONE = -1
# what takes no values of a parameter
UNREAD = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim")),
    *(getattr(Tensor, name).__get__ for name in ("grad", "requires_grad", "is_leaf")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.storage_offset),
    *(Tensor.element_size, Tensor.untyped_storage),
    *(Tensor.requires_grad_, Tensor.is_floating_point),
}
GROUPS = "_fsdp_param_groups"  # of a state of `fully_shard`: what gathers parameters
WRITTEN_OVER = (
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation, after it was saved for the backward pass"
)


@dataclass(eq=False)
class Block:
    """What one call of `fully_shard` holds together."""

    module: Any
    stays: bool  # whether it is whole from its first use to the end of the passes
    places: list[tuple[nn.Module, str]]  # where its parameters are; tied ones are in several
    shards: list[nn.Parameter]  # of each place, what the optimizer has
    wholes: list[nn.Parameter]  # of each place, what passes compute with
    versions: dict[int, int] = field(default_factory=dict)  # of wholes that have values
    running: int = 0  # calls of its modules that have not returned

    def __post_init__(self) -> None:
        self._state = self.module._get_fsdp_state()
        self._groups = groups_of(self._state)

    @contextmanager
    def _seen(self) -> Iterator[None]:
        """Inside, calls of the module find what `fully_shard` made of it; see `without_hooks`."""
        hidden = vars(self._state).get(GROUPS) == []
        if hidden:
            vars(self._state)[GROUPS] = self._groups
        try:
            yield
        finally:
            if hidden:
                vars(self._state)[GROUPS] = []

    def unshard(self) -> None:
        with self._seen():
            self.module.unshard()

    def reshard(self) -> None:
        with self._seen():
            self.module.reshard()

    def put(self, parameters: list[nn.Parameter]) -> None:
        for (module, name), parameter in zip(self.places, parameters, strict=True):
            if type(module).__setattr__ is nn.Module.__setattr__:
                module._parameters[name] = parameter
            else:  # which has it elsewhere, too, as nn.LSTM in a list
                setattr(module, name, parameter)


class Blocks:
    """The parts of a model, for the passes of its steps.

    Args:
        model: with modules that `fully_shard` was called on.
        sharded: those.
        ranks: all that hold it.
    """

    def __init__(self, model: nn.Module, sharded: list[Any], ranks: Group) -> None:
        self.model, self.ranks = model, ranks
        self.each: list[Block] = []
        self._owners: dict[nn.Parameter, Block] = {}
        self._loaded: dict[int, tuple[Block, nn.Parameter]] = {}  # by memory
        self._busy = self._again = False
        self._check_untied(sharded)
        inside = {id(m) for module in sharded for m in module.modules() if m is not module}
        for module in sharded:
            self._find(module, id(module) not in inside)

    def _check_untied(self, sharded: list[Any]) -> None:
        """Raise where calls of `fully_shard` parted what was one parameter."""
        states = {id(state): state for state in (m._get_fsdp_state() for m in sharded)}
        known: dict[Any, str] = {}
        for group in (g for state in states.values() for g in groups_of(state)):
            for each in group.fsdp_params:
                uid = getattr(each, "_orig_param_uid", None)  # since torch 2.13
                info = each._module_info
                own = next((n for n, m in self.model.named_modules() if m is info.module), "")
                name = f"{own}.{info.param_name}" if own else info.param_name
                if uid is not None and uid in known:
                    raise InputError(
                        f"model: {known[uid]} and {name} were one parameter, and fully_shard was "
                        "called on their modules apart, so they part: pass it both, as a list"
                    )
                known[uid] = name

    def _find(self, module: Any, root: bool) -> None:
        """The block of a module, by what becomes whole where it is gathered."""
        places = [(m, name) for m in self.model.modules() for name in m._parameters]
        before = [m._parameters[name] for m, name in places]
        module.unshard()
        after = [m._parameters[name] for m, name in places]
        module.reshard()
        own = [k for k, (a, b) in enumerate(zip(before, after, strict=True)) if a is not b]
        known = {(id(m), name) for block in self.each for m, name in block.places}
        if not own or (id(places[own[0]][0]), places[own[0]][1]) in known:
            return  # a module without parameters of its own, or one of several in one call
        made: dict[int, nn.Parameter] = {}
        for k in own:
            whole: Any = after[k]
            if id(whole) not in made:
                made[id(whole)] = nn.Parameter(_nothing(whole), whole.requires_grad)
        state = module._get_fsdp_state()
        stays = root and bool(state._auto_reshard_after_forward)
        stays = stays or all(g.post_forward_mesh_info is None for g in groups_of(state))
        shards: list[Any] = [before[k] for k in own]
        wholes = [made[id(after[k])] for k in own]
        block = Block(module, stays, [places[k] for k in own], shards, wholes)
        self.each.append(block)
        self._owners.update(dict.fromkeys(wholes, block))

    @property
    def taken(self) -> int:
        """Bytes of what is whole at once, at most: what stays, and the largest of the rest."""
        sizes = {True: [0], False: [0]}
        for block in self.each:
            sizes[block.stays].append(sum(w.nbytes for w in dict.fromkeys(block.wholes)))
        return sum(sizes[True]) + max(sizes[False])

    def are_of(self, model: nn.Module) -> bool:
        """Whether the model has the same parameters as when these were looked up."""
        held = {id(p) for module in model.modules() for p in module._parameters.values()}
        known = {id(p) for block in self.each for p in block.shards}
        return known <= held and all(
            m._parameters.get(name) is p
            for block in self.each
            for (m, name), p in zip(block.places, block.shards, strict=True)
        )

    @contextmanager
    def used(self, whole: bool, again: bool = False) -> Iterator[None]:
        """Inside, the model computes with whole parameters; to be entered by all ranks.

        Args:
            whole: whether all parts are gathered at once and stay.
            again: whether a graph made inside is used when this is entered another time.
        """
        self._again = again
        with ExitStack() as stack:
            stack.callback(self._rest)
            if whole:
                for block in self.each:
                    self._gather(block, stays=True)
            for module in {id(m): m for block in self.each for m, _ in block.places}.values():
                stack.callback(vars(module).__setitem__, "_parameters", module._parameters)
                vars(module)["_parameters"] = _Watched(module._parameters, self._want)
            for block in self.each:
                for own, shard in zip(block.wholes, block.shards, strict=True):
                    own.requires_grad_(shard.requires_grad)  # which one rank may freeze alone
                block.put(block.wholes)
            if not whole:
                stack.enter_context(_Using(self))
            if not whole and (again or not all(block.stays for block in self.each)):
                self._follow(stack)
                stack.enter_context(saved_tensors_hooks(self._pack, self._unpack))
            try:
                yield
                for block in self.each:
                    self._check_unwritten(block)
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):
                    raise
                raise InputError(
                    "loss: torch.func does not run where parts of a model in fully_shard are "
                    "gathered one after another: give it reshard_after_forward=False"
                ) from error
            finally:
                if self.each and not whole:
                    self._meet(None)

    def _follow(self, stack: ExitStack) -> None:
        """Count the calls of modules that have not returned, for as long as passes are made."""
        mine: dict[nn.Module, list[Block]] = {}
        for block in self.each:
            owners = {id(m) for m, _ in block.places}
            for module in block.module.modules():
                if any(id(m) in owners for m in module.modules()):
                    mine.setdefault(module, []).append(block)
        for module, blocks in mine.items():
            before = partial(module.register_forward_pre_hook, prepend=True)
            after = partial(module.register_forward_hook, always_call=True)
            for method, count in ((before, 1), (after, -1)):
                stack.callback(register(method, _adds(blocks, count)).remove)

    def _want(self, parameter: Any) -> None:
        """Have the values of a parameter, if it is one that has none."""
        block = None if self._busy else self._owners.get(parameter)
        if block is not None and not block.versions:
            self._meet(block)

    def _meet(self, wanted: Block | None) -> None:
        """Gather with all ranks what they wait for, until this one has its, or all are done."""
        mine = DONE if wanted is None else self.each.index(wanted)
        for block in self.each if wanted is not None else ():
            self._check_unwritten(block)  # before others count on this rank
        while True:
            asked = [each for each in self.ranks.gather(mine) if each != DONE]
            if not asked:
                return
            # what most wait for; of these the first
            counts = Counter(sorted(asked))
            block = self.each[counts.most_common(1)[0][0]]
            self._gather(block, keeps=block is wanted)
            if block is wanted:
                return

    def _gather(self, block: Block, keeps: bool = True, stays: bool = False) -> None:
        self._busy = True
        try:
            if keeps:
                for other in self.each:
                    if other.versions and not (other.stays or stays or other.running):
                        self._free(other)
            block.unshard()
            stays = stays or block.stays
            values: list[Any] = [m._parameters[name] for m, name in block.places]
            try:
                if keeps or stays:
                    self._load(block, values, stays)
            finally:
                if not stays:
                    block.reshard()
                block.put(block.wholes)
        finally:
            self._busy = False

    def _load(self, block: Block, values: list[Tensor], stays: bool) -> None:
        for whole, value in dict(zip(block.wholes, values, strict=True)).items():
            # memory that is gone with its last user, in place of one that is taken from it
            whole.data = value.detach() if stays else value.detach().clone()
            self._loaded[whole.untyped_storage()._cdata] = block, whole
        block.versions = {k: whole._version for k, whole in enumerate(block.wholes)}

    def _check_unwritten(self, block: Block) -> None:
        for k, version in block.versions.items():
            if block.wholes[k]._version != version:
                known = self.model.named_parameters()
                name = next((name for name, p in known if p is block.wholes[k]), "")
                raise InputError(
                    f"model: a pass writes to parameter {name}, which fully_shard gathers for it "
                    "and drops: write to it between steps"
                )

    def _free(self, block: Block) -> None:
        for whole in dict.fromkeys(block.wholes):
            self._loaded.pop(whole.untyped_storage()._cdata, None)
            whole.data = _nothing(whole)
        block.versions = {}

    def _rest(self) -> None:
        """The parameters of the model are shards."""
        for block in self.each:
            block.running = 0
            for whole in dict.fromkeys(block.wholes):
                whole.data = _nothing(whole)
            block.versions = {}
            block.reshard()
            block.put(block.shards)
        self._loaded.clear()

    def owns(self, value: Any) -> bool:
        """Whether it is a parameter that passes compute with."""
        return isinstance(value, nn.Parameter) and value in self._owners

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the memory of a parameter that is whole now."""
        return tensor.untyped_storage()._cdata in self._loaded

    def _pack(self, tensor: Tensor) -> Any:
        with suppress(RuntimeError, NotImplementedError):  # a tensor without memory of its own
            if tensor.layout == torch.strided and not (tensor.is_conj() or tensor.is_neg()):
                found = self._loaded.get(tensor.untyped_storage()._cdata)
                stays = found is not None and found[0].stays and not self._again
                if found is not None and not stays and tensor.dtype == found[1].dtype:
                    where = tensor.shape, tensor.stride(), int(tensor.storage_offset())
                    return _OfBlock(*found, where)
        return _Kept(tensor.detach(), tensor._version)  # not the graph, which would hold itself

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _OfBlock):
            if not packed.block.versions:
                self._meet(packed.block)
            return packed.whole.detach().as_strided(*packed.where)
        # torch leaves it to such hooks to find that a saved tensor was written to
        if packed.tensor._version != packed.version:
            raise RuntimeError(WRITTEN_OVER)
        return packed.tensor


def groups_of(state: Any) -> list[Any]:
    """What a state of `fully_shard` gathers parameters by; before torch 2.13, one at most."""
    if GROUPS in vars(state):
        return vars(state)[GROUPS]
    return [group for group in [state._fsdp_param_group] if group is not None]


class _OfBlock(NamedTuple):
    """Where a saved tensor is in a parameter."""

    block: Block
    whole: nn.Parameter
    where: tuple[Any, Any, int]
    lasting = True


class _Kept(NamedTuple):
    """A saved tensor, and how often it was written to before."""

    tensor: Tensor
    version: int
    lasting = True


class _Watched(dict):
    """A module's parameters: one that is read has its values."""

    def __init__(self, known: dict[str, Any], want: Any) -> None:
        super().__init__(known)
        self._want = want

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        if found is not None:
            self._want(found)
        return found


class _Using(TorchFunctionMode):
    """What a function is called with has its values, though it was read before others were used."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, known = kwargs or {}, self.blocks
        every = (*args, *kwargs.values())
        given = (each if isinstance(each, (list, tuple)) else (each,) for each in every)
        needed = [] if known._busy else [known._owners[p] for p in chain(*given) if known.owns(p)]
        if not needed or func in UNREAD:
            return func(*args, **kwargs)
        for block in needed:
            block.running += 1
        try:
            for block in needed:
                if not block.versions:
                    known._meet(block)
            return func(*args, **kwargs)
        finally:
            for block in needed:
                block.running -= 1


def _adds(blocks: list[Block], count: int) -> Any:
    def hook(*_: Any) -> None:
        for block in blocks:
            block.running += count

    return hook


def _nothing(like: Tensor) -> Tensor:
    """Its shape, dtype and device, and no values."""
    return like.detach().new_full((), float("nan")).expand(like.shape)
