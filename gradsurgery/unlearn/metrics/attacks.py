"""Membership inference: do a model's outputs tell forgotten samples from ones it never saw?

An attack is a score per sample, higher for what looks more like a member; `roc`, `auc`,
`tpr_at_fpr` and `best_accuracy` say how far the scores of two sets lie apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.ranking import auc, checked_scores, ranked
from gradsurgery.unlearn.objectives.classification import integers

# a loss is clipped here before a regression sees it: one sample forgotten to an enormous loss would
# otherwise set the scale of the logistic regression for all the others
LARGEST_LOSS = 50.0  # nats
ATTACK_SPLITS = 5
LOW_FPR = 0.01


# -- scores of samples


def checked_logits(logits: Tensor, name: str = "logits") -> Tensor:
    """`logits` [N, C] in float64 on the CPU; `InputError` naming them where they are of no use."""
    if not isinstance(logits, Tensor):
        raise InputError(f"{name} must be a tensor [N, C], got {type(logits).__name__}")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise InputError(f"{name} must be [N, C] with C at least 2, got {list(logits.shape)}")
    # to the CPU first: not every device knows float64
    found = logits.detach().cpu().double()
    bad = (~found.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise InputError(f"{name} must be finite, got {found[row, column]} in row {row}")
    return found


def checked_labels(labels: Tensor, logits: Tensor, name: str = "labels") -> Tensor:
    """`labels` [N] on the CPU, each a column of `logits` [N, C]."""
    n, classes = logits.shape
    found = integers(labels, n, name, of="row of logits").detach().cpu()
    if n and not 0 <= int(found.min()) <= int(found.max()) < classes:
        bounds = f"{int(found.min())} to {int(found.max())}"
        raise InputError(f"{name} must be in [0, {classes}), got {bounds}")
    return found


def log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) of the softmax of `logits` [N, C], each [N, C], float64, nats.

    Relatively exact even where p rounds to 0 or 1. Only the largest p can be near 1, and for it
    p / (1 - p) = e^-o with o = log sum_{i != top} e^z_i - z_top, so that both logarithms are
    log-sigmoids of o; every other p is at most 1/2.
    """
    z = checked_logits(logits)
    top = z.argmax(dim=1, keepdim=True)
    odds = z.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True) - z.gather(1, top)
    log_p = z.log_softmax(dim=1)
    log_rest = torch.log1p(-log_p.exp())
    # two logits can lie further apart than the largest double: 0 log 0 stays 0, and sums finite
    least = torch.finfo(z.dtype).min / 4
    return (
        log_p.scatter(1, top, F.logsigmoid(-odds)).clamp(min=least),
        log_rest.scatter(1, top, F.logsigmoid(odds)).clamp(min=least),
    )


def at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """values[i, labels[i]], [N]."""
    return values.gather(1, labels[:, None]).squeeze(1)


def confidence_attack(logits: Tensor, labels: Tensor) -> Tensor:
    """A member is predicted with confidence: log p_y, minus the loss, [N], at most 0, nats.

    Attacks look at the order alone, which is that of p_y; the logarithm keeps apart samples whose
    p_y all round to 1.

    Args:
        logits: [N, C].
        labels: y, [N].

    Systematic Evaluation of Privacy Risks of Machine Learning Models, Song and Mittal
    (arXiv:2003.10595), with one threshold for all classes.
    """
    log_p, _ = log_probabilities(logits)
    return at_labels(log_p, checked_labels(labels, log_p))


def entropy_attack(logits: Tensor, labels: Tensor) -> Tensor:
    """A member is predicted with little doubt: sum_i p_i log p_i, [N], in [-log C, 0], nats.

    Args:
        logits: [N, C].
        labels: [N], not looked at: a confident wrong answer looks like a member too.

    Song and Mittal (arXiv:2003.10595), with one threshold for all classes.
    """
    log_p, _ = log_probabilities(logits)
    checked_labels(labels, log_p)
    return (log_p.exp() * log_p).sum(dim=1)


def modified_entropy_attack(logits: Tensor, labels: Tensor) -> Tensor:
    """A member is predicted with little doubt and rightly, [N], at most 0, nats.

    (1 - p_y) log p_y + sum_{i != y} p_i log(1 - p_i)

    Args:
        logits: [N, C].
        labels: y, [N].

    Song and Mittal (arXiv:2003.10595), whose Mentr is minus this; here with one threshold for all
    classes. Written from the definition: code in wide use indexes whole columns where (i, y_i) is
    meant, and takes log p for log(1 - p).
    """
    log_p, log_rest = log_probabilities(logits)
    y = checked_labels(labels, log_p)
    others = (log_p.exp() * log_rest).scatter(1, y[:, None], 0.0)
    return at_labels(log_rest.exp() * log_p, y) + others.sum(dim=1)


def correctness_attack(logits: Tensor, labels: Tensor) -> Tensor:
    """A member is predicted rightly: 1 where the largest logit is at the label, else 0, [N].

    Args:
        logits: [N, C]; of equal largest logits the first counts.
        labels: [N].

    Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting, Yeom et al.
    (arXiv:1709.01604).
    """
    found = checked_logits(logits)
    return (found.argmax(dim=1) == checked_labels(labels, found)).double()


# -- how far two sets of scores lie apart


def roc(member_scores: Tensor, nonmember_scores: Tensor) -> tuple[Tensor, Tensor]:
    """False and true positive rate of every threshold there is, from (0, 0) to (1, 1).

    Point k calls members those at or above the k-th highest distinct score, so samples of one
    score pass together and no point depends on their order.

    Args:
        member_scores: [n_members], higher is more like a member.
        nonmember_scores: [n_nonmembers].

    Returns:
        fpr [K + 1] and tpr [K + 1], float64, in [0, 1], ascending, K the distinct scores.
    """
    roc_curve = package("sklearn.metrics", "jobs", "roc").roc_curve

    members, others = ranked(member_scores, nonmember_scores)
    truth = [1] * len(members) + [0] * len(others)
    fpr, tpr, _ = roc_curve(truth, torch.cat([members, others]).numpy(), drop_intermediate=False)
    return torch.from_numpy(fpr), torch.from_numpy(tpr)


def tpr_at_fpr(member_scores: Tensor, nonmember_scores: Tensor, fpr: float = LOW_FPR) -> float:
    """Share of members found by the best threshold with at most `fpr` false positives, in [0, 1].

    Only thresholds there are count, with nothing in between. With fewer than 1 / fpr nonmembers a
    single false positive is too many, and the answer is the share of members that score above
    every nonmember: a statement about the extremes of a small set, not about a rate of `fpr`.

    Args:
        member_scores: [n_members].
        nonmember_scores: [n_nonmembers].
        fpr: in [0, 1].

    Membership Inference Attacks From First Principles, Carlini et al. (arXiv:2112.03570).
    """
    if not 0 <= fpr <= 1:
        raise InputError(f"fpr must be in [0, 1], got {fpr}")
    rates, found = roc(member_scores, nonmember_scores)
    return found[rates <= fpr].max().item()


def best_accuracy(
    member_scores: Tensor, nonmember_scores: Tensor, *, two_sided: bool = False
) -> float:
    """Balanced accuracy, (TPR + TNR) / 2, of the best threshold, in [0.5, 1].

    The sizes of the sets do not matter. The threshold is chosen on the very samples it is judged
    by, so that of n and m samples of one distribution about 0.31 sqrt(1/n + 1/m) above 0.5 is
    luck, or 0.43 of it if two-sided: compare with Retrain on the same samples, not with 0.5.

    Args:
        member_scores: [n_members].
        nonmember_scores: [n_nonmembers].
        two_sided: members may be those below the threshold as well, whichever is better; otherwise
            they are those at or above it, and where members score lowest this is 0.5.
    """
    rates, found = roc(member_scores, nonmember_scores)
    lead = found - rates
    return ((1 + (lead.abs() if two_sided else lead)) / 2).max().item()


# -- attacks


def mia(forget_losses: Tensor, unseen_losses: Tensor, seed: int = 0) -> float:
    """Accuracy of a loss-based membership attack on forget samples against unseen ones.

    A logistic regression on the per-sample loss, mean accuracy over 5 stratified folds, each
    predicted by the regression fitted on the others. The larger set is subsampled to the size of
    the smaller, so 0.5 means the attack cannot tell them apart. Compare with Retrain, not with
    0.5: wrong labels and an unseen class have losses that stand out in a model that never saw
    them.

    Args:
        forget_losses: [n_forget].
        unseen_losses: [n_unseen], samples no model was trained on.
        seed: of the subsample and of the folds.
    """
    package("sklearn", "jobs", "an attack by a fitted model")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    forget = checked_scores(forget_losses, "forget_losses")
    unseen = checked_scores(unseen_losses, "unseen_losses")
    n = min(len(forget), len(unseen))
    if n < ATTACK_SPLITS:
        raise InputError(f"an attack needs at least {ATTACK_SPLITS} samples a side, got {n}")
    generator = torch.Generator().manual_seed(seed)
    sides = [
        side[torch.randperm(len(side), generator=generator)[:n]].clamp(-LARGEST_LOSS, LARGEST_LOSS)
        for side in (forget, unseen)
    ]
    features = torch.cat(sides).reshape(-1, 1).numpy()
    member = torch.tensor([1, 0]).repeat_interleave(n).numpy()
    folds = StratifiedKFold(ATTACK_SPLITS, shuffle=True, random_state=seed)
    attack = make_pipeline(StandardScaler(), LogisticRegression())
    return float(cross_val_score(attack, features, member, cv=folds).mean())


THRESHOLD_ATTACKS = {
    "mia_confidence": confidence_attack,
    "mia_entropy": entropy_attack,
    "mia_modified_entropy": modified_entropy_attack,
    "mia_correctness": correctness_attack,
}


def attack_all(
    forget_logits: Tensor,
    forget_labels: Tensor,
    unseen_logits: Tensor,
    unseen_labels: Tensor,
    seed: int = 0,
) -> dict[str, float]:
    """Every attack on a model's outputs, by the name it has in a job's results, each in [0, 1].

    mia: `mia`. mia_confidence, mia_entropy, mia_modified_entropy, mia_correctness: two-sided
    `best_accuracy` of that attack. mia_auc, mia_tpr: `auc`, and `tpr_at_fpr` at 1 %, of the loss,
    whose order is that of the confidence; they are one-sided and say which side it is.

    Two-sided, as `mia` is, because samples with wrong labels or of an unseen class look less like
    members than unseen samples do, in Retrain most of all: an attack that knows only one side gives
    0.5 for every model, and their gap to Retrain would be 0 in silence. The papers' attacks are
    one-sided.

    Args:
        forget_logits: [n_forget, C].
        forget_labels: [n_forget], as the forget set was trained with them.
        unseen_logits: [n_unseen, C], of samples no model was trained on.
        unseen_labels: [n_unseen].
        seed: of `mia`.
    """
    forget = checked_logits(forget_logits, "forget_logits")
    unseen = checked_logits(unseen_logits, "unseen_logits")
    sides = (
        (forget, checked_labels(forget_labels, forget, "forget_labels")),
        (unseen, checked_labels(unseen_labels, unseen, "unseen_labels")),
    )
    scores = {
        name: (attack(*sides[0]), attack(*sides[1])) for name, attack in THRESHOLD_ATTACKS.items()
    }
    confidences = scores["mia_confidence"]
    return {
        "mia": mia(-confidences[0], -confidences[1], seed),
        **{name: best_accuracy(*pair, two_sided=True) for name, pair in scores.items()},
        "mia_auc": auc(*confidences),
        "mia_tpr": tpr_at_fpr(*confidences),
    }
