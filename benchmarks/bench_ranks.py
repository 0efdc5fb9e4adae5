"""Steps of several gloo processes, one thread each, against the plain step of data parallelism.

A rank has 8 forget samples, all of which make one row, and 8 retain samples, a row each. What one
process takes of its plain step is measured first, in the same run: beside DDP's plain step, many
ranks are to take no more than 1.15 times that.
"""

import copy
import statistics
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import spawn

import gradsurgery as gs
from gradsurgery.bench.models import loss, make
from gradsurgery.bench.steps import distance, exact_update, parameters, update_of

SIZE = 8
DDP = "plain step of DDP"
MODELS = ("transformer 384x6 T64", "LoRA 384x6 T64")
CALLS = ("ours", "plain", "update")
SLACK = 1.15  # of the ratio of one process


def samples(name, ranks):
    """The model, and the forget and the retain batches of all ranks."""
    model, batches = make(name)
    return model, batches(SIZE * ranks), batches(SIZE * ranks)


def steps(model, forget, retain, ranks):
    """Our step and the plain one, of a rank or of one process."""
    own, other = copy.deepcopy(model), copy.deepcopy(model)
    if ranks > 1:
        own = nn.parallel.DistributedDataParallel(own)
        other = nn.parallel.DistributedDataParallel(other)
    optimizer = torch.optim.SGD(parameters(own), lr=0.0)
    theirs = torch.optim.SGD(parameters(other), lr=0.0)
    surgeon = gs.Surgeon(own, optimizer, gs.OrthoGrad())
    both = tuple(torch.cat(pair) for pair in zip(forget, retain, strict=True))

    def ours():
        torch.set_num_threads(1)
        surgeon.step(forget=forget, retain=retain, loss=loss)

    def plain():
        torch.set_num_threads(1)
        loss(other, both).mean().backward()
        theirs.step()
        theirs.zero_grad()

    return {"ours": ours, "plain": plain, "update": lambda: update_of(ours, own, optimizer)}


def part(batch, rank):
    return tuple(tensor[rank * SIZE : (rank + 1) * SIZE] for tensor in batch)


def follow(index, folder, name, ranks):
    """A rank, of those after the first, that does what the first one says."""
    rank = index + 1
    join(folder, rank, ranks)
    model, forget, retain = samples(name, ranks)
    calls = steps(model, part(forget, rank), part(retain, rank), ranks)
    while True:
        told = torch.zeros((), dtype=torch.int64)
        dist.broadcast(told, 0)
        if told < 0:
            break
        calls[CALLS[int(told)]]()
    dist.destroy_process_group()


def join(folder, rank, ranks):
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def lead(calls):
    """The same calls, which the other ranks make too."""

    def led(name):
        def call():
            dist.broadcast(torch.tensor(CALLS.index(name)), 0)
            return calls[name]()

        return call

    return {name: led(name) for name in CALLS}


def medians(calls, rounds=7):
    """Seconds of each, taken in turns."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def sent():
    """Bytes that went over this machine's own network."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def wire(call):
    before = sent()
    call()
    return sent() - before


def counted(model, forget, retain, ranks):
    """Bytes that all ranks send in a step, as `gs.check` knows them before it."""
    pair = part(forget, 0), part(retain, 0)
    both = tuple(torch.cat(each) for each in zip(*pair, strict=True))
    rows = torch.arange(2 * SIZE).sub(SIZE - 1).clamp(min=0)  # those of the forget set are one
    sent = gs.check(model, both, loss=loss, groups=rows, ranks=ranks).sent
    return ranks * (sent["Gramian"] + sent["update"])


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("name", MODELS)
def bench_ranks(compare, benchmark, name, ranks):
    model, forget, retain = samples(name, ranks)
    alone = medians(
        {
            kind: call
            for kind, call in steps(model, part(forget, 0), part(retain, 0), 1).items()
            if kind != "update"
        }
    )
    ratio = alone["ours"] / alone["plain"]
    with tempfile.TemporaryDirectory() as folder:
        others = spawn(
            follow, args=(folder, name, ranks), nprocs=ranks - 1, join=False, daemon=True
        )
        join(folder, 0, ranks)
        calls = lead(steps(model, part(forget, 0), part(retain, 0), ranks))
        error = distance(calls["update"](), exact_update(model, forget, retain))
        compare(
            calls["ours"],
            {DDP: calls["plain"]},
            nbytes=3 * 4 * sum(p.numel() for p in parameters(model)),
            error=error,
            result_bytes=0,
            target={DDP: 1 / (SLACK * ratio)},
            memory_target={DDP: 1.3},
            rounds=7,
        )
        benchmark.extra_info.update(
            one_process=ratio,
            sent={
                "ours": wire(calls["ours"]),
                "ours, counted": counted(model, forget, retain, ranks),
                DDP: wire(calls["plain"]),
            },
        )
        dist.broadcast(torch.tensor(-1), 0)
        others.join()
        dist.destroy_process_group()
