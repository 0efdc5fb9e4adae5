"""Networks, data and losses of tests on many ranks: each has something that parts may get wrong."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradsurgery as gs


class Rows(nn.Module):
    """[B, 6] to [B, 4]."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)).to(dtype)

    def forward(self, x):
        return self.layers(x.to(self.layers[0].weight.dtype))


class OneMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.layer(x.float())


class Odd(Rows):
    """Parameters without values, of one value, and one that only some samples use."""

    def __init__(self):
        super().__init__()
        for name, shape in {"none": (0, 3), "one": (), "some": (4, 4), "unused": (2,)}.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=torch.float64)))
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x):
        out = super().forward(x) * self.one + self.none.sum()
        if bool((x[:, 0] > 2).any()):
            more = torch.where((x[:, 0] > 2)[:, None], out @ self.some, 0)
            out = out + more
        return out


class Experts(nn.Module):
    """Each sample goes to one of three experts, whose matrices are one tensor, or are apart."""

    def __init__(self, stacked):
        super().__init__()
        torch.manual_seed(0)
        self.stacked = stacked
        self.inside = nn.Linear(6, 8)
        if stacked:
            self.experts = nn.Parameter(torch.randn(3, 8, 4))
        else:
            self.experts = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
        self.double()

    def forward(self, x):
        hidden, out = self.inside(x).tanh(), x.new_zeros(len(x), 4)
        which = x[:, 0].sign().long() + 1
        for k in range(3):
            (mine,) = (which == k).nonzero(as_tuple=True)
            if len(mine):
                chosen = hidden[mine]
                made = chosen @ self.experts[k] if self.stacked else self.experts[k](chosen)
                out = out.index_add(0, mine, made)
        return out


class Checkpointed(Rows):
    def forward(self, x):
        hidden = checkpoint(self.layers[:2], x, use_reentrant=False)
        return checkpoint(self.layers[2], hidden, use_reentrant=False)


class Counting(Rows):
    """Buffers that no other sample has a part in: a count, and one that is replaced."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        self.last = x[0, :2].detach().clone()
        return super().forward(x)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(),
            nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 4),
        ).double()  # fmt: skip

    def forward(self, x):
        return self.layers(x.view(-1, 1, 4, 4))


class Turned(Rows):
    """A matrix that some samples meet the other way round, and a vector that is one of its rows."""

    def __init__(self):
        super().__init__()
        self.square = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x):
        out = super().forward(x)
        mine = x[:, 0] > 0
        if bool(mine.any()):
            out = torch.where(mine[:, None], out @ self.square, out)
        if not bool(mine.all()):
            out = torch.where(mine[:, None], out, out @ self.square.T + self.square[0])
        return out


class Viewed(nn.Module):
    """Matrices that samples see in one of two ways: as other matrices, and as a table of lines."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cube = nn.Parameter(torch.randn(2, 3, 4, dtype=torch.float64))
        self.table = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))

    def forward(self, x):
        (a,), (b,) = (flag.nonzero(as_tuple=True) for flag in (x[:, 0] > 0, x[:, 0] <= 0))
        out = x.new_zeros(len(x), 4)
        if len(a):
            made = x[a] @ self.cube.view(6, 4) + self.table[(x[a][:, 1] > 0).long()]
            out = out.index_add(0, a, made)
        if len(b):
            wide = (x[b][:, :2] @ self.cube.view(2, 12)).view(-1, 3, 4)
            out = out.index_add(0, b, wide.tanh().sum(1) + (x[b][:, :5] @ self.table).tanh())
        return out


def ordered(size, seed):
    batch = digits(size, seed)
    order = batch["x"][:, 0].argsort(descending=True)
    return {name: value[order] for name, value in batch.items()}


def normed():
    model = Rows()
    nn.utils.parametrizations.weight_norm(model.layers[0])
    return model


def mixture(experts):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        use_cache=False,
    )
    config._attn_implementation, config._experts_implementation = "eager", experts
    return transformers.MixtralForCausalLM(config)


def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4))
    config = peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
    return peft.get_peft_model(base, config).double()


# batches and losses


def digits(size, seed, width=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, width, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(4, (size,), generator=generator)}


def classified(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def widely_scaled(size, seed):
    powers = torch.linspace(-30, 30, size, dtype=torch.float64)
    return {**digits(size, seed), "factor": 10.0**powers}


def small(size, seed):
    return {**digits(size, seed), "factor": torch.full((size,), 1e-30, dtype=torch.float64)}


def faint(size, seed):
    """Inputs and gradients that float32 holds, and products that it does not."""
    batch = digits(size, seed)
    factor = torch.full((size,), 1e-20, dtype=torch.float64)
    return {**batch, "x": batch["x"] * 1e-20, "factor": factor}


def some_zero(size, seed):
    factor = torch.ones(size, dtype=torch.float64)
    factor[seed % size] = 0
    return {**digits(size, seed), "factor": factor}


def repeated(size, seed):
    one = digits(1, seed)
    return {name: value.repeat(size, *[1] * (value.dim() - 1)) for name, value in one.items()}


def factored(model, batch):
    losses = classified(model, batch)
    return losses * batch["factor"].to(losses.dtype)


def in_bfloat16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return classified(model, batch).float()


def next_tokens(model, batch):
    logits = model(input_ids=batch["x"]).logits
    return F.cross_entropy(logits.mT, batch["y"], reduction="none").mean(1)


def tasks(model, batch):
    out = model(batch["x"])
    targets = out.new_zeros(len(out), 3)
    return (out[:, :3] - targets).square() + out[:, 3:]


def of_outputs(model, batch):
    return model(batch["x"]).square().sum(1)


def weighted(model, batch):
    """Of tokens that differ in number: even ones count."""
    logits = model(batch["x"])
    each = F.cross_entropy(logits.mT, batch["y"], reduction="none")
    counts = batch["x"] % 2 == 0
    number = counts.sum(1)
    return gs.WeightedLosses((each * counts).sum(1) / number.clamp(min=1), number)


class Learned:
    """A loss with learned weights that the optimizer holds and the model does not."""

    def __init__(self):
        self.sizes = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def __call__(self, model, batch):
        losses = classified(model, batch)
        return losses * self.sizes[0].exp() + self.sizes[1].square()


def weighted_rarely(model, batch):
    """Only where the first token of a sample is below 10."""
    made = weighted(model, batch)
    return gs.WeightedLosses(made.losses, made.weights * (batch["x"][:, 0] < 10))
