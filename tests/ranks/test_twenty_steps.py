"""Twenty steps of many ranks, in each wrapper and by each kind of rule, are those of one process.

What is wrong with a step is in all that follow. So is rounding, which must not grow, and rules are
such that it does not: continuous in the rows, for a conflict that comes or goes changes nothing
where it does so, with orders and signs drawn by seed. Where GradDrop's purity is a draw to the last
digit, and where SAGO's directions change sign, an update jumps, but that is nowhere. AdamW makes
whole steps of gradients that are rounding alone, of which there are none; and a metric of the
optimizer is 1 / eps where gradients cancel, so eps is large there. A test nudges what is begun with
and looks at the end, and for conflicts on the way.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import gradsurgery as gs
from tests.ranks import test_sharded as sharded
from tests.ranks import test_tensor_parallel as split
from tests.ranks.cases import assert_alike, batches, data, loss, share, whole
from tests.ranks.processes import run

STEPS = 20
FORGET, OTHER = 5, 6  # samples of all ranks
TOKENS = 8  # which sequence parallelism shares out evenly


class Network(sharded.Network):
    """Of one block."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype)
        del self.blocks[1]


def adapted(dtype=torch.float64):
    from peft import LoraConfig, inject_adapter_in_model

    names = ["up", "down", "first"]
    options = LoraConfig(r=2, lora_alpha=1, target_modules=names, init_lora_weights=False)
    return inject_adapter_in_model(options, Network(dtype)).to(dtype)


def attentive(dtype=torch.float64, tied=False):
    """With heads for four ranks."""
    return split.Transformer(tied=tied, heads=4).to(dtype)


def _ddp(**options):
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


def _split(plan):
    def wrap(model):
        parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan())
        model.tie()
        return model

    return wrap


# what a rank makes of a model
REPLICAS = {
    "plain": None,
    "DDP": _ddp(),
    "DDP, static graph": _ddp(static_graph=True),
    "DDP, unused parameters": _ddp(find_unused_parameters=True),
    "DDP, gradient views": _ddp(gradient_as_bucket_view=True),
}
SHARDED = ("replicate", "root", "blocks", "kept", "checkpoints", "offloaded", "hybrid")
SPLIT = {"columns and rows": _split(split._blocks), "sequence": _split(split._sequence)}
WRAPPED = {**REPLICAS, **{name: sharded.WRAPPED[name] for name in SHARDED}, **SPLIT}
NETWORKS = {
    "plain": Network,
    "adapted": adapted,
    "attentive": attentive,
    "attentive, tied": partial(attentive, tied=True),
}
RULES = {
    "OrthoGrad": gs.OrthoGrad,
    "UPGrad": gs.UPGrad,
    "PCGrad": gs.PCGrad,
    "GRU": gs.GRU,
    "GradDrop": gs.GradDrop,
    "SAGO": gs.SAGO,
    "optimizer": lambda: gs.OrthoGrad(precondition="optimizer"),
    "OWM": gs.UPGrad,
}
OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "AdamW, smooth": partial(torch.optim.AdamW, lr=1e-2, eps=1e-3),
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
}
# of each number of ranks, samples of the forget batch and of the other on each
SHARES = {
    2: {
        "even": ((3, 2), (3, 3)),
        "uneven": ((4, 1), (1, 5)),
        "one lacks each": ((5, 0), (0, 6)),
        "one has none": ((5, 0), (6, 0)),
    },
    4: {
        "even": ((1, 1, 1, 2), (2, 2, 1, 1)),
        "uneven": ((3, 0, 1, 1), (0, 4, 1, 1)),
        "one lacks each": ((0, 2, 3, 0), (3, 0, 3, 0)),
        "one has none": ((0, 5, 0, 0), (0, 0, 6, 0)),
    },
}

KINDS = tuple(SHARES[2])


class Case(NamedTuple):
    wrap: str
    rule: str
    optimizer: str
    shares: str
    how: str
    network: str = "plain"
    dtype: torch.dtype = torch.float64


def _of_outputs(model, batch):
    return model(batch["x"]).square().sum((1, 2))


def _observed(wrapped, rank, ranks, group):
    kept, batch = gs.OWM(wrapped, alpha=1e-3, others="leave"), data(3, 90)
    if rank is not None:
        batch = share(batch, (2, 1) if ranks == 2 else (1, 0, 1, 1), rank)
    kept.observe(batch, _of_outputs, process_group=group)
    return kept


def _step(surgeon, parts):
    return surgeon.step(loss=loss, **parts)


def _add(surgeon, parts):
    """In two parts, and then as in a loop of one's own."""
    for half in range(2):
        some = {}
        for part, batch in parts.items():
            size = 0 if batch is None else len(batch["x"])
            at = slice(0, size // 2) if half == 0 else slice(size // 2, size)
            if at.start < at.stop:
                some[part] = {name: value[at] for name, value in batch.items()}
        if some or surgeon._shards is not None:
            surgeon.add(loss=loss, **some)
    info = surgeon.backward()
    surgeon.optimizer.step()
    surgeon.optimizer.zero_grad()
    return info


def _micro(surgeon, parts):
    surgeon.micro_batch = 2
    return surgeon.step(loss=loss, **parts)


HOW = {"step": _step, "add": _add, "micro": _micro}


def _trained(case, rank=None, ranks=1, nudge=0.0):
    """Parameters and what was seen, of one process or, with a rank, of one of several."""
    model = NETWORKS[case.network](case.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + nudge
    alone, wrap = rank is None, WRAPPED[case.wrap]
    wrapped = model if alone or wrap is None else wrap(model)
    group = dist.group.WORLD if not alone and wrap is None else None
    rule, options, sizes = RULES[case.rule](), {}, ((FORGET,), (OTHER,))
    if not alone and case.wrap not in SPLIT:
        sizes = SHARES[ranks][case.shares]
    if case.rule == "OWM":
        options["project"] = _observed(wrapped, rank, ranks, group)
    held = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[case.optimizer](held)
    surgeon = gs.Surgeon(wrapped, optimizer, rule, process_group=group, **options)
    how, share_of = HOW["step" if alone else case.how], None if len(sizes[0]) == 1 else rank
    infos = [how(surgeon, batches(rule, sizes, k, share_of, TOKENS)) for k in range(STEPS)]
    return whole(model), [(info.gramian, info.losses, info.cosines) for info in infos]


def _cases(wrappers, rules, most=8, **given):
    """Of each wrapper so many rules, all of which have their turn, and so has all else."""
    found: list[Case] = []
    for wrap in wrappers:
        served = [rule for rule in rules if rule != "OWM" or wrap not in SPLIT]
        for _ in served[:most]:
            k = len(found)
            rule, turn = served[k % len(served)], k + k // len(served)
            optimizer = "AdamW, smooth" if rule == "optimizer" else ("AdamW", "SGD")[turn % 2]
            how = ("step", "micro" if rule == "OWM" else "add", "micro")[k % 3]
            found.append(Case(wrap, rule, optimizer, KINDS[turn // 2 % 4], how, **given))
    return found


WEIGHTED = ("OrthoGrad", "UPGrad", "PCGrad", "GRU")  # of these is what tensor parallelism serves
PARTS = ("replicate", "root", "kept", "checkpoints", "offloaded")
ADAPTED = _cases(("plain", "blocks"), ("OrthoGrad", "SAGO", "UPGrad"), 2, network="adapted")
TIED = _cases(("sequence",), WEIGHTED, 1, network="attentive, tied")
ATTENTIVE: dict[str, Any] = {"network": "attentive"}
SINGLE: dict[str, Any] = {"dtype": torch.float32}
SPLIT_IN_SINGLE = _cases(("sequence",), WEIGHTED, 1, **ATTENTIVE, **SINGLE)
# how many ranks, and what they do
GROUPS = {
    "plain": (2, _cases(("plain",), RULES) + _cases(("plain",), RULES, 4, **SINGLE)),
    "DDP": (2, _cases(tuple(REPLICAS)[1:], RULES, 3)),
    "blocks": (2, _cases(("blocks",), RULES) + _cases(("root",), RULES, 3, **SINGLE)),
    "parts": (2, _cases(PARTS, RULES, 2) + ADAPTED),
    "split": (2, _cases(SPLIT, WEIGHTED, 2, **ATTENTIVE) + TIED + SPLIT_IN_SINGLE),
    "four replicas": (4, _cases(REPLICAS, RULES, 1) + _cases(("DDP",), RULES, 1, **SINGLE)),
    "four sharded": (4, _cases(("hybrid", *PARTS), RULES, 1) + _cases(("hybrid",), ("OWM",), 1)),
    "four split": (4, _cases(("sequence",), WEIGHTED, 1, **ATTENTIVE)),
}


def _work(rank, ranks, cases):
    return [_trained(case, rank, ranks) for case in cases]


@cache
def _alone(problem, nudge=0.0):
    return _trained(problem, nudge=nudge)


def _problem(case):
    """What one process does of it."""
    return case._replace(wrap="plain", shares="even", how="step")


@pytest.mark.parametrize("group", GROUPS)
def test_many_ranks_are_one_process(group, tmp_path):
    ranks, cases = GROUPS[group]
    every = run(_work, ranks, tmp_path, ranks, cases)
    for k, case in enumerate(cases):
        close = (1e-5, 1e-5) if case.dtype == torch.float32 else (1e-12, 1e-10)
        assert_alike([each[k] for each in every], _alone(_problem(case)), *close)


PROBLEMS = {_problem(case): None for _, cases in GROUPS.values() for case in cases}


def _named(case):
    return f"{case.rule}, {case.optimizer}, {case.network}, {case.dtype}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=_named)
def test_rounding_does_not_grow_and_rows_conflict(problem):
    expected, infos = _alone(problem)
    least = torch.finfo(problem.dtype).eps
    nudged, _ = _alone(problem, nudge=least)
    for name, value in expected.items():
        assert (nudged[name] - value).abs().max() <= 100 * least * max(1, value.abs().max()), name
    conflicts = [_conflicts(info[0], problem.rule) for info in infos]
    assert sum(conflicts) > STEPS / 2


def _conflicts(gramian, rule):
    """Whether two rows of a batch oppose each other, or forgetting raises a retain loss."""
    if "forget" in RULES[rule]().roles:
        return bool((gramian[0, 1:] > 0).any())
    return bool((gramian < 0).any())
