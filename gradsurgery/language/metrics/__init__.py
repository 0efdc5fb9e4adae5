"""What is measured of a language model that unlearns; rouge-score and SciPy come when needed.

A metric is a function of values of samples, by sample id, which `gathered` puts together from all
processes. A mean is `Sums`, a total and a number.
"""

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
from gradsurgery.language.metrics.generation import Generated, Rouge, generated, rouge_l
from gradsurgery.language.metrics.relearning import relearn_steps
from gradsurgery.language.metrics.report import evaluate
from gradsurgery.language.metrics.scores import (
    TokenScores,
    exact_memorization,
    extraction_strength,
    losses,
    min_k,
    perplexity,
    perplexity_of,
    probability,
    token_scores,
    token_sums,
)
from gradsurgery.language.metrics.sums import Sums, gathered, merged

__all__ = [
    "Generated",
    "Rouge",
    "Sums",
    "TokenScores",
    "attack_aucs",
    "attack_scores",
    "closeness",
    "evaluate",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "gathered",
    "generated",
    "gradient_norms",
    "losses",
    "merged",
    "min_k",
    "model_utility",
    "perplexity",
    "perplexity_of",
    "priv_leak",
    "probability",
    "probability_among",
    "relearn_steps",
    "rouge_l",
    "token_scores",
    "token_sums",
    "truth_ratios",
    "truthfulness",
]
