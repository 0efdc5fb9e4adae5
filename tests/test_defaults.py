"""torch's default device and dtype change nothing of what is computed."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import gradsurgery as gs
from tests.inputs import gaussian, signed
from tests.surgery.properties import make


def calls():
    """Results by name, of tensors made beforehand."""
    torch.manual_seed(0)
    rows = signed(gaussian(4, 9)) + 0.3
    single, gram = rows.float(), rows @ rows.mT
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loss(net, batch):
        return net(batch).square().sum(1)

    def diagnosis():
        found = gs.diagnose(gram)
        return [found.norms, found.cosines, found.removed, str(found), found.conflicts]

    def step():
        kept = gs.NullSpace(model)
        kept.observe(single[:1], loss)
        surgeon = gs.Surgeon(model, optimizer, gs.PCGrad(), project=kept)
        info = surgeon.step(batch=single, loss=loss)
        return [info.gramian, info.cosines, str(info.diagnosis), *model.parameters()]

    known = {"diagnose": diagnosis, "step": step}
    for name in gs.RULES:
        known[name] = lambda name=name: [make(name, 4)(given) for given in (rows, single)]
    known["project_out"] = lambda: gs.project_out(single[0], single[1:])
    known["orthonormalize"] = lambda: list(gs.orthonormalize(single))
    known["harmonize"] = lambda: list(gs.harmonize(single[0], single[1], mode="both"))
    known["gramian"] = lambda: gs.gramian(single)
    known["combine"] = lambda: gs.combine(single, rows[:, 0])
    return known


@contextmanager
def default(kind):
    if kind == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["meta", torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", calls())
def test_defaults_change_nothing(name, kind):
    expected = calls()[name]()
    call = calls()[name]
    with default(kind):
        found = call()
    for a, b in zip(*map(pytree.tree_leaves, (found, expected)), strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b
