# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_rkld.losses import (
    HeadInput,
    LMHead,
    chunked,
    chunked_divergence,
    chunked_nll,
    dense_divergence,
    unlearning_teacher_logits,
)


N, V, H = 23, 61, 12
ALPHA = 3.0


def make_roles(dtype=torch.float32, bias=False, scale=1.0, softcap=None, shared=False):
    """Student, original and augmented: hidden states and heads of their own, or one frozen head for all."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    heads = [LMHead(draw(V, H), draw(V) if bias else None, scale, softcap) for _ in range(3)]
    if shared:
        heads = [heads[0]] * 3
    return [HeadInput(draw(N, H), head) for head in heads], torch.randint(0, V, (N,), generator=generator)


def oracle_logits(hidden, weight, bias, scale, softcap):
    """The heads again, in float64 numpy: shares no line with the product."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * scale
    return z if softcap is None else softcap * np.tanh(z / softcap)


def oracle_log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def as_numpy(role):
    head = role.head
    bias = None if head.bias is None else head.bias.detach().double().numpy()
    return [role.hidden_states.detach().double().numpy(), head.weight.detach().double().numpy(), bias]


def oracle_loss(student, original, augmented, scale, softcap, beta):
    l_o = oracle_logits(*original, scale, softcap)
    l_a = oracle_logits(*augmented, scale, softcap)
    log_t = oracle_log_softmax(l_o - ALPHA * np.maximum(l_a - l_o, 0))
    log_s = oracle_log_softmax(oracle_logits(*student, scale, softcap))
    if beta == 1.0:
        return (np.exp(log_s) * (log_s - log_t)).sum()
    return (np.exp(log_t) * (log_t - log_s)).sum()


def test_direction_by_hand():
    # Student (0.9, 0.1), teacher (0.5, 0.5). Reverse: 0.9 ln 1.8 + 0.1 ln 0.2; forward: 0.5 ln(5/9) + 0.5 ln 5.
    student = torch.tensor([[math.log(0.9), math.log(0.1)]])
    teacher = torch.tensor([[0.0, 0.0]])
    assert dense_divergence(student, teacher, beta=1.0).item() == pytest.approx(0.36806, abs=1e-5)
    assert dense_divergence(student, teacher, beta=0.0).item() == pytest.approx(0.51083, abs=1e-5)


@pytest.mark.parametrize(("beta", "expected"), [(1.0, 0.36806), (0.0, 0.51083)])
def test_direction_of_the_chunked_loss_by_hand(beta, expected):
    identity = LMHead(torch.eye(2))
    student = HeadInput(torch.tensor([[math.log(0.9), math.log(0.1)]]), identity)
    teacher = HeadInput(torch.zeros(1, 2), identity)
    losses = chunked_divergence(student, teacher, None, torch.tensor([0]), alpha=8.0, beta=beta)
    assert losses.loss.item() == pytest.approx(expected, abs=1e-5)
    assert losses.label_log_probs.item() == pytest.approx(math.log(0.9), abs=1e-6)
    assert losses.teacher_entropy.item() == pytest.approx(math.log(2), abs=1e-6)


def test_teacher_by_hand():
    # Only what the augmented model raised is lowered, and α times as much: 1 − 8·1, 2, 3 − 8·0.5.
    original, augmented = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 1.0, 3.5]])
    assert unlearning_teacher_logits(original, augmented, 8.0).tolist() == [[-7.0, 2.0, -1.0]]
    losses = chunked_divergence(
        HeadInput(torch.tensor([[0.0, 0.0, 0.0]]), LMHead(torch.eye(3))),
        HeadInput(original, LMHead(torch.eye(3))),
        HeadInput(augmented, LMHead(torch.eye(3))),
        torch.tensor([0]),
        alpha=8.0,
    )
    teacher = torch.tensor([-7.0, 2.0, -1.0]).log_softmax(-1)
    assert losses.loss.item() == pytest.approx((-math.log(3) - teacher).mean().item(), abs=1e-5)
    assert losses.teacher_gap.item() == pytest.approx((1 - 1 + 0.5) / 3)


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 4.0},
    "bias, scale and softcap": {"bias": True, "scale": 1.7, "softcap": 6.0},
    "shared": {"shared": True},
}


@pytest.mark.parametrize("beta", [1.0, 0.0])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 7, N])
def test_chunked_is_dense(beta, kind, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_NUMBERS", V * chunk)
    (student, original, augmented), labels = make_roles(**HEADS[kind])
    leaves = [student.hidden_states, student.head.weight] + ([student.head.bias] if "bias" in kind else [])
    for leaf in leaves:
        leaf.requires_grad_()
    losses = chunked_divergence(student, original, augmented, labels, ALPHA, beta)

    def logits(role):  # differentiable, unlike LMHead.logits
        hidden, head = role
        z = hidden @ head.weight.T
        z = (z if head.bias is None else z + head.bias) * head.scale
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    teacher = unlearning_teacher_logits(logits(original), logits(augmented), ALPHA).detach()
    dense = dense_divergence(logits(student), teacher, beta).sum()
    torch.testing.assert_close(losses.loss, dense, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(3.0 * losses.loss, leaves)
    for ours, theirs in zip(grads, torch.autograd.grad(3.0 * dense, leaves), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    expected = logits(student).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    torch.testing.assert_close(losses.label_log_probs, expected.detach())


@pytest.mark.parametrize("beta", [1.0, 0.0])
@pytest.mark.parametrize("kind", HEADS)
def test_chunked_against_finite_differences(beta, kind, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_NUMBERS", V * 5)
    settings = {"scale": 1.0, "softcap": None} | {k: v for k, v in HEADS[kind].items() if k in ("scale", "softcap")}
    roles, labels = make_roles(**HEADS[kind])
    student = roles[0]
    leaves = [student.hidden_states, student.head.weight]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = chunked_divergence(*roles, labels, ALPHA, beta).loss
    frozen = [as_numpy(role) for role in roles]
    assert loss.item() == pytest.approx(oracle_loss(*frozen, **settings, beta=beta), rel=1e-5)
    rng = np.random.default_rng(0)
    for position, grad in enumerate(torch.autograd.grad(loss, leaves)):
        direction = rng.standard_normal(grad.shape)

        def shifted(step, position=position, direction=direction):
            moved = [array.copy() if array is not None else None for array in frozen[0]]
            moved[position] = moved[position] + step * direction
            return oracle_loss(moved, *frozen[1:], **settings, beta=beta)

        slope = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
        assert (grad.double().numpy() * direction).sum() == pytest.approx(slope, rel=1e-4)


def test_frozen_head_and_no_grad_compute_no_gradient():
    (student, original, augmented), labels = make_roles(shared=True)
    assert not chunked_divergence(student, original, augmented, labels, ALPHA).loss.requires_grad
    student.hidden_states.requires_grad_()
    with torch.no_grad():
        assert not chunked_divergence(student, original, augmented, labels, ALPHA).loss.requires_grad
    loss = chunked_divergence(student, original, augmented, labels, ALPHA).loss
    loss.backward()
    assert student.head.weight.grad is None
    assert student.hidden_states.grad.abs().sum() > 0


def test_nll_is_cross_entropy():
    (student, *_), labels = make_roles(bias=True, scale=0.5, softcap=5.0)
    hidden, head = student
    leaves = [hidden.requires_grad_(), head.weight.requires_grad_(), head.bias.requires_grad_()]
    losses = chunked_nll(student, labels)
    logits = 5.0 * torch.tanh((hidden @ head.weight.T + head.bias) * 0.5 / 5.0)
    dense = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(losses.loss, dense, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(losses.loss, leaves), torch.autograd.grad(dense, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_alpha_zero_is_the_original():
    (student, original, augmented), labels = make_roles(shared=True)
    student = HeadInput(original.hidden_states.clone().requires_grad_(), student.head)
    loss = chunked_divergence(student, original, augmented, labels, alpha=0.0).loss
    loss.backward()
    assert loss.item() == 0.0
    assert student.hidden_states.grad.abs().max() == 0.0


def test_bfloat16_products_are_not_rounded():
    """Of 16-bit inputs the logits are those of float32: rounding them would cost three decimal places."""
    (student, original, augmented), labels = make_roles(dtype=torch.bfloat16)
    widened = [
        HeadInput(h.float(), head._replace(weight=head.weight.float())) for h, head in (student, original, augmented)
    ]
    ours = chunked_divergence(student, original, augmented, labels, ALPHA).loss
    torch.testing.assert_close(ours, chunked_divergence(*widened, labels, ALPHA).loss, rtol=1e-6, atol=1e-5)


def test_no_token_gives_a_differentiable_zero():
    (student, original, augmented), labels = make_roles()
    nothing = [HeadInput(role.hidden_states[:0].clone(), role.head) for role in (student, original, augmented)]
    nothing[0].hidden_states.requires_grad_()
    loss = chunked_divergence(*nothing, labels[:0], ALPHA).loss
    loss.backward()
    assert loss.item() == 0.0


def test_no_tensor_holds_all_tokens_and_the_vocabulary(monkeypatch):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    monkeypatch.setattr(chunked, "_CHUNK_NUMBERS", V * 4)
    roles, labels = make_roles()
    roles[0].hidden_states.requires_grad_()
    roles[0].head.weight.requires_grad_()
    with Largest() as largest:
        chunked_divergence(*roles, labels, ALPHA).loss.backward()
    assert largest.numbers == max(V * 4, V * H)


@pytest.mark.parametrize("function", ["dense", "chunked"])
def test_unknown_divergence_is_refused(function):
    (student, original, augmented), labels = make_roles()
    with pytest.raises(ValueError, match="`beta` must be 1.0"):
        if function == "dense":
            dense_divergence(torch.zeros(1, 2), torch.zeros(1, 2), beta=0.5)
        else:
            chunked_divergence(student, original, augmented, labels, ALPHA, beta=0.5)
