# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.

from unlearn_eval.lm_head import LMHead, lm_head_of

from .chunked import HeadInput, TokenLosses, chunked_divergence, chunked_nll
from .divergence import dense_divergence, unlearning_teacher_logits


__all__ = [
    "HeadInput",
    "LMHead",
    "TokenLosses",
    "chunked_divergence",
    "chunked_nll",
    "dense_divergence",
    "lm_head_of",
    "unlearning_teacher_logits",
]
