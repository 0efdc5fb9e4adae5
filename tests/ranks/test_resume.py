"""Runs of several ranks that are saved by torch.distributed.checkpoint, and go on from there."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import gradsurgery as gs
from tests.ranks.cases import Network, assert_alike, batches, loss, trained, whole
from tests.ranks.processes import run

RULES = {
    "PCGrad": gs.PCGrad,
    "GradVac": gs.GradVac,
    "GradVac, tensor": lambda: gs.GradVac(granularity="tensor"),
    "GradDrop": gs.GradDrop,
    "GRU": gs.GRU,
    "MoDo": gs.MoDo,
    "OrthoGrad": gs.OrthoGrad,  # which remembers nothing
}
# of a parameter of one value cosines are 1 or -1, and turning rows by these loses digits
LOOSE = {"GradVac, tensor": 1e-9}
DDP = nn.parallel.DistributedDataParallel
WRAPPED = {"plain": None, "DDP": DDP}
CASES = [(rule, "plain") for rule in RULES] + [("GradVac", "DDP"), ("GRU", "DDP")]
STEPS, SAVED = 6, 3
# of each number of ranks, how the same batches are dealt out: forget, and the other
SHARES = {1: ((6,), (5,)), 2: ((2, 4), (3, 2)), 3: ((2, 3, 1), (3, 0, 2))}


def _surgeon(rule, wrap):
    model = Network()
    wrapped = model if wrap is None else wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    group = dist.group.WORLD if wrap is None else None
    return model, gs.Surgeon(wrapped, optimizer, rule, process_group=group)


def _steps(surgeon, sizes, rank, steps):
    found = []
    for step in steps:
        info = surgeon.step(loss=loss, **batches(surgeon.rule, sizes, step, rank))
        found.append((info.gramian, info.losses, info.cosines))
    return found


def _state(surgeon):
    """What is saved; the rule's in a tuple, which is kept whole, for its sizes are not known."""
    model, optimizer = get_state_dict(surgeon.model, surgeon.optimizer)
    return {"model": model, "optimizer": optimizer, "rule": (surgeon.rule.state_dict(),)}


def _folder(folder, rule, wrap):
    return f"{folder}/{rule}, {wrap}"


def _saved(rank, ranks, folder):
    """The whole run, saved in the middle."""
    found = {}
    for name, wrap in CASES:
        model, surgeon = _surgeon(RULES[name](), WRAPPED[wrap])
        infos = _steps(surgeon, SHARES[ranks], rank, range(SAVED))
        save(_state(surgeon), checkpoint_id=_folder(folder, name, wrap))
        infos += _steps(surgeon, SHARES[ranks], rank, range(SAVED, STEPS))
        found[name, wrap] = whole(model), infos
    return found


def _resumed(rank, ranks, folder):
    """The second half, from another process's files."""
    found = {}
    # what one kind of model saved, the other may load
    for name, saved, wrap in [(*case, wrap) for case in CASES for wrap in WRAPPED]:
        if (name, wrap) not in CASES:
            continue
        model, surgeon = _surgeon(RULES[name](), WRAPPED[wrap])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        state = _state(surgeon)
        load(state, checkpoint_id=_folder(folder, name, saved))
        set_state_dict(
            surgeon.model,
            surgeon.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        surgeon.rule.load_state_dict(*state["rule"])
        infos = _steps(surgeon, SHARES[ranks], rank, range(SAVED, STEPS))
        found[name, saved, wrap] = whole(model), infos
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where two ranks saved, and what they found without stopping."""
    folder = str(tmp_path_factory.mktemp("saved"))
    return folder, run(_saved, 2, tmp_path_factory.mktemp("ranks"), 2, folder)


@pytest.mark.parametrize("ranks", SHARES)
def test_a_run_goes_on_from_its_checkpoint(ranks, saved, tmp_path):
    folder, before = saved
    found = run(_resumed, ranks, tmp_path, ranks, folder)
    for case in found[0]:
        name, kept, _ = case
        each = [one[case] for one in found]
        if ranks == 2:
            for (parameters, infos), one in zip(each, before, strict=True):
                expected, all_infos = one[name, kept]
                for key, value in expected.items():
                    assert torch.equal(parameters[key], value), (case, key)
                for found_info, info in zip(infos, all_infos[SAVED:], strict=True):
                    assert all(map(torch.equal, found_info, info)), case
        alone = trained(RULES[name](), SHARES[ranks], steps=STEPS)
        close = LOOSE.get(name, 1e-12)
        assert_alike(each, (alone[0], alone[1][SAVED:]), gramian=close, parameters=close)


def _in_place(rank, folder):
    """A state of tensors by name, which is of no size before a first call."""
    _, surgeon = _surgeon(gs.GradVac(), None)
    _steps(surgeon, SHARES[1], rank, range(1))
    save({"rule": surgeon.rule.state_dict()}, checkpoint_id=folder)
    try:
        load({"rule": gs.GradVac().state_dict()}, checkpoint_id=folder)
    except CheckpointException as error:
        return str(error)
    return "loaded"


def test_memory_is_not_left_out_in_silence(tmp_path):
    assert "Size mismatch" in run(_in_place, 1, tmp_path, f"{tmp_path}/saved")[0]
