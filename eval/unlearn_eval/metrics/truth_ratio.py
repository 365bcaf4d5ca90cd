# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The truth ratio, its three aggregations, and forget quality, which compares two of its distributions."""

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np

from .checks import finite_array, same_length


def truth_ratio(
    right_loss: Sequence[float],
    wrong_losses: Sequence[Sequence[float]],
    guard: float = 1e-10,
    wrong_mean: Literal["geometric", "arithmetic"] = "geometric",
) -> np.ndarray:
    """
    Truth ratio of each item, `R = P_wrong / (P_right + guard)`: wrong over right.

    `P_wrong` is the *geometric* mean over the wrong answers, `exp(-mean_j loss_j)`. The paper's formula takes the
    arithmetic mean; the numbers that both reference evaluators report do not. Aggregation: [`closer_to_1_better`] on
    the forget set, [`true_better`] elsewhere, [`prob_mean`] in the OpenUnlearning paper. Direction: none of its own:
    R < 1 says that the model prefers the right answer, R = 1 that it cannot tell. Source:
    https://huggingface.co/papers/2401.06121, section 2.2, as in open-unlearning@d3d7cf9 (`truth_ratio`).

    Args:
        right_loss (`Sequence[float]` of shape `[n]`):
            Mean loss of the right answer in nats per token: the paraphrased answer (forget, retain), or the answer
            itself (real authors, world facts).
        wrong_losses (`Sequence[Sequence[float]]` of shape `[n, k]`):
            Mean losses of the k wrong answers, in nats per token.
        guard (`float`, *optional*, defaults to `1e-10`):
            Added to the denominator, as open-unlearning does. `0.0` reproduces locuslab/tofu@bdc209e.
        wrong_mean (`str`, *optional*, defaults to `"geometric"`):
            `"arithmetic"` averages the probabilities of the wrong answers: the paper's formula, and what
            locuslab/tofu@bdc209e reports during training (`utils.get_model_utility`). Never mix the two.

    Returns:
        `np.ndarray` of shape `[n]`:
            Ratios R >= 0.

    Raises:
        [`ValueError`]: If an argument is empty or not finite, the lengths differ, or a ratio overflows.
    """
    right_loss = finite_array("right_loss", right_loss)
    wrong_losses = finite_array("wrong_losses", wrong_losses, ndim=2)
    same_length("right_loss", right_loss, "wrong_losses", wrong_losses)
    if wrong_mean not in ("geometric", "arithmetic"):
        raise ValueError(f"`wrong_mean` must be 'geometric' or 'arithmetic', not {wrong_mean!r}.")
    with np.errstate(over="ignore", divide="ignore"):
        if wrong_mean == "geometric":
            wrong_loss = wrong_losses.mean(axis=1)
        else:
            wrong_loss = -np.log(np.exp(-wrong_losses).mean(axis=1))
        # Without a guard the difference is taken in the exponent, where no probability underflows.
        ratios = np.exp(-wrong_loss) / (np.exp(-right_loss) + guard) if guard else np.exp(right_loss - wrong_loss)
    return finite_array("right_loss - wrong_losses", ratios)


def closer_to_1_better(truth_ratios: Sequence[float]) -> float:
    """
    Aggregation of the forget set's truth ratio: mean of `min(R, 1 / (R + 1e-10))`.

    Direction: 1 says that right and wrong answers are equally likely, so higher is better for the data subject; but
    the aim is the retain-only model's value, not 1. Source: open-unlearning@d3d7cf9; locuslab/tofu@bdc209e has no
    guard (the difference is below 1e-10).

    Args:
        truth_ratios (`Sequence[float]` of shape `[n]`):
            Output of [`truth_ratio`].

    Returns:
        `float`:
            A value in [0, 1].

    Raises:
        [`ValueError`]: If `truth_ratios` is empty, not finite or negative.
    """
    ratios = _ratios("truth_ratios", truth_ratios)
    return float(np.minimum(ratios, 1 / (ratios + 1e-10)).mean())


def true_better(truth_ratios: Sequence[float]) -> float:
    """
    Aggregation of the truth ratio of retain set, real authors and world facts: mean of `max(0, 1 - R)`.

    Direction: higher is better for the user. Source: open-unlearning@d3d7cf9 and locuslab/tofu@bdc209e.

    Args:
        truth_ratios (`Sequence[float]` of shape `[n]`):
            Output of [`truth_ratio`].

    Returns:
        `float`:
            A value in [0, 1].

    Raises:
        [`ValueError`]: If `truth_ratios` is empty, not finite or negative.
    """
    return float(np.maximum(0, 1 - _ratios("truth_ratios", truth_ratios)).mean())


def prob_mean(truth_ratios: Sequence[float]) -> float:
    """
    Aggregation of the OpenUnlearning paper: mean of `right / (right + wrong) = 1 / (1 + R)`.

    Direction: on the forget set lower is better for the data subject, 0.5 says that right and wrong are equally
    likely. No shipped setting of open-unlearning@d3d7cf9 uses it. Source: https://huggingface.co/papers/2506.12618.

    Args:
        truth_ratios (`Sequence[float]` of shape `[n]`):
            Output of [`truth_ratio`] with `guard=0.0`: the paper's formula has none.

    Returns:
        `float`:
            A value in (0, 1].

    Raises:
        [`ValueError`]: If `truth_ratios` is empty, not finite or negative.
    """
    return float((1 / (1 + _ratios("truth_ratios", truth_ratios))).mean())


class ForgetQuality(TypedDict):
    """A two-sample Kolmogorov-Smirnov test."""

    p: float
    ks_d: float
    n: int


def forget_quality(truth_ratios: Sequence[float], retain_truth_ratios: Sequence[float]) -> ForgetQuality:
    """
    Can the truth ratios on the forget set be told from those of a model that never saw it?

    A two-sided two-sample Kolmogorov-Smirnov test (scipy's default method). Aggregation: p-value over the n items.
    Direction: higher p and lower D are better for the data subject; p = 1 for the retain-only model itself, p < 0.05
    is the usual line for "can be told". The same D gives a smaller p with more items, so p of splits of different
    length are not comparable; D is. R and 1/R give the same result. Source: https://huggingface.co/papers/2401.06121,
    section 2.2, as in open-unlearning@d3d7cf9 (`ks_test`), which checks no lengths.

    Args:
        truth_ratios (`Sequence[float]` of shape `[n]`):
            Output of [`truth_ratio`] on the forget set, for the model judged.
        retain_truth_ratios (`Sequence[float]` of shape `[n]`):
            The same for the retain-only model, on the same items.

    Returns:
        `ForgetQuality`:
            `p` in [0, 1], not its logarithm; `ks_d`, the largest distance of the two distribution functions, in
            [0, 1]; `n`, the number of items.

    Raises:
        [`ValueError`]: If an argument is empty, not finite or negative, or the lengths differ.
    """
    ratios = _ratios("truth_ratios", truth_ratios)
    retain_ratios = _ratios("retain_truth_ratios", retain_truth_ratios)
    same_length("truth_ratios", ratios, "retain_truth_ratios", retain_ratios)

    from scipy.stats import ks_2samp

    test = ks_2samp(ratios, retain_ratios)
    return ForgetQuality(p=float(test.pvalue), ks_d=float(test.statistic), n=len(ratios))


def _ratios(name: str, values: Sequence[float]) -> np.ndarray:
    ratios = finite_array(name, values)
    if ratios.min() < 0:
        raise ValueError(f"`{name}` has a negative value: pass ratios of probabilities, not their logarithms.")
    return ratios
