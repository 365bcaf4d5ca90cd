# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
A look at vLLM before it is trusted: a few answers must score as they do with transformers, and an adapter must do
something.

vLLM has served adapters without effect (vllm#34186, vllm#51594) and log-probabilities of other requests (vllm#42019),
each time silently.
"""

from collections.abc import Sequence

import numpy as np

from .backends import ScoreRequest


CANARY_SIZE = 8

TOLERANCE, RELATIVE_TOLERANCE = 0.1, 0.03
"""
Largest difference of average losses, in nats per token and as a share of the loss, which allows for short answers that the
model finds unlikely. 16-bit kernels stay below half of it; a fault does not.
"""


def choose(requests: Sequence[ScoreRequest]) -> list[ScoreRequest]:
    """The answers to look at, spread evenly over the longer half: the rounding of many tokens cancels out."""
    longer = sorted(requests, key=lambda request: len(request.answer_ids))[len(requests) // 2 :]
    return [longer[int(i)] for i in np.linspace(0, len(longer) - 1, min(CANARY_SIZE, len(longer)))]


def check_agreement(name: str, expected: Sequence[float], found: Sequence[float]) -> None:
    """
    Raise unless vLLM scores as transformers does.

    Args:
        name (`str`):
            Name of the checkpoint.
        expected (`Sequence[float]`):
            Average losses with transformers, in nats per token.
        found (`Sequence[float]`):
            The same with vLLM.

    Raises:
        [`ValueError`]: If they differ by more than the tolerance.
    """
    differences = np.abs(np.subtract(expected, found))
    if not np.all(differences <= TOLERANCE + RELATIVE_TOLERANCE * np.abs(expected)):
        raise ValueError(
            f"vLLM scores `{name}` otherwise than transformers does: average losses differ by up to "
            f"{differences.max():.3f} nats per token on {len(expected)} answers (tolerance {TOLERANCE} and "
            f"{RELATIVE_TOLERANCE:.0%} of the loss). Use `backend=transformers`, or merge the adapter "
            "(`trl-rkld merge`)."
        )


def check_adapter(name: str, with_adapter: Sequence[float], base: Sequence[float]) -> None:
    """
    Raise if an adapter changes nothing.

    Args:
        name (`str`):
            Name of the checkpoint.
        with_adapter (`Sequence[float]`):
            Average losses with vLLM, the adapter on.
        base (`Sequence[float]`):
            The same of the bare base.

    Raises:
        [`ValueError`]: If they are all equal.
    """
    if np.array_equal(with_adapter, base):
        raise ValueError(
            f"With vLLM the adapter `{name}` scores {len(base)} answers exactly as its base does: it was never trained, or "
            "vLLM does not apply it. Use `backend=transformers`, or merge the adapter (`trl-rkld merge`)."
        )
