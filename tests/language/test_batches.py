"""Batches of samples of different lengths, and pairs of forget and retain samples."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import gradsurgery as gs
from gradsurgery.language import NLL, LogProbs
from gradsurgery.language.batches import Pair, PairCollator, Pairs, PairSampler, collate
from tests.language import tiny
from tests.language.tiny import REFUSALS, SAMPLES, made, moved


def sample(prompt, answer):
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


DATA = [sample(*each) for each in SAMPLES]
OTHER = [sample(*each) for each in REFUSALS]


def test_samples_are_padded_each_entry_as_it_must_be():
    long = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "position_ids": [3, 4, 5], "id": 9}
    short = {
        "input_ids": torch.tensor([8]),
        "labels": np.array([8]),
        "position_ids": [3],
        "id": torch.tensor(4),
    }
    found = collate([long, short], pad=1)
    assert {name: entry.tolist() for name, entry in found.items()} == {
        "input_ids": [[5, 6, 7], [8, 1, 1]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "position_ids": [[3, 4, 5], [3, 0, 0]],
        "id": [9, 4],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert all(entry.dtype == torch.int64 for entry in found.values())
    masked = collate([{"input_ids": [5, 6], "attention_mask": [0, 1]}, {**short, "x": 1}][:1])
    assert masked["attention_mask"].tolist() == [[0, 1]]


def test_other_answers_are_padded_by_themselves():
    pairs = zip(DATA[:2], OTHER[:2], strict=True)
    found = collate([{**one, "alternate": other} for one, other in pairs])
    for part, samples in ((found, SAMPLES[:2]), (found["alternate"], REFUSALS[:2])):
        for name, expected in tiny.batch(samples, ids=False).items():
            assert torch.equal(part[name], expected)


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ([], "samples: there are none"),
        ([[1, 2]], "sample 0 must be a mapping, got list"),
        ([{"input_ids": [1], "labels": [1, 2]}], "sample 0: sequences .* input_ids 1, labels 2"),
        ([{"input_ids": [1]}, {"input_ids": [1], "text": 3}], r"same entries: \['text'\] differ"),
        ([{"input_ids": "hello"}], "input_ids of sample 0 must be a number or .*, got str"),
        ([{"input_ids": [[1, 2]]}], r"input_ids of sample 0 must be one sequence, got \[1, 2\]"),
        ([{"a": [1]}, {"a": 1}], "a is a number of some samples and a sequence of others"),
    ],
)
def test_what_makes_no_batch_is_named(samples, match):
    with pytest.raises(gs.InputError, match=match):
        collate(samples)


def drawn(epoch=0, **options):
    sampler = PairSampler(7, 5, retain_per_forget=2, **options)
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    return list(sampler)


def test_an_epoch_has_every_forget_sample_once_and_retain_samples_by_turns():
    found = drawn()
    assert sorted(pair.forget for pair in found) == list(range(7))
    retain = [place for pair in found for place in pair.retain]
    assert len(retain) == 14
    for first in (0, 5):
        assert sorted(retain[first : first + 5]) == list(range(5))
    assert len(set(retain[10:])) == 4


@pytest.mark.parametrize(
    "ratio,counts",
    [(0.25, [0, 0, 0, 1, 0, 0, 1]), (0.5, [0, 1] * 3 + [1]), (1.5, [1, 2] * 3 + [1])],
)
def test_any_ratio_of_retain_to_forget_samples(ratio, counts):
    sampler = PairSampler(7, 5, retain_per_forget=ratio)
    found = list(sampler)
    assert [len(pair.retain) for pair in found] == counts
    retain = [place for pair in found for place in pair.retain]
    assert len(set(retain[:5])) == min(5, len(retain))
    ranks = [list(PairSampler(7, 5, retain_per_forget=ratio, rank=r, ranks=2)) for r in range(2)]
    dealt = [pair for step in zip(*ranks, strict=True) for pair in step]
    assert dealt[:5] == found[:5] and dealt[-1].retain
    pairs = Pairs(DATA, OTHER)
    alone = PairCollator()([pairs[pair._replace(forget=0, retain=())] for pair in found[:2]])
    assert set(alone) == {"forget"}
    with pytest.raises(gs.InputError, match="retain_per_forget must be above 0, got -1"):
        PairSampler(7, 5, retain_per_forget=-1)


def test_draws_follow_from_seed_and_epoch_alone():
    first = drawn(1, seed=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert drawn(1, seed=3) == first
    assert torch.equal(torch.get_rng_state(), before)
    others = [drawn(0, seed=3), drawn(2, seed=3), drawn(1, seed=4), drawn(3, seed=1)]
    assert all(other != first for other in others)


def test_ranks_see_together_what_one_would_and_each_its_own():
    whole = drawn(seed=3)
    ranks = [drawn(seed=3, rank=rank, ranks=3) for rank in range(3)]
    assert [pair for step in zip(*ranks, strict=True) for pair in step] == whole[:6]
    with pytest.raises(gs.InputError, match=r"rank must be in \[0, ranks\)"):
        drawn(rank=3, ranks=3)


def test_a_loop_of_ones_own_over_pairs():
    """Batches of a loader, each sample with its id; micro-batches of one step are one batch."""
    model = made()
    pairs, sampler = Pairs(DATA, OTHER), PairSampler(5, 5, retain_per_forget=2)
    loader = DataLoader(pairs, batch_size=2, sampler=sampler, collate_fn=PairCollator())
    updates = []
    for size in (2, 5):
        other = copy.deepcopy(model)
        surgeon = gs.Surgeon(other, torch.optim.SGD(other.parameters(), lr=0.1), gs.OrthoGrad())
        loader = DataLoader(pairs, batch_size=size, sampler=sampler, collate_fn=PairCollator())
        ids = []
        for each in loader:
            assert len(each["retain"]["id"]) == 2 * len(each["forget"]["id"])
            ids += [*each["forget"]["id"].tolist(), *each["retain"]["id"].tolist()]
            surgeon.add(forget=each["forget"], retain=each["retain"], loss=NLL())
        assert set(ids) == set(range(10))
        surgeon.backward()
        updates.append(torch.cat([p.grad.flatten() for p in other.parameters()]))
    torch.testing.assert_close(*updates, rtol=1e-12, atol=1e-12)


def test_pairs_are_of_samples_by_place():
    found = Pairs(DATA, OTHER)[Pair(2, (4, 0))]
    assert found["forget"] == {**DATA[2], "id": 2}
    assert found["retain"] == [{**OTHER[4], "id": 9}, {**OTHER[0], "id": 5}]
    for bad, match in ((iter(DATA), "must have a length and samples by place"), ([], "is empty")):
        with pytest.raises(gs.InputError, match=f"retain dataset {match}"):
            Pairs(DATA, bad)
    with pytest.raises(gs.InputError, match="sample 0 of the forget dataset must be a mapping"):
        Pairs([[1, 2]], OTHER)[Pair(0, (1,))]


def test_a_collator_that_packs_samples_is_refused():
    def packed(samples):
        return {"labels": torch.tensor([[k for sample in samples for k in sample["labels"]]])}

    pair = Pairs(DATA, OTHER)[Pair(0, (1, 2))]
    with pytest.raises(gs.InputError, match=r"a row for each of 2 samples, got \[1, \d+\]"):
        PairCollator(packed)([pair])


def test_other_answers_are_tokens_and_of_all_samples():
    other = {"alternate": "I do not know."}
    for samples, match in (
        ([{**DATA[0], **other}], "alternate of a sample must be a mapping .* tokens, got str"),
        ([{**DATA[0], **other}, DATA[1]], "must all have an alternate, or none"),
    ):
        numbered = [{**sample, "id": k} for k, sample in enumerate(samples)]
        with pytest.raises(gs.InputError, match=match):
            PairCollator().batch(numbered)


def test_log_probs_are_found_again_where_they_were_saved(tmp_path):
    original = made()
    collator = PairCollator()
    pairs = Pairs([{**one, "alternate": two} for one, two in zip(DATA, OTHER, strict=True)], OTHER)
    samples = [pairs[Pair(k, ())]["forget"] for k in range(5)]
    known = LogProbs.of(original, [collator.batch(samples)])
    torch.save(known.state_dict(), tmp_path / "known.pt")
    again = LogProbs()
    again.load_state_dict(torch.load(tmp_path / "known.pt", weights_only=True))
    model = moved(original)
    batch = collator.batch(samples)
    for part in (batch, {**batch["alternate"], "id": batch["id"]}):
        assert torch.equal(again.log_probs(model, part), known.log_probs(model, part))
    empty = LogProbs()
    empty.load_state_dict(LogProbs().state_dict())
    assert len(empty) == 0
    with pytest.raises(gs.InputError, match="state must have tensors id, labels, log_probs"):
        empty.load_state_dict({"id": torch.arange(2)})
