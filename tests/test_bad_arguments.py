"""Wrong arguments to everything public: one line that says what is wrong, and no other error."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery import ops
from gradsurgery.integrations.torchjd import aggregation as theirs
from gradsurgery.surgery import Weighting

ROWS = torch.tensor([[1.0, 2.0, 3.0], [-2.0, 1.0, 0.5]])
GRAM = ROWS @ ROWS.mT
MODEL = nn.Linear(3, 2)


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


BAD = {
    "None": None,
    "int": 3,
    "negative": -7,
    "float": 2.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "true": True,
    "str": "x" * 400,
    "bytes": b"xy",
    "object": object(),
    "type": int,
    "function": len,
    "module": MODEL,
    "dict": {},
    "dict of tensors": {"a": ROWS, "b": torch.ones(3, 2)},
    "dict of numbers": {1: 2},
    "empty list": [],
    "list of None": [None],
    "list of str": ["a", "b"],
    "list of numbers": [1.5, 2.5],
    "list of both": [ROWS, "x"],
    "uneven list": [ROWS, torch.ones(3, 2)],
    "iterator": iter([1, 2]),
    "set": {1, 2},
    "slice": slice("a"),
    "ndarray": np.ones((2, 3)),
    "scalar": torch.tensor(1.5),
    "vector": torch.arange(500.0),
    "matrix": torch.ones(2, 5),
    "cube": torch.ones(2, 3, 4),
    "no values": torch.ones(0, 0),
    "int tensor": torch.ones(2, 3, dtype=torch.int64),
    "bool tensor": torch.ones(2, 3, dtype=torch.bool),
    "complex tensor": torch.ones(2, 2, dtype=torch.complex64),
    "float8 tensor": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "sparse tensor": torch.eye(2).to_sparse(),
    "nested tensor": nested(torch.strided),
    "jagged tensor": nested(torch.jagged),
    "nan tensor": torch.full((2, 2), torch.nan),
    "meta tensor": torch.ones(2, 2, device="meta"),
}


def loss(model, batch):
    return model(batch).square().sum(1)


# each takes one wrong value somewhere
CALLS = {
    "gramian(x)": lambda x: gs.gramian(x),
    "gramian(per=x)": lambda x: gs.gramian(ROWS, per=x),
    "gramian(precise=x)": lambda x: gs.gramian(ROWS, precise=x),
    "combine(x)": lambda x: gs.combine(x, torch.ones(2)),
    "combine(weights=x)": lambda x: gs.combine(ROWS, x),
    "project_out(x)": lambda x: gs.project_out(x, ROWS),
    "project_out(rows=x)": lambda x: gs.project_out(ROWS[0], x),
    "project_out(rtol=x)": lambda x: gs.project_out(ROWS[0], ROWS, rtol=x),
    "project_out(refine=x)": lambda x: gs.project_out(ROWS[0], ROWS, refine=x),
    "orthonormalize(x)": lambda x: gs.orthonormalize(x),
    "orthonormalize(rtol=x)": lambda x: gs.orthonormalize(ROWS, rtol=x),
    "harmonize(x)": lambda x: gs.harmonize(x, ROWS[0]),
    "harmonize(retain=x)": lambda x: gs.harmonize(ROWS[0], x),
    "harmonize(mode=x)": lambda x: gs.harmonize(ROWS[0], ROWS[1], mode=x),
    "harmonize(per=x)": lambda x: gs.harmonize(ROWS[0], ROWS[1], per=x),
    "projection_weights(x)": lambda x: ops.projection_weights(x, torch.ones(2)),
    "projection_weights(products=x)": lambda x: ops.projection_weights(GRAM, x),
    "projection_weights(rtol=x)": lambda x: ops.projection_weights(GRAM, torch.ones(2), rtol=x),
    "cone_weights(x)": lambda x: ops.cone_weights(x, torch.ones(1, 2)),
    "cone_weights(products=x)": lambda x: ops.cone_weights(GRAM, x),
    "cone_weights(rtol=x)": lambda x: ops.cone_weights(GRAM, torch.ones(1, 2), rtol=x),
    "cone_weights(noise=x)": lambda x: ops.cone_weights(GRAM, torch.ones(1, 2), noise=x),
    "bargaining_weights(x)": lambda x: ops.bargaining_weights(x),
    "bargaining_weights(power=x)": lambda x: ops.bargaining_weights(GRAM, x),
    "bargaining_weights(rtol=x)": lambda x: ops.bargaining_weights(GRAM, rtol=x),
    "conflict_averse_weights(x)": lambda x: ops.conflict_averse_weights(x, 0.5),
    "conflict_averse_weights(c=x)": lambda x: ops.conflict_averse_weights(GRAM, x),
    "conflict_averse_weights(noise=x)": lambda x: ops.conflict_averse_weights(GRAM, 1, noise=x),
    "deconflict_weights(x)": lambda x: ops.deconflict_weights(x, torch.zeros(2, 2).long()),
    "deconflict_weights(order=x)": lambda x: ops.deconflict_weights(GRAM, x),
    "deconflict_weights(targets=x)": lambda x: ops.deconflict_weights(
        GRAM, torch.tensor([[0, 1], [0, 1]]), x
    ),
    "deconflict_weights(beta=x)": lambda x: ops.deconflict_weights(
        GRAM, torch.tensor([[0, 1], [0, 1]]), GRAM.clamp(-1, 1), x
    ),
    "eigen(x)": lambda x: ops.eigen(x),
    "diagnose(x)": lambda x: gs.diagnose(x),
    "diagnose(labels=x)": lambda x: gs.diagnose(GRAM, x),
    "OWM(x)": lambda x: gs.OWM(x),
    "OWM(alpha=x)": lambda x: gs.OWM(MODEL, alpha=x),
    "OWM(others=x)": lambda x: gs.OWM(MODEL, others=x),
    "NullSpace(rtol=x)": lambda x: gs.NullSpace(MODEL, rtol=x),
    "NullSpace.observe(loss=x)": lambda x: gs.NullSpace(MODEL).observe(
        ROWS, loss if callable(x) else x
    ),
    "NullSpace.load_state_dict(x)": lambda x: gs.NullSpace(MODEL).load_state_dict(x),
    "NullSpace.load_state_dict(weight=x)": lambda x: gs.NullSpace(MODEL).load_state_dict(
        {"weight": x}
    ),
}


def of_rule(name, rule):
    options = {
        "constant": {"values": [1.0, 2.0]},
        "gdrgma": {"mix": 0.3},
        "krum": {"n_byzantine": 0},
    }.get(name, {})
    for option in dataclasses.fields(rule):
        if option.init:
            yield (
                f"{name}({option.name}=x)",
                lambda x, key=option.name: rule(**{**options, key: x})(ROWS),
            )
    yield f"{name}()(x)", lambda x: rule(**options)(x)
    if issubclass(rule, Weighting):
        yield f"{name}().weights(x)", lambda x: rule(**options).weights(x)
    yield f"{name}().load_state_dict(x)", lambda x: rule(**options).load_state_dict(x)
    for key in rule.remembers:
        yield (
            f"{name}().load_state_dict({key}=x)",
            lambda x, key=key: rule(**options).load_state_dict({key: x}),
        )
    for role in rule.roles:
        yield f"{name}()(rows, {role}=x)", lambda x, key=role: rule(**options)(ROWS, **{key: x})
    yield f"{name}()(rows, x, x)", lambda x: rule(**options)(ROWS, x, x)


for _name, _rule in gs.RULES.items():
    CALLS.update(of_rule(_name, _rule))

CALLS.update(
    {
        "torchjd.UPGrad()(x)": lambda x: theirs.UPGrad()(x),
        "torchjd.UPGrad(x)": lambda x: theirs.UPGrad(x)(ROWS),
        "torchjd.Constant(x)": lambda x: theirs.Constant(x)(ROWS),
        "torchjd.CAGrad(x)": lambda x: theirs.CAGrad(x)(ROWS),
        "torchjd.GradDrop(x)": lambda x: theirs.GradDrop(x)(ROWS),
        "torchjd.TrimmedMean(x)": lambda x: theirs.TrimmedMean(x)(ROWS),
        "torchjd.TrimmedMean()(x)": lambda x: theirs.TrimmedMean(0)(x),
        "torchjd.Krum(x)": lambda x: theirs.Krum(x)(ROWS),
        "torchjd.PCD(x)": lambda x: theirs.PCD(x)(ROWS),
        "torchjd.CRMOGMWeighting(x)": lambda x: theirs.CRMOGMWeighting(x),
        "torchjd.MGDAWeighting()(x)": lambda x: theirs.MGDAWeighting()(x),
    }
)

SIGNATURE = re.compile(r"argument|positional|keyword")


def said(call, value):
    """What the call says of a value that it does not take; None if it takes it."""
    try:
        call(value)
    except gs.InputError as error:
        return str(error)
    except TypeError as error:
        if SIGNATURE.search(str(error)):
            return str(error)
        raise
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_says_in_a_line_what_is_wrong(name):
    refused = 0
    for kind, value in BAD.items():
        if kind == "iterator":
            value = iter([1, 2])
        message = said(CALLS[name], value)
        if message is None:
            continue
        refused += 1
        assert "\n" not in message and len(message) <= 300, (kind, message)
        assert "tensor(" not in message and "0x" not in message, (kind, message)
    assert refused > len(BAD) / 2


def test_a_mapping_of_blocks_is_rows_by_name():
    blocks = {"a": ROWS, "b": torch.ones(2, 2, 2)}
    for rule in (gs.UPGrad(), gs.SAGO(), gs.GRU(momentum=0.5), gs.UPGrad(granularity="tensor")):
        expected, found = rule(list(blocks.values())), rule(blocks)
        assert list(found) == ["a", "b"]
        assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))


def test_a_role_is_given_once():
    with pytest.raises(gs.InputError, match="OrthoGrad is given forget twice"):
        gs.OrthoGrad()(ROWS, 0, forget=1)


def test_a_seed_too_large_is_named():
    with pytest.raises(gs.InputError, match="seed must fit into 64 bits"):
        gs.PCGrad(seed=1 << 70)(ROWS)
