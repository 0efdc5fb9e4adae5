"""Means add up, over batches and over processes, and a sample counts once."""

import json

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import spawn

import gradsurgery as gs
from gradsurgery.language import metrics
from gradsurgery.language.metrics import Sums
from tests.language.tiny import SAMPLES, batch, made


def test_sums_add_up_and_means_of_means_do_not():
    # 1, 2, 3 and 10 have the mean 4, where the means 2 and 10 have 6
    parts = Sums.of([1, 2, 3]) + Sums.of({7: 10})
    assert parts == Sums(16, 4) == Sums().add(1).add(5, 2).add(10)
    assert parts.mean == 4
    with pytest.raises(gs.InputError, match="a mean of no sample"):
        _ = Sums().mean


def test_the_order_of_samples_changes_no_bit():
    for values in ([1e16, 1.0, -1e16], [1.0, 1e16, -1e16], [-1e16, 1e16, 1.0]):
        assert Sums.of(values) == Sums.of(dict(enumerate(values))) == Sums(1, 3)


def test_merged_values_are_in_the_order_of_ids_and_first_ones_count():
    assert list(metrics.merged({3: 1.0}, {1: 2.0, 3: 9.0}).items()) == [(1, 2.0), (3, 1.0)]
    assert metrics.gathered({2: 1.0}) == {2: 1.0}


def report():
    """Of five samples: two processes have three each, and one sample twice."""
    samples = [{name: rows[0] for name, rows in batch([one], ids=False).items()} for one in SAMPLES]
    asked = [{**one, "perturbed": samples[: k + 1]} for k, one in enumerate(samples)]
    return metrics.evaluate(made(), forget=asked, holdout=samples[:1], batch_size=2)


def _work(rank, folder):
    dist.init_process_group("gloo", store=FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    found = {"report": report(), "gathered": metrics.gathered({rank: 1.0, 5: float(rank)})}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    with pytest.raises(gs.InputError, match=r"need id \[B\] where several processes"):
        metrics.token_scores(made(), batch(SAMPLES, ids=False))
    dist.destroy_process_group()


def test_two_processes_report_what_one_does(tmp_path):
    spawn(_work, args=(str(tmp_path),), nprocs=2)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0]["gathered"] == {"0": 1.0, "1": 1.0, "5": 0.0}
    assert told[0]["report"] == pytest.approx(report(), rel=1e-12)
