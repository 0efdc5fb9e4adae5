"""Which way to the Gramian of one parameter costs least, from counted work.

With N tokens in all, T in each of n blocks, and a plane [H, W]:

    factored  the products of tokens, N^2 / 2 (H + W) multiplications
    direct    each block's plane, N H W, and the products of the planes, n^2 / 2 H W

Tokens of an embedding, P in all, meet each other and the N in products over W alone.

Where many samples are summed into one row, the multiplications for its plane cost nothing: the
update needs them anyway. What remains to be paid is moving the plane, and its products with the
other rows, by the plane or by its tokens.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from gradsurgery.errors import InputError

PATHS = ("factored", "direct")
# multiplications in the time that a kept plane costs a value: to be written, multiplied with itself
# and read, and two products of fewer tokens where one would do. On a CPU, measured: 48 (Zen 4 and
# 5), 100 (Xeon). The larger: a plane kept beside the pairs takes memory, too. On a GPU, counted for
# an H200: 8 bytes at 4 TB/s, and 3.25e14 multiplications a second
KEEP = {"cpu": 96, "cuda": 650}
# the same of a plane that is formed, multiplied with others and dropped. A CPU does so in its
# registers and its inner cache; a GPU writes and reads it. Measured on an H200, bfloat16: 16 planes
# of 4096 x 4096 from 64 tokens each in 0.37 ms, from 1024 in 1.05 ms
FORM = {"cpu": 0, "cuda": 300}
# what a product of tokens costs of one that forms a plane; the same H200: 2.6e14 a second at best
PAIR = {"cpu": 1.0, "cuda": 1.4}
# and what launches of 4 us cost, which a CPU does not notice, 1.3e9 each. Pairs of tokens share one
# with other planes of their shape; a plane that is formed after others takes 4, and one that is
# formed alone 0.6 ms, measured. Those of a kept plane: 2 where others are formed, 5 where it is
# multiplied with tokens
LAUNCHES = {"cuda": {"direct": 5.2e9, "factored": 0}}
ALONE = {"cuda": 2e11}
KEPT = {"cuda": {"direct": 2.6e9, "factored": 6.5e9}}
NO_LAUNCHES = {"direct": 0, "factored": 0}

_planned: ContextVar[str] = ContextVar("planned", default="cuda")


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Inside, tensors on meta stand for those on a device of this type."""
    token = _planned.set(device)
    try:
        yield
    finally:
        _planned.reset(token)


def device_of(tensor: Tensor) -> str:
    """The type of the device that a tensor is on, or is planned for."""
    return _planned.get() if tensor.is_meta else tensor.device.type


class Work(NamedTuple):
    """What there is to multiply for one parameter."""

    height: int
    width: int
    tokens: int  # of one block, all uses together
    blocks: int  # of rows of their own
    group: int = 0  # blocks of the summed row
    kept: bool = False  # the summed row's plane exists
    device: str = "cpu"  # torch's type of it
    picked: int = 0  # tokens of embeddings, of all these blocks
    picked_group: int = 0  # and of the summed row's
    alone: bool = False  # whether its planes cannot be formed with those of other parameters


class Plan(NamedTuple):
    path: str  # "factored" or "direct"
    cross: str  # where the summed row's products come from: "none", "plane" or "tokens"
    multiplications: float


def plan(work: Work, products: bool = True) -> Plan:
    """The cheapest way; GRADSURGERY_PATH=factored|direct forces one.

    `products`: every use is a product of tokens, or an embedding beside one.
    """
    forced = os.environ.get("GRADSURGERY_PATH", "")
    if products and forced and forced not in PATHS:
        raise InputError(f"GRADSURGERY_PATH={forced}: must be one of {', '.join(PATHS)}")
    return _plan(work, products, forced)


@lru_cache(maxsize=4096)  # a model has many parameters of few shapes, in every step
def _plan(work: Work, products: bool, forced: str) -> Plan:
    h, w = work.height, work.width
    pair = PAIR.get(work.device, 1.0)
    own, summed = work.blocks * work.tokens, work.group * work.tokens
    keep = KEEP.get(work.device, 0) * h * w if work.group else 0
    form = FORM.get(work.device, 0) * work.blocks

    def pairs(tokens: float, others: float, picked: float, others_picked: float) -> float:
        mixed = tokens * others_picked + picked * others + picked * others_picked
        return pair * (tokens * others * (h + w) + mixed * w)

    inner = pairs(own, own, work.picked, work.picked) / 2
    options = [Plan("direct", "plane", (own + form + (work.blocks + 1) ** 2 / 2) * h * w + keep)]
    if work.group or work.kept:
        options.append(Plan("factored", "plane", inner + own * h * w + keep))
    if work.group:
        outer = pairs(own, summed, work.picked, work.picked_group)
        options.append(Plan("factored", "tokens", inner + outer + keep))
    if not work.kept:
        both, picked = own + summed, work.picked + work.picked_group
        options.append(Plan("factored", "none", pairs(both, both, picked, picked) / 2))
    if not products:
        return options[0]
    if work.device == "cuda" and not forced and work.picked + work.picked_group:
        options = options[1:]  # slices of planes with embeddings wait for each other there
    launches = LAUNCHES.get(work.device, NO_LAUNCHES)
    kept = KEPT.get(work.device, NO_LAUNCHES) if work.group else NO_LAUNCHES

    def cost(option: Plan) -> float:
        more = kept[option.path] if option.cross != "none" else 0
        if work.alone and option.path == "direct":
            more += ALONE.get(work.device, 0)
        return option.multiplications + launches[option.path] + more

    each = [p._replace(multiplications=cost(p)) for p in options if forced in ("", p.path)]
    return min(each, key=lambda p: p.multiplications)
