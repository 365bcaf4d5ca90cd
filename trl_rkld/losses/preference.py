# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Losses on the log-probabilities of whole answers."""

import torch
import torch.nn.functional as F


def npo_losses(log_probs: torch.Tensor, original_log_probs: torch.Tensor, beta: float) -> torch.Tensor:
    """
    Negative preference optimisation, `−(2/β) log σ(−β log(π_θ(y|x) / π_o(y|x)))`
    (https://huggingface.co/papers/2404.05868, eq. 3). As β → 0, its gradient becomes that of gradient ascent.

    Args:
        log_probs (`torch.Tensor`):
            Log-probability of each answer under the student, of shape `(num_samples,)`, in nats.
        original_log_probs (`torch.Tensor`):
            The same under the original model.
        beta (`float`):
            Inverse temperature β.

    Returns:
        `torch.Tensor`:
            Losses of shape `(num_samples,)`.
    """
    return -2 / beta * F.logsigmoid(-beta * (log_probs - original_log_probs))


def simnpo_losses(log_probs: torch.Tensor, lengths: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """
    NPO without a reference model, `−(2/β) log σ(−(β/|y|) log π_θ(y|x) − γ)`
    (https://huggingface.co/papers/2410.07163, eq. 5).

    Args:
        log_probs (`torch.Tensor`):
            Log-probability of each answer under the student, of shape `(num_samples,)`, in nats.
        lengths (`torch.Tensor`):
            Counted tokens of each answer, of the same shape.
        beta (`float`):
            Inverse temperature β.
        gamma (`float`):
            Margin γ.

    Returns:
        `torch.Tensor`:
            Losses of shape `(num_samples,)`.
    """
    return -2 / beta * F.logsigmoid(-beta * log_probs / lengths - gamma)
