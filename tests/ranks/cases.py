"""A model that each rank has a replica of, its samples dealt out, and the same in one process."""

import torch
import torch.distributed as dist
from torch import nn

import gradsurgery as gs

RULES = {
    "OrthoGrad": gs.OrthoGrad,
    "OrthoGrad, mean": lambda: gs.OrthoGrad(retain="mean"),
    "OrthoGrad, tensor": lambda: gs.OrthoGrad(granularity="tensor"),
    "OrthoGrad, optimizer": lambda: gs.OrthoGrad(precondition="optimizer"),
    "OrthoGrad, refined": lambda: gs.OrthoGrad(refine=2),
    "GRU": gs.GRU,
    "SAGO": gs.SAGO,
    "UPGrad": gs.UPGrad,
    "PCGrad": gs.PCGrad,
    "GradDrop": gs.GradDrop,
    "MoDo": gs.MoDo,
}
# of each number of ranks, samples of the forget batch and of the other on each
SHARES = {
    2: [((2, 3), (3, 2)), ((4, 0), (0, 5))],
    3: [((2, 3, 1), (3, 0, 2))],
    4: [((2, 0, 1, 1), (1, 2, 1, 1))],
}


class Network(nn.Module):
    """Tied tokens, a norm, a bias, a scale and a convolution: small planes and wide ones."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(30, 12)
        self.mix = nn.Conv1d(12, 12, 3, padding=1)
        self.up, self.down = nn.Linear(12, 33), nn.Linear(33, 12, bias=False)
        self.norm, self.scale = nn.LayerNorm(12), nn.Parameter(torch.tensor(0.7))
        self.to(dtype)

    def forward(self, x):
        hidden = self.tokens(x)
        hidden = hidden + self.mix(hidden.mT).mT
        hidden = self.norm(hidden + self.scale * self.down(self.up(hidden).tanh()))
        return hidden @ self.tokens.weight.T


def loss(model, batch):
    logits = model(batch["x"])
    each = nn.functional.cross_entropy(logits.mT, batch["y"], reduction="none")
    return each.mean(1)


def data(size, seed, tokens=7):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, 30, (size, tokens), generator=generator) for _ in range(2))
    return {"x": x, "y": y}


def share(batch, sizes, rank):
    """The samples of one rank; None where it has none."""
    start = sum(sizes[:rank])
    end = start + sizes[rank]
    return {k: v[start:end] for k, v in batch.items()} if sizes[rank] else None


def batches(rule, sizes, step, rank=None, tokens=7):
    """What a step is given: of all samples, or those of a rank."""
    forget, other = sizes
    if "forget" in rule.roles:
        whole = {"forget": (forget, 10 * step), "retain": (other, 10 * step + 1)}
    else:
        whole = {"batch": (other, 10 * step + 1)}
    if "second" in rule.roles:
        whole["second"] = other, 10 * step + 2
    made = {part: (data(sum(each), seed, tokens), each) for part, (each, seed) in whole.items()}
    if rank is None:
        return {part: batch for part, (batch, _) in made.items()}
    return {part: share(batch, each, rank) for part, (batch, each) in made.items()}


def trained(
    rule,
    sizes,
    rank=None,
    *,
    wrap=None,
    network=Network,
    steps=3,
    optimizer=None,
    group=None,
    loss=loss,
    **options,
):
    """Parameters and what the steps saw, of one process or, with a rank, of one of several."""
    model = network()
    wrapped = model if wrap is None or rank is None else wrap(model)
    made = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2))
    if rank is not None and wrap is None and group is None:
        group = dist.group.WORLD
    surgeon = gs.Surgeon(wrapped, made(wrapped.parameters()), rule, process_group=group, **options)
    infos = [surgeon.step(loss=loss, **batches(rule, sizes, step, rank)) for step in range(steps)]
    return whole(model), [(info.gramian, info.losses, info.cosines) for info in infos]


def whole(model):
    """Copies of the parameters, whole on each rank."""
    return {name: _whole(p.detach()) for name, p in model.named_parameters()}


def _whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def assert_alike(every, expected, gramian=1e-12, parameters=1e-10):
    """Each rank's against those of one process; ranks are the same to the bit."""
    for found, infos in every:
        for (gram, losses, cosines), (g, l, c) in zip(infos, expected[1], strict=True):
            assert (gram - g).abs().max() <= gramian * g.abs().max()
            torch.testing.assert_close(losses, l, rtol=gramian, atol=gramian)
            assert cosines.shape == c.shape
        for name, value in expected[0].items():
            error = (found[name] - value).abs().max()
            assert error <= parameters * max(1.0, float(value.abs().max())), name
            assert torch.equal(found[name], every[0][0][name]), name
