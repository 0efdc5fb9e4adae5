"""MoDo, SDMGrad and ExcessMTL of gs.integrations.torchjd, whose weights move, against torchjd's."""

import pytest
import torch

import gradsurgery as gs
from gradsurgery.integrations.torchjd import aggregation as ours
from tests.inputs import gaussian

theirs = pytest.importorskip("torchjd.aggregation")

OPTIONS = [
    ("MoDoWeighting", {}),
    ("MoDoWeighting", {"gamma": 0.02, "rho": 0.3}),
    # with an lr of 10, the default, theirs itself makes 0.1 of 1e-13 in some products
    ("SDMGradWeighting", {"lr": 0.3}),
    (
        "SDMGradWeighting",
        {
            "lr": 0.4,
            "momentum": 0.2,
            "n_iter": 5,
            "lambda_": 0.7,
            "pref_vector": torch.tensor([0.5, 0.2, 0.3]),
        },
    ),
    ("ExcessMTLWeighting", {"robust_step_size": 0.05}),
    ("ExcessMTLWeighting", {"n_warmup_steps": 3}),
    ("ExcessMTL", {"robust_step_size": 0.05}),
    ("ExcessMTL", {"robust_step_size": 0.3, "n_warmup_steps": 2}),
]
EXCESS = ("ExcessMTL", "ExcessMTLWeighting")


def stats(name, m=3, calls=6):
    """Matrices, or products of two batches that share a part, large beside theirs' constants."""
    if name in EXCESS:
        return [3 * gaussian(m, 7) for _ in range(calls)]
    shared = 100 * gaussian(m, 20)
    pairs = [[shared + 50 * gaussian(m, 20) for _ in range(2)] for _ in range(calls)]
    scale = 1 if name.startswith("SDM") else 0.01  # of MoDo steps are long or short
    return [scale * (a @ b.mT) for a, b in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name,options", OPTIONS)
def test_goes_on_as_theirs(name, options, dtype):
    """Theirs in float64."""
    found, expected = (getattr(kind, name)(**options) for kind in (ours, theirs))

    def check(m):
        results = []
        for stat in stats(name, m):
            results.append(found(stat.to(dtype)))
            assert results[-1].dtype == dtype
            wanted = expected(stat.to(dtype).double()).to(dtype)
            torch.testing.assert_close(results[-1], wanted, rtol=1e-6, atol=1e-6)
        assert not torch.equal(results[-1], results[-2])

    check(3)
    for each in (found, expected):
        each.reset()
    check(3)
    if "pref_vector" not in options:  # of other rows all begins anew
        check(4)


@pytest.mark.parametrize("name,options", OPTIONS)
def test_reset_and_state_dict(name, options):
    kind = getattr(ours, name)
    rule, resumed = kind(**options), kind(**options)
    given = stats(name)
    first = [rule(stat) for stat in given]
    resumed.load_state_dict(rule.state_dict())
    for stat in stats(name):
        assert torch.equal(rule(stat), resumed(stat))
    rule.reset()
    assert all(torch.equal(rule(stat), known) for stat, known in zip(given, first, strict=True))


def test_what_is_kept_of_a_matrix_is_saved_once():
    rule = ours.ExcessMTL()
    rule(gaussian(3, 7))
    (state,) = rule.state_dict().values()
    assert sum(value.numel() == 21 for value in state.values()) == 1


def test_a_product_of_batches_has_an_order():
    """K = [[1, 1], [0, 2]] and its transpose, from (1/2, 1/2), without rho.

    K w = (1, 1) leaves w; Kᵀ w = (1/2, 3/2) gives w - 0.25 Kᵀ w = (3/8, 1/8), and w as (5/8, 3/8).
    """
    product = torch.tensor([[1.0, 1], [0, 2]])
    weights = ours.MoDoWeighting(gamma=0.25, rho=0.0)(product)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5]))
    weights = ours.MoDoWeighting(gamma=0.25, rho=0.0)(product.mT)
    torch.testing.assert_close(weights, torch.tensor([0.625, 0.375]))


# ExcessMTL


@pytest.mark.parametrize("warm", [0, 1, 2])
def test_excess_risks_by_hand(warm):
    """g = ((3, 4), (1, 0)), then ((4, 3), (0, 2)): roots ((3, 4), (1, 0)), then ((5, 5), (1, 2)).

    E = (9/3 + 16/4, 1) = (7, 1), then (16/5 + 9/5, 4/2) = (5, 2).
    """
    one = torch.tensor([[3.0, 4], [1, 0]]).double()
    two = torch.tensor([[4.0, 3], [0, 2]]).double()
    rule = ours.ExcessMTLWeighting(0.5, warm)
    found = torch.stack([rule(one), rule(two)])
    first, ratio = torch.tensor([7.0, 1]).double(), torch.tensor([5 / 7, 2]).double()
    even = torch.zeros(2).double()
    logs = {0: [first, first + ratio], 1: [even, ratio], 2: [even, even]}[warm]
    torch.testing.assert_close(found, (0.5 * torch.stack(logs)).softmax(1))
    # (6, 1.5) are the means of two; of a third that is as the second, E is (16 + 9) / sqrt(41 or
    # 34), and 4 / sqrt(8)
    third = torch.tensor([16 / 41**0.5 + 9 / 34**0.5, 4 / 8**0.5]).double()
    base = {0: first, 1: first, 2: torch.tensor([6.0, 1.5]).double()}[warm]
    wanted = (0.5 * (logs[1] + third / base)).softmax(0)
    torch.testing.assert_close(rule(two), wanted)
    rule.reset()
    torch.testing.assert_close(ours.ExcessMTL(0.5, warm)(one), rule(one) @ one)


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1e9, 1e300])
def test_excess_risks_of_any_scale_are_the_same(scale):
    """Where theirs adds to small squares what they do not have."""
    first, scaled, real = (
        kind.ExcessMTLWeighting(n_warmup_steps=2) for kind in (ours, ours, theirs)
    )
    wanted = other = torch.empty(0)
    for matrix in stats("ExcessMTL"):
        wanted, found, other = first(matrix), scaled(scale * matrix), real(scale * matrix)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert scale == 1e9 or not torch.allclose(other, wanted, rtol=1e-3)


def test_a_task_that_began_without_risk_takes_all_weight_as_in_theirs():
    found, expected = (kind.ExcessMTLWeighting() for kind in (ours, theirs))
    for scale in (0, 0, 1e-4, 3, 1):
        matrix = gaussian(3, 7)
        matrix[1] *= scale
        for weights in (found(matrix), expected(matrix)):
            assert scale == 0 or weights.tolist() == [0, 1, 0]


def test_a_weight_that_vanished_returns():
    """In theirs it stays zero."""
    calls = [torch.tensor([[900.0], [1]])] + 500 * [torch.tensor([[0.0], [200]])]
    for kind, wanted in ((ours, [0, 1]), (theirs, [1, 0])):
        weighting = kind.ExcessMTLWeighting()
        assert [weighting(matrix) for matrix in calls][-1].tolist() == wanted


def test_rows_of_no_columns_and_no_rows():
    torch.testing.assert_close(ours.ExcessMTLWeighting()(torch.ones(4, 0)), torch.full((4,), 0.25))
    assert ours.ExcessMTL()(torch.ones(0, 3)).tolist() == [0, 0, 0]
    assert ours.MoDoWeighting()(torch.ones(0, 0)).shape == (0,)


def test_weights_carry_no_gradient():
    matrix = gaussian(3, 7).requires_grad_()
    assert not ours.ExcessMTLWeighting()(matrix).requires_grad


@pytest.mark.parametrize("name", ["MoDoWeighting", "SDMGradWeighting", *EXCESS])
def test_what_is_not_finite_leaves_the_state(name):
    rule, other = getattr(ours, name)(), getattr(ours, name)()
    good = stats(name)
    wrong = good[0].clone()
    wrong[1, 2] = float("nan")
    assert torch.equal(rule(good[0]), other(good[0]))
    with pytest.raises(gs.NonFiniteError, match="is not finite"):
        rule(wrong)
    assert torch.equal(rule(good[1]), other(good[1]))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: ours.MoDoWeighting(gamma=0.0), "gamma must be above 0, got 0.0"),
        (lambda: ours.MoDoWeighting(rho=-1.0), "rho must be 0 or more, got -1.0"),
        (lambda: ours.SDMGradWeighting(lr=0.0), "lr must be above 0, got 0.0"),
        (lambda: ours.SDMGradWeighting(momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: ours.SDMGradWeighting(n_iter=0), "n_iter must be 1 or more, got 0"),
        (lambda: ours.SDMGradWeighting(lambda_=-0.1), "lambda_ must be 0 or more, got -0.1"),
        (lambda: ours.SDMGradWeighting(lambda_="a"), "lambda_ must be a number, got 'a'"),
        (
            lambda: ours.SDMGradWeighting(pref_vector=torch.ones(2, 2)),
            "pref_vector must be a vector of numbers",
        ),
        (
            lambda: ours.SDMGradWeighting(pref_vector=torch.ones(2))(torch.eye(3)),
            "preference must have 3 entries, one per row, got 2",
        ),
        (lambda: ours.ExcessMTL(0.0), "robust_step_size must be above 0, got 0.0"),
        (lambda: ours.ExcessMTL(n_warmup_steps=-1), "n_warmup_steps must be 0 or more, got -1"),
        (lambda: ours.ExcessMTL(n_warmup_steps=0.5), "n_warmup_steps must be a whole number"),
        (lambda: ours.MoDoWeighting()(torch.ones(2, 3)), r"must be \[..., m, m\], got \[2, 3\]"),
        (lambda: ours.ExcessMTL()(torch.ones(3)), r"matrix must be \[m, n\], got \[3\]"),
        (
            lambda: ours.ExcessMTLWeighting()(torch.ones(2, 3).long()),
            "matrix must be floating point, got torch.int64",
        ),
        (
            lambda: ours.CRMOGMWeighting(ours.MoDoWeighting()),
            "weighting must not keep weights of its own, as MoDoWeighting does",
        ),
        (
            lambda: ours.CRMOGMWeighting(ours.ExcessMTLWeighting()),
            "weighting must not keep weights of its own, as ExcessMTLWeighting does",
        ),
        (lambda: ours.CRMOGMWeighting(ours.ExcessMTL()), "weighting must be one of this module"),
    ],
)
def test_refuses_by_name(call, message):
    with pytest.raises(gs.InputError, match=message):
        call()
