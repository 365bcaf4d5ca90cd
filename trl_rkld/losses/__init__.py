# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.

from .chunked import HeadInput, TokenLosses, chunked_divergence, chunked_nll
from .divergence import dense_divergence, unlearning_teacher_logits
from .lm_head import LMHead, lm_head_of


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
