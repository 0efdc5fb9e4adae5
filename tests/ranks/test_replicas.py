"""Ranks that have replicas: rows, Gramians and parameters are those of one process."""

import pytest
import torch
from torch import nn

from tests.ranks.cases import RULES, SHARES, Network, assert_alike, trained
from tests.ranks.processes import run


def _ddp(**options):
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


WRAPPED = {
    "plain": None,
    "DDP": _ddp(),
    "DDP, static graph": _ddp(static_graph=True),
    "DDP, unused parameters": _ddp(find_unused_parameters=True),
    "DDP, gradient views": _ddp(gradient_as_bucket_view=True),
}
# how rows are passed: as is counted, only rows, tiles where they can be (multiplications a second
# and bytes a second between ranks, as `table.SPEED` has them)
WAYS = {"counted": None, "rows": (1e-30, 1e-30), "tiles": (1e30, 1.0)}


def _cases(ranks):
    found = {("plain", rule, "counted"): rule for rule in RULES}
    if ranks == 2:
        found |= {
            (wrap, rule, "counted"): rule for wrap in WRAPPED for rule in ("OrthoGrad", "UPGrad")
        }
    found |= {("plain", rule, way): rule for way in WAYS for rule in ("OrthoGrad", "PCGrad")}
    return list(found)


def _work(rank, ranks):
    from gradsurgery.ranks import table

    counted, found = table.SPEED["cpu"], {}
    for wrap, rule, way in _cases(ranks):
        table.SPEED["cpu"] = WAYS[way] or counted
        for k, sizes in enumerate(SHARES[ranks]):
            found[wrap, rule, way, k] = trained(RULES[rule](), sizes, rank, wrap=WRAPPED[wrap])
    return found


@pytest.fixture(scope="module", params=sorted(SHARES))
def every(request, tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    return request.param, run(_work, request.param, folder, request.param)


@pytest.mark.parametrize("rule", RULES)
def test_many_ranks_are_one_process(every, rule):
    ranks, found = every
    for k, sizes in enumerate(SHARES[ranks]):
        expected = trained(RULES[rule](), sizes)
        for case in _cases(ranks):
            if case[1] == rule:
                assert_alike([each[(*case, k)] for each in found], expected)


def _in_float32(rank, ranks):
    network = lambda: Network(torch.float32)  # noqa: E731  which is not pickled
    return [
        trained(RULES[rule](), sizes, rank, network=network, steps=20)
        for rule in ("OrthoGrad", "UPGrad")
        for sizes in SHARES[ranks]
    ]


def test_in_float32(tmp_path):
    found = run(_in_float32, 2, tmp_path, 2)
    expected = _in_float32_alone()
    for k, one in enumerate(expected):
        assert_alike([each[k] for each in found], one, gramian=1e-5, parameters=1e-5)


def _in_float32_alone():
    return [
        trained(RULES[rule](), sizes, network=lambda: Network(torch.float32), steps=20)
        for rule in ("OrthoGrad", "UPGrad")
        for sizes in SHARES[2]
    ]
