# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Losses over the whole vocabulary that never hold a whole `(num_tokens, vocab_size)` tensor.

The counted tokens go through the head a chunk at a time. Each chunk yields its losses and, in closed form, the gradient
of its logits, which is multiplied into the gradients of the hidden states and of the head on the spot: nothing is
recomputed in the backward pass, and nothing but those two gradients is kept for it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from unlearn_eval.lm_head import LMHead


# Numbers in one chunk of logits: 2²³ in float32 are 32 MiB, of which about five are alive at once.
_CHUNK_NUMBERS = 2**23


class HeadInput(NamedTuple):
    """What one role's head gets: last hidden states of the counted tokens, `(num_tokens, hidden_size)`, and the head."""

    hidden_states: torch.Tensor
    head: LMHead


class TokenLosses(NamedTuple):
    """
    Result of a chunked loss.

    Attributes:
        loss (`torch.Tensor`):
            Sum over the tokens, a scalar in float32. The only differentiable part.
        label_log_probs (`torch.Tensor`):
            Log-probability of each label under the student, of shape `(num_tokens,)`, in nats.
        teacher_entropy (`torch.Tensor`):
            Entropy of the teacher at each token, in nats; zeros where the loss has no teacher.
        teacher_gap (`torch.Tensor`):
            Mean over the vocabulary of `l_aug − l_o` at each token; zeros where there is no augmented model.
    """

    loss: torch.Tensor
    label_log_probs: torch.Tensor
    teacher_entropy: torch.Tensor
    teacher_gap: torch.Tensor


def chunked_nll(student: HeadInput, labels: torch.Tensor) -> TokenLosses:
    """
    Negative log-likelihood of the labels, summed over the tokens.

    Args:
        student ([`HeadInput`]):
            Hidden states and head of the model being trained.
        labels (`torch.Tensor`):
            Token ids of shape `(num_tokens,)`.

    Returns:
        [`TokenLosses`]:
            Sum in nats, and the labels' log-probabilities.
    """

    def score(log_probs: torch.Tensor, rows: slice):
        targets = labels[rows, None].to(log_probs.device)
        losses = -log_probs.gather(-1, targets).squeeze(-1)
        grad = log_probs.exp_()
        grad.scatter_add_(-1, targets, grad.new_full((grad.shape[0], 1), -1.0))
        zeros = torch.zeros_like(losses)
        return losses, grad, zeros, zeros

    return _apply(student, labels, score)


def chunked_divergence(
    student: HeadInput,
    original: HeadInput,
    augmented: HeadInput | None,
    labels: torch.Tensor,
    alpha: float,
    beta: float = 1.0,
) -> TokenLosses:
    """
    Divergence from the unlearning teacher, summed over the tokens. The same numbers as
    [`~trl_rkld.losses.dense_divergence`] on [`~trl_rkld.losses.unlearning_teacher_logits`].

    With `z` the student's logits, the gradients are `∂KL(π_s‖π_t)/∂z = π_s (log π_s − log π_t − KL)` for the reverse
    and `∂KL(π_t‖π_s)/∂z = π_s − π_t` for the forward KL.

    Args:
        student ([`HeadInput`]):
            Hidden states and head of the model being trained.
        original ([`HeadInput`]):
            The same tokens under the original model; never differentiated.
        augmented ([`HeadInput`], *optional*):
            The same tokens under the augmented model. If `None`, the original model is the teacher.
        labels (`torch.Tensor`):
            Token ids of shape `(num_tokens,)`, for the log-probabilities that are reported.
        alpha (`float`):
            Strength of the subtraction, see [`~trl_rkld.losses.unlearning_teacher_logits`].
        beta (`float`, *optional*, defaults to `1.0`):
            `1.0` for the reverse KL `KL(student ‖ teacher)`, `0.0` for the forward KL `KL(teacher ‖ student)`.

    Returns:
        [`TokenLosses`]:
            Sum in nats, with what is worth logging about student and teacher.
    """
    if beta not in (0.0, 1.0):
        raise ValueError(f"`beta` must be 1.0 (reverse KL) or 0.0 (forward KL), got {beta}.")

    def score(student_log_probs: torch.Tensor, rows: slice):
        teacher, gap = _teacher_log_probs(original, augmented, alpha, rows)
        if beta == 1.0:
            entropy = -(teacher.exp() * teacher).sum(-1)
            difference = torch.sub(student_log_probs, teacher, out=teacher)
            probs = student_log_probs.exp_()
            losses = torch.linalg.vecdot(probs, difference)
            grad = difference.sub_(losses[:, None]).mul_(probs)
        else:
            teacher_probs = teacher.exp()
            entropy = -torch.linalg.vecdot(teacher_probs, teacher)
            losses = torch.linalg.vecdot(teacher_probs, teacher.sub_(student_log_probs))
            grad = student_log_probs.exp_().sub_(teacher_probs)
        return losses, grad, entropy, gap

    return _apply(student, labels, score)


def _teacher_log_probs(
    original: HeadInput, augmented: HeadInput | None, alpha: float, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = original.head.logits(original.hidden_states[rows])
    gap = teacher.new_zeros(teacher.shape[0])
    if augmented is not None:
        difference = augmented.head.logits(augmented.hidden_states[rows]).sub_(teacher)
        gap = difference.mean(-1)
        teacher.sub_(difference.relu_(), alpha=alpha)
    return _log_softmax_(teacher), gap


def _log_softmax_(logits: torch.Tensor) -> torch.Tensor:
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _apply(student: HeadInput, labels: torch.Tensor, score: Callable) -> TokenLosses:
    # Of a model split over devices, the head may lie on another one than the last layer.
    hidden_states, head = student.hidden_states.to(student.head.weight.device), student.head
    needs_grad = torch.is_grad_enabled()
    return TokenLosses(
        *_ChunkedLoss.apply(
            hidden_states, head.weight, head.bias, head, labels.to(head.weight.device), score, needs_grad
        )
    )


class _ChunkedLoss(torch.autograd.Function):
    """
    `score(log_probs, rows)` turns the student's log-probabilities of a chunk (which it may overwrite) into
    `(losses, gradient of the logits, teacher entropy, teacher gap)`.
    """

    @staticmethod
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, hidden_states, weight, bias, head, labels, score, needs_grad):
        num_tokens, vocab_size = hidden_states.shape[0], weight.shape[0]
        chunk = max(1, _CHUNK_NUMBERS // vocab_size)
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if needs_grad and needed else None
            for tensor, needed in zip((hidden_states, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        loss, label_log_probs, entropy, gap = hidden_states.new_zeros(4, num_tokens, dtype=torch.float32)
        for start in range(0, num_tokens, chunk):
            rows = slice(start, start + chunk)
            log_probs = head.logits(hidden_states[rows])
            # The soft cap's derivative wants the logits themselves, which the steps below overwrite.
            logits = log_probs.clone() if head.softcap is not None else log_probs
            _log_softmax_(log_probs)
            label_log_probs[rows] = log_probs.gather(-1, labels[rows, None]).squeeze(-1)
            loss[rows], grad, entropy[rows], gap[rows] = score(log_probs, rows)
            if grad_hidden is None and grad_weight is None:
                continue
            grad = head.backward_logits(grad, logits)
            if grad_hidden is not None:
                grad_hidden[rows] = head.backward_hidden(grad)
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden_states[rows].float())
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(
            *(
                None if grad is None else grad.to(tensor.dtype)
                for grad, tensor in zip(
                    (grad_hidden, grad_weight, grad_bias), (hidden_states, weight, bias), strict=True
                )
            )
        )
        ctx.mark_non_differentiable(label_log_probs, entropy, gap)
        return loss.sum(), label_log_probs, entropy, gap

    @staticmethod
    def backward(ctx, grad_loss, *_):
        # In place: each backward pass consumes the saved gradients once, and a second copy of the head's is large.
        grads = tuple(None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None
