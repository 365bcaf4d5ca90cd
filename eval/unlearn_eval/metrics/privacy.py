# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Membership inference: can the forget set be told from a holdout set that the model never saw?

Every score is higher for text that looks *less* like training data, and becomes one number through [`auc`].
"""

import zlib
from collections.abc import Sequence

import numpy as np

from .checks import finite_array, finite_number, same_length


def loss_score(avg_loss: float) -> float:
    """
    Attack by loss: the mean loss itself.

    Aggregation: [`auc`]. Direction: higher says "not in the training data". Source:
    https://huggingface.co/papers/1709.01604, as in open-unlearning@d3d7cf9 (`mia_loss`).

    Args:
        avg_loss (`float`):
            Mean loss over all counted tokens, end-of-turn token included, in nats per token.

    Returns:
        `float`:
            The score.

    Raises:
        [`ValueError`]: If `avg_loss` is not finite.
    """
    return finite_number("avg_loss", avg_loss)


def zlib_score(avg_loss: float, answer: str) -> float:
    """
    Attack by loss for each byte that the answer takes when compressed: discounts text that any model finds easy.

    Aggregation: [`auc`]. Direction: higher says "not in the training data". Source:
    https://huggingface.co/papers/2012.07805, as in open-unlearning@d3d7cf9 (`mia_zlib`).

    Args:
        avg_loss (`float`):
            Mean loss over all counted tokens, end-of-turn token included, in nats per token.
        answer (`str`):
            The answer's text.

    Returns:
        `float`:
            The score, in nats per token and byte.

    Raises:
        [`ValueError`]: If `avg_loss` is not finite or `answer` is empty.
    """
    if not answer:
        raise ValueError("`answer` is empty: drop items without an answer.")
    return finite_number("avg_loss", avg_loss) / len(zlib.compress(answer.encode("utf-8")))


def min_k_score(logprobs: Sequence[float], k: float = 0.4) -> float:
    """
    Min-K% attack: minus the mean of the lowest share `k` of the token log-probabilities.

    Aggregation: [`auc`]. Direction: higher says "not in the training data". Source:
    https://huggingface.co/papers/2310.16789, as in open-unlearning@d3d7cf9 (`mia_min_k`).

    Args:
        logprobs (`Sequence[float]` of shape `[T]`):
            Log-probability in nats of each answer token, *without* the final end-of-turn token.
        k (`float`, *optional*, defaults to `0.4`):
            Share of tokens, in (0, 1]; rounded down to whole tokens, at least one.

    Returns:
        `float`:
            The score, in nats per token.

    Raises:
        [`ValueError`]: If `logprobs` is empty or not finite, or `k` is out of range.
    """
    return _minus_mean_of_lowest(finite_array("logprobs", logprobs), k)


def min_k_plus_plus_score(
    logprobs: Sequence[float], means: Sequence[float], variances: Sequence[float], k: float = 0.4
) -> float:
    """
    Min-K%++ attack: Min-K% on log-probabilities standardised by the vocabulary's moments at each position.

    With p the distribution over the vocabulary, `mean = sum p log p` and `variance = sum p (log p)^2 - mean^2`,
    clamped from below at 1e-6. Aggregation: [`auc`]. Direction: higher says "not in the training data". Source:
    https://huggingface.co/papers/2404.02936, as in open-unlearning@d3d7cf9 (`mia_min_k_plus_plus`).

    Args:
        logprobs (`Sequence[float]` of shape `[T]`):
            Log-probability in nats of each answer token, *without* the final end-of-turn token.
        means (`Sequence[float]` of shape `[T]`):
            Mean of log p under p at each position.
        variances (`Sequence[float]` of shape `[T]`):
            Variance of log p under p at each position.
        k (`float`, *optional*, defaults to `0.4`):
            Share of tokens, in (0, 1]; rounded down to whole tokens, at least one.

    Returns:
        `float`:
            The score, in standard deviations.

    Raises:
        [`ValueError`]: If an argument is empty or not finite, the lengths differ, or `k` is out of range.
    """
    logprobs = finite_array("logprobs", logprobs)
    means = finite_array("means", means)
    variances = finite_array("variances", variances)
    same_length("logprobs", logprobs, "means", means)
    same_length("logprobs", logprobs, "variances", variances)
    return _minus_mean_of_lowest((logprobs - means) / np.sqrt(np.maximum(variances, 1e-6)), k)


def auc(forget_scores: Sequence[float], holdout_scores: Sequence[float]) -> float:
    """
    Area under the ROC curve of an attack: the chance that a holdout item scores above a forget item, ties counting
    half.

    Labels are forget = 0 and holdout = 1, as in open-unlearning@d3d7cf9. Aggregation: rank statistic over all pairs,
    equal to scikit-learn's `roc_auc_score`. Direction: 1 says that the forget set is fully remembered, 0.5 is ideal
    for the data subject, below 0.5 it is *less* likely than unseen text (over-unlearned), which gives it away too.

    Args:
        forget_scores (`Sequence[float]` of shape `[n]`):
            Scores of the forget set.
        holdout_scores (`Sequence[float]` of shape `[m]`):
            Scores of the holdout set, by the same attack.

    Returns:
        `float`:
            A value in [0, 1].

    Raises:
        [`ValueError`]: If an argument is empty or not finite.
    """
    forget_scores = finite_array("forget_scores", forget_scores)
    holdout_scores = finite_array("holdout_scores", holdout_scores)

    from scipy.stats import mannwhitneyu

    statistic = mannwhitneyu(holdout_scores, forget_scores, method="asymptotic").statistic
    return float(statistic / (len(holdout_scores) * len(forget_scores)))


def privleak(model_auc: float, retain_auc: float = 0.5) -> float:
    """
    Privacy leakage: the distance of an attack's AUC from the retain-only model's, in per cent.

    `100 * ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain + 1e-10)`: MUSE counts the AUC the other way round, hence
    the `1 - AUC`. Aggregation: from two aggregates of [`min_k_score`]. Direction: 0 is ideal for the data subject,
    -100 fully leaked, far above 0 over-unlearned (unbounded as `retain_auc` nears 1). Source:
    https://huggingface.co/papers/2407.06460, as in open-unlearning@d3d7cf9 (`privleak`).

    Args:
        model_auc (`float`):
            AUC of the model judged, as [`auc`] gives it.
        retain_auc (`float`, *optional*, defaults to `0.5`):
            The same for the retain-only model. The default is what the reference takes without a retain log.

    Returns:
        `float`:
            Per cent.

    Raises:
        [`ValueError`]: If an argument is not in [0, 1].
    """
    for name, value in (("model_auc", model_auc), ("retain_auc", retain_auc)):
        if not 0 <= finite_number(name, value) <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], not {value}: pass the output of `auc`, not per cent.")
    return ((1 - model_auc) - (1 - retain_auc)) / (1 - retain_auc + 1e-10) * 100


def _minus_mean_of_lowest(values: np.ndarray, k: float) -> float:
    if not 0 < k <= 1:
        raise ValueError(f"`k` must be in (0, 1], not {k}: it is a share, not per cent.")
    return -float(np.sort(values)[: max(1, int(len(values) * k))].mean())
