"""gs.integrations.torchjd.aggregation against the real torchjd."""

import inspect

import pytest
import torch

import gradsurgery as gs
from gradsurgery.integrations.torchjd import aggregation as ours
from tests.inputs import gaussian, signed

theirs = pytest.importorskip("torchjd.aggregation")

# arguments, and how near results are: those of the definition to theirs with small constants
RULES = {
    "UPGrad": ({}, 3e-3),
    "DualProj": ({}, 3e-3),
    "CAGrad": ({"c": 0.5}, 3e-3),
    "MGDA": ({"epsilon": 1e-9, "max_iters": 20000}, 1e-2),
    "IMTLG": ({}, 1e-7),
    "AlignedMTL": ({}, 1e-7),
    "ConFIG": ({}, 1e-7),
    "FairGrad": ({"alpha": 2.0}, 1e-4),
    "NashMTL": ({"n_tasks": 4, "max_norm": 0.0, "optim_niter": 100}, 5e-2),
    "Mean": ({}, 1e-12),
    "Sum": ({}, 1e-12),
    "TrimmedMean": ({"trim_number": 1}, 1e-12),
    "Constant": ({"weights": torch.tensor([1.0, 2, 3, 4]).double()}, 1e-12),
    "Krum": ({"n_byzantine": 0, "n_selected": 3}, 1e-12),
    "PCD": ({}, 1e-7),
    "ExcessMTL": ({"robust_step_size": 0.1}, 1e-6),
}
# of products of two batches, as weightings alone
CROSS = {"MoDo": ({}, 1e-12), "SDMGrad": ({}, 1e-4)}
# of other weightings
WRAPPING = ["CRMOGMWeighting"]
WEIGHTINGS = [n for n in dir(ours) if n.endswith("Weighting") and n not in ("Weighting", *WRAPPING)]
KINDS = {"Aggregator", "WeightedAggregator", "GramianWeightedAggregator", "Weighting"}
RANDOM = {"PCGrad": {}, "GradVac": {}, "Random": {}, "GradDrop": {}}


def make(module, name, arguments):
    try:
        return getattr(module, name)(**arguments)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.filterwarnings("ignore")  # cvxpy's
@pytest.mark.parametrize("name", RULES)
def test_gives_what_theirs_gives(name):
    arguments, tolerance = RULES[name]
    for seed in range(3):
        torch.manual_seed(seed)
        matrix = signed(gaussian(4, 9)) + 0.4
        expected = make(theirs, name, arguments)(matrix)
        found = make(ours, name, arguments)(matrix)
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings_take_and_return_what_theirs_do(name, dtype):
    rule = name.removesuffix("Weighting")
    arguments, tolerance = {**RULES, **CROSS}.get(rule) or (RANDOM[rule], None)
    matrix = (signed(gaussian(4, 9)) + 0.4).to(dtype)
    expected = make(theirs, name, arguments)(matrix @ matrix.mT)
    weights = make(ours, name, arguments)(matrix @ matrix.mT)
    assert (weights.shape, weights.dtype, weights.device) == (
        expected.shape,
        dtype,
        expected.device,
    )
    if tolerance is not None:
        assert (weights - expected).norm() <= max(tolerance, 1e-5) * expected.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-7)])
@pytest.mark.parametrize(
    "mixture",
    {
        "dependent": [[1, 0], [0, 1], [1, 1]],
        "multiples": [[1, 0], [2, 0], [5, 0]],
        "duplicates": [[1, 0], [1, 0], [0, 1]],
        "opposed": [[1, 0], [-3, 0], [0, 1]],
        "zero": [[1, 0], [0, 0], [0, 1], [2, -1]],
        "nothing": [[0, 0], [0, 0]],
    }.values(),
    ids=str,
)
def test_imtlg_of_dependent_rows_is_theirs(mixture, dtype, tolerance):
    for _ in range(4):
        matrix = torch.tensor(mixture).to(dtype) @ torch.randint(-9, 10, (2, 6)).to(dtype)
        expected, found = theirs.IMTLG()(matrix), ours.IMTLG()(matrix)
        assert (found - expected).norm() <= tolerance * max(expected.norm(), matrix.norm())
        gram = matrix @ matrix.mT
        expected, found = theirs.IMTLGWeighting()(gram), ours.IMTLGWeighting()(gram)
        assert (found - expected).norm() <= tolerance * max(expected.norm(), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_imtlg_of_rows_that_cancel_is_zero(dtype):
    """As theirs, but for float32, where theirs divides rounding by rounding."""
    matrix = gaussian(1, 6).to(dtype)
    matrix = torch.cat([matrix, -matrix])
    assert not ours.IMTLG()(matrix).any()
    assert dtype == torch.float32 or not theirs.IMTLG()(matrix).any()


def test_two_conflicting_rows_need_no_order():
    matrix = torch.tensor([[-4.0, 1, 1], [6, 1, 1]])
    torch.testing.assert_close(ours.PCGrad()(matrix), theirs.PCGrad()(matrix))
    torch.testing.assert_close(ours.GradVac()(matrix), theirs.GradVac()(matrix))


@pytest.mark.parametrize("name", RANDOM)
def test_the_global_seed_decides(name):
    matrix = signed(gaussian(6, 9))
    found = []
    for seed in (1, 1):
        torch.manual_seed(seed)
        found.append(getattr(ours, name)()(matrix))
    assert torch.equal(*found)


def test_reset_forgets():
    matrix = signed(gaussian(4, 9))
    rule = ours.GradVac()
    first = rule(matrix)
    rule(matrix + 1)
    rule.reset()
    assert torch.equal(rule(matrix), first)


@pytest.mark.parametrize("name", [*RULES, *RANDOM])
def test_takes_the_same_arguments(name):
    expected = set(inspect.signature(getattr(theirs, name)).parameters) - {"f"}
    arguments = dict.fromkeys(expected)
    given = RULES.get(name, (RANDOM.get(name, {}),))[0]
    defaults = inspect.signature(getattr(theirs, name)).parameters
    for argument in arguments:
        value = given.get(argument, defaults[argument].default)
        arguments[argument] = 0.0 if argument == "leak" else value
    getattr(ours, name)(**arguments)


def test_serves_their_backward():
    autojac = pytest.importorskip("torchjd.autojac")
    x, found = torch.randn(4, 3), []
    model = torch.nn.Linear(3, 2)
    for rule in (make(theirs, "UPGrad", {}), ours.UPGrad()):
        for optimized in (False, True):
            model.zero_grad()
            autojac.backward(list(model(x).square().mean(0)))
            weights = autojac.jac_to_grad(
                list(model.parameters()), rule, optimize_gramian_computation=optimized
            )
            found.append(torch.cat([weights, *(p.grad.flatten() for p in model.parameters())]))
    for result in found[1:]:
        torch.testing.assert_close(result, found[0], rtol=3e-3, atol=1e-4)


def test_are_of_their_kinds():
    assert isinstance(ours.UPGrad(), theirs.GramianWeightedAggregator)
    assert isinstance(ours.UPGradWeighting(), theirs.Weighting)
    assert isinstance(ours.GradDrop(), theirs.Aggregator)
    assert isinstance(ours.GradDrop(), ours.Aggregator)
    for kind in ("Aggregator", "WeightedAggregator", "GramianWeightedAggregator"):
        assert isinstance(ours.UPGrad(), getattr(ours, kind))
        assert isinstance(ours.UPGrad(), getattr(theirs, kind))


def test_has_all_their_names_but_those():
    """A name that is new in theirs is to be added, or to be left out with a reason."""
    left_out: dict[str, str] = {}
    public = {n for n, v in vars(theirs).items() if n[0] != "_" and not inspect.ismodule(v)}
    assert {*public, *theirs.__all__} == {*ours.__all__, *left_out}
    assert all(hasattr(ours, name) for name in ours.__all__)


@pytest.mark.parametrize("name", sorted({*ours.__all__} - KINDS - {"GradDrop"}))  # it has no f
def test_arguments_have_their_names_order_and_defaults(name):
    expected = inspect.signature(getattr(theirs, name)).parameters.values()
    found = [*inspect.signature(getattr(ours, name)).parameters.values()][: len(expected)]
    assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected]


def test_krum_leaves_out_what_theirs_does():
    for _ in range(5):
        honest = (1 + 0.1 * gaussian(6, 9)).float()
        matrix = torch.cat([honest, 50 * gaussian(2, 9).float()])
        for n_selected in (1, 3, 6):
            options = {"n_byzantine": 2, "n_selected": n_selected}
            found, expected = (kind.Krum(**options)(matrix) for kind in (ours, theirs))
            assert found.norm() < 4 and expected.norm() < 4
            if n_selected == 6:  # all that are left
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.4])
def test_pcd_goes_on_as_theirs(tau):
    found, expected = (kind.PCD(tau=tau, beta=0.9) for kind in (ours, theirs))
    matrices = [signed(gaussian(4, 9)) for _ in range(6)]
    matrices[3][3] = -matrices[3][2]
    for matrix in matrices:
        torch.testing.assert_close(found(matrix), expected(matrix), rtol=1e-6, atol=1e-6)
    for each in (found, expected):
        each.reset()
    again = matrices[0]
    torch.testing.assert_close(found(again), expected(again), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["MeanWeighting", "IMTLGWeighting"])
@pytest.mark.parametrize("given", [None, torch.tensor([0.1, 0.2, 0.3, 0.4]).double()])
def test_crmogm_goes_on_as_theirs(name, given):
    found, expected = (
        kind.GramianWeightedAggregator(
            kind.CRMOGMWeighting(getattr(kind, name)(), alpha=0.7, initial_weights=given)
        )
        for kind in (ours, theirs)
    )
    matrices = [signed(gaussian(4, 9)) + 0.4 for _ in range(4)]
    for matrix in matrices:
        torch.testing.assert_close(found(matrix), expected(matrix), rtol=1e-7, atol=1e-9)
    for each in (found, expected):
        each.gramian_weighting.reset()
    again = matrices[0]
    torch.testing.assert_close(found(again), expected(again), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_aggregators_of_any_weighting(dtype):
    matrix = gaussian(4, 9).to(dtype)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    for kind in (ours, theirs):
        mean = ours.WeightedAggregator(kind.MeanWeighting())(matrix)
        assert mean.dtype == dtype
        torch.testing.assert_close(mean, matrix.mean(0), **tolerance)
    smooth = ours.CRMOGMWeighting(ours.MeanWeighting())
    torch.testing.assert_close(ours.WeightedAggregator(smooth)(matrix), matrix.mean(0), **tolerance)
    made = ours.GramianWeightedAggregator(ours.UPGradWeighting())
    assert torch.equal(made(matrix), ours.UPGrad()(matrix))
    again = ours.GramianWeightedAggregator(ours.CRMOGMWeighting(ours.GradVacWeighting()))
    again(matrix)
    resumed = ours.GramianWeightedAggregator(ours.CRMOGMWeighting(ours.GradVacWeighting()))
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(again(matrix), resumed(matrix))


def test_state_is_saved_with_the_module():
    matrix = signed(gaussian(4, 9))
    rule, resumed = ours.GradVac(), ours.GradVac()
    rule(matrix)
    resumed.load_state_dict(rule.state_dict())
    assert torch.equal(rule(matrix + 1), resumed(matrix + 1))


def test_small_gradients_keep_their_directions():
    """Where theirs is the mean of the rows."""
    matrix = 1e-6 * torch.tensor([[1.0, 0], [-0.5, 0.1]]).double()
    update = ours.UPGrad()(matrix)
    assert (matrix @ update >= -1e-9 * update.norm() * matrix.norm(dim=1)).all()
    mean = make(theirs, "UPGrad", {})(matrix)
    assert (matrix @ mean).min() < 0


def test_refuses_what_it_cannot_serve():
    for call, message in (
        (lambda: ours.UPGrad()(torch.ones(3)), r"matrix must be \[m, n\], got \[3\]"),
        (lambda: ours.UPGradWeighting()(torch.ones(3)), r"gramian must be a matrix, got \[3\]"),
        (lambda: ours.AlignedMTL(scale_mode="rmse"), "scale_mode must be 'min', got 'rmse'"),
        (
            lambda: ours.GradDrop(leak=torch.ones(2)),
            "leak must be a number",
        ),
        (
            lambda: ours.NashMTL(2, update_weights_every=2),
            "update_weights_every must be 1: every call is solved",
        ),
        (lambda: ours.PCD(tau=torch.ones(2)), "tau must be a number, the same for all rows"),
        (
            lambda: ours.CRMOGMWeighting(theirs.MeanWeighting()),
            "weighting must be one of this module, got MeanWeighting",
        ),
        (lambda: ours.WeightedAggregator(1), "weighting must be a Module, got int"),
        (lambda: ours.GramianWeightedAggregator(len), "gramian_weighting must be a Module"),
        (lambda: ours.KrumWeighting(0)(torch.eye(2)), "Krum needs 3 rows or more"),
    ):
        with pytest.raises(gs.InputError, match=message):
            call()
