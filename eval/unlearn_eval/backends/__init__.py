# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Two ways to run a model, behind two methods: `score(requests)` and `generate(requests)`.

Both take token ids and yield `(index of the request, result)` pairs in any order, as soon as a batch is done: what was
yielded need not be computed again after a crash.
"""

from typing import NamedTuple

import numpy as np

from ..prompts import TokenizedAnswer


ScoreRequest = TokenizedAnswer
"""Prompt and counted tokens; the answer is not empty, and neither is the prompt."""


class AnswerScores(NamedTuple):
    """
    What a model thinks of an answer, token by token: all that the metrics need.

    Attributes:
        logprobs (`np.ndarray` of shape `[T]`):
            Log-probability of each counted token in nats, 32 bits.
        matches (`np.ndarray` of shape `[T]`):
            Whether the token is the model's first choice.
        means, variances (`np.ndarray` of shape `[T]`, *optional*):
            Mean and variance of `log p` under `p` at each position (Min-K%++). `None` where the backend can't give
            them.
    """

    logprobs: np.ndarray
    matches: np.ndarray
    means: np.ndarray | None = None
    variances: np.ndarray | None = None

    @property
    def avg_loss(self) -> float:
        """Mean loss over the counted tokens, end of turn included, in nats per token."""
        return -float(self.logprobs.mean(dtype=np.float64))


class GenerateRequest(NamedTuple):
    """
    A prompt to continue greedily.

    Attributes:
        prompt_ids (`list[int]`):
            Everything the model is given.
        max_new_tokens (`int`):
            Largest number of new tokens, the one that ends the turn included.
    """

    prompt_ids: list[int]
    max_new_tokens: int
