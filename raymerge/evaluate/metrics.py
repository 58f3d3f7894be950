"""What a score is: the metrics of classification from scikit-learn, and perplexity."""

import math
from collections.abc import Sequence
from typing import Literal

Metric = Literal["accuracy", "f1", "matthews"]


def score_classes(metric: Metric, labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Accuracy in 0 to 1, F1 in 0 to 1 as the plain mean over classes, or Matthews' correlation in -1 to 1."""
    from sklearn import metrics

    if metric == "accuracy":
        return float(metrics.accuracy_score(labels, predictions))
    if metric == "f1":
        # A class that is never predicted counts as 0, without a warning.
        return float(metrics.f1_score(labels, predictions, average="macro", zero_division=0.0))
    return float(metrics.matthews_corrcoef(labels, predictions))


def perplexity(total_nll: float, num_tokens: int) -> float:
    """exp of the mean negative log-likelihood, in nats, of the predicted tokens; infinite if it overflows."""
    mean = total_nll / num_tokens
    return math.exp(mean) if mean < 709 else math.inf


def is_better_lower(metric: str) -> bool:
    return metric == "perplexity"


def share_kept(metric: str, score: float, reference: float | None) -> float | None:
    """The share of an expert's own score that a model keeps: 1 is as good as the expert, above is better.

    score / reference, or its inverse where lower is better; None without a reference or where it is 0.
    """
    if reference is None:
        return None
    top, bottom = (reference, score) if is_better_lower(metric) else (score, reference)
    return top / bottom if bottom else None
