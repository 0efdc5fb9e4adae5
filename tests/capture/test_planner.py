"""Which path is taken, by count: the examples are counted by hand."""

import pytest

from gradsurgery.capture.planner import Work, plan
from gradsurgery.errors import InputError


@pytest.mark.parametrize(
    "work,path,multiplications",
    [
        # 16 blocks of 32 tokens, 384 x 1536. Factored: 512^2 / 2 (384 + 1536)
        (Work(384, 1536, 32, 16), "factored", 251_658_240),
        # of 1024 tokens. Direct: (16384 + 17^2 / 2) 384 1536; factored: 1024 times the above
        (Work(384, 1536, 1024, 16), "direct", (16384 + 144.5) * 384 * 1536),
        # a GPU writes each plane and reads it, 300 multiplications a value, 16 times: 8192 + 4800 +
        # 17^2 / 2; and four launches
        (
            Work(4096, 4096, 512, 16, device="cuda"),
            "direct",
            (8192 + 4800 + 144.5) * 4096**2 + 5.2e9,
        ),
        # 300 tokens are more than 16 blocks of 4096 x 4096 pay for in pairs, but for those writes
        (Work(4096, 4096, 300, 16), "direct", (4800 + 144.5) * 4096**2),
        (Work(4096, 4096, 300, 16, device="cuda"), "factored", 1.4 * 4800**2 / 2 * 8192),
        # a device nobody counted for
        (Work(4096, 4096, 300, 16, device="xpu"), "direct", (4800 + 144.5) * 4096**2),
    ],
)
def test_the_cheaper_path(work, path, multiplications):
    found = plan(work)
    assert (found.path, found.cross) == (path, "none" if path == "factored" else "plane")
    assert found.multiplications == multiplications


def test_a_summed_row_of_few_tokens_is_not_kept():
    # 16 samples beside 16 summed, 16 tokens each: all pairs, 512^2 / 2 (768 + 3072)
    found = plan(Work(768, 3072, 16, 16, group=16))
    assert found == ("factored", "none", 512**2 / 2 * 3840)


def test_a_gpu_forms_large_planes_and_takes_small_ones_as_pairs():
    # a layer of Llama 3.2 1B, 256 tokens. Keeping a plane: 650 a value, and two launches more
    found = plan(Work(2048, 2048, 256, 16, group=16, device="cuda"))
    each = 4096 + 4800 + 17**2 / 2 + 650
    assert found == ("direct", "plane", each * 2048**2 + 4 * 1.3e9 + 2 * 1.3e9)
    # of 64 tokens, and of a small model: all pairs, 1.4 of a product each
    found = plan(Work(384, 1536, 64, 16, group=16, device="cuda"))
    assert found == ("factored", "none", 1.4 * 2048**2 / 2 * (384 + 1536))


def test_tokens_of_an_embedding_meet_over_the_width_alone():
    # a tied vocabulary of 128 x 32: 2 blocks of 3 tokens of the head, 10 picked in both
    found = plan(Work(128, 32, 3, 2, picked=10))
    assert found == ("factored", "none", (6 * 6 * (128 + 32) + 2 * 6 * 10 * 32 + 10 * 10 * 32) / 2)
    # beside 1 summed of 3 tokens and 5 picked; by the plane, 96 multiplications a value
    found = plan(Work(128, 32, 3, 2, group=1, picked=10, picked_group=5))
    assert found == (
        "factored",
        "none",
        (9 * 9 * (128 + 32) + 2 * 9 * 15 * 32 + 15 * 15 * 32) / 2,
    )


def test_a_gpu_meets_tokens_of_an_embedding_as_pairs():
    # by count, planes would be cheaper
    work = Work(4096, 4096, 2048, 16, device="cuda")
    assert plan(work).path == "direct"
    assert plan(work._replace(picked=16 * 2048)).path == "factored"


def test_a_row_that_exists_is_met_as_a_plane():
    found = plan(Work(768, 3072, 16, 16, kept=True))
    assert (found.path, found.cross) == ("factored", "plane")


def test_the_variable_forces_a_path(monkeypatch):
    monkeypatch.setenv("GRADSURGERY_PATH", "direct")
    assert plan(Work(384, 1536, 32, 16)).path == "direct"
    monkeypatch.setenv("GRADSURGERY_PATH", "fused")
    with pytest.raises(InputError, match="GRADSURGERY_PATH=fused: must be one of factored, direct"):
        plan(Work(384, 1536, 32, 16))
