"""What one forward pass says of each sample: its loss, and how well it is known by heart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.language.metrics.sums import Sums, ranks
from gradsurgery.language.packed import unpacked
from gradsurgery.language.reference import still
from gradsurgery.language.tokens import Batch, Predictions, known_labels, named, predictions
from gradsurgery.ops._inputs import check, check_number, shown

K = 0.4  # share of the tokens that min-k looks at, as MUSE does
LEAST_VARIANCE = 1e-6  # nats squared, of min-k++, as in public code
LEAST = -1e4  # nats: a token less likely has probability 0 in every dtype
# logits looked at together: on a CPU what stays in its cache, which is four times as fast
AT_ONCE = {"cpu": 1 << 20}


class TokenValues(NamedTuple):
    """What a model says of a sample's n label tokens, [n] each, on the CPU.

    Attributes:
        log_probs: of each, float64, nats.
        normalized: (log p - m) / s, with m and s mean and deviation of log p over the model's own
            prediction there, float64.
        right: whether it is the most likely one, bool.
    """

    log_probs: Tensor
    normalized: Tensor
    right: Tensor


class TokenScores(NamedTuple):
    """A sample, as one forward pass shows it.

    Attributes:
        loss: L, the mean negative log-likelihood of its label tokens, nats.
        tokens: n, how many there are.
        memorization: `exact_memorization`, in [0, 1].
        extraction: `extraction_strength`, in [0, 1].
        min_k: `min_k` of the log-probabilities, nats.
        min_k_plus_plus: `min_k` of the normalized ones, in deviations.
    """

    loss: float
    tokens: int
    memorization: float
    extraction: float
    min_k: float
    min_k_plus_plus: float


def token_scores(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    k: float = K,
    as_published: bool = False,
) -> dict[int, TokenScores]:
    """All that is measured of a model's predictions of label tokens, by sample id, in one pass.

    A sample's scores are the same in any batch, with padding of any length on either side.

    Args:
        model: looked at in eval mode and without gradients; it is as before afterwards.
        batches: as losses take them, [B, T] entries on the model's device, several or one. `id` [B]
            numbers the samples; without it they are numbered as they come.
        k: share of the tokens that min-k looks at, in (0, 1].
        as_published: as public code has it: the last label token, the end of the text as a rule,
            counts for the loss alone, and `extraction_strength` is 1/n where nothing is extracted.

    Raises:
        InputError: no sample; ids on some batches only; an id that two different samples have; with
            `as_published`, a sample of one label token; as `tokens.predictions`.
        NonFiniteError: a token's log-probability is NaN. The message names the sample.
    """
    check_number("k", k)
    check(0 < k <= 1, f"k must be in (0, 1], got {shown(k)}")
    scores: dict[int, TokenScores] = {}
    for batch, ids in numbered(batches):
        with still(model):
            found = predictions(model, batch)
            each = token_values(found)
        for place, (sample, tokens) in enumerate(zip(ids, each, strict=True)):
            if bool(tokens.log_probs.isnan().any()):
                who = named(batch, place)
                raise NonFiniteError(f"model's log-probabilities of {who} are NaN")
            if as_published and len(tokens.right) < 2:
                who = named(batch, place)
                raise InputError(f"{who} has one label token, and as_published leaves the last out")
            scores.setdefault(sample, _scored(tokens, k, as_published))
    return scores


def _scored(tokens: TokenValues, k: float, as_published: bool) -> TokenScores:
    kept = TokenValues(*(values[:-1] for values in tokens)) if as_published else tokens
    return TokenScores(
        -math.fsum(tokens.log_probs.tolist()) / len(tokens.log_probs),
        len(tokens.log_probs),
        exact_memorization(kept.right),
        extraction_strength(kept.right, as_published=as_published),
        min_k(kept.log_probs, k),
        min_k(kept.normalized, k),
    )


def numbered(batches: Batch | Iterable[Batch]) -> Iterator[tuple[Batch, list[int]]]:
    """Batches with the ids of their samples, or their places among all where no batch has ids.

    Raises:
        InputError: no sample; ids on some batches only, not integers [B], of two different samples,
            or missing where several processes of torch.distributed run.
    """
    seen, with_ids = 0, False
    known: dict[int, int] = {}
    several = [cast(Batch, batches)] if isinstance(batches, Mapping) else batches
    for given in several:
        batch = unpacked(given) if isinstance(given, Mapping) else given
        size = _size(batch)
        ids = batch.get("id")
        if seen and with_ids != (ids is not None):
            raise InputError("id: some batches have ids and some have none")
        with_ids = ids is not None
        if not with_ids:
            check(ranks() == 1, "batches need id [B] where several processes share the samples")
            yield batch, list(range(seen, seen + size))
        elif isinstance(ids, Tensor) and ids.shape == (size,) and not ids.is_floating_point():
            for sample, key in zip(ids.tolist(), _keys(batch), strict=True):
                check(known.setdefault(sample, key) == key, f"id {sample} is of two samples")
            yield batch, ids.tolist()
        else:
            got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(f"id of a batch must be integers [{size}], got {got}")
        seen += size
    check(seen > 0, "batches hold no sample")


def _size(batch: Batch) -> int:
    if isinstance(batch, Mapping) and "labels" not in batch:
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 2:
            return len(ids)
    return len(known_labels(batch))


def _keys(batch: Batch) -> Iterator[int]:
    """Of each sample what its tokens and labels hash to, wherever padding stands."""
    like = batch["labels" if "labels" in batch else "input_ids"]

    def rows(name: str, otherwise: Tensor) -> list[list[int]]:
        entry: Any = batch.get(name)
        fits = isinstance(entry, Tensor) and entry.shape == like.shape
        return entry.tolist() if fits else otherwise.tolist()

    ids, labels = rows("input_ids", like), like.tolist()
    kept = rows("attention_mask", torch.ones_like(like))
    for three in zip(ids, labels, kept, strict=True):
        yield hash(tuple((i, label) for i, label, seen in zip(*three, strict=True) if seen))


def mean_losses(model: nn.Module, batch: Batch) -> Tensor:
    """L of each sample of a batch, [B], in nats, through which gradients flow."""
    found = predictions(model, batch)
    return found.means(-found.log_probs())


def token_values(found: Predictions) -> list[TokenValues]:
    """Of the label tokens of each sample of a batch."""
    step = max(1, AT_ONCE.get(found.logits.device.type, 1 << 24) // found.logits.shape[2])
    logits, labels = found.logits[found.counted], found.labels[found.counted]  # [N, V], [N]
    rows = zip(logits.split(step), labels.split(step), strict=True)
    parts = [_token_values(logits, labels) for logits, labels in rows]
    sizes = found.counts.tolist()
    log_probs, normalized, right = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    split = (log_probs.double(), normalized.double(), right)
    return [
        TokenValues(*values) for values in zip(*(each.split(sizes) for each in split), strict=True)
    ]


def _token_values(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [N, V] and labels [N], [N] each."""
    logs = logits.log_softmax(-1)
    own = logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    p, logs = logs.exp(), logs.clamp(min=LEAST)
    mean = (p * logs).sum(-1)
    variance = (p * (logs - mean.unsqueeze(-1)).square()).sum(-1)
    normalized = (own - mean) / variance.clamp(min=LEAST_VARIANCE).sqrt()
    return own, normalized, logits.argmax(-1) == labels


def exact_memorization(right: Tensor) -> float:
    """Share of a sample's label tokens that are the most likely ones, in [0, 1].

    Public code leaves the last label token out, which `token_scores(as_published=True)` does.

    Args:
        right: which are, bool [n].

    Tirumala et al. 2022 (arXiv:2205.10770).
    """
    return _known(right).double().mean().item()


def extraction_strength(right: Tensor, *, as_published: bool = False) -> float:
    """1 - k/n, k the shortest prefix after which all tokens are the most likely ones, in [0, 1].

    0 where the last token is not: nothing is extracted.

    Args:
        right: as for `exact_memorization`.
        as_published: 1/n in place of 0, as in public code, where the prefix has n - 1 tokens at
            most.

    Carlini et al. 2021 (arXiv:2012.07805), as a share of the answer.
    """
    n = len(_known(right))
    wrong = (~right).nonzero()
    prefix = int(wrong[-1]) + 1 if len(wrong) else 0
    if as_published:
        prefix = min(prefix, n - 1)
    return 1 - prefix / n


def min_k(values: Tensor, k: float = K) -> float:
    """Minus the mean of the lowest max(1, floor(k n)) of a sample's n token values.

    Low for members, as a loss is: a text that was trained on has few tokens that surprise. Of
    log-probabilities it is Min-K %, of normalized ones Min-K %++.

    Args:
        values: [n].
        k: in (0, 1].

    Detecting Pretraining Data from Large Language Models, Shi et al. 2023 (arXiv:2310.16789);
    Min-K %++, Zhang et al. 2024 (arXiv:2404.02936).
    """
    lowest = _known(values).sort().values[: max(1, int(k * len(values)))]
    return -math.fsum(lowest.tolist()) / len(lowest)


def _known(values: Tensor) -> Tensor:
    check(len(values) > 0, "a sample without a label token has no score")
    return values


def losses(scores: Mapping[int, TokenScores]) -> dict[int, float]:
    """L of each sample, nats a token."""
    return {sample: found.loss for sample, found in scores.items()}


def probability(scores: Mapping[int, TokenScores]) -> dict[int, float]:
    """exp(-L) of each sample: the geometric mean of its tokens' probabilities, in [0, 1].

    TOFU, Maini et al. 2024 (arXiv:2401.06121).
    """
    return {sample: math.exp(-found.loss) for sample, found in scores.items()}


def perplexity(scores: Mapping[int, TokenScores]) -> float:
    """exp of the mean negative log-likelihood over the tokens of all samples, 1 or more."""
    return perplexity_of(token_sums(scores))


def token_sums(scores: Mapping[int, TokenScores]) -> Sums:
    """Negative log-likelihood of all samples, nats, and their tokens, for `perplexity_of`."""
    total = math.fsum(found.loss * found.tokens for found in scores.values())
    return Sums(total, sum(found.tokens for found in scores.values()))


def perplexity_of(sums: Sums) -> float:
    """exp(total / tokens), infinite where no float holds it."""
    return math.exp(sums.mean) if sums.mean < 709 else math.inf
