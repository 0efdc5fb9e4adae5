"""What a Surgeon's step is, in plain torch: rows by a loop of autograd, the rule, the optimizer."""

import copy

import torch
from torch import nn

import gradsurgery as gs

IN, HIDDEN, OUT = 5, 7, 4


class Net(nn.Module):
    """Layers, a sum of two biases, a learned temperature, a buffer that counts, one unused."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.other, self.unused = nn.Parameter(torch.randn(HIDDEN)), nn.Linear(2, 3)
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.norm = nn.LayerNorm(HIDDEN)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.double()

    def forward(self, x):
        self.calls += 1
        h = torch.tanh(self.norm(self.first(x) + (self.first.bias + self.other)))
        return self.last(h) * self.temperature.exp()


def scheduled(params):
    optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.5)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


def grouped(params):
    groups = [{"params": params[::2], "lr": 0.02}, {"params": params[1::2], "weight_decay": 0.1}]
    return torch.optim.Adam(groups, lr=0.01)


OPTIMIZERS = {
    "groups": grouped,
    "scheduled": scheduled,
    "maximize": lambda p: torch.optim.SGD(p, lr=0.01, maximize=True),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01, dtype=torch.float64)),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "capturable": lambda p: torch.optim.RAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
}


def of_samples(model, batch):
    x, y = parts_of(batch)
    return (model(x) - y).square().sum(1)


def of_tasks(model, batch):
    x, y = parts_of(batch)
    return (model(x) - y).square()[:, :3]


def parts_of(batch):
    if isinstance(batch, (tuple, list)):
        return batch
    if isinstance(batch, torch.Tensor):
        return batch, batch[:, :OUT]
    return batch["x"], batch["y"]


def rows_of(model, batch, loss, merged):
    """Rows {name: [m, *p.shape]} of the trainable parameters, and the losses; None: unreached."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    losses = loss(model, batch)
    values = losses.mean(0) if losses.dim() == 2 else losses
    values = losses.mean()[None] if merged else values
    found = {name: [] for name in named}
    for value in values:
        grads = torch.autograd.grad(
            value, list(named.values()), retain_graph=True, allow_unused=True
        )
        for name, grad in zip(named, grads, strict=True):
            found[name].append(grad)
    return found, values.detach()


def reference(model, optimizer, rule, parts, loss):
    """One step; the rows' Gramian, and losses."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) in held}
    rows, losses, counts = {name: [] for name in named}, [], {}
    for part, batch in parts.items():
        found, values = rows_of(model, batch, loss, part == "forget" or part in rule.merges)
        counts[part] = len(values)
        losses.append(values)
        for name in named:
            rows[name] += found[name]
    used = {name for name, grads in rows.items() if any(g is not None for g in grads)}
    blocks = {
        name: torch.stack([torch.zeros_like(named[name]) if g is None else g for g in grads])
        for name, grads in rows.items()
    }
    jacobian = gs.DenseJacobian({k: v.detach() for k, v in blocks.items()}, list(named.values()))
    given = {}
    if "memory" in parts:
        given["memory"] = slice(jacobian.m - counts["memory"], None)
    if "retain_loss" in rule.roles:
        given["retain_loss"] = losses[list(parts).index("retain")].mean()
    if rule.weighting is not None:
        metric = metric_of(optimizer, list(named.values())) if rule.precondition else None
        solution = rule.solve(jacobian, metric=metric, **given)
        update, gramian = jacobian.combine(solution.weights), solution.gramian  # in the metric
    else:
        update, gramian = rule(jacobian, **given), jacobian.gramian()
    for p in model.parameters():
        p.grad = None
    for (name, p), u in zip(named.items(), update, strict=True):
        p.grad = u.clone() if name in used else None
    optimizer.step()
    for p in model.parameters():
        p.grad = None
    return gramian, torch.cat(losses)


def metric_of(optimizer, parameters):
    """lr / (sqrt(v) + eps) of Adam, once it has taken a step."""
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                found[p] = group["lr"] / (v.sqrt() + group["eps"])
    # one without state has had no gradient: its rows are zero in any metric
    return [found.get(p, torch.ones_like(p)) for p in parameters] if found else None


def cloned(model, optimizer, rule):
    """Copies that go on alike."""
    twin = copy.deepcopy(model)
    places = {id(p): q for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
    other = copy.copy(optimizer)
    other.param_groups = [
        {**group, "params": [places[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    other.state = type(optimizer.state)(
        optimizer.state.default_factory,
        {places[id(p)]: copy.deepcopy(s) for p, s in optimizer.state.items()},
    )
    for p in twin.parameters():
        p.grad = None
    return twin, other, copy.deepcopy(rule)


def state_of(model, optimizer, rule):
    """All that an error must leave as it was."""
    tensors = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        tensors[f"grad.{name}"] = None if p.grad is None else p.grad.clone()
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{name}.{key}"] = copy.deepcopy(value)
    for k, group in enumerate(optimizer.param_groups):
        tensors[f"group.{k}"] = {n: copy.deepcopy(v) for n, v in group.items() if n != "params"}
    for name, value in rule.state_dict().items():
        tensors[f"rule.{name}"] = value
    return tensors


def differing(before, after):
    """Names whose values are not the same."""
    names = sorted(set(before) ^ set(after))
    for name in set(before) & set(after):
        a, b = before[name], after[name]
        same = torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a is b or a == b
        if not same:
            names.append(name)
    return names
