"""Which way to the Gramian of one parameter costs least, from counted work.

With N tokens in all, T in each of n blocks, and a plane [H, W]:

    factored  the products of tokens, N^2 / 2 (H + W) multiplications
    direct    each block's plane, N H W, and the products of the planes, n^2 / 2 H W

Where many samples are summed into one row, the multiplications for its plane cost nothing: the
update needs them anyway. What remains to be paid is moving the plane, and its products with the
other rows, by the plane or by its tokens.
"""

import os
from typing import NamedTuple

from gradsurgery.errors import InputError

PATHS = ("factored", "direct")
# multiplications in the time that a kept plane costs a value: to be written, multiplied with itself
# and read, and two products of fewer tokens where one would do. On a CPU, measured: 48 (Zen 4 and
# 5), 100 (Xeon). The larger: a plane kept beside the pairs takes memory, too. On a GPU, counted for
# an H200, not yet measured: 8 bytes at 4 TB/s, and 3.25e14 multiplications a second
KEEP = {"cpu": 96, "cuda": 650}
# the same of a plane that is formed and dropped. A CPU does so in its registers and its inner
# cache; a GPU writes and reads it, 4 bytes at the 5.5 TB/s of its cache, counted as above
FORM = {"cpu": 0, "cuda": 240}


class Work(NamedTuple):
    """What there is to multiply for one parameter."""

    height: int
    width: int
    tokens: int  # of one block, all uses together
    blocks: int  # of rows of their own
    group: int = 0  # blocks of the summed row
    kept: bool = False  # the summed row's plane exists
    device: str = "cpu"  # torch's type of it


class Plan(NamedTuple):
    path: str  # "factored" or "direct"
    cross: str  # where the summed row's products come from: "none", "plane" or "tokens"
    multiplications: float


def plan(work: Work, products: bool = True) -> Plan:
    """The cheapest way; GRADSURGERY_PATH=factored|direct forces one.

    `products`: every use is a product of tokens, as that of an embedding is not.
    """
    h, w, t = work.height, work.width, work.tokens
    own, summed = work.blocks * t, work.group * t
    keep = KEEP.get(work.device, 0) * h * w if work.group else 0
    form = FORM.get(work.device, 0) * work.blocks
    options = [Plan("direct", "plane", (own + form + (work.blocks + 1) ** 2 / 2) * h * w + keep)]
    if work.group or work.kept:
        options.append(Plan("factored", "plane", own**2 / 2 * (h + w) + own * h * w + keep))
    if work.group:
        options.append(Plan("factored", "tokens", (own / 2 + summed) * own * (h + w) + keep))
    if not work.kept:
        options.append(Plan("factored", "none", (own + summed) ** 2 / 2 * (h + w)))
    if not products:
        return options[0]
    forced = os.environ.get("GRADSURGERY_PATH", "")
    if forced and forced not in PATHS:
        raise InputError(f"GRADSURGERY_PATH={forced}: must be one of {', '.join(PATHS)}")
    return min(
        (p for p in options if not forced or p.path == forced), key=lambda p: p.multiplications
    )
