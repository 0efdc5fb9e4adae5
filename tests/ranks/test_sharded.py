"""Models in `fully_shard` or `replicate`: rows, Gramian and update are those of one process."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from tests.ranks.cases import RULES, SHARES, assert_alike, trained
from tests.ranks.processes import run


class Block(nn.Module):
    """33 lines are no two equal shards, and one of a scale is none."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(12), nn.Linear(12, 33)
        self.down, self.scale = nn.Linear(33, 12, bias=False), nn.Parameter(torch.tensor([0.7]))
        self.recomputes = False

    def forward(self, x):
        if self.recomputes:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x):
        return x + self.scale * self.down(self.up(self.norm(x)).tanh())


class Network(nn.Module):
    """Tied tokens, learned ones that a layer multiplies as they are, a convolution, blocks."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(30, 12)
        self.learned, self.first = nn.Parameter(torch.randn(12)), nn.Linear(12, 12)
        self.mix = nn.Conv1d(12, 12, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.to(dtype)

    def forward(self, x):
        hidden = self.tokens(x)
        hidden = hidden + self.mix(hidden.mT).mT
        hidden = hidden + self.first(self.learned.expand(len(x), -1))[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return hidden @ self.tokens.weight.T


class Frozen(Network):
    """Blocks with frozen parameters between others."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype)
        for block in self.blocks:
            block.up.requires_grad_(False)
        self.mix.weight.requires_grad_(False)


class Normalized(Network):
    """A weight that is computed from parameters."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype)
        torch.nn.utils.parametrizations.weight_norm(self.blocks[0].up)


def _root(model):
    return fully_shard(model)


def sharded_blocks(model, **options):
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _recomputed(model):
    for block in model.blocks:
        block.recomputes = True
    return sharded_blocks(model)


def _recomputed_outside(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for k, block in enumerate(model.blocks):
        model.blocks[k] = checkpoint_wrapper(fully_shard(block))
    return fully_shard(model)


def _a_part(model):
    fully_shard(model.blocks[1])
    return model


def composed(model, **options):
    from torch.distributed._composable.replicate import replicate

    return replicate(model, **options)


def _replicated(model):
    from torch.distributed._composable.replicate_with_fsdp import replicate

    for block in model.blocks:
        replicate(block)
    return replicate(model)


def _offloaded(model):
    return sharded_blocks(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def _hybrid(model):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    return sharded_blocks(model, mesh=mesh)


def _in_pairs(model):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("apart", "replicas", "shards"))
    return sharded_blocks(model, mesh=mesh["replicas", "shards"])


WRAPPED = {
    "root": _root,
    "blocks": sharded_blocks,
    "kept": lambda model: sharded_blocks(model, reshard_after_forward=False),
    "resharded": lambda model: sharded_blocks(model, reshard_after_forward=True),
    "checkpoints": _recomputed,
    "checkpoints outside": _recomputed_outside,
    "a part": _a_part,
    "offloaded": _offloaded,
    "replicate": composed,
    "replicate, unused parameters": lambda m: composed(m, find_unused_parameters=True),
    "replicate, static graph": lambda m: composed(m, static_graph=True),
    "replicate by FSDP": _replicated,
    "hybrid": _hybrid,
    "in pairs": _in_pairs,
}
NETWORKS = {"plain": Network, "frozen": Frozen, "normalized": Normalized}


def _cases(ranks):
    """(wrapped, network, rule, samples, steps)"""
    if ranks == 4:
        found = [("hybrid", "plain", rule, 0, 3) for rule in ("OrthoGrad", "GRU", "PCGrad")]
        return [*found, ("in pairs", "plain", "OrthoGrad", 0, 2)]
    # of these, a rank without samples of one batch, or of all
    two = [("OrthoGrad", 0), ("UPGrad", 1)]
    found = [("root", "plain", rule, 0, 5) for rule in RULES]
    found += [("blocks", "plain", *each, 3) for each in two]
    others = [wrap for wrap in WRAPPED if wrap not in ("root", "blocks", "hybrid", "in pairs")]
    found += [(wrap, "plain", *each, 2) for wrap in others for each in two]
    return found + [("blocks", name, *each, 2) for name in ("frozen", "normalized") for each in two]


def _smooth(parameters):
    """Whose metric, 1 / (|u| + eps), does not amplify the rounding of an update u that is small."""
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)


def _work(rank, ranks):
    return [_trained(*case, ranks, rank) for case in _cases(ranks)]


def _trained(wrap, network, rule, samples, steps, ranks, rank=None):
    if wrap == "in pairs":  # which know nothing of each other
        ranks, rank = 2, None if rank is None else rank % 2
    found, seen = trained(
        RULES[rule](),
        SHARES[ranks][samples],
        rank,
        wrap=WRAPPED[wrap],
        network=NETWORKS[network],
        steps=steps,
        optimizer=_smooth if rule == "OrthoGrad, optimizer" else None,
    )
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in found.items()}, seen


@pytest.fixture(scope="module", params=(2, 4))
def every(request, tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("sharded")
    return request.param, run(_work, request.param, folder, request.param)


def test_shards_are_one_process(every):
    ranks, found = every
    for k, case in enumerate(_cases(ranks)):
        assert_alike([each[k] for each in found], _trained(*case, ranks))
