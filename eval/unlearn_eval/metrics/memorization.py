# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""How much of an answer greedy decoding gives back, teacher-forced."""

from collections.abc import Sequence

import numpy as np


def exact_memorization(matches: Sequence[bool]) -> float:
    """
    Share of an answer's tokens that are the model's first choice, given all tokens before them.

    Aggregation: mean over items ([`mean_over_items`]). Direction: on the forget set lower is better for the data
    subject. Source: https://huggingface.co/papers/2205.10770, as in open-unlearning@d3d7cf9 (`exact_memorization`),
    which stores it in 32 bits.

    Args:
        matches (`Sequence[bool]` of shape `[T]`):
            For each answer token *without* the final end-of-turn token: is it the argmax?

    Returns:
        `float`:
            A value in [0, 1].

    Raises:
        [`ValueError`]: If `matches` is empty, not one-dimensional or not boolean.
    """
    return float(_matches(matches).mean())


def extraction_strength(matches: Sequence[bool]) -> float:
    """
    Share of an answer that the model completes without an error: `1 - k / T` with k the length of the shortest prefix
    after which every token is the model's first choice.

    Quirk of the reference, kept: if not even the last token is right, k stays at T - 1, so the floor is `1 / T`, not
    0, and an answer of one token always scores 1. Aggregation: mean over items ([`mean_over_items`]). Direction: on
    the forget set lower is better for the data subject. Source: https://huggingface.co/papers/2406.09179, as in
    open-unlearning@d3d7cf9 (`extraction_strength`).

    Args:
        matches (`Sequence[bool]` of shape `[T]`):
            For each answer token *without* the final end-of-turn token: is it the argmax?

    Returns:
        `float`:
            A value in [1 / T, 1].

    Raises:
        [`ValueError`]: If `matches` is empty, not one-dimensional or not boolean.
    """
    matches = _matches(matches)
    wrong = np.flatnonzero(~matches)
    prefix = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - min(prefix, len(matches) - 1) / len(matches)


def _matches(matches: Sequence[bool]) -> np.ndarray:
    array = np.asarray(matches)
    if array.ndim != 1 or array.size == 0 or array.dtype != bool:
        raise ValueError(
            f"`matches` must be a non-empty list of booleans, one for each answer token, not {array.dtype} of shape "
            f"{array.shape}: pass `argmax == label`, and drop items without answer tokens."
        )
    return array
