"""Means over the samples of several ranks, where hooks or Functions change gradients.

The step is that of one process, or is refused.
"""

import warnings

import torch
import torch.distributed as dist

import gradsurgery as gs
from tests.ranks.processes import run
from tests.test_step_hooks import HOOKS, KINDS, LINEAR, X

FORGET = [X[:3], X[3:4]]
RETAIN = [X[4:5], X[5:]]
BATCH = [X[:2], X[2:]]


def _stepped(kind, where, change, rank, together):
    rule, loss, network, _ = KINDS[kind]
    model = network(where, change)
    group = False if rank is None else dist.group.WORLD
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"together": together} if "mean" in kind else {}
    surgeon = gs.Surgeon(model, optimizer, rule(), process_group=group, **options)
    if rule is gs.UPGrad:
        surgeon.step(loss=loss, batch=X if rank is None else BATCH[rank])
    elif rank is None:
        surgeon.step(loss=loss, forget=X[:4], retain=X[4:])
    else:
        surgeon.step(loss=loss, forget=FORGET[rank], retain=RETAIN[rank])
    return [p.detach() for p in model.parameters()]


def _work(rank):
    warnings.simplefilter("ignore")
    found = {}
    for where in ("activation", "parameter", "Function"):
        for kind in KINDS:
            for hook, change in HOOKS.items():
                for together in (True, False):
                    case = where, kind, hook, together
                    try:
                        whole = _stepped(kind, where, change, None, together)
                    except gs.CoupledSamplesError:
                        continue
                    try:
                        mine = _stepped(kind, where, change, rank, together)
                    except gs.InputError as error:
                        found[case] = str(error)
                    else:
                        found[case] = all(map(torch.allclose, mine, whole))
    return found


def test_a_step_is_that_of_one_process_or_refused(tmp_path):
    found = run(_work, 2, tmp_path)
    assert len(found[0]) > 100
    for case in found[0]:
        where, _, hook, _ = case
        for each in found:
            if hook in LINEAR[where]:
                assert each[case] is True, case
            else:
                assert "not linear" in str(each[case]), case
