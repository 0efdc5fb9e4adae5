"""A trainer's state: all of it is checked before any of it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradsurgery.errors import InputError
from gradsurgery.ranks.places import grad_of, whole_of
from gradsurgery.ranks.shards import rest
from gradsurgery.spread import is_split
from gradsurgery.text import brief, show
from gradsurgery.unlearn.training.data import LoaderBatches

if TYPE_CHECKING:
    from gradsurgery.unlearn.training.trainer import Trainer

State = dict[str, Any]
# what loading raises where a state is not of the thing it is loaded into
UNFIT = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def fail(message: str) -> NoReturn:
    raise InputError(f"state: {message}")


def names(trainer: Trainer) -> dict[str, str | None]:
    """What a state is of: the classes of the method, the optimizer and the schedule."""
    schedule = trainer.schedule
    return {
        "method": type(trainer).__name__,
        "optimizer": type(trainer.optimizer).__name__,
        "schedule": None if schedule is None else type(schedule).__name__,
    }


def state_of(trainer: Trainer) -> State:
    """All that later steps depend on, in copies."""
    rest(trainer.model)
    cuda = trainer.device.type == "cuda"
    schedule = trainer.schedule
    state = {
        "names": names(trainer),
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": None if schedule is None else schedule.state_dict(),
        "batches": {kind: found.state_dict() for kind, found in trainer.batches.items()},
        "loaders": {kind: own.get_state() for kind, own in trainer._generators().items()},
        "samples": dict(trainer.samples),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(trainer.device) if cuda else None,
        **_rng_of_ranks(trainer),
        "generator": trainer.generator.get_state(),
        "step": trainer.step,
        "seconds": trainer.seconds,
        "stopped": trainer.stopped,
        "extra": trainer.extra_state(),
    }
    return _cloned(state)


def _rng_of_ranks(trainer: Trainer) -> State:
    """Of several ranks, the states of each one's generators."""
    if not trainer.ranks:
        return {}
    cuda = trainer.device.type == "cuda"
    own = [torch.get_rng_state(), torch.cuda.get_rng_state(trainer.device) if cuda else None]
    return {"rng_of_ranks": trainer.ranks.gather(own)}


def load(trainer: Trainer, state: Any) -> None:
    """Check a state, then load it; an error leaves the trainer as it was."""
    rest(trainer.model)
    check(trainer, state)
    with _undone_by_errors(trainer):
        with _naming("optimizer"):
            trainer.optimizer.load_state_dict(_dealt_out(trainer, state["optimizer"]))
        if trainer.schedule is not None:
            with _naming("schedule"):
                trainer.schedule.load_state_dict(state["schedule"])
        with _naming("extra"):
            trainer.load_extra_state(state["extra"])
        with _naming("model"):
            own = trainer.model.state_dict()
            trainer.model.load_state_dict(
                {k: _as(v, own.get(k)) for k, v in state["model"].items()}
            )
        for kind, drawn in state["batches"].items():
            trainer.batches[kind].load_state_dict(drawn)
        for kind, own in trainer._generators().items():
            own.set_state(state["loaders"][kind])
        drawn = state["rng"], state["cuda_rng"]
        if trainer.ranks:
            drawn = state["rng_of_ranks"][trainer.ranks.rank]
        torch.set_rng_state(drawn[0])
        if drawn[1] is not None:
            torch.cuda.set_rng_state(drawn[1], trainer.device)
        trainer.generator.set_state(state["generator"])
        trainer.samples.update(state["samples"])
        trainer.step, trainer.seconds = state["step"], state["seconds"]
        trainer.stopped = state["stopped"]


def _dealt_out(trainer: Trainer, state: State) -> State:
    """An optimizer's state of whole tensors, as shards where parameters are."""
    made = copy.deepcopy(state)
    for theirs, mine in zip(made["param_groups"], trainer.optimizer.param_groups, strict=True):
        for k, parameter in zip(theirs["params"], mine["params"], strict=True):
            entry = made["state"].get(k, {})
            for name, value in entry.items():
                if isinstance(value, Tensor) and value.dim() and is_split(parameter):
                    if value.shape != parameter.shape:
                        fail(f"optimizer: {name} is not as its parameter, and is not dealt out")
                    entry[name] = _as(value, parameter)
    return made


def _as(value: Tensor, own: Any) -> Tensor:
    """A whole tensor, as shards where the trainer has these."""
    return grad_of(value, own) if isinstance(own, Tensor) and is_split(own) else value


# -- what must fit


def check(trainer: Trainer, state: Any) -> None:
    """Raise `InputError` naming the first thing in `state` that is not of such a trainer."""
    _expect(state, Mapping, "it")
    known = state.get("names", {})  # states of before there were names have none
    _expect(known, Mapping, "names")
    bases = [base.__name__ for base in type(trainer).__mro__]
    for part, mine in names(trainer).items():
        theirs = known.get(part, mine)
        if theirs != mine and not (part == "method" and theirs in bases):
            fail(f"its {part} is {show(theirs, 80)}, this trainer's is {mine}")
    wanted = (
        *("model", "optimizer", "schedule", "batches", "loaders", "samples", "rng"),
        *("cuda_rng", "generator", "step", "seconds", "stopped", "extra"),
    )
    for name in wanted:
        if name not in state:
            fail(f"it has no {name}")
    _check_numbers(trainer, state)
    same_tensors(trainer.model.state_dict(), state["model"], "model")
    _check_optimizer(trainer, state["optimizer"])
    if trainer.schedule is None:
        if state["schedule"] is not None:
            fail("it has a schedule, and this trainer has none")
    else:
        _has(state["schedule"], trainer.schedule.state_dict(), "schedule")
    _check_draws(trainer, state)
    _expect(state["extra"], Mapping, "extra")
    trainer.check_extra_state(state["extra"])


def same_tensors(own: Any, given: Any, where: str) -> None:
    """Raise `InputError` unless `given` has the tensors of `own`, in names, shapes and dtypes."""
    if isinstance(own, Tensor):
        if not isinstance(given, Tensor):
            fail(f"{where} must be a tensor, got {type(given).__name__}")
        if (given.shape, given.dtype) != (own.shape, own.dtype):
            fail(f"{where} is {_kind(given)}, this trainer's is {_kind(own)}")
    elif isinstance(own, Mapping):
        _has(given, own, where)
        if unknown := [name for name in given if name not in own]:
            fail(f"{where} has {show(unknown[0], 80)}, which this trainer's has not")
        for name in own:
            same_tensors(own[name], given[name], f"{where}.{name}")
    elif isinstance(own, (list, tuple)):
        _expect(given, (list, tuple), where)
        if len(given) != len(own):
            fail(f"{where} has {len(given)} entries, this trainer's has {len(own)}")
        for k, (mine, theirs) in enumerate(zip(own, given, strict=True)):
            same_tensors(mine, theirs, f"{where}[{k}]")


def check_kept(trainer: Trainer, extra: Mapping[str, Any]) -> None:
    """Raise `InputError` unless `extra` has what the method keeps: modules with their tensors."""
    for name in trainer.keeps:
        held, where = getattr(trainer, name), f"extra.{name}"
        if name not in extra:
            fail(f"extra has no {name}, which {type(trainer).__name__} keeps")
        if isinstance(held, nn.Module):
            same_tensors(held.state_dict(), extra[name], where)
        elif isinstance(held, (Tensor, list, tuple, Mapping)):
            kinds = (Tensor, (list, tuple), Mapping)
            _expect(extra[name], next(kind for kind in kinds if isinstance(held, kind)), where)


def _check_numbers(trainer: Trainer, state: Mapping[str, Any]) -> None:
    step, seconds, total = state["step"], state["seconds"], trainer.total_steps()
    _count(step, "step")
    if step > total:
        fail(f"step is {step}, and this trainer takes {total}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        fail(f"seconds must be a number, at least 0, got {brief(seconds)}")
    _expect(state["stopped"], bool, "stopped")
    _has(state["samples"], trainer.samples, "samples")
    for kind, count in state["samples"].items():
        _count(count, f"samples.{show(kind, 80)}")
    for name in ("rng", "generator"):
        _check_generator(state[name], name)
    drawn = state.get("rng_of_ranks", ())
    _expect(drawn, (list, tuple), "rng_of_ranks")
    if len(drawn) != trainer.ranks.size and (trainer.ranks or drawn):
        fail(
            f"it is of {len(drawn) or 1} ranks, and there are {trainer.ranks.size}, which would "
            "draw other random numbers"
        )
    for rank, pair in enumerate(drawn):
        _expect(pair, (list, tuple), f"rng_of_ranks[{rank}]")
        if len(pair) != 2:
            fail(f"rng_of_ranks[{rank}] must be two states, got {len(pair)}")
        _check_generator(pair[0], f"rng_of_ranks[{rank}]")
    if state["cuda_rng"] is not None:
        if trainer.device.type != "cuda":
            fail(f"cuda_rng is of a model on a GPU, and this one is on {trainer.device}")
        _check_generator(state["cuda_rng"], "cuda_rng", trainer.device)


def _check_optimizer(trainer: Trainer, given: Any) -> None:
    _has(given, ("state", "param_groups"), "optimizer")
    groups, entries = given["param_groups"], given["state"]
    _expect(groups, list, "optimizer.param_groups")
    _expect(entries, Mapping, "optimizer.state")
    own = trainer.optimizer.param_groups
    if len(groups) != len(own):
        fail(f"optimizer has {len(groups)} groups of parameters, this trainer's has {len(own)}")
    held: dict[Any, tuple[int, Tensor]] = {}
    for g, (theirs, mine) in enumerate(zip(groups, own, strict=True)):
        where = f"optimizer.param_groups[{g}]"
        _has(theirs, mine, where)
        at = theirs["params"]
        _expect(at, list, f"{where}.params")
        if len(at) != len(mine["params"]):
            fail(f"{where} has {len(at)} parameters, this trainer's has {len(mine['params'])}")
        for k, parameter in zip(at, mine["params"], strict=True):
            _count(k, f"every one of {where}.params")
            held[k] = g, parameter
    called = {id(p): name for name, p in trainer.model.named_parameters()}
    kind = type(trainer.optimizer)
    # of torch's own what is not one number has the parameter's shape, but for Adafactor's factors
    shaped = kind.__module__.startswith("torch.optim.") and kind.__name__ != "Adafactor"
    firsts: dict[int, Any] = {}
    for k, entry in entries.items():
        if k not in held:
            fail(f"optimizer.state has an entry of parameter {brief(k)}, which no group has")
        g, parameter = held[k]
        where = f"optimizer.state of {called.get(id(parameter), f'parameter {k}')}"
        _expect(entry, Mapping, where)
        if not shaped:
            continue
        _has(entry, firsts.setdefault(g, entry), where)
        for name, value in entry.items():
            one = not isinstance(value, Tensor) or value.dim() == 0 or value.shape == (1,)
            if not one and value.shape != parameter.shape:
                shapes = f"{list(value.shape)}, and the parameter is {list(parameter.shape)}"
                fail(f"{where}: {show(name, 80)} is {shapes}")


def _check_draws(trainer: Trainer, state: Mapping[str, Any]) -> None:
    drawn, own = state["batches"], trainer.batches
    _expect(drawn, Mapping, "batches")
    if set(drawn) != set(own):
        theirs, mine = (", ".join(map(show, each)) or "no set" for each in (drawn, own))
        fail(f"batches are of {theirs}, and this trainer draws from {mine}")
    for kind, found in own.items():
        _has(drawn[kind], found.state_dict(), f"batches.{kind}")
        _count(drawn[kind]["drawn"], f"batches.{kind}.drawn")
        if isinstance(found, LoaderBatches):
            _check_position(drawn[kind], f"batches.{kind}", found)
    generators = trainer._generators()
    _has(state["loaders"], generators, "loaders")
    for kind, generator in generators.items():
        _check_generator(state["loaders"][kind], f"loaders.{kind}", generator.device)


def _check_position(drawn: Mapping[str, Any], where: str, found: LoaderBatches) -> None:
    position, start = drawn["position"], drawn["start"]
    _count(position, f"{where}.position")
    if position > drawn["drawn"]:
        fail(f"{where}.position is {position}, of {drawn['drawn']} drawn")
    _expect(start, (list, tuple), f"{where}.start")
    own = found.loader.generator
    devices = [torch.device("cpu"), torch.device("cpu") if own is None else own.device]
    if len(start) != len(devices):
        fail(f"{where}.start must be two states, got {len(start)}")
    for each, device in zip(start, devices, strict=True):
        if each is not None:
            _check_generator(each, f"{where}.start", device)


def _check_generator(value: Any, where: str, device: torch.device | str = "cpu") -> None:
    try:
        torch.Generator(device).set_state(value)
    except (RuntimeError, TypeError):
        fail(f"{where} is no state of a generator on {device}")


def _expect(value: Any, kind: Any, where: str) -> None:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or a ".join(each.__name__.lower() for each in kinds)
        fail(f"{where} must be a {wanted}, got {type(value).__name__}")


def _count(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        fail(f"{where} must be a whole number, at least 0, got {brief(value)}")


def _has(given: Any, own: Any, where: str) -> None:
    """That `given` is a mapping with every name of `own`."""
    _expect(given, Mapping, where)
    for name in own:
        if name not in given:
            fail(f"{where} has no {show(name, 80)}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# -- what checks cannot know: code of others that loads a state


@contextmanager
def _naming(part: str) -> Iterator[None]:
    try:
        yield
    except UNFIT as error:
        reason = show(str(error).removeprefix("state: "), 300)
        raise InputError(f"state: {part}: {reason}") from error


@contextmanager
def _undone_by_errors(trainer: Trainer) -> Iterator[None]:
    """The trainer is as it was where the body raises. A copy of the model is held for that."""
    model, schedule, generators = trainer.model, trainer.schedule, trainer._generators()
    copies = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    extra = _cloned(trainer.extra_state())
    scheduled = None if schedule is None else copy.deepcopy(schedule.state_dict())
    samples, drawn = dict(trainer.samples), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None
    own = [(each, each.get_state()) for each in (trainer.generator, *generators.values())]
    # these replace what they load, and change nothing in place
    holders = [trainer, trainer.optimizer, *trainer.batches.values()]
    attributes = [(holder, dict(vars(holder))) for holder in holders]
    try:
        yield
    except BaseException:
        with suppress(*UNFIT):
            trainer.load_extra_state(extra)
        if schedule is not None:
            with suppress(*UNFIT):
                schedule.load_state_dict(scheduled)
        for holder, values in attributes:
            vars(holder).clear()
            vars(holder).update(values)
        with torch.no_grad():
            for tensor, saved in copies:
                tensor.copy_(saved)
        for generator, state in own:
            generator.set_state(state)
        torch.set_rng_state(drawn)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, trainer.device)
        trainer.samples.update(samples)
        raise


def _cloned(state: Any) -> Any:
    """With copies of tensors; of shards whole ones, on the CPU, where there is more room."""

    def copied(tensor: Tensor) -> Tensor:
        found = tensor.detach()
        return whole_of(found).to("cpu", copy=True) if is_split(found) else found.clone()

    return pytree.tree_map_only(Tensor, copied, state)
