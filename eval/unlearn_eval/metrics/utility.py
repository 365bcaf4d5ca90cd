# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What the model still can, as harmonic means: one thing lost cannot be made good by the others."""

from collections.abc import Mapping, Sequence

from .checks import finite_number


RETAIN_UTILITY_METRICS = ("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio")
"""The three aggregates under retain utility, by their names in open-unlearning's logs."""

MODEL_UTILITY_METRICS = (
    *RETAIN_UTILITY_METRICS,
    "ra_Q_A_Prob_normalised",
    "ra_Q_A_ROUGE",
    "ra_Truth_Ratio",
    "wf_Q_A_Prob_normalised",
    "wf_Q_A_ROUGE",
    "wf_Truth_Ratio",
)
"""The nine aggregates under model utility."""


def model_utility(aggregates: Mapping[str, float]) -> float:
    """
    Model utility: harmonic mean of probability, ROUGE-L recall and truth ratio on retain set, real authors and world
    facts.

    Aggregation: harmonic mean of nine means. Direction: higher is better for the user. If one of the nine is 0, so is
    the result; [`explain_zero`] says which. Source: https://huggingface.co/papers/2401.06121, section 2.2, as in
    open-unlearning@d3d7cf9 (`hm_aggregate`).

    Args:
        aggregates (`Mapping[str, float]`):
            The aggregates named in `MODEL_UTILITY_METRICS`, each in [0, 1]; others are ignored.

    Returns:
        `float`:
            A value in [0, 1].

    Raises:
        [`ValueError`]: If one of the nine is absent, not finite or negative.
    """
    return _harmonic_mean(aggregates, MODEL_UTILITY_METRICS)


def retain_utility(aggregates: Mapping[str, float]) -> float:
    """
    Retain utility: harmonic mean of probability, ROUGE-L recall and truth ratio on the retain set alone.

    For models that never knew real authors or world facts well, whose model utility says little. Aggregation: harmonic
    mean of three means. Direction: higher is better for the user. Not part of open-unlearning's logs.

    Args:
        aggregates (`Mapping[str, float]`):
            The aggregates named in `RETAIN_UTILITY_METRICS`, each in [0, 1]; others are ignored.

    Returns:
        `float`:
            A value in [0, 1].

    Raises:
        [`ValueError`]: If one of the three is absent, not finite or negative.
    """
    return _harmonic_mean(aggregates, RETAIN_UTILITY_METRICS)


def explain_zero(aggregates: Mapping[str, float]) -> str | None:
    """
    Say why a harmonic mean of `aggregates` is 0.

    Args:
        aggregates (`Mapping[str, float]`):
            The values under the harmonic mean, by name.

    Returns:
        `str` or `None`:
            A sentence naming the values that are 0, or `None` if there are none.
    """
    zeros = [name for name, value in aggregates.items() if value == 0]
    return f"0 because of a harmonic mean over values that are 0: {', '.join(zeros)}" if zeros else None


def _harmonic_mean(aggregates: Mapping[str, float], metrics: Sequence[str]) -> float:
    missing = [name for name in metrics if name not in aggregates]
    if missing:
        raise ValueError(f"`aggregates` lacks {', '.join(missing)}: all of {', '.join(metrics)} are needed.")
    numbers = [finite_number(name, aggregates[name]) for name in metrics]
    negative = [name for name, number in zip(metrics, numbers, strict=True) if number < 0]
    if negative:
        raise ValueError(f"`{negative[0]}` is negative: a harmonic mean needs values in [0, 1].")

    from scipy.stats import hmean

    return float(hmean(numbers))
