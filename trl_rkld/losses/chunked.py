# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Losses over the whole vocabulary that never hold a whole `(num_tokens, vocab_size)` tensor.

The counted tokens go through the head a chunk at a time. Each chunk yields its losses and, in closed form, the
gradient of its logits, which is multiplied into the gradients of the hidden states and of the head on the spot:
nothing is recomputed in the backward pass, and nothing but those two gradients is kept for it.
"""

from collections.abc import Callable, Sequence
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
            Mean over the vocabulary of what α multiplies, `ReLU(l_aug − l_o)`, at each token; zeros where there is no augmented model.
    """

    loss: torch.Tensor
    label_log_probs: torch.Tensor
    teacher_entropy: torch.Tensor
    teacher_gap: torch.Tensor

    @classmethod
    def without_teacher(cls, loss: torch.Tensor, label_log_probs: torch.Tensor) -> "TokenLosses":
        """Result of a loss that has no teacher."""
        log_probs = label_log_probs.detach()
        return cls(loss, log_probs, torch.zeros_like(log_probs), torch.zeros_like(log_probs))


def chunked_nll(student: HeadInput, labels: torch.Tensor, targets: torch.Tensor | None = None) -> TokenLosses:
    """
    Negative log-likelihood of the labels, or of other targets, summed over the tokens.

    Args:
        student ([`HeadInput`]):
            Hidden states and head of the model being trained.
        labels (`torch.Tensor`):
            Token ids of shape `(num_tokens,)`.
        targets (`torch.Tensor`, *optional*):
            Token ids of the same shape whose likelihood is the loss. If `None`, the labels.

    Returns:
        [`TokenLosses`]:
            Sum in nats, and the labels' log-probabilities.
    """

    targets = labels if targets is None else targets

    def score(log_probs: torch.Tensor, rows: slice):
        tokens = targets[rows, None].to(log_probs.device)
        losses = -log_probs.gather(-1, tokens).squeeze(-1)
        grad = log_probs.exp_()
        grad.scatter_add_(-1, tokens, grad.new_full((grad.shape[0], 1), -1.0))
        zeros = torch.zeros_like(losses)
        return losses, grad, zeros, zeros

    return _apply(student, labels, score)


def chunked_divergence(
    student: HeadInput,
    original: HeadInput,
    labels: torch.Tensor,
    augmented: HeadInput | None = None,
    alpha: float = 0.0,
    beta: float = 1.0,
    label_penalty: float = 0.0,
) -> TokenLosses:
    """
    Divergence from the unlearning teacher, [`~trl_rkld.losses.unlearning_teacher_logits`], summed over the tokens.

    With `z` the student's logits, the gradients are `∂KL(π_s‖π_t)/∂z = π_s (log π_s − log π_t − KL)` for the reverse
    and `∂KL(π_t‖π_s)/∂z = π_s − π_t` for the forward KL.

    Args:
        student ([`HeadInput`]):
            Hidden states and head of the model being trained.
        original ([`HeadInput`]):
            The same tokens under the original model; never differentiated.
        labels (`torch.Tensor`):
            Token ids of shape `(num_tokens,)`, for the log-probabilities that are reported.
        augmented ([`HeadInput`], *optional*):
            The same tokens under the augmented model. If `None`, the original model is the teacher.
        alpha (`float`, *optional*, defaults to `0.0`):
            Strength of the subtraction, see [`~trl_rkld.losses.unlearning_teacher_logits`].
        beta (`float`, *optional*, defaults to `1.0`):
            `1.0` for the reverse KL `KL(student ‖ teacher)`, `0.0` for the forward KL `KL(teacher ‖ student)`.
        label_penalty (`float`, *optional*, defaults to `0.0`):
            Taken away from the teacher's logit of each label, too.

    Returns:
        [`TokenLosses`]:
            Sum in nats, with what is worth logging about student and teacher.
    """
    if beta not in (0.0, 1.0):
        raise ValueError(f"`beta` must be 1.0 (reverse KL) or 0.0 (forward KL), got {beta}.")

    def score(student_log_probs: torch.Tensor, rows: slice):
        teacher, gap = _teacher_logits(original, augmented, alpha, rows)
        if label_penalty != 0.0:
            tokens = labels[rows, None].to(teacher.device)
            teacher.scatter_add_(-1, tokens, teacher.new_full(tokens.shape, -label_penalty))
        _log_softmax_(teacher)
        if beta == 1.0:
            entropy = -torch.linalg.vecdot(teacher.exp(), teacher)
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


@torch.no_grad()
def teacher_labels(
    original: HeadInput, augmented: HeadInput, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Likeliest token under the unlearning teacher at each token.

    Args:
        original, augmented, alpha:
            As in [`chunked_divergence`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`:
            Token ids, and the teacher's entropy and gap as in [`TokenLosses`], each of shape `(num_tokens,)`.
    """
    num_tokens, chunk = original.hidden_states.shape[0], _chunk_size(original.head)
    entropy, gap = torch.empty(2, num_tokens, device=original.head.weight.device)
    labels = torch.empty_like(gap, dtype=torch.long)
    for start in range(0, num_tokens, chunk):
        rows = slice(start, start + chunk)
        teacher, gap[rows] = _teacher_logits(original, augmented, alpha, rows)
        labels[rows] = teacher.argmax(-1)
        _log_softmax_(teacher)
        entropy[rows] = -torch.linalg.vecdot(teacher.exp(), teacher)
    return labels, entropy, gap


def label_log_probs(student: HeadInput, labels: torch.Tensor) -> torch.Tensor:
    """
    Log-probability of each label, differentiable: for losses that are no sum over the tokens. The backward pass
    multiplies the head once more instead of keeping logits.

    Args:
        student ([`HeadInput`]):
            Hidden states and head of the model being trained.
        labels (`torch.Tensor`):
            Token ids of shape `(num_tokens,)`.

    Returns:
        `torch.Tensor`:
            Log-probabilities of shape `(num_tokens,)`, in float32 and nats.
    """
    hidden_states, head, labels = _on_one_device(student, labels)
    return _LabelLogProbs.apply(hidden_states, head.weight, head.bias, head, labels)


def _teacher_logits(
    original: HeadInput, augmented: HeadInput | None, alpha: float, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = original.head.logits(original.hidden_states[rows])
    gap = teacher.new_zeros(teacher.shape[0])
    if augmented is not None:
        difference = augmented.head.logits(augmented.hidden_states[rows]).sub_(teacher)
        gap = difference.relu_().mean(-1)
        teacher.sub_(difference, alpha=alpha)
    return teacher, gap


def _log_softmax_(logits: torch.Tensor) -> torch.Tensor:
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _chunk_size(head: LMHead) -> int:
    return max(1, _CHUNK_NUMBERS // head.weight.shape[0])


def _on_one_device(student: HeadInput, labels: torch.Tensor) -> tuple[torch.Tensor, LMHead, torch.Tensor]:
    # Of a model split over devices, the head may lie on another one than the last layer.
    device = student.head.weight.device
    return student.hidden_states.to(device), student.head, labels.to(device)


def _apply(student: HeadInput, labels: torch.Tensor, score: Callable) -> TokenLosses:
    hidden_states, head, labels = _on_one_device(student, labels)
    needs_grad = torch.is_grad_enabled()
    return TokenLosses(*_ChunkedLoss.apply(hidden_states, head.weight, head.bias, head, labels, score, needs_grad))


class _HeadGradients:
    """Gradients of the hidden states and of the head's tensors, those that are needed, summed up chunk by chunk."""

    def __init__(self, hidden_states, weight, bias, head: LMHead, needed: Sequence[bool]):
        self.tensors, self.head = (hidden_states, weight, bias), head
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if is_needed else None
            for tensor, is_needed in zip(self.tensors, needed, strict=True)
        )

    @property
    def any_needed(self) -> bool:
        return self.hidden is not None or self.weight is not None

    def add(self, rows: slice, grad: torch.Tensor, logits: torch.Tensor) -> None:
        """Add what comes of the gradient of a chunk's logits, which is overwritten."""
        grad = self.head.backward_logits(grad, logits)
        if self.hidden is not None:
            self.hidden[rows] = self.head.backward_hidden(grad)
        if self.weight is not None:
            self.weight.addmm_(grad.T, self.tensors[0][rows].float())
        if self.bias is not None:
            self.bias += grad.sum(0)

    def result(self) -> tuple[torch.Tensor | None, ...]:
        """That of the hidden states in float32: in float16 it would be 0 before a loss scaler comes to it."""
        grads = zip((self.weight, self.bias), self.tensors[1:], strict=True)
        return self.hidden, *(None if grad is None else grad.to(tensor.dtype) for grad, tensor in grads)


class _ChunkedLoss(torch.autograd.Function):
    """
    `score(log_probs, rows)` turns the student's log-probabilities of a chunk (which it may overwrite) into
    `(losses, gradient of the logits, teacher entropy, teacher gap)`.
    """

    @staticmethod
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, hidden_states, weight, bias, head, labels, score, needs_grad):
        num_tokens, chunk = hidden_states.shape[0], _chunk_size(head)
        needed = [needs_grad and needed for needed in ctx.needs_input_grad[:3]]
        grads = _HeadGradients(hidden_states, weight, bias, head, needed)
        loss, label_log_probs, entropy, gap = hidden_states.new_zeros(4, num_tokens, dtype=torch.float32)
        for start in range(0, num_tokens, chunk):
            rows = slice(start, start + chunk)
            log_probs = head.logits(hidden_states[rows])
            # The soft cap's derivative wants the logits themselves, which the steps below overwrite.
            logits = log_probs.clone() if head.softcap is not None else log_probs
            _log_softmax_(log_probs)
            label_log_probs[rows] = log_probs.gather(-1, labels[rows, None]).squeeze(-1)
            loss[rows], grad, entropy[rows], gap[rows] = score(log_probs, rows)
            if grads.any_needed:
                grads.add(rows, grad, logits)
        ctx.dtype = hidden_states.dtype
        ctx.save_for_backward(*grads.result())
        ctx.mark_non_differentiable(label_log_probs, entropy, gap)
        return loss.sum(), label_log_probs, entropy, gap

    @staticmethod
    def backward(ctx, grad_loss, *_):
        # In place: each backward pass consumes the saved gradients once, and a second copy of the head's is large.
        hidden, *head = (None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        return None if hidden is None else hidden.to(ctx.dtype), *head, None, None, None, None


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, hidden_states, weight, bias, head, labels):
        ctx.save_for_backward(hidden_states, weight, bias, labels)
        ctx.head = head._replace(weight=None, bias=None)  # autograd keeps the tensors
        chunk = _chunk_size(head)
        return torch.cat(
            [
                _log_softmax_(head.logits(states)).gather(-1, ids[:, None]).squeeze(-1)
                for states, ids in zip(hidden_states.split(chunk), labels.split(chunk), strict=True)
            ]
        )

    @staticmethod
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad_output):
        hidden_states, weight, bias, labels = ctx.saved_tensors
        head = ctx.head._replace(weight=weight, bias=bias)
        grads = _HeadGradients(hidden_states, weight, bias, head, ctx.needs_input_grad[:3])
        for start in range(0, hidden_states.shape[0], _chunk_size(head)):
            rows = slice(start, start + _chunk_size(head))
            logits = head.logits(hidden_states[rows])
            weights = grad_output[rows, None]
            # ∂ log π(y) / ∂z = onehot(y) − π
            grad = logits.softmax(-1).mul_(-weights)
            grads.add(rows, grad.scatter_add_(-1, labels[rows, None], weights), logits)
        hidden, *head = grads.result()
        return None if hidden is None else hidden.to(hidden_states.dtype), *head, None, None
