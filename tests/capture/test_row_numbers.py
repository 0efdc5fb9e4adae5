"""Row numbers are shared by uses, and what is derived from them is made once."""

import sys
import threading

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.capture.row_numbers import JOINS, RowNumbers, index_of
from tests.capture.oracle import BATCH, batch, energy

NUMBERS = [[0, 1, 2], [2, 0, 1], [1, 1, 4, -1, 1], [3], []]


@pytest.mark.parametrize("numbers", NUMBERS)
def test_tables(numbers):
    rows = RowNumbers(torch.tensor(numbers, dtype=torch.int64))
    assert len(rows) == len(numbers)
    assert rows.ids.tensor.tolist() == sorted(set(numbers))
    assert [rows.ids.tensor.tolist()[k] for k in rows.where.tensor] == numbers
    assert rows.distinct == (sorted(set(numbers)) == numbers)
    assert rows.some_none == (-1 in numbers)
    assert rows.occurring.tensor.tolist() == sorted(set(numbers) - {-1})


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("row", [0, 1, 7])
def test_a_split_has_each_block_once(numbers, row):
    rows = RowNumbers(torch.tensor(numbers, dtype=torch.int64))
    outside, inside = rows.split(row)
    blocks = torch.arange(len(numbers))
    assert sorted([*blocks[outside.blocks].tolist(), *blocks[inside.blocks].tolist()]) == [*blocks]
    assert set(inside.rows.tensor.tolist()) <= {row}
    assert row not in outside.rows.tensor
    for part in (outside, inside):
        assert rows.tensor[part.blocks].tolist() == part.rows.tensor.tolist()
    assert rows.split(row) is rows.split(row)


def test_the_same_others_are_joined_once():
    rows = [RowNumbers(torch.tensor(each)) for each in ([0, 1], [5], [2, 2])]
    whole = rows[0].join(*rows[1:])
    assert whole.tensor.tolist() == [0, 1, 5, 2, 2]
    assert rows[0].join(*rows[1:]) is whole
    assert rows[0].join(rows[1]) is not whole
    assert rows[0].join() is rows[0]


def test_where_rows_are_in_those_of_several_uses():
    rows = [RowNumbers(torch.tensor(each)) for each in ([4, 1], [5])]
    ids, where = index_of(rows)
    assert ids.tensor.tolist() == [1, 4, 5]
    assert [each.tensor.tolist() for each in where] == [[1, 0], [2]]
    ids, where = index_of([rows[0], rows[0]])
    assert ids is rows[0].ids
    assert where[0] is where[1] is rows[0].where


@pytest.mark.parametrize("groups", [None, torch.tensor([0, 0, 1, 2, 3, 4])])
def test_a_deeper_model_makes_no_more_tables(groups, monkeypatch):
    """One cache for each use, not for what uses share, would make some for each layer."""

    def tables(depth):
        torch.manual_seed(0)
        layers = [m for _ in range(depth) for m in (nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh())]
        model, made, unique = nn.Sequential(*layers).double(), [], torch.Tensor.unique

        def counted(self, *args, **options):
            made.append(self)
            return unique(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "unique", counted)
            with gs.tape(model) as tape:
                losses = energy(model(batch(BATCH, 3, 5)))
            jacobian = tape.jacobian(losses, groups)
            jacobian.gramian()
            jacobian.gramian(per="tensor")
            jacobian.backward(torch.ones(jacobian.m).double())
        return len(made)

    assert tables(2) == tables(8)


def test_threads_that_join_keep_few():
    rows, failed = RowNumbers(torch.arange(4)), []
    assert rows.distinct  # its tables are there before the threads

    def join():
        try:
            for _ in range(10_000):
                assert rows.join(RowNumbers(torch.arange(2))).tensor.tolist() == [0, 1, 2, 3, 0, 1]
        except BaseException as error:
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    try:
        threads = [threading.Thread(target=join) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed
    assert len(rows._tables.joins) <= JOINS + len(threads)
