"""Models that parallelize_module split: rows, Gramians and parameters are those of one process."""

import os
import re
import time
from contextlib import nullcontext, suppress
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import gradsurgery as gs
from gradsurgery.errors import RankError
from gradsurgery.spread import local
from tests.ranks.cases import whole
from tests.ranks.processes import LIMIT, run

WORDS = 31


class Block(nn.Module):
    """Attention and a network, as in Llama, with heads that ranks share out."""

    def __init__(self, width, heads):
        super().__init__()
        self.width = width // heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        hidden = self.norm(x)
        split = [
            part(hidden).unflatten(2, (-1, self.width)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        ]
        seen = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, tied=False, checkpoints=False, heads=6):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.blocks = (
            nn.Embedding(WORDS, 12),
            nn.ModuleList([Block(12, heads)]),
        )
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, WORDS, bias=False)
        self.checkpoints, self.tied = checkpoints, tied
        self.double().tie()

    def tie(self):
        if self.tied:
            self.head.weight = self.tokens.weight

    def forward(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.head(self.norm(x))


class Network(Transformer):
    """Two layers between others."""

    def __init__(self):
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.tokens, self.up, self.down = nn.Embedding(WORDS, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, WORDS)
        self.double()

    def tie(self):
        pass

    def forward(self, x):
        hidden = self.tokens(x)
        return self.head(hidden + self.down(self.up(hidden).tanh()))


def _blocks(**own):
    columns = {f"blocks.*.{name}": ColwiseParallel() for name in ("query", "key", "value", "up")}
    return {**columns, **{f"blocks.*.{name}": RowwiseParallel(**own) for name in ("out", "down")}}


def _sequence():
    out = {"output_layouts": Shard(1)}
    norms = ("norm", "blocks.*.norm", "blocks.*.norm2")
    return {
        "tokens": RowwiseParallel(input_layouts=Replicate(), **out),
        **dict.fromkeys(norms, SequenceParallel()),
        **_blocks(**out),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


# of each: a model, and how it is split
SPLIT = {
    "network": (Network, lambda: {"up": ColwiseParallel(), "down": RowwiseParallel()}),
    "head": (Network, lambda: {"head": ColwiseParallel(output_layouts=Replicate())}),
    "columns of tokens": (
        Network,
        lambda: {"tokens": ColwiseParallel(output_layouts=Replicate())},
    ),
    "blocks": (Transformer, _blocks),
    "sequence": (Transformer, _sequence),
    "tied": (lambda: Transformer(tied=True), _sequence),
    "checkpoints": (lambda: Transformer(checkpoints=True), _sequence),
    "words": (Transformer, lambda: {**_blocks(), "head": ColwiseParallel(use_local_output=False)}),
}


def loss(model, batch):
    logits = model(batch["x"])
    if hasattr(logits, "full_tensor"):  # words are split, as loss_parallel has it
        with torch.no_grad():
            shape = batch["y"].shape
        each = F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), reduction="none")
        return each.view(shape).mean(1).full_tensor()
    return F.cross_entropy(logits.mT, batch["y"], reduction="none").mean(1)


def _data(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, WORDS, (size, 6), generator=generator) for _ in range(2))
    return {"x": x, "y": y}


def _model(split, ranks):
    make, plan = SPLIT[split]
    model = make()
    if ranks > 1:
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), plan())
        model.tie()
    return model


def _parts(rule, step, memory=False):
    if "forget" in rule.roles:
        parts = {"forget": _data(3, 10 * step), "retain": _data(4, 10 * step + 1)}
    else:
        parts = {"batch": _data(4, 10 * step)}
    return {**parts, **({"memory": _data(2, 9)} if memory else {})}


def _step(surgeon, step):
    return surgeon.step(loss=loss, **_parts(surgeon.rule, step))


def _remembering(surgeon, step):
    return surgeon.step(loss=loss, **_parts(surgeon.rule, step, memory=True))


def _adding(surgeon, step):
    """Micro-batches, a second update on the first, and a norm that is clipped."""
    surgeon.add(loss=loss, **_parts(surgeon.rule, step))
    surgeon.add(loss=loss, **_parts(surgeon.rule, step + 50))
    surgeon.backward()
    info = surgeon.backward(0.5, loss=loss, **_parts(surgeon.rule, step + 70))
    nn.utils.clip_grad_norm_(surgeon.model.parameters(), 0.1)
    surgeon.optimizer.step()
    surgeon.optimizer.zero_grad()
    return info


# a rule, the model, how steps are taken, options
CASES = {
    **{f"OrthoGrad, {split}": (gs.OrthoGrad, split, _step, {}) for split in SPLIT},
    "PCGrad, blocks": (gs.PCGrad, "blocks", _step, {}),
    "Mean": (gs.Mean, "sequence", _step, {}),
    "GRU": (gs.GRU, "sequence", _step, {}),
    "UPGrad, modules": (lambda: gs.UPGrad(granularity="module"), "sequence", _step, {}),
    "GradVac, tensors": (lambda: gs.GradVac(granularity="tensor"), "sequence", _step, {}),
    "OrthoGrad, refined": (lambda: gs.OrthoGrad(refine=2), "sequence", _step, {}),
    "memory": (gs.OrthoGrad, "sequence", _remembering, {}),
    "added": (gs.OrthoGrad, "sequence", _adding, {}),
    "micro-batches": (gs.OrthoGrad, "sequence", _step, {"micro_batch": 2}),
    "rows held": (gs.UPGrad, "sequence", _step, {"micro_batch": 2, "hold": "rows"}),
    "together": (gs.OrthoGrad, "sequence", _step, {"together": True}),
    "words, PCGrad": (gs.PCGrad, "words", _step, {}),
}
LONG = ("OrthoGrad, network", "OrthoGrad, sequence", "PCGrad, blocks")  # five steps, and not two
THREE = ("OrthoGrad, network", "OrthoGrad, head", "OrthoGrad, sequence")


def _trained(case, ranks=1):
    rule, split, step, options = CASES[case]
    model = _model(split, ranks)
    surgeon = gs.Surgeon(model, torch.optim.AdamW(model.parameters(), lr=1e-2), rule(), **options)
    with loss_parallel() if split == "words" and ranks > 1 else nullcontext():
        infos = [step(surgeon, k) for k in range(5 if case in LONG else 2)]
    return whole(model), [(info.gramian, info.losses) for info in infos]


def _surgeon(split="network", rule=gs.PCGrad, **options):
    model = _model(split, 2)
    return gs.Surgeon(model, torch.optim.AdamW(model.parameters(), lr=1e-2), rule(), **options)


class Scaled(Network):
    """With a parameter that is not split and meets activations that are."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        hidden = self.tokens(x)
        return self.head(hidden + self.down(self.up(hidden).tanh() * self.scale))


SPLIT["scaled"] = (Scaled, SPLIT["network"][1])


def _hooked(model, batch):
    losses = loss(model, batch)
    losses.register_hook(lambda grad: 2 * grad)
    return losses


def _of_weights(model, batch):
    return loss(model, batch) + model.up.weight.square().sum().full_tensor()


def _whole_words(model, batch):
    return model(batch["x"]).mean((1, 2))


def _other_samples():
    _surgeon().step(loss=loss, batch=_data(4, dist.get_rank()))


def _without_head(model, batch):
    """Losses that do not show what the head's bias is."""
    return model(batch["x"]).sum((1, 2)) * 0 + model.tokens(batch["x"]).sum((1, 2))


def _other_weights():
    surgeon = _surgeon()
    with torch.no_grad():
        surgeon.model.head.bias += 1e-3 * dist.get_rank()
    surgeon.step(loss=_without_head, batch=_data(4, 0))


def _raising(after):
    """A loss that raises on the second rank, when it has called the model so often."""

    def raising(model, batch):
        for _ in range(after):
            loss(model, batch)
        if dist.get_rank() == 1:
            raise ValueError("a loss of somebody")
        return loss(model, batch)

    return raising


def _fails_in_backward(model, batch):
    """What is computed again there raises on the second rank."""
    calls = []

    def again(hidden):
        calls.append(hidden)
        if len(calls) == 2 and dist.get_rank() == 1:
            raise ValueError("a backward pass of somebody")
        return model.up(hidden).tanh()

    hidden = model.tokens(batch["x"])
    above = model.down(checkpoint(again, hidden, use_reentrant=False))
    return F.cross_entropy(model.head(hidden + above).mT, batch["y"], reduction="none").mean(1)


def _goes_on(fails, **parts):
    """What a step that fails on one rank says; nothing has changed, and the next one is exact."""
    surgeon = _surgeon()
    _step(surgeon, 0)
    before = whole(surgeon.model)
    parts = {"batch": _data(4, 1), **parts}
    try:
        surgeon.step(loss=fails, **parts)
    except (ValueError, RankError) as error:
        after = whole(surgeon.model)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        _step(surgeon, 1)  # and the next one is as if nothing had been
        model = Network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        alone = gs.Surgeon(model, optimizer, gs.PCGrad(), process_group=False)
        for k in range(2):
            _step(alone, k)
        for name, value in whole(surgeon.model).items():
            assert (model.state_dict()[name] - value).abs().max() <= 1e-10, name
        raise gs.InputError(f"{type(error).__name__}: {error}") from error


def _bad_batch():
    """An entry without samples, of one rank: it comes to no pass."""
    bad = {} if dist.get_rank() == 0 else {"batch": {"x": torch.ones(4), "y": torch.ones(3)}}
    _goes_on(loss, **bad)


def _unlike(model, batch):
    losses = loss(model, batch)
    return losses + loss(model, batch) * 0 if dist.get_rank() == 1 else losses


def _trial_raises():
    """A loss that one rank cannot compute of few samples: no trial is made, and the step is."""

    def raising(model, batch):
        if dist.get_rank() == 1 and len(batch["x"]) < 4:
            raise ValueError("of few samples")
        return loss(model, batch)

    surgeon = _surgeon()
    surgeon.add(loss=raising, batch=_data(4, 0))
    surgeon.backward()
    surgeon.add(loss=raising, batch=_data(4, 0))
    fails = _raising(0)
    try:
        surgeon.add(loss=fails, batch=_data(4, 0))
    except (ValueError, RankError) as error:
        raise gs.InputError(str(error)) from error


def _refused_on_one_rank():
    """An optimizer's hook that raises on the second rank: neither has moved."""
    surgeon = _surgeon()
    _step(surgeon, 0)
    before = whole(surgeon.model)

    def fails(*_):
        if dist.get_rank() == 1:
            raise ValueError("a hook of somebody")

    surgeon.optimizer.register_step_post_hook(fails)
    try:
        _step(surgeon, 1)
    except (ValueError, RankError) as error:
        after = whole(surgeon.model)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        raise gs.InputError(str(error)) from error


def _left_behind():
    """Of a step that is too small to be seen in what all ranks have."""
    model = _model("network", 2)
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=1e-12), gs.PCGrad())
    short = patch.object(torch.optim.SGD, "_init_group", side_effect=torch.OutOfMemoryError)
    with short if dist.get_rank() == 1 else nullcontext(), suppress(torch.OutOfMemoryError):
        _step(surgeon, 0)
    _step(surgeon, 1)


REFUSED = {
    "other samples": (_other_samples, "ranks that a model is split over are to be given the same"),
    "other weights": (_other_weights, r"parameter head\.bias differs between rank 0 and rank 1"),
    "meets what is split": (
        lambda: _step(_surgeon("scaled"), 0),
        "rows of scale differ between rank 0 and rank 1: it is not split",
    ),
    "left behind": (_left_behind, "its last step failed on rank 1 and not on rank 0, whose shard"),
    **{
        f"the loss of one rank, after {k}": (
            lambda k=k: _goes_on(_raising(k)),
            "(ValueError|RankError: rank 1: ValueError): a loss of somebody",
        )
        for k in (0, 1, 2)
    },
    "the backward pass of one rank": (
        lambda: _goes_on(_fails_in_backward),
        "(ValueError|RankError: rank 1: ValueError): a backward pass of somebody",
    ),
    "the batch of one rank": (_bad_batch, "batch"),
    "a pass more of one rank": (lambda: _goes_on(_unlike), "in a pass"),
    "a trial of one rank": (_trial_raises, "(rank 1: ValueError: )?a loss of somebody"),
    "one rank": (_refused_on_one_rank, "a hook of somebody"),
    "hooks": (
        lambda: _surgeon().step(loss=_hooked, batch=_data(4, 0)),
        r"parameter up\.weight is split by tensor parallelism, and the forward pass registered",
    ),
    "of weights": (
        lambda: _surgeon().step(loss=_of_weights, batch=_data(4, 0)),
        r"parameter up\.weight is split by tensor parallelism, and another tensor",
    ),
    "losses": (
        lambda: _surgeon("words").step(loss=_whole_words, batch=_data(4, 0)),
        r"losses are a DTensor: return losses\.full_tensor\(\)",
    ),
    "rows": (lambda: _surgeon(rule=gs.GradDrop), "rule: GradDrop needs whole rows"),
    "stored": (lambda: _surgeon(rows="stored"), "rows='stored'"),
    "metric": (
        lambda: _surgeon(rule=lambda: gs.UPGrad(precondition="optimizer")),
        "precondition='optimizer'",
    ),
    "projection": (lambda: _projected(), "project"),
    "group": (
        lambda: _surgeon(process_group=dist.group.WORLD),
        "process_group: parallelize_module has its own",
    ),
    "tape": (lambda: gs.tape(_model("network", 2)).__enter__(), "spread .* by DTensor"),
    "check": (lambda: gs.check(_model("network", 2), _data(4, 0), loss=loss), "by DTensor"),
    "dense": (
        lambda: gs.DenseJacobian.from_model(_model("network", 2), _data(4, 0), loss),
        "spread .* by DTensor",
    ),
}


def _projected():
    model = _model("network", 2)
    kept = gs.OWM(Network())
    gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), gs.Mean(), project=kept)


def _ending(*_):
    os._exit(0)


def _ends(rank, folder):
    """The process of the second rank ends in its loss: the first does not wait for ever."""
    surgeon = _surgeon()
    _step(surgeon, 0)
    before = [local(p.detach()).clone() for p in surgeon.model.parameters()]
    start = time.monotonic()
    with suppress(RuntimeError):
        surgeon.step(loss=_ending if rank == 1 else loss, batch=_data(4, 1))
        (folder / "stepped").touch()
    waited = time.monotonic() - start
    after = [local(p.detach()) for p in surgeon.model.parameters()]
    torch.save((all(map(torch.equal, before, after)), waited), folder / "found")
    os._exit(0)  # there is no group to be left in good order


def test_a_rank_that_ends_in_its_loss_ends_the_others(tmp_path):
    with pytest.raises(FileNotFoundError):  # no rank came to its end
        run(_ends, 2, tmp_path, tmp_path)
    assert not (tmp_path / "stepped").exists()
    same, waited = torch.load(tmp_path / "found")
    assert same
    assert waited < LIMIT / 2  # which is when the group would end it


def _said(call):
    try:
        call()
    except gs.InputError as error:
        return str(error)
    return "accepted"


def _work(rank, ranks):
    cases = CASES if ranks == 2 else THREE
    found = {case: _trained(case, ranks) for case in cases}
    refused = REFUSED if ranks == 2 else {}
    return found, {name: _said(call) for name, (call, _) in refused.items()}


@pytest.fixture(scope="module", params=(2, 3))
def every(request, tmp_path_factory):
    """What each rank found."""
    return request.param, run(_work, request.param, tmp_path_factory.mktemp("r"), request.param)


@pytest.mark.parametrize("case", CASES)
def test_split_models_are_those_of_one_process(every, case):
    ranks, found = every
    if ranks == 3 and case not in THREE:
        return
    parameters, infos = _trained(case)
    for mine, _ in found:
        for (gram, losses), (expected, known) in zip(mine[case][1], infos, strict=True):
            assert (gram - expected).abs().max() <= 1e-12 * expected.abs().max()
            torch.testing.assert_close(losses, known, rtol=1e-12, atol=0)
        for name, value in parameters.items():
            assert (mine[case][0][name] - value).abs().max() <= 1e-10, name
            assert torch.equal(mine[case][0][name], found[0][0][case][0][name]), name


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_served_is_named(every, what):
    ranks, found = every
    for _, said in found if ranks == 2 else ():
        assert re.search(REFUSED[what][1], said[what]), said[what]
