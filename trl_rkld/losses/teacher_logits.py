# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The unlearning teacher on whole logits."""

import torch


def unlearning_teacher_logits(
    original_logits: torch.Tensor, augmented_logits: torch.Tensor, alpha: float
) -> torch.Tensor:
    """
    Logits of the unlearning teacher, `l_t = l_o − α · ReLU(l_aug − l_o)`
    (https://huggingface.co/papers/2406.01983, section "Unlearning teacher").

    On raw logits: log-probabilities have no room left to grow on what the original model already memorised.

    Args:
        original_logits (`torch.Tensor`):
            Logits of the original model, of shape `(num_tokens, vocab_size)`.
        augmented_logits (`torch.Tensor`):
            Logits of the augmented model, of the same shape.
        alpha (`float`):
            Strength of the subtraction; `0.0` makes the teacher the original model.

    Returns:
        `torch.Tensor`:
            Teacher logits of shape `(num_tokens, vocab_size)`.
    """
    return original_logits - alpha * torch.relu(augmented_logits - original_logits)
