# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
TOFU's metrics as pure functions over plain arrays: no torch, no files, no texts in error messages.

They follow [OU], locuslab/open-unlearning@d3d7cf9, where it differs from the papers, and say so. Two parties read the
numbers: the *data subject*, who wants the forget set gone, and the *model's user*, who wants everything else kept.
Each docstring names the aggregation and says whose gain a higher value is.
"""

from .memorization import exact_memorization, extraction_strength
from .privacy import auc, loss_score, min_k_plus_plus_score, min_k_score, privleak, zlib_score
from .probability import answer_probability, mean_over_items, option_normalised_probability
from .rouge import has_rouge_words, rouge_scores
from .truth_ratio import closer_to_1_better, forget_quality, prob_mean, true_better, truth_ratio
from .utility import MODEL_UTILITY_METRICS, RETAIN_UTILITY_METRICS, explain_zero, model_utility, retain_utility


__all__ = [
    "MODEL_UTILITY_METRICS",
    "RETAIN_UTILITY_METRICS",
    "answer_probability",
    "auc",
    "closer_to_1_better",
    "exact_memorization",
    "explain_zero",
    "extraction_strength",
    "forget_quality",
    "has_rouge_words",
    "loss_score",
    "mean_over_items",
    "min_k_plus_plus_score",
    "min_k_score",
    "model_utility",
    "option_normalised_probability",
    "privleak",
    "prob_mean",
    "retain_utility",
    "rouge_scores",
    "true_better",
    "truth_ratio",
    "zlib_score",
]
