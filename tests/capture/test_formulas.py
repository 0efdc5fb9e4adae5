"""Every carrier and formula against the operation itself, asked with gradients of known rows."""

import math

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.capture import broadcast
from gradsurgery.capture.carriers import CARRIERS, COUPLED, ELEMENTWISE, MANY, SHARED, base_name
from gradsurgery.capture.formulas import FORMULAS, prepare
from gradsurgery.capture.layout import Layout, compress, constant
from gradsurgery.capture.leaves import dense_rows
from gradsurgery.capture.probe import probe
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.trace import Junction
from gradsurgery.capture.unknown import of_broadcast, one_by_one
from gradsurgery.capture.views import shape_of
from tests.capture import operations
from tests.capture.operations import CASES

ONLY_CUDA = {
    "CudnnBatchNorm",
    "FusedDropout",
    "FusedRmsNorm",
    "ScaledDotProductCudnnAttention",
    "ScaledDotProductEfficientAttention",
    "ScaledDotProductFlashAttention",
}

FLOAT32 = {"GroupedMm"}  # torch has it in no float64: tests/capture/test_experts.py

# of DTensors on several ranks: tests/ranks/test_tensor_parallel.py
ON_RANKS = {"RedistributeBackward", "_FromTorchTensorBackward", "_ToTorchTensorBackward"}

# whose sums a GPU takes together
SUMS = {
    "Add", "Addmm", "Addmv", "Convolution", "Expand", "Mul", "NativeBatchNorm", "NativeGroupNorm",
    "NativeLayerNorm", "Rsub", "Sub",
}  # fmt: skip

ROWS = 24  # the most that a layout here tells apart


def built(name):
    """The node of each case, the shapes of its outputs and of its inputs."""
    for k, case in enumerate(CASES[name]):
        operations.GENERATOR.manual_seed(k)
        result = case()
        first = result if isinstance(result, torch.Tensor) else result[0]
        node = first.grad_fn
        assert base_name(node) == name
        outs = [tuple(meta.shape) for meta in node._input_metadata]
        ins = [None if c is None else shape_of((c, nr)) for c, nr in node.next_functions]
        yield node, outs, ins, result  # which keeps the graph


def layouts(shape):
    """Samples in every dimension that can hold them, alone, with others inside or outside."""
    yield constant(1)
    for dim, size in enumerate(shape):
        below = math.prod(shape[dim + 1 :])
        for outer in range(1, size + 1):
            for inner in range(1, size + 1):
                n, rest = divmod(size, outer * inner)
                if rest or n < 2:
                    continue
                rows = torch.arange(n)
                yield Layout(below * inner, RowNumbers(rows))
                if inner > 1 or outer > 1:
                    continue
                yield Layout(below * inner, RowNumbers(rows.flip(0) + 1))
                if n > 2:
                    yield Layout(below * inner, RowNumbers(rows // 2))
                    yield Layout(below * inner, RowNumbers(rows.where(rows != 1, -1)))
    numel = math.prod(shape)
    yield compress((torch.arange(numel) % 5 - 1).view(shape))  # from no dimension


def given(outs, name):
    """The layouts of all outputs at once: equal ones, and some of them alone."""
    for layout in layouts(outs[0]):
        yield {0: layout}
    if name in MANY:
        for k, shape in enumerate(outs):
            for layout in layouts(shape):
                yield {k: layout}
        for many in zip(*map(layouts, outs), strict=False):
            yield dict(enumerate(many))


def compare(carried, asked, shape):
    """A carrier may give an element that no loss depends on to any row."""
    if carried == COUPLED:
        assert asked == SHARED
    elif isinstance(carried, Layout):
        assert isinstance(asked, Layout), f"{carried}, but rows meet"
        said, seen = carried.elements(shape), asked.elements(shape)
        assert torch.equal(said[seen >= 0], seen[seen >= 0])


@pytest.mark.parametrize("name", sorted(set(CASES) & set(CARRIERS)))
def test_carrier(name, monkeypatch):
    monkeypatch.setattr(
        "gradsurgery.capture.probe.compress",
        lambda elements: Layout(1, RowNumbers(elements.flatten())),
    )
    answered = shared = 0
    for node, shapes, ins, _graph in built(name):
        for outs in given(shapes, name):
            carried = (CARRIERS[name](node, outs, shapes, ins) + [None] * len(ins))[: len(ins)]
            asked = probe(node, outs, ins, ROWS)
            for shape, r, a in zip(ins, carried, asked, strict=True):
                if shape is None or r is None:
                    continue
                compare(r, a, shape)
                answered += isinstance(r, Layout) and not r.constant
                shared += r == SHARED == a
    assert answered or shared, "the carrier never had an answer"


def test_every_carrier_and_formula_has_a_case():
    assert set(CARRIERS) - set(CASES) == ONLY_CUDA | FLOAT32 | ON_RANKS
    assert set(FORMULAS) - set(CASES) == ONLY_CUDA & set(FORMULAS) | FLOAT32


def junctions(name):
    """Every input that rows share, with the gradients of the outputs."""
    for node, shapes, ins, _graph in built(name):
        out = shapes[0]
        if name not in FORMULAS and all(shape == out for shape in ins):
            continue  # each element meets one
        for layout in layouts(out):
            outs = {0: layout}
            for k, answer in enumerate(probe(node, outs, ins, ROWS)):
                shape = ins[k]
                if shape is None:
                    continue
                if answer == SHARED:
                    yield Junction(node, k, outs), out, shape
                elif layout.constant and isinstance(answer, Layout):
                    yield Junction(node, k, outs, answer), out, shape


@pytest.mark.parametrize("together", [False, True], ids=["at once", "as a GPU sums"])
@pytest.mark.parametrize("name", sorted(({*FORMULAS} | ELEMENTWISE) & {*CASES}))
def test_junction(name, together, monkeypatch):
    """What a junction keeps gives each row's gradient, as the operation's own backward does."""
    if together:
        monkeypatch.setattr(broadcast, "runs_triton", lambda *_, among: True)
    kept = met = later = 0
    for junction, out, shape in junctions(name):
        grad = torch.randn(out, dtype=torch.float64)
        grads = [grad, *[None] * (len(junction.node._input_metadata) - 1)]
        met += 1
        finish = prepare(junction, shape)
        use = of_broadcast(junction, grads, shape) if finish is None else finish(grad)
        if use is None:
            continue
        kept += 1
        later += isinstance(use, broadcast.Sum)
        actual = dense_rows(broadcast.added_up([use]), ROWS).reshape(ROWS, *shape)
        expected = torch.zeros(ROWS, *shape, dtype=torch.float64)
        one = one_by_one(junction, grads, shape)
        for row, block in zip(one.rows.tensor.tolist(), one.blocks, strict=True):
            expected[row] = block
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert kept or name not in FORMULAS, f"none of {met} junctions was kept"
    assert (later > 0) == (together and name in SUMS)


def test_a_forced_backend_serves_norms_and_convolutions(impl):
    layers = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 2), nn.Flatten()]
    model, images = nn.Sequential(*layers).double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    with gs.tape(model) as tape:
        losses = model(images).square().sum(1)
    gramian = tape.jacobian(losses).gramian()
    each = [torch.autograd.grad(model(x[None]).square().sum(), model.parameters()) for x in images]
    rows = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each])
    torch.testing.assert_close(gramian, rows @ rows.mT, rtol=1e-9, atol=1e-9)
