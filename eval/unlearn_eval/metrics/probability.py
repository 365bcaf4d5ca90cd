# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Probability of an answer, alone or against wrong options."""

from collections.abc import Sequence

import numpy as np

from .checks import finite_array, same_length


def answer_probability(avg_loss: Sequence[float]) -> np.ndarray:
    """
    Length-normalised probability of each answer, `P = exp(-avg_loss) = p(answer | question) ** (1 / T)`.

    Aggregation: mean over items ([`mean_over_items`]). Direction: on the forget set lower is better for the data
    subject; on the retain set higher is better for the user. Source: https://huggingface.co/papers/2401.06121, section
    2.2, as in open-unlearning@d3d7cf9 (`probability`), which stores it in 32 bits.

    Args:
        avg_loss (`Sequence[float]` of shape `[n]` or `[n, k]`):
            Mean negative log-likelihood over the T counted tokens of each answer, end-of-turn token included, in nats
            per token. With k answers an item, one row an item.

    Returns:
        `np.ndarray`:
            Probabilities in (0, 1], of the shape of `avg_loss`.

    Raises:
        [`ValueError`]: If `avg_loss` is empty or not finite.
    """
    return np.exp(-finite_array("avg_loss", avg_loss, ndim=(1, 2)))


def option_normalised_probability(
    right: Sequence[float], wrong: Sequence[Sequence[float]], guard: float = 1e-10
) -> np.ndarray:
    """
    Probability of the right answer among the right and the wrong ones, `P / (P + sum_j P_wrong_j + guard)`.

    Aggregation: mean over items ([`mean_over_items`]). Direction: higher is better for the user (real authors, world
    facts). Source: https://huggingface.co/papers/2401.06121, section 2.2, as in open-unlearning@d3d7cf9
    (`probability_w_options`); locuslab/tofu@bdc209e has no guard.

    Args:
        right (`Sequence[float]` of shape `[n]`):
            Length-normalised probability of the right answers.
        wrong (`Sequence[Sequence[float]]` of shape `[n, k]`):
            Length-normalised probabilities of the k wrong answers of each item (3 in TOFU).
        guard (`float`, *optional*, defaults to `1e-10`):
            Added to the denominator. `0.0` reproduces locuslab/tofu.

    Returns:
        `np.ndarray` of shape `[n]`:
            Normalised probabilities in [0, 1].

    Raises:
        [`ValueError`]: If an argument is empty, not finite or negative, if the lengths differ, or if without a guard
            all probabilities of an item are zero.
    """
    right = finite_array("right", right)
    wrong = finite_array("wrong", wrong, ndim=2)
    same_length("right", right, "wrong", wrong)
    if right.min() < 0 or wrong.min() < 0:
        raise ValueError("`right` and `wrong` must be probabilities, none of them negative: pass exp(-avg_loss).")
    total = right + wrong.sum(axis=1) + guard
    if not total.all():
        raise ValueError(
            f"`right` and `wrong` are all zero for item {int(np.argmin(total))}: keep the default `guard`, or score in fp32."
        )
    return right / total


def mean_over_items(values: Sequence[float] | Sequence[Sequence[float]]) -> float:
    """
    The plain mean; with several values an item, first over an item's values, then over the items.

    Aggregation: this function is the one called "mean over items" elsewhere. Direction: that of the values.

    Args:
        values (`Sequence[float]` of shape `[n]` or `[n, k]`):
            One value, or k values, for each item.

    Returns:
        `float`:
            The mean.

    Raises:
        [`ValueError`]: If `values` is empty or not finite.
    """
    values = finite_array("values", values, ndim=(1, 2))
    return float(values.reshape(len(values), -1).mean(axis=1).mean())
