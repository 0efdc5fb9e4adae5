"""Bytes that gs.check plans to leave a rank in a step are those that do, on the wire."""

import os
import socket
import struct
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradsurgery as gs
from tests.ranks.cases import loss
from tests.ranks.processes import run

SAMPLES, TOKENS, WIDTH = 4, 16, 96


class Adapted(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside.requires_grad_(False)
        self.a = nn.Linear(inside.in_features, 8, bias=False)
        self.b = nn.Linear(8, inside.out_features, bias=False)

    def forward(self, x):
        return self.inside(x) + self.b(self.a(x))


class Network(nn.Module):
    def __init__(self, adapted=False, width=WIDTH):
        super().__init__()
        torch.manual_seed(0)
        kind = Adapted if adapted else lambda layer: layer
        self.tokens = nn.Embedding(30, width).requires_grad_(not adapted)
        sizes = [(width, 9 * width), (9 * width, width)]
        pairs = [[kind(nn.Linear(*size)) for size in sizes] for _ in range(2)]
        self.layers = nn.ModuleList(map(nn.ModuleList, pairs))
        self.head = nn.Linear(width, 30).requires_grad_(not adapted)

    def forward(self, x):
        hidden = self.tokens(x)
        for up, down in self.layers:
            hidden = hidden + down(up(hidden).tanh())
        return self.head(hidden)


CASES = {"whole": (False, SAMPLES), "two samples": (False, 2), "adapters": (True, SAMPLES)}


def texts(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, 30, (samples, TOKENS), generator=generator) for _ in range(2))
    return {"x": x, "y": y}


def sent():
    """Bytes that this process has given to its connections, which are gloo's."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as each:
                known = each.getsockopt(socket.IPPROTO_TCP, 11, 232)  # TCP_INFO
        except OSError:  # closed by now, or no connection
            continue
        # tcpi_bytes_sent, of which tcpi_bytes_retrans twice, and tcpi_notsent_bytes, which wait
        done, twice = struct.unpack_from("QQ", known, 200)
        total += done - twice + struct.unpack_from("I", known, 144)[0]
    return total


def counted(call):
    dist.barrier()
    before = sent()
    call()
    return sent() - before


def _work(rank):
    found = {}
    for name, (adapted, samples) in CASES.items():
        model = DistributedDataParallel(Network(adapted))
        trained = [p for p in model.parameters() if p.requires_grad]
        surgeon = gs.Surgeon(model, torch.optim.SGD(trained, 0.1), gs.OrthoGrad(), together=False)
        forget, retain = texts(samples, rank), texts(samples, 10 + rank)

        def step(surgeon=surgeon, forget=forget, retain=retain):
            surgeon.step(forget=forget, retain=retain, loss=loss)

        def plain(model=model, forget=forget):
            loss(model, forget).mean().backward()

        both = {key: torch.cat([forget[key], retain[key]]) for key in forget}
        groups = torch.arange(2 * samples).sub(samples - 1).clamp(min=0)
        planned = gs.check(model, both, loss=loss, groups=groups, micro_batch=samples)
        step()  # ranks look at each other's replicas
        for _ in range(2):  # the wrapper makes its buckets anew after the first
            plain()
        found[name] = planned, counted(step), counted(plain)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="connections are not counted elsewhere")
@pytest.mark.parametrize("ranks", [3])
def test_what_leaves_a_rank_is_what_was_planned(ranks, tmp_path):
    every = run(_work, ranks, tmp_path)
    for name in CASES:
        for planned, step, plain in (found[name] for found in every):
            assert planned.exact
            assert planned.ranks == ranks
            total = planned.sent["Gramian"] + planned.sent["update"]
            assert planned.sent["plain"] > 1e5
            assert step == pytest.approx(total, rel=0.05), name
            assert plain == pytest.approx(planned.sent["plain"], rel=0.05), name
            assert " a rank in a step (Gramian " in str(planned)


def test_many_ranks_can_be_planned_by_one():
    batch = texts(SAMPLES, 0)
    sent = [gs.check(Network(), batch, loss=loss, ranks=ranks).sent for ranks in (2, 64)]
    alone = gs.check(Network(), batch, loss=loss)
    assert alone.sent == {}
    assert "sends" not in str(alone)
    assert sent[1]["update"] == pytest.approx(63 / 32 * sent[0]["update"], rel=1e-6)
    assert sent[0]["plain"] == sent[0]["update"]
