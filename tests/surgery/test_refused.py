"""What rules refuse, by name: Gramians, rows and options that are none."""

import pytest
import torch

import gradsurgery as gs
from gradsurgery import RULES
from tests.inputs import gaussian
from tests.surgery.properties import make, weighted


@pytest.mark.parametrize("name", RULES)
def test_refuses_what_is_no_gramian(name, impl):
    if not weighted(name):
        return
    rule = make(name)
    with pytest.raises(gs.InputError, match=r"gramian must be \[..., m, m\], got \[2, 3\]"):
        rule.weights(torch.ones(2, 3))
    with pytest.raises(gs.InputError, match="gramian must be a Tensor, got list"):
        rule.weights([[1.0]])
    with pytest.raises(gs.NonFiniteError, match="gramian is not finite in row 1"):
        rule.weights(torch.tensor([[1.0, 0], [0, float("nan")]]))


@pytest.mark.parametrize("name", RULES)
def test_names_the_row_that_is_not_finite(name, impl):
    if not weighted(name):
        return
    rows = torch.randn(3, 5)
    rows[2, 1] = float("inf")
    with pytest.raises(gs.NonFiniteError, match="row 2 is not finite"):
        make(name, 3)(rows)


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("pcgrad", {"reduction": "max"}, "reduction must be one of .* got 'max'"),
        ("gradvac", {"beta": 2.0}, r"beta must be in \[0, 1\], got 2.0"),
        ("cagrad", {"c": -1.0}, "c must be 0 or more, got -1.0"),
        ("cagrad", {"rescale": 3}, "rescale must be one of .* got 3"),
        ("nashmtl", {"max_norm": 0.0}, "max_norm must be above 0 or None, got 0.0"),
        ("fairgrad", {"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ("gem", {"margin": -1.0}, "margin must be 0 or more"),
        ("gdrgma", {"mix": 2.0}, r"mix must be in \[0, 1\], got 2.0"),
        ("gru", {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ("gru", {"momentum": 0.5, "granularity": "tensor"}, "momentum needs granularity='model'"),
        ("blur", {"gamma": -1.0}, "gamma must be 0 or more"),
        ("munba", {"objective": "up"}, "objective must be one of .* got 'up'"),
        ("orthograd", {"objective": "up"}, "objective must be one of .* got 'up'"),
        ("ltuharmonize", {"mode": "none"}, "mode must be one of .* got 'none'"),
        ("graddrop", {"leak": 2.0}, r"leak must be in \[0, 1\], got 2.0"),
        ("signagreement", {"threshold": 2.0}, r"threshold must be in \[0, 1\]"),
        ("trimmedmean", {"trim": -1}, "trim must be 0 or more"),
        ("salun", {"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ("mean", {"precondition": "adam"}, "precondition must be one of .* got 'adam'"),
        (
            "gru",
            {"momentum": 0.5, "precondition": "optimizer"},
            "GRU with momentum has no inner products to precondition",
        ),
        ("mean", {"granularity": "layer"}, "granularity must be one of .* got 'layer'"),
    ],
)
def test_refuses_unknown_options(name, options, message):
    with pytest.raises(gs.InputError, match=message):
        make(name, **options)


def test_refuses_rows_it_does_not_know(impl):
    rows = gaussian(3, 5)
    for call, message in (
        (lambda: gs.PCGrad()(rows, forget=0), "PCGrad has no forget rows"),
        (lambda: gs.Mean()(rows, 0), "Mean takes rows for"),
        (lambda: gs.UPGrad()(rows, memory=5), "memory=5 is out of range for 3 rows"),
        (lambda: gs.GEM()(rows, memory=slice(None)), "memory selects 3 of 3 rows"),
        (lambda: gs.OrthoGrad()(rows, forget=0, memory=0), r"both select rows \[0\]"),
        (lambda: gs.OrthoGrad()(rows, forget=0, memory=[1, 2]), "memory selects all retain rows"),
        (lambda: gs.Constant(values=[1.0])(rows), "values has 1 weights for 3 rows"),
        (lambda: gs.UPGrad(preference=[1.0])(rows), "preference must have 3 entries"),
        (lambda: gs.UPGrad(preference=[1.0, -1.0]), "preference must be 0 or more"),
        (lambda: gs.Mean()(list(rows)), r"these seem to be gradients: torch.stack\(rows\)"),
        (lambda: gs.GDRGMA()(rows), "GDRGMA needs retain_loss"),
        (lambda: gs.TrimmedMean(trim=2)(rows), "trim=2 leaves none of 3 rows"),
        (lambda: gs.GRU(momentum=0.5).weights(rows @ rows.mT), "call it on rows"),
        (lambda: gs.Mean().load_state_dict({"x": rows}), "Mean remembers"),
    ):
        with pytest.raises(gs.InputError, match=message):
            call()
