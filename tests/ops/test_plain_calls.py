"""Plain calls go past torch's dispatcher: what they give and refuse is what it would have."""

import contextlib
import warnings
from typing import ClassVar

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery as gs
from gradsurgery import ops
from tests.inputs import signed


def gramian_of(rows):
    rows = rows.to_dense() if rows.is_sparse else rows
    rows = (rows.real if rows.is_complex() else rows).double()
    return rows @ rows.mT


# name: the operators it is made of, and a call on rows [m, n]
CALLS = {
    "gramian": ({"gramian"}, lambda rows: gs.gramian(rows)),
    "gramian of blocks": (
        {"gramian"},
        lambda rows: gs.gramian([rows, rows[:, :2]], per="tensor", precise=True),
    ),
    "combine": ({"combine"}, lambda rows: gs.combine(rows, torch.ones(len(rows)))),
    "combine blocks": (
        {"combine"},
        lambda rows: gs.combine([rows, rows[:, 1:2]], torch.ones(2, len(rows)).double()),
    ),
    "project_out": (
        {"project_out"},
        lambda rows: gs.project_out(rows.sum(0) + 1, rows, return_info=True),
    ),
    "project_out of blocks": (
        {"project_out"},
        lambda rows: gs.project_out(
            [rows[0], rows[0, 1:2].contiguous()], [rows[1:], rows[1:, 1:2]], refine=2
        ),
    ),
    "projection_weights": (
        {"projection_weights"},
        lambda rows: ops.projection_weights(gramian_of(rows)[1:, 1:], gramian_of(rows)[1:, 0]),
    ),
    "cone_weights": (
        {"cone_weights"},
        lambda rows: ops.cone_weights(gramian_of(rows), torch.ones(1, len(rows))),
    ),
}
# rules wait for what they see of a Gramian, and are not traced
RULES = {
    "OrthoGrad": (
        {"projection_weights"},
        lambda rows: gs.OrthoGrad().weights(gramian_of(rows)),
    ),
    "OrthoGrad of means": (
        {"projection_weights"},
        lambda rows: gs.OrthoGrad(retain="mean").weights(gramian_of(rows), [1], memory=[-1]),
    ),
    "UPGrad": ({"cone_weights"}, lambda rows: gs.UPGrad().weights(gramian_of(rows))),
    "UPGrad of rows": ({"gramian", "cone_weights", "combine"}, lambda rows: gs.UPGrad()(rows)),
    "DualProj": ({"cone_weights"}, lambda rows: gs.DualProj().weights(gramian_of(rows))),
    "PCGrad": (
        {"deconflict_weights"},
        lambda rows: gs.PCGrad().weights(gramian_of(rows)),
    ),
}
BOTH = CALLS | RULES


class Through(TorchDispatchMode):
    """Sees every call that reaches the dispatcher, and lets it be."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    @property
    def ours(self):
        return {name.removeprefix("gradsurgery::") for name in self.seen if "gradsurgery" in name}


class Sub(torch.Tensor):
    """A subclass that notes what is called on it."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def leaves(found):
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def outcome(call, *args):
    """What a call gives, as a flat list of tensors, or says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = call(*args)
        except Exception as error:
            return type(error), str(error)
    return leaves(found), [str(warning.message) for warning in caught]


def same(found, expected):
    assert len(found) == len(expected)
    if not isinstance(expected[0], list):  # an error and its text
        assert found == expected
        return
    assert found[1] == expected[1]
    for a, b in zip(found[0], expected[0], strict=True):
        assert type(a) is type(b)
        assert (a.dtype, a.shape, a.stride(), a.requires_grad, a.is_inference()) == (
            b.dtype, b.shape, b.stride(), b.requires_grad, b.is_inference(),
        )  # fmt: skip
        assert a.is_meta or torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


def filled(m, n, dtype=torch.float64):
    return signed(torch.randn(m, n, dtype=torch.float64)).to(dtype)


def with_value(value, dtype=torch.float32):
    rows = filled(4, 31, dtype)
    rows[2, 7] = value
    return rows


INPUTS = {
    "float64": lambda: filled(4, 31),
    "float32": lambda: filled(5, 70, torch.float32),
    "bfloat16": lambda: filled(3, 70, torch.bfloat16),
    "float16": lambda: filled(3, 70, torch.float16),
    "transposed": lambda: filled(31, 4).mT,
    "strided": lambda: filled(8, 62)[::2, ::2],
    "expanded": lambda: filled(1, 31).expand(3, 31),
    "offset": lambda: filled(5, 32)[1:, 1:],
    "one value": lambda: filled(1, 1),
    "no columns": lambda: filled(3, 0),
    "no rows": lambda: filled(0, 9),
    "a zero row": lambda: torch.cat([filled(2, 9), torch.zeros(1, 9), filled(1, 9)]),
    "zero rows": lambda: torch.zeros(3, 9),
    "duplicate rows": lambda: filled(2, 31).repeat(2, 1),
    "near duplicates": lambda: filled(1, 31) + 1e-7 * filled(3, 31),
    "badly scaled": lambda: filled(4, 31) * torch.tensor([1e-150, 1e150, 1e-9, 1.0])[:, None],
    "too small to square": lambda: filled(3, 31) * 1e-170,
    "too large to square": lambda: filled(3, 31) * 1e200,
    "tiny float32": lambda: filled(3, 31, torch.float32) * 1e-30,
    "nan": lambda: with_value(float("nan")),
    "inf": lambda: with_value(float("inf")),
    "bfloat16 inf": lambda: with_value(float("inf"), torch.bfloat16),
    "negated view": lambda: torch._C._VariableFunctions._neg_view(filled(4, 31)),
    "parameter": lambda: torch.nn.Parameter(filled(4, 31), requires_grad=False),
    "wanted": lambda: filled(4, 31).requires_grad_(),
    "wanted leaf": lambda: torch.nn.Parameter(filled(4, 31)),
    # refused
    "a vector": lambda: torch.randn(9),
    "whole numbers": lambda: torch.ones(3, 9, dtype=torch.int64),
    "complex": lambda: torch.ones(3, 9, dtype=torch.complex64),
    "sparse": lambda: filled(3, 9).to_sparse(),
    "meta": lambda: torch.empty(3, 9, device="meta"),
}
SEEN = {"negated view", "parameter", "wanted", "wanted leaf", "meta"}
REFUSED = {"a vector", "whole numbers", "complex", "sparse", "meta"}


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("name", BOTH)
def test_gives_and_says_what_the_dispatcher_would(name, given, impl):
    """Bit by bit; and without a gradient wanted, or in inference mode."""
    _, call = BOTH[name]
    for context in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        rows = INPUTS[given]()
        with context():
            direct = outcome(call, rows)
            with Through():
                through = outcome(call, rows)
        same(direct, through)
    with torch.inference_mode():
        rows = INPUTS[given]()
    if given not in REFUSED:
        direct = outcome(call, rows)
        with Through():
            same(direct, outcome(call, rows))


@pytest.mark.parametrize("name", BOTH)
def test_plain_calls_are_not_dispatched(name, impl, monkeypatch):
    operators, call = BOTH[name]
    seen = noted(operators, monkeypatch)
    for given in INPUTS.keys() - SEEN - REFUSED:
        outcome(call, INPUTS[given]())
    with torch.no_grad():
        call(INPUTS["wanted"]())
    with torch.inference_mode():
        call(filled(4, 31))
    assert not seen


class TestWhoeverMustSeeACallSeesIt:
    @pytest.mark.parametrize("name", BOTH)
    def test_modes(self, name, impl):
        operators, call = BOTH[name]
        with Through() as mode:
            call(filled(4, 31))
        assert operators <= mode.ours

    @pytest.mark.parametrize("name", CALLS)
    def test_fake_tensors_and_traces(self, name, impl):
        operators, call = CALLS[name]
        graph = make_fx(call, tracing_mode="fake")(filled(4, 31))
        assert operators <= names_in(graph)

    @pytest.mark.parametrize("name", CALLS)
    def test_compile_and_export(self, name, impl):
        operators, call = CALLS[name]
        rows = filled(4, 31)
        expected = outcome(call, rows)
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            compiled = torch.compile(call, backend=backend, fullgraph=True)
            same(outcome(compiled, rows), expected)

        class Module(torch.nn.Module):
            def forward(self, rows):
                return call(rows)

        program = torch.export.export(Module(), (rows,))
        assert operators <= names_in(program.graph_module)

    # torch 2.11 says it of every profile, once
    @pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
    @pytest.mark.parametrize("name", BOTH)
    def test_profiler(self, name, impl):
        operators, call = BOTH[name]
        rows = filled(4, 31)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call(rows)
        seen = {event.key for event in profile.key_averages()}
        assert {f"gradsurgery::{operator}" for operator in operators} <= seen

    @pytest.mark.parametrize("name", CALLS)
    def test_gradients(self, name, impl):
        _, call = CALLS[name]
        wanted = filled(4, 31).requires_grad_()
        found = [part for part in leaves(call(wanted)) if part.requires_grad]
        (mine,) = torch.autograd.grad(sum((part**2).sum() for part in found), wanted)
        assert mine.any()

    @pytest.mark.parametrize("name", BOTH)
    def test_subclasses(self, name, impl):
        operators, call = BOTH[name]
        Sub.seen.clear()
        with torch.no_grad():
            call(filled(4, 31).as_subclass(Sub))
        assert all(any(f"gradsurgery.{op}" in seen for seen in Sub.seen) for op in operators)

    @pytest.mark.parametrize("name", BOTH)
    def test_tangents(self, name, impl, monkeypatch):
        operators, call = BOTH[name]
        seen = noted(operators, monkeypatch)
        with torch.autograd.forward_ad.dual_level():
            call(filled(4, 31))
        assert seen == operators

    @pytest.mark.parametrize("name", CALLS)
    def test_transforms_of_others(self, name, impl, monkeypatch):
        operators, call = CALLS[name]
        seen, rows = noted(operators, monkeypatch), filled(4, 31)
        torch.func.vmap(lambda other: (call(rows), other)[1])(torch.ones(2))
        assert seen == operators

    @pytest.mark.parametrize("name", CALLS)
    def test_vmap(self, name, impl):
        _, call = CALLS[name]
        rows = torch.stack([filled(4, 31) for _ in range(2)])
        found = leaves(torch.func.vmap(call)(rows))
        each = [leaves(call(sample)) for sample in rows]
        for part, samples in zip(found, zip(*each, strict=True), strict=True):
            assert torch.equal(part, torch.stack(samples))


def noted(operators, monkeypatch):
    """Names of those operators that are asked for by torch's dispatcher, as they are."""
    seen = set()
    for name in operators:
        operator = getattr(torch.ops.gradsurgery, name)

        def spy(*args, name=name, operator=operator):
            seen.add(name)
            return operator(*args)

        monkeypatch.setattr(torch.ops.gradsurgery, name, spy)
    return seen


def names_in(graph):
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    return {t.split(".")[1] for t in targets if t.startswith("gradsurgery.")}
