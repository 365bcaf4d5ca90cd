# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.

from unlearn_eval.lm_head import LMHead, lm_head_of

from .chunked import HeadInput, TokenLosses, chunked_divergence, chunked_nll, label_log_probs, teacher_labels
from .preference import npo_losses, simnpo_losses
from .teacher_logits import unlearning_teacher_logits


__all__ = [
    "HeadInput",
    "LMHead",
    "TokenLosses",
    "chunked_divergence",
    "chunked_nll",
    "label_log_probs",
    "lm_head_of",
    "npo_losses",
    "simnpo_losses",
    "teacher_labels",
    "unlearning_teacher_logits",
]
