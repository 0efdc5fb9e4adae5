"""Several processes of torch.distributed on this machine, for tests of many ranks."""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import spawn

LIMIT = 100  # seconds, after which ranks that wait for each other are ended


def run(work, ranks, folder, *given, seconds=LIMIT):
    """What `work(rank, *given)` returned on each of so many ranks, by gloo.

    Raises what a rank raised; no rank outlives the call.
    """
    folder = Path(folder)
    context = spawn(
        _work, args=(str(folder), ranks, work, given), nprocs=ranks, join=False, daemon=True
    )
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1, grace_period=5):
            if time.monotonic() > end:
                raise TimeoutError(f"{work.__name__} on {ranks} ranks took over {seconds} s")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _work(rank, folder, ranks, work, given):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=FileStore(f"{folder}/store", ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=LIMIT / 2),
    )
    try:
        torch.save(work(rank, *given), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # what was found is saved; in a process that shuts down, a thread of gloo's may abort it
    os._exit(0)
