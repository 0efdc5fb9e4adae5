"""Experts: tokens sorted into groups, each of which meets a matrix of its own."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from tests.capture.oracle import agrees, check, loop

SAMPLES, TOKENS, WIDTH, HIDDEN, EXPERTS = 4, 6, 8, 12, 5
FLOAT32 = 1e-5


class Routed(nn.Module):
    """Each token of x [B, T, d] goes to the experts in `ways` [B, T, k]; some may get none."""

    def __init__(self, turned=False):
        super().__init__()
        self.turned = turned
        self.first = nn.Linear(WIDTH, WIDTH)
        shape = (EXPERTS, HIDDEN, WIDTH) if turned else (EXPERTS, WIDTH, HIDDEN)
        self.up = nn.Parameter(torch.randn(shape) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 3)

    def forward(self, x, ways, grouped=True):
        x = torch.tanh(self.first(x)).flatten(0, 1)
        k = ways.shape[-1]
        order = ways.flatten().argsort(stable=True)
        tokens, experts = x[order // k], ways.flatten()[order]
        up = self.up.mT if self.turned else self.up
        out = torch.tanh(self.product(tokens, up, experts, grouped))
        out = self.product(out, self.down, experts, grouped)
        return torch.zeros_like(x).index_add(0, order // k, out).view(-1, TOKENS, WIDTH)

    def product(self, x, weight, experts, grouped):
        if not grouped:  # every token by itself, of any dtype
            return torch.einsum("td,tdp->tp", x, weight[experts])
        offs = torch.bincount(experts, minlength=EXPERTS).cumsum(0).int()
        if self.turned:  # y = W x, tokens in the second dimension
            return F.grouped_mm(weight.mT, x.mT.contiguous(), offs=offs).mT
        return F.grouped_mm(x, weight, offs=offs)


WAYS = {
    "one expert": torch.randint(EXPERTS, (SAMPLES, TOKENS, 1)),
    "two": torch.randint(EXPERTS, (SAMPLES, TOKENS, 2)),
    "some without tokens": torch.randint(1, 3, (SAMPLES, TOKENS, 1)),
    "one of one sample": (torch.arange(SAMPLES) == 1).long().view(-1, 1, 1).expand(-1, TOKENS, 1),
    "most of one sample": (torch.arange(SAMPLES * TOKENS) % 7 == 0).long().view(SAMPLES, TOKENS, 1),
}


def losses_of(out):
    wave = torch.arange(WIDTH, dtype=out.dtype).cos()
    return (out - wave).square().mean((1, 2))


def exact(net, x, ways, groups=None):
    """The rows in float64, of products token by token."""
    net = copy.deepcopy(net).double()
    rows = loop(losses_of(net(x.double(), ways, grouped=False)), net, groups)
    return [g for g in rows if g is not None]


def taken(net, forward, groups=None, **options):
    """The Jacobian; with no warning."""
    with gs.tape(net) as tape:
        losses = forward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tape.jacobian(losses, groups=groups, **options)


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("turned", [False, True], ids=["x W", "W x"])
@pytest.mark.parametrize("path", ["factored", "direct"])
@pytest.mark.parametrize("groups", [None, [0, 0, 1, 0]], ids=["rows", "a group"])
def test_rows_of_groups(ways, turned, path, groups, monkeypatch):
    monkeypatch.setenv("GRADSURGERY_PATH", path)
    net, x = Routed(turned), torch.randn(SAMPLES, TOKENS, WIDTH)
    groups = None if groups is None else torch.tensor(groups)
    jacobian = taken(net, lambda: losses_of(net(x, WAYS[ways])), groups)
    check(jacobian, net, exact(net, x, WAYS[ways], groups), FLOAT32)


def test_tokens_behind_the_last_group_meet_no_expert():
    net, x = Routed(), torch.randn(SAMPLES, TOKENS, WIDTH)
    ways = WAYS["two"]
    order = ways.flatten().argsort(stable=True)

    def forward():
        y = torch.tanh(net.first(x)).flatten(0, 1)[order // 2]
        # torch leaves what is behind unwritten, in both directions
        y = y.masked_fill((torch.arange(len(order)) >= len(order) - 5)[:, None], 0)
        offs = torch.bincount(ways.flatten()[order[:-5]], minlength=EXPERTS).cumsum(0).int()
        out = F.grouped_mm(y, net.up, offs=offs)[:-5]
        back = torch.zeros(SAMPLES * TOKENS, HIDDEN).index_add(0, order[:-5] // 2, out)
        return back.view(SAMPLES, -1).square().sum(1)

    jacobian = taken(net, forward)
    twin = copy.deepcopy(net).double()
    y = torch.tanh(twin.first(x.double())).flatten(0, 1)[order[:-5] // 2]
    out = torch.einsum("td,tdp->tp", y, twin.up[ways.flatten()[order[:-5]]])
    back = torch.zeros(SAMPLES * TOKENS, HIDDEN).double().index_add(0, order[:-5] // 2, out)
    check(jacobian, net, loop(back.view(SAMPLES, -1).square().sum(1), twin), FLOAT32)


@pytest.mark.parametrize("kept", [0, 3])
def test_losses_that_few_tokens_reach_or_none(kept):
    net, x = Routed(), torch.randn(SAMPLES, TOKENS, WIDTH)
    some = (torch.arange(SAMPLES * TOKENS) < kept).view(SAMPLES, TOKENS, 1)

    def losses(net, x, **options):
        out = net(x, WAYS["one expert"], **options)
        return torch.where(some, out, 0).square().sum((1, 2)) + net.first(x).square().sum((1, 2))

    jacobian = taken(net, lambda: losses(net, x))
    twin = copy.deepcopy(net).double()
    check(jacobian, net, loop(losses(twin, x.double(), grouped=False), twin), FLOAT32)


def test_experts_that_are_met_twice():
    net, x = Routed(), torch.randn(SAMPLES, TOKENS, WIDTH)
    both = WAYS["one expert"], WAYS["two"]

    def out(net, x, **options):
        return net(net(x, both[0], **options), both[1], **options)

    jacobian = taken(net, lambda: losses_of(out(net, x)))
    twin = copy.deepcopy(net).double()
    check(jacobian, net, loop(losses_of(out(twin, x.double(), grouped=False)), twin), FLOAT32)


@pytest.mark.parametrize("first", [True, False])
def test_experts_that_are_also_met_otherwise(first):
    """Weights that are computed with before, and that every token meets too."""
    net, x = Routed(), torch.randn(SAMPLES, TOKENS, WIDTH)
    ways = WAYS["some without tokens"]
    every = torch.ones(EXPERTS, 1, SAMPLES * TOKENS)

    def losses(net, x, grouped=True):
        y = torch.tanh(net.first(x)).flatten(0, 1)
        order = ways.flatten().argsort(stable=True)
        experts = ways.flatten()[order]
        out = net.product(y[order], net.up, experts, grouped)
        out = net.product(torch.tanh(out), 0.5 * net.down, experts, grouped)
        back = torch.zeros_like(y).index_add(0, order, out).view(SAMPLES, -1).square().sum(1)
        dense = torch.bmm(every.to(y).mT * y, net.up).square()  # [experts, tokens, hidden]
        dense = dense.sum((0, 2)).view(SAMPLES, -1).mean(1)
        return dense + back if first else back + dense

    jacobian = taken(net, lambda: losses(net, x))
    twin = copy.deepcopy(net).double()
    check(jacobian, net, loop(losses(twin, x.double(), grouped=False), twin), FLOAT32)


@pytest.mark.parametrize("lines", [[(0, 3), (3, 5)], [(0, 3), (2, 5)], [(1, 3)]])
@pytest.mark.parametrize("path", ["factored", "direct"])
def test_slices_of_a_parameter_are_matrices_too(lines, path, monkeypatch):
    """Side by side, of which each is a plane; overlapping; with lines that nothing meets."""
    monkeypatch.setenv("GRADSURGERY_PATH", path)
    net = nn.Linear(WIDTH, 5).double()
    x = torch.randn(SAMPLES, TOKENS, WIDTH).double()

    def losses():
        parts = [F.linear(x.cumsum(k), net.weight[lo:hi]) for k, (lo, hi) in enumerate(lines)]
        return sum(part.tanh().square().sum((1, 2)) for part in parts)

    jacobian = agrees(net, losses)
    metric = [torch.rand_like(p) + 0.5 for p in net.parameters()]
    weighed = jacobian.materialize() * torch.cat([m.flatten() for m in metric]).sqrt()
    torch.testing.assert_close(jacobian.gramian(metric=metric), weighed @ weighed.mT)


def test_rows_of_any_size():
    """Products of tokens that leave float32's range are taken again in float64."""
    net, x = Routed(), torch.randn(SAMPLES, TOKENS, WIDTH)
    scale = torch.tensor([1e-25, 1.0, 1e15, 1e-3])
    jacobian = taken(net, lambda: losses_of(net(x, WAYS["two"])) * scale)
    rows = [scale.double().view(-1, *[1] * (g.dim() - 1)) * g for g in exact(net, x, WAYS["two"])]
    flat = torch.cat([g.flatten(1) for g in rows], 1)
    norms = flat.norm(dim=1)
    away = (jacobian.gramian() - flat @ flat.mT).abs() / (norms[:, None] * norms)
    assert away.max() < FLOAT32
    weights = torch.tensor([1e25, 0.0, 0.0, 0.0], dtype=torch.float64)
    update = torch.cat([g.flatten().double() for g in jacobian.combine(weights)])
    torch.testing.assert_close(update, weights @ flat, rtol=1e-4, atol=1e-6 * float(update.norm()))


def test_concatenated_with_a_row_of_a_pass_of_its_own():
    net, x = Routed(), torch.randn(SAMPLES, TOKENS, WIDTH)
    rows = exact(net, x, WAYS["two"])
    whole = taken(net, lambda: losses_of(net(x, WAYS["two"])).sum())
    jacobian = gs.concat([whole, taken(net, lambda: losses_of(net(x, WAYS["two"])))])
    check(jacobian, net, [torch.cat([g.sum(0, keepdim=True), g]) for g in rows], FLOAT32)


def test_metric_and_inputs():
    net, x = Routed(), torch.randn(SAMPLES, TOKENS, WIDTH)
    ways = WAYS["some without tokens"]
    jacobian, rows = taken(net, lambda: losses_of(net(x, ways))), exact(net, x, ways)
    metric = [torch.rand_like(p) + 0.5 for p in net.parameters()]
    weighed = [(g * m.double().sqrt()).flatten(1) for g, m in zip(rows, metric, strict=True)]
    gram = sum(g @ g.mT for g in weighed)
    torch.testing.assert_close(jacobian.gramian(metric=metric), gram, rtol=FLOAT32, atol=1e-8)

    up = jacobian.names.index("up")
    seen = jacobian.inputs_seen()[up]
    assert seen is not None
    inputs = torch.tanh(net.first(x)).flatten(0, 1).detach().double()
    for expert in range(EXPERTS):
        mine = inputs[ways.flatten() == expert]
        torch.testing.assert_close(seen[0][expert], mine.mT @ mine, rtol=1e-5, atol=1e-6)
    stacked = jacobian.inputs_stacked()[up]
    assert stacked is not None
    torch.testing.assert_close(stacked[0].mT @ stacked[0], seen[0], rtol=1e-9, atol=1e-9)


def test_check_tells_the_paths_of_the_whole_batch():
    net, batch = Routed(), (torch.randn(SAMPLES, TOKENS, WIDTH), WAYS["one expert"])
    checked = gs.check(net, batch, loss=lambda net, batch: losses_of(net(*batch)))
    jacobian = taken(net, lambda: losses_of(net(*batch)))
    plan = jacobian._planes[jacobian.names.index("up")].plan
    assert checked.exact and not checked.slow
    assert checked.paths["up"] == plan.path


transformers = pytest.importorskip("transformers")
COMMON = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "use_cache": False,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "Qwen2Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "intermediate_size": 24,
        "shared_expert_intermediate_size": 8,
    },
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "DeepseekV3": {
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "intermediate_size": 24,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "GptOss": {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 8},
}


def experts(name, ways=2, implementation=None):
    options = {**COMMON, **MODELS[name], "num_experts_per_tok": ways}
    config = getattr(transformers, f"{name}Config")(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    if implementation is None:
        assert model.config._experts_implementation == "grouped_mm"
    else:
        model.config._experts_implementation = implementation
    return model


def next_token(model, ids):
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)


def text(size=4, tokens=9):
    return torch.randint(37, (size, tokens))


def in_float64(model):
    """The same weights, and experts in a loop, which torch multiplies in any dtype."""
    twin = copy.deepcopy(model).double()
    twin.config._experts_implementation = "eager"
    return twin


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_models_as_they_come(name, ways):
    model, ids = experts(name, ways), text()
    jacobian = taken(model, lambda: next_token(model, ids))
    twin = in_float64(model)
    check(jacobian, model, loop(next_token(twin, ids), twin), 10 * FLOAT32)
    # though a row has many tokens, it is no sum of samples: no plane is kept for it
    assert all(plane.group is None for plane in jacobian._planes if plane is not None)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "fallback"])
def test_other_ways_to_multiply(implementation, monkeypatch):
    """Experts in a loop, by copies of their weights, and by transformers' own groups."""
    model = experts("Mixtral", 2, "grouped_mm" if implementation == "fallback" else implementation)
    model, ids = model.double(), text()
    own = "transformers.integrations.moe._can_use_grouped_mm"
    monkeypatch.setattr(own, lambda *_: implementation != "fallback")
    # the router's softmax is in float32 always
    agrees(model, lambda: next_token(model, ids), tolerance=1e-6)
    for _ in range(5):  # so few tokens that experts have those of one sample, or of none
        few = text(3, 3)
        agrees(model, lambda few=few: next_token(model, few), tolerance=1e-6)


@pytest.mark.parametrize("combine", ["stored", "backward"])
def test_checkpoints(combine):
    model, ids = experts("Mixtral"), text()
    twin = in_float64(model)
    model.train()
    # its old name warns since transformers 5.2x, and older ones have no other
    name = "activation_checkpointing_enable"
    name = name if hasattr(model, name) else "gradient_checkpointing_enable"
    getattr(model, name)({"use_reentrant": False})
    jacobian = taken(model, lambda: next_token(model, ids), combine=combine)
    rows = loop(next_token(twin, ids), twin)
    flat = torch.cat([g.flatten(1) for g in rows], 1)
    gram = flat @ flat.mT
    torch.testing.assert_close(jacobian.gramian(), gram, rtol=1e-4, atol=1e-4 * float(gram.max()))
    jacobian.backward(torch.tensor([1.0, -0.5, 2.0, 0.25]))
    update = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    want = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=torch.float64) @ flat
    assert (update - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize("hold", ["pairs", "rows"])
def test_accumulated_steps_are_those_of_the_whole_batch(hold):
    model = experts("Mixtral")
    forget, retain = text(2), text(4)
    steps = []
    for parts in (1, 2):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
        surgeon = gs.Surgeon(twin, optimizer, gs.OrthoGrad(alpha=0.5), hold=hold)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for f, r in zip(forget.chunk(parts), retain.chunk(parts), strict=True):
                surgeon.add(forget=f, retain=r, loss=next_token)
            surgeon.step()
        steps.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (steps[0] - steps[1]).norm() < 1e-4 * (steps[0] - before).norm()


def test_bfloat16():
    model, ids = experts("Mixtral"), text()
    model.to(torch.bfloat16)
    checked = gs.check(model, ids, loss=next_token)
    assert checked.exact and not checked.slow
