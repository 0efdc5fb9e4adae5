"""The metrics of TOFU in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.language.batches import collate
from gradsurgery.language.metrics.answers import (
    closeness,
    forget_quality,
    model_utility,
    probability_among,
    truth_ratios,
    truthfulness,
)
from gradsurgery.language.metrics.attacks import (
    attack_aucs,
    attack_scores,
    gradient_norms,
    priv_leak,
)
from gradsurgery.language.metrics.generation import Generated, generated, rouge_l
from gradsurgery.language.metrics.scores import (
    TokenScores,
    losses,
    perplexity,
    probability,
    token_scores,
)
from gradsurgery.language.metrics.sums import Sums, gathered, ranks
from gradsurgery.language.tokens import IGNORED, Batch
from gradsurgery.ops._inputs import check, check_count

Sample = Mapping[str, Any]
OF_OPTIONS = ("real_authors", "world_facts")  # of questions whose wrong answers are options
USEFUL = ("retain", *OF_OPTIONS)
UTILITY = ("probability", "rouge_l_recall", "truth_ratio")


def evaluate(
    model: nn.Module,
    *,
    forget: Sequence[Sample],
    retain: Sequence[Sample] | None = None,
    real_authors: Sequence[Sample] | None = None,
    world_facts: Sequence[Sample] | None = None,
    holdout: Sequence[Sample] | None = None,
    retrained: nn.Module | None = None,
    tokenizer: Any = None,
    batch_size: int = 16,
    max_new_tokens: int = 200,
    gradients: bool = False,
    as_published: bool = False,
) -> dict[str, float]:
    """What users of TOFU look at, by names such as "forget/truth_ratio"; what lacks data is absent.

    Of each set but holdout: probability (of real authors and world facts, among the options),
    memorization, extraction, truth_ratio, and with a tokenizer rouge_l_recall. model_utility, where
    the nine are there. With a holdout set attack/NAME, AUCs. With the retrained model
    forget_quality, priv_leak (of min_k) and generated_perplexity: how fluent what the model wrote
    for the forget set is to the retrained one, NaN where it wrote nothing at all.

    Where torch.distributed runs several processes, each looks at its share of the samples, and each
    returns the same.

    Args:
        model: a causal language model; looked at in eval mode, and as before afterwards.
        forget: samples, mappings of `input_ids` and `labels`, [T] each, and `attention_mask` where
            not all is attended to. For truth ratios also `perturbed`, a list of samples with wrong
            answers, and `paraphrased`, one with the right answer in other words; without it the
            sample's own is taken.
        retain: samples that were to be kept, likewise.
        real_authors: questions about the world, whose wrong answers are options, likewise.
        world_facts: the same.
        holdout: samples like the forget set that the model never saw, likewise.
        retrained: trained without the forget set; also the other model of the attack "reference".
        tokenizer: for what needs text: ROUGE-L, the attack "zlib" and generated_perplexity.
        batch_size: samples in a pass.
        max_new_tokens: of an answer that the model writes; 0: it writes none.
        gradients: whether there is the attack "gradient", which costs backward passes.
        as_published: as for `token_scores`.

    Raises:
        InputError: an empty set, or what is no sample, by name and place; as the metrics.

    TOFU, Maini et al. 2024 (arXiv:2401.06121); MUSE, Shi et al. 2024 (arXiv:2407.06460).
    """
    check_count("batch_size", batch_size)
    given = {"forget": forget, "retain": retain, "real_authors": real_authors}
    given |= {"world_facts": world_facts, "holdout": holdout}
    sets = {name: _checked(name, samples) for name, samples in given.items() if samples is not None}
    own = {name: _seen(model, sets[name], batch_size, as_published) for name in sets}
    found: dict[str, float] = {}
    written: dict[str, dict[int, Generated]] = {}
    for name in sets:
        if name == "holdout":
            continue
        metrics = _means(own[name], among=name in OF_OPTIONS, forget=name == "forget")
        if tokenizer is not None and max_new_tokens:
            shares = _batches(model, sets[name], batch_size)
            answers = generated(model, shares, tokenizer, max_new_tokens=max_new_tokens)
            written[name] = gathered(answers)
            texts = {sample: one.text for sample, one in written[name].items()}
            rouges = rouge_l(_texts(sets[name], tokenizer), texts)
            metrics["rouge_l_recall"] = Sums.of(one.recall for one in rouges.values()).mean
        found |= {f"{name}/{metric}": value for metric, value in metrics.items()}
    useful = [f"{name}/{metric}" for name in USEFUL for metric in UTILITY]
    if found.keys() >= set(useful):
        found["model_utility"] = model_utility({name: found[name] for name in useful})

    theirs: dict[str, _Seen] = {}
    if retrained is not None:
        compared = [name for name in ("forget", "holdout") if name in sets]
        theirs = {n: _seen(retrained, sets[n], batch_size, as_published) for n in compared}
        if own["forget"].wrong:
            found["forget_quality"] = forget_quality(own["forget"].ratios, theirs["forget"].ratios)
        if written:
            said = [one.sample() for one in written["forget"].values() if len(one.tokens)]
            scores = _seen(retrained, said, batch_size).scores if said else {}
            found["generated_perplexity"] = perplexity(scores) if said else math.nan
    if "holdout" in sets:
        norms = {}
        for name in ("forget", "holdout") if gradients else ():
            norms[name] = gathered(gradient_norms(model, _batches(model, sets[name], batch_size)))
        aucs = _aucs(sets, own, theirs, norms, tokenizer)
        found |= {f"attack/{name}": auc for name, auc in aucs.items()}
        if theirs:
            found["priv_leak"] = priv_leak(
                aucs["min_k"], _aucs(sets, theirs, {}, {}, None)["min_k"]
            )
    return dict(sorted(found.items()))


class _Seen(NamedTuple):
    """A set as a model sees it, by place of the sample.

    Attributes:
        scores: of the samples.
        right: L of the right answers as paraphrased.
        wrong: L of the wrong answers; empty where the set has none.
    """

    scores: dict[int, TokenScores]
    right: dict[int, float]
    wrong: dict[int, list[float]]

    @property
    def ratios(self) -> dict[int, float]:
        return truth_ratios(self.right, self.wrong)


def _seen(
    model: nn.Module, samples: Sequence[Sample], size: int, as_published: bool = False
) -> _Seen:
    def scored(samples: Sequence[Sample], **options: bool) -> dict[int, TokenScores]:
        return gathered(token_scores(model, _batches(model, samples, size), **options))

    scores = scored(samples, as_published=as_published)
    right: dict[int, float] = losses(scores)
    wrong: dict[int, list[float]] = {}
    again = [(place, other) for place, one in enumerate(samples) for other in _more(one)]
    false = [(place, other) for place, one in enumerate(samples) for other in _wrong(one)]
    others = losses(scored([one for _, one in again + false])) if again or false else {}
    for k, loss in others.items():
        if k < len(again):
            right[again[k][0]] = loss
        else:
            wrong.setdefault(false[k - len(again)][0], []).append(loss)
    return _Seen(scores, right, wrong)


def _means(seen: _Seen, *, among: bool, forget: bool) -> dict[str, float]:
    scores = seen.scores
    known = probability(scores)
    if among and seen.wrong:
        known = probability_among(losses(scores), seen.wrong)
    found = {
        "probability": known,
        "memorization": {sample: one.memorization for sample, one in scores.items()},
        "extraction": {sample: one.extraction for sample, one in scores.items()},
    }
    if seen.wrong:
        found["truth_ratio"] = (closeness if forget else truthfulness)(seen.ratios)
    return {name: Sums.of(values).mean for name, values in found.items()}


def _aucs(
    sets: Mapping[str, Sequence[Sample]],
    own: Mapping[str, _Seen],
    theirs: Mapping[str, _Seen],
    norms: Mapping[str, dict[int, float]],
    tokenizer: Any,
) -> dict[str, float]:
    def scores(name: str) -> dict[str, dict[int, float]]:
        return attack_scores(
            own[name].scores,
            texts=None if tokenizer is None else _texts(sets[name], tokenizer),
            reference=theirs[name].scores if theirs else None,
            gradients=norms.get(name),
        )

    return attack_aucs(scores("forget"), scores("holdout"))


def _checked(name: str, samples: Any) -> list[Sample]:
    """A set as a list of samples.

    Raises:
        InputError: naming the set, and the place of what is no sample.
    """
    if isinstance(samples, (Mapping, Tensor)):
        raise InputError(f"{name} must be a list of samples, got {type(samples).__name__}")
    known = list(samples)
    check(len(known) > 0, f"{name}: no sample")
    asked = any(_wrong(one) for one in known if isinstance(one, Mapping))
    for place, one in enumerate(known):
        _check_sample(f"{name}[{place}]", one)
        if asked and not _wrong(one):
            raise InputError(f"{name}[{place}] has no perturbed answer, where others have")
        for k, other in enumerate([*_wrong(one), *_more(one)]):
            _check_sample(f"answer {k} of {name}[{place}]", other)
    return known


def _check_sample(name: str, sample: Any) -> None:
    if not isinstance(sample, Mapping):
        raise InputError(f"{name} must be a mapping, got {type(sample).__name__}")
    for entry in ("input_ids", "labels"):
        found = sample.get(entry)
        if not isinstance(found, Tensor) or found.dim() != 1 or found.is_floating_point():
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"{entry} of {name} must be integers [T], got {got}")


def _wrong(sample: Sample) -> Sequence[Sample]:
    return sample.get("perturbed") or ()


def _more(sample: Sample) -> Sequence[Sample]:
    found = sample.get("paraphrased")
    return () if found is None else (found,)


def _batches(model: nn.Module, samples: Sequence[Sample], size: int) -> Iterator[Batch]:
    """Padded batches of this process's share of samples, `id` the place among all."""
    device = next(model.parameters()).device
    # every process makes as many passes, as a model spread over them needs: what comes twice
    # counts once
    share = -(-len(samples) // ranks())
    first = share * (dist.get_rank() if ranks() > 1 else 0)
    places = [place % len(samples) for place in range(first, first + share)]
    for start in range(0, share, size):
        chosen = places[start : start + size]
        rows = [{**_plain(samples[place]), "id": place} for place in chosen]
        yield {name: entry.to(device) for name, entry in collate(rows).items()}


def _plain(sample: Sample) -> dict[str, Tensor]:
    """What the model is given of a sample."""
    ids = sample["input_ids"]
    mask = sample.get("attention_mask")
    seen = torch.ones_like(ids) if mask is None else mask
    return {"input_ids": ids, "attention_mask": seen, "labels": sample["labels"]}


def _texts(samples: Sequence[Sample], tokenizer: Any) -> dict[int, str]:
    """The label tokens of each sample as text."""
    answers = [one["labels"][one["labels"] != IGNORED].tolist() for one in samples]
    return {k: tokenizer.decode(one, skip_special_tokens=True) for k, one in enumerate(answers)}
