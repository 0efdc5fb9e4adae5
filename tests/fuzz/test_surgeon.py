"""Programs of a Surgeon's steps: as plain torch has them, and all or nothing after errors."""

import sys
import warnings
from collections import UserDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery as gs
from tests.fuzz.profiles import attack, examples
from tests.fuzz.steps import (
    IN,
    OPTIMIZERS,
    OUT,
    Net,
    cloned,
    differing,
    of_samples,
    of_tasks,
    reference,
    state_of,
)
from tests.surgery.properties import FEWEST, make

RULES = sorted(gs.RULES)
WITH_MEMORY = [name for name in RULES if "memory" in gs.RULES[name].roles]
Pair = namedtuple("Pair", "x y")
STRUCTURES = {
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"x": x, "y": y},
    "list": lambda x, y: [x, y],
    "named": Pair,
    "tensor": lambda x, y: x,
    "user dict": lambda x, y: UserDict(x=x, y=y),
}
# the same update to rounding needs a rule that is not on an edge: weights of rows that are
# dependent in one small tensor are decided by rounding
STEADY = ["mean", "sum", "pcgrad", "upgrad", "gradvac", "ngdiff", "munba", "gru", "blur", "agem"]


def batch_of(structure, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, IN, generator=generator, dtype=torch.float64)
    return STRUCTURES[structure](x, torch.randn(size, OUT, generator=generator).double())


@st.composite
def surgeons(draw):
    """Options of a Surgeon and of its rule."""
    name = draw(st.sampled_from(RULES))
    options = {}
    optimizer = draw(st.sampled_from(list(OPTIMIZERS)))
    if name in STEADY:
        options["granularity"] = draw(st.sampled_from(["model", "tensor", "module"]))
        if optimizer in ("adam", "adamw", "groups") and draw(st.booleans()):
            options["precondition"] = "optimizer"
    rows = draw(st.sampled_from(["captured", "captured", "stored"]))
    more = {"rows": rows}
    if rows == "captured":
        more["micro_batch"] = draw(st.sampled_from([None, None, 1, 2, 3]))
        more["together"] = draw(st.sampled_from([None, True, False]))
    else:
        more["chunk_size"] = draw(st.sampled_from([1, 2, 32]))
    return {
        "rule": name,
        "options": options,
        "surgeon": more,
        "optimizer": optimizer,
        "structure": draw(st.sampled_from([s for s in STRUCTURES if s != "user dict"])),
        "seed": draw(st.integers(0, 2**10)),
        "size": draw(st.integers(FEWEST.get(name, 1), 5)),
        "tasks": rows == "captured" and draw(st.booleans()),
        "memory": draw(st.booleans()),
    }


class Program:
    """A model under surgery."""

    def __init__(self, drawn):
        self.drawn, name = drawn, drawn["rule"]
        self.kind = gs.RULES[name]
        self.model = Net(drawn["seed"])
        self.optimizer = OPTIMIZERS[drawn["optimizer"]](list(self.model.parameters()))
        self.memory = name in WITH_MEMORY and (drawn["memory"] or name in ("gem", "agem"))
        forgets = "forget" in self.kind.roles
        self.tasks = drawn["tasks"] and not forgets
        self.loss = of_tasks if self.tasks else of_samples
        rows = 3 if self.tasks else drawn["size"]
        self.rule = make(name, rows, **drawn["options"])
        self.surgeon = gs.Surgeon(self.model, self.optimizer, self.rule, **drawn["surgeon"])
        self.names = ["forget", "retain"] if forgets else ["batch"]
        self.names += ["memory"] if self.memory else []
        self.calls = 0

    def parts(self, structure=None):
        self.calls += 1
        structure = structure or self.drawn["structure"]
        size, seed = self.drawn["size"], 100 * self.drawn["seed"] + self.calls
        return {name: batch_of(structure, size, seed + 10 * k) for k, name in enumerate(self.names)}

    def step(self, parts, loss=None):
        return self.surgeon.step(**parts, loss=loss or self.loss)

    def state(self):
        return state_of(self.model, self.optimizer, self.rule)

    def checked_step(self, structure=None):
        """A step that has to be the reference's."""
        parts = self.parts(structure)
        twin, other, again = cloned(self.model, self.optimizer, self.rule)
        start = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        grads = [p.grad if p.grad is None else (p.grad, p.grad.clone()) for p in self.params()]
        plain = {name: unwrapped(batch) for name, batch in parts.items()}
        gramian, losses = reference(twin, other, again, plain, self.loss)
        info = self.step(parts)
        for p, kept in zip(self.params(), grads, strict=True):
            same = p.grad is None if kept is None else p.grad is kept[0]
            assert same and (kept is None or torch.equal(*kept)), "a .grad changed"
        close(info.gramian, gramian, 1e-9, "gramian")
        close(info.losses, losses, 1e-9, "losses")
        expected = dict(twin.named_parameters())
        moved = torch.cat([(expected[n] - start[n]).flatten() for n in start]).norm()
        for n, p in self.model.named_parameters():
            error = float((p - expected[n]).norm())
            assert error <= 1e-6 * float(moved) + 1e-13, f"{n} moved otherwise, by {error:.1e}"
        remembered = differing(self.rule.state_dict(), again.state_dict())
        for name in set(remembered) - {"columns"}:  # of whom it is, which no twin knows
            pair = self.rule.state_dict()[name], again.state_dict()[name]
            torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-9, msg=f"rule: {name}")

    def params(self):
        return list(self.model.parameters())


def unwrapped(batch):
    return dict(batch) if isinstance(batch, UserDict) else batch


def close(found, expected, tolerance, what):
    error, size = (found - expected).abs().max(), expected.abs().max()
    assert float(error) <= tolerance * float(size) + 1e-300, f"{what}: off by {float(error):.1e}"


def quietly(kind, run):
    with attack(kind), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()


@examples(20)
@given(surgeons(), st.lists(st.sampled_from(["step", "grad", "lr", "zero"]), max_size=4))
def test_steps(drawn, actions):
    def run():
        program = Program(drawn)
        for action in ["step", *actions]:
            if action == "grad":
                for p in program.params()[::2]:
                    p.grad = torch.ones_like(p)
            elif action == "zero":
                program.optimizer.zero_grad()
            elif action == "lr":
                program.optimizer.param_groups[0]["lr"] *= 0.5
            else:
                program.checked_step()

    quietly("surgeon: steps", run)


@examples(10)
@given(surgeons(), st.lists(st.sampled_from(["freeze", "thaw", "add", "remove"]), max_size=4))
def test_parameters_that_change(drawn, actions):
    """Whoever is frozen, thawed or added moves as in an ordinary step, or is refused by name."""

    def run():
        program = Program(drawn)
        model, optimizer = program.model, program.optimizer
        for action in actions:
            if action == "freeze":
                model.first.weight.requires_grad_(False)
            elif action == "thaw":
                model.first.weight.requires_grad_(True)
            elif action == "add" and not hasattr(model, "more"):
                model.more = torch.nn.Parameter(torch.zeros(OUT, dtype=torch.float64))
                model.register_forward_hook(lambda m, i, out: out + m.more)
                optimizer.add_param_group({"params": [model.more]})
            elif action == "remove":
                group = optimizer.param_groups[0]
                group["params"] = [p for p in group["params"] if p is not model.last.bias]
            program.checked_step()

    quietly("surgeon: parameters change", run)


@examples(6)
@given(surgeons(), st.sampled_from(list(STRUCTURES)))
def test_batches(drawn, structure):
    quietly("surgeon: batches", lambda: Program(drawn).checked_step(structure))


class Thrown(Exception):
    pass


def thrown(*_):
    raise Thrown


def losses_that_throw(program, calls):
    seen = [0]

    def loss(model, batch):
        seen[0] += 1
        if seen[0] > calls:
            model(
                batch[0] if isinstance(batch, tuple) else next(iter(program.params())).new_ones(IN)
            )
            raise Thrown
        return program.loss(model, batch)

    return loss


ERRORS = {
    "loss": lambda p, n: losses_that_throw(p, n),
    "forward hook": lambda p, n: p.model.last.register_forward_hook(thrown),
    "backward hook": lambda p, n: p.model.last.register_full_backward_hook(thrown),
    "before the step": lambda p, n: p.optimizer.register_step_pre_hook(thrown),
    "after the step": lambda p, n: p.optimizer.register_step_post_hook(thrown),
    "parameter hook": lambda p, n: p.model.first.weight.register_hook(thrown),
    "accumulated": lambda p, n: p.model.first.bias.register_post_accumulate_grad_hook(thrown),
    "shape": lambda p, n: lambda m, b: p.loss(m, b).sum(),
    "nan": lambda p, n: lambda m, b: p.loss(m, b) * float("nan"),
    "detached": lambda p, n: lambda m, b: p.loss(m, b).detach(),
    "infinite gradient": lambda p, n: lambda m, b: p.loss(m, b) * m.other.sum().mul(0).sqrt(),
}


@examples(14)
@given(surgeons(), st.sampled_from(list(ERRORS)), st.integers(0, 2), st.booleans())
def test_errors(drawn, error, calls, grads):
    """After an error everything is as before, and the next step is right."""

    def run():
        program = Program(drawn)
        if error in ("backward hook", "parameter hook") and drawn["surgeon"]["rows"] == "stored":
            return  # torch.func has no hooks
        program.checked_step()
        if grads:
            for p in program.params():
                p.grad = torch.full_like(p, 0.5)
        parts, before = program.parts(), program.state()
        made = ERRORS[error](program, calls)
        hook = hasattr(made, "remove")
        try:
            program.step(parts, None if hook else made)
        except (Thrown, gs.InputError):
            changed = differing(before, program.state())
            assert not changed, f"changed by an error: {changed}"
        if hook:
            made.remove()
        program.checked_step()

    quietly("surgeon: errors", run)


class Interrupt(TorchDispatchMode):
    """KeyboardInterrupt at the n-th operation, but not inside torch's own optimizers."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left <= 0 and not inside_optimizer():
            self.left = 10**9
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def inside_optimizer():
    frame = sys._getframe()
    while frame is not None:
        if f"torch{'/'}optim" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


@examples(14)
@given(surgeons(), st.floats(0, 1), st.booleans())
def test_interrupts(drawn, share, grads):
    """Interrupted anywhere, a step has been taken whole or not at all."""

    def run():
        program = Program(drawn)
        program.checked_step()
        if grads:
            for p in program.params():
                p.grad = torch.full_like(p, 0.5)
        parts = program.parts()
        whole = Program(drawn)  # the same steps, to see how many operations there are
        whole.checked_step()
        for p, q in zip(whole.params(), program.params(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        counted = Interrupt(10**9)
        with counted:
            whole.step(parts)
        before, after = program.state(), whole.state()
        at = 1 + int(share * (10**9 - counted.left))
        try:
            with Interrupt(at):
                program.step(parts)
        except KeyboardInterrupt:
            found = program.state()
            undone, done = differing(before, found), differing(after, found)
            assert not undone or not done, f"half done: {undone} changed, {done} not as after"
        program.checked_step()

    quietly("surgeon: interrupts", run)


@pytest.mark.parametrize("rows", ["captured", "stored"])
def test_the_reference_moves_what_it_should(rows):
    """The oracle itself, against a step of the mean loss."""
    drawn = {
        "rule": "mean", "options": {}, "surgeon": {"rows": rows}, "optimizer": "adamw",
        "structure": "dict", "seed": 3, "size": 4, "tasks": False, "memory": False,
    }  # fmt: skip
    program = Program(drawn)
    twin, other, again = cloned(program.model, program.optimizer, program.rule)
    plain, optimizer, _ = cloned(program.model, program.optimizer, program.rule)
    parts = program.parts()
    reference(twin, other, again, parts, program.loss)
    program.loss(plain, parts["batch"]).mean().backward()
    optimizer.step()
    for a, b in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
