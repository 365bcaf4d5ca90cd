# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The unlearning teacher and the divergences, on whole logits: short, plain, and the oracle of the chunked version."""

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


def dense_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """
    Divergence between student and teacher at each token, in nats.

    Args:
        student_logits (`torch.Tensor`):
            Logits of the student, of shape `(num_tokens, vocab_size)`.
        teacher_logits (`torch.Tensor`):
            Logits of the teacher, of the same shape.
        beta (`float`, *optional*, defaults to `1.0`):
            `1.0` is the reverse KL, `KL(student ‖ teacher) = Σ_v π_s (log π_s − log π_t)`; `0.0` the forward KL,
            `KL(teacher ‖ student) = Σ_v π_t (log π_t − log π_s)`.

    Returns:
        `torch.Tensor`:
            Divergences of shape `(num_tokens,)`, in float32.
    """
    student = student_logits.float().log_softmax(-1)
    teacher = teacher_logits.float().log_softmax(-1)
    if beta == 1.0:
        return (student.exp() * (student - teacher)).sum(-1)
    if beta == 0.0:
        return (teacher.exp() * (teacher - student)).sum(-1)
    raise ValueError(f"`beta` must be 1.0 (reverse KL) or 0.0 (forward KL), got {beta}.")
