"""Membership inference on texts: is a forgotten one told from one that was never seen?

An attack has a score for each sample, low for what looks like a member, as a loss is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from gradsurgery.capture import tape
from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.language.metrics.scores import TokenScores, mean_losses, numbered
from gradsurgery.language.reference import still
from gradsurgery.language.tokens import Batch
from gradsurgery.ops._inputs import check, check_number
from gradsurgery.ranking import auc
from gradsurgery.ranks.shards import gathering

Scores = dict[int, float]


def attack_scores(
    scores: Mapping[int, TokenScores],
    *,
    texts: Mapping[int, str] | None = None,
    reference: Mapping[int, TokenScores] | None = None,
    gradients: Mapping[int, float] | None = None,
) -> dict[str, Scores]:
    """Every attack that can be made of what is given, by name, a score for each sample id.

    loss: L. min_k, min_k_plus_plus: as `metrics.min_k`. zlib: L over the bytes that zlib makes of
    the text, in UTF-8. reference: L less that of another model, one that never saw the forget set.
    gradient: the norm of the gradient of L.

    Args:
        scores: of the model under attack.
        texts: what was scored, as text.
        reference: the same samples' scores by the other model.
        gradients: `gradient_norms` of the model under attack.

    Raises:
        InputError: a sample that texts, reference or gradients lack.

    Loss: Yeom et al. 2018 (arXiv:1709.01604). zlib, reference: Carlini et al. 2021
    (arXiv:2012.07805).
    """
    for name, given in (("texts", texts), ("reference", reference), ("gradients", gradients)):
        missing = [sample for sample in scores if given is not None and sample not in given]
        if missing:
            raise InputError(f"{name} lack sample id {missing[0]}")
    found: dict[str, Scores] = {
        name: {sample: getattr(one, name) for sample, one in scores.items()}
        for name in ("loss", "min_k", "min_k_plus_plus")
    }
    losses = found["loss"]
    if texts is not None:
        found["zlib"] = {
            sample: loss / len(zlib.compress(texts[sample].encode("utf-8")))
            for sample, loss in losses.items()
        }
    if reference is not None:
        found["reference"] = {
            sample: loss - reference[sample].loss for sample, loss in losses.items()
        }
    if gradients is not None:
        found["gradient"] = {sample: gradients[sample] for sample in losses}
    return found


def attack_aucs(
    forget: Mapping[str, Mapping[int, float]], holdout: Mapping[str, Mapping[int, float]]
) -> dict[str, float]:
    """Area under the ROC curve of each attack, in [0, 1]: the chance that a forgotten sample scores
    below one never seen, ties half.

    0.5 is guessing, 1 finds every member, 0 shows that what was forgotten stands out.

    Args:
        forget: `attack_scores` of the forget set.
        holdout: of samples no model was trained on. Attacks that either lacks are left out.

    Raises:
        InputError: no sample on a side; a score that is NaN, by attack and sample id.
    """
    package("scipy.stats", "language", "attack_aucs")
    found = {}
    for name in forget:
        if name not in holdout:
            continue
        sides = []
        for side, scores in (("forget", forget[name]), ("holdout", holdout[name])):
            check(len(scores) > 0, f"{side}: no sample")
            for sample, score in scores.items():
                if math.isnan(score):
                    raise InputError(f"{name} of sample id {sample} of {side} is NaN")
            sides.append(-torch.tensor(list(scores.values()), dtype=torch.float64, device="cpu"))
        found[name] = auc(*sides)
    return found


def gradient_norms(model: nn.Module, batches: Batch | Iterable[Batch]) -> Scores:
    """Norm of the gradient of each sample's loss L, over the parameters that train, by sample id.

    All of a batch in one backward pass, exactly: the root of the diagonal of the rows' Gramian.

    Args:
        model: looked at in eval mode; no `.grad` is touched.
        batches: as `token_scores` takes them.

    Raises:
        InputError: as `token_scores`, and what `gs.tape` refuses.
    """
    found: Scores = {}
    with gathering(model):
        for batch, ids in numbered(batches):
            with still(model), torch.enable_grad(), tape(model) as recorded:
                gram = recorded.jacobian(mean_losses(model, batch)).gramian()
            for sample, square in zip(ids, gram.diagonal().tolist(), strict=True):
                found.setdefault(sample, math.sqrt(square))
    return found


def priv_leak(auc: float, retrained: float) -> float:
    """How far an attack's AUC is from that on the retrained model, in percent of what it leaves.

    100 ((1 - AUC) - (1 - AUC')) / (1 - AUC')

    0 is as private as retraining. Below, down to -100, members are found; above, what was forgotten
    stands out. NaN where AUC' is 1: the retrained model leaves nothing to compare with. MUSE takes
    it of `min_k`.

    Args:
        auc: AUC of the model, in [0, 1], members found at 1.
        retrained: AUC' of the retrained model.

    MUSE, Shi et al. 2024 (arXiv:2407.06460), whose code counts AUCs from the other side.
    """
    for name, value in (("auc", auc), ("retrained", retrained)):
        check_number(name, value)
        check(0 <= value <= 1, f"{name} must be in [0, 1], got {value}")
    if retrained == 1:
        return math.nan
    return 100 * (retrained - auc) / (1 - retrained)
