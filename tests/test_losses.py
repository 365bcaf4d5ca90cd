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
    label_log_probs,
    npo_losses,
    simnpo_losses,
    teacher_labels,
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


def dense_divergence(student_logits, teacher_logits, beta):
    """What the chunked loss computes, on whole logits: KL(student ‖ teacher), or for β = 0 KL(teacher ‖ student)."""
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if beta == 0.0:
        student, teacher = teacher, student
    return (student.exp() * (student - teacher)).sum(-1)


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


def test_gradients_of_half_precision_meet_the_loss_scaler_first():
    """Those of saturated tokens are too small for float16: they are rounded only after they have been scaled up."""
    (student, original, augmented), labels = make_roles(torch.float16, shared=True)
    near, scale, gradients = original.hidden_states + 0.01 * student.hidden_states, 65536, []
    for dtype in (torch.float16, torch.float32):
        head = LMHead(4 * original.head.weight.to(dtype))
        hidden = near.to(dtype).clone().requires_grad_()
        others = [HeadInput(role.hidden_states.to(dtype), head) for role in (original, augmented)]
        loss = chunked_divergence(HeadInput(hidden, head), others[0], labels, others[1], alpha=0.0, beta=1.0).loss
        (scale * loss).backward()
        gradients.append(hidden.grad.double() / scale)
    half, full = gradients
    small = full.abs() < 2**-25  # half of the smallest number of float16
    assert small.sum() > 10
    torch.testing.assert_close(half[small], full[small], rtol=0.05, atol=2**-40)


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
    losses = chunked_divergence(student, teacher, torch.tensor([0]), alpha=8.0, beta=beta)
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
        torch.tensor([0]),
        HeadInput(augmented, LMHead(torch.eye(3))),
        alpha=8.0,
    )
    teacher = torch.tensor([-7.0, 2.0, -1.0]).log_softmax(-1)
    assert losses.loss.item() == pytest.approx((-math.log(3) - teacher).mean().item(), abs=1e-5)
    assert losses.teacher_gap.item() == pytest.approx((1 + 0 + 0.5) / 3)


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 4.0},
    "bias, scale and softcap": {"bias": True, "scale": 1.7, "softcap": 6.0},
    "shared": {"shared": True},
}


def plain_logits(role):
    """Differentiable, unlike `LMHead.logits`."""
    hidden, head = role
    z = hidden.float() @ head.weight.float().T
    z = (z if head.bias is None else z + head.bias.float()) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def trainable(student):
    leaves = [student.hidden_states, student.head.weight, student.head.bias]
    return [leaf.requires_grad_() for leaf in leaves if leaf is not None]


def assert_same_gradients(ours, theirs, leaves, rtol=1e-5):
    pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True)
    for ours_, theirs_ in pairs:
        assert (ours_ - theirs_).abs().max() <= rtol * theirs_.abs().max()


@pytest.mark.parametrize("beta", [1.0, 0.0])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 7, N])
def test_chunked_is_dense(beta, kind, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_NUMBERS", V * chunk)
    (student, original, augmented), labels = make_roles(**HEADS[kind])
    leaves = [student.hidden_states, student.head.weight] + ([student.head.bias] if "bias" in kind else [])
    for leaf in leaves:
        leaf.requires_grad_()
    losses = chunked_divergence(student, original, labels, augmented, ALPHA, beta)

    teacher = unlearning_teacher_logits(plain_logits(original), plain_logits(augmented), ALPHA).detach()
    dense = dense_divergence(plain_logits(student), teacher, beta).sum()
    torch.testing.assert_close(losses.loss, dense, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(3.0 * losses.loss, leaves)
    for ours, theirs in zip(grads, torch.autograd.grad(3.0 * dense, leaves), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    expected = plain_logits(student).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
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
    loss = chunked_divergence(*roles[:2], labels, roles[2], ALPHA, beta).loss
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
    assert not chunked_divergence(student, original, labels, augmented, ALPHA).loss.requires_grad
    student.hidden_states.requires_grad_()
    with torch.no_grad():
        assert not chunked_divergence(student, original, labels, augmented, ALPHA).loss.requires_grad
    loss = chunked_divergence(student, original, labels, augmented, ALPHA).loss
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


def test_nll_of_other_targets_by_hand():
    # Student (0.2, 0.3, 0.5) at both tokens, targets 1 and 0: −ln 0.3 − ln 0.2 = 1.20397 + 1.60944. The gradient is
    # π − onehot(target). What is reported is the probability of the labels, 2 and 1.
    logits = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]]).log().requires_grad_()
    student = HeadInput(logits, LMHead(torch.eye(3)))
    losses = chunked_nll(student, torch.tensor([2, 1]), torch.tensor([1, 0]))
    assert losses.loss.item() == pytest.approx(2.81341, abs=1e-5)
    assert losses.label_log_probs.tolist() == pytest.approx([-0.69315, -1.20397], abs=1e-5)
    (grad,) = torch.autograd.grad(losses.loss, logits)
    torch.testing.assert_close(grad, torch.tensor([[0.2, -0.7, 0.5], [-0.8, 0.3, 0.5]]))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 7, N])
def test_nll_of_other_targets_is_dense(kind, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_NUMBERS", V * chunk)
    (student, *_), labels = make_roles(**HEADS[kind])
    leaves, targets = trainable(student), (labels * 7 + 3) % V
    losses = chunked_nll(student, labels, targets)
    log_probs = plain_logits(student).log_softmax(-1)
    dense = -log_probs[range(N), targets].sum()
    torch.testing.assert_close(losses.loss, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.label_log_probs, log_probs[range(N), labels].detach())
    assert_same_gradients(losses.loss, dense, leaves)


def test_hard_labels_by_hand():
    # l_o = (1, 2, 3), l_aug = (2, 1, 3.5). α = 8: (1 − 8, 2, 3 − 4), so token 1; α = 0.1: (0.9, 2, 2.95), so token 2.
    # Swapped, l_aug − α ReLU(l_o − l_aug) = (2, 1 − 8, 3.5) would give token 2 with α = 8, too.
    original, augmented = (
        HeadInput(torch.tensor([logits]), LMHead(torch.eye(3))) for logits in ([1.0, 2.0, 3.0], [2.0, 1.0, 3.5])
    )
    labels, entropy, gap = teacher_labels(original, augmented, 8.0)
    assert labels.tolist() == [1]
    # softmax(−7, 2, −1) = (0.000118, 0.952469, 0.047420)
    assert entropy.item() == pytest.approx(0.19202, abs=1e-4)
    assert gap.item() == pytest.approx((1 + 0 + 0.5) / 3)
    assert teacher_labels(original, augmented, 0.1)[0].tolist() == [2]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 7, N])
def test_hard_labels_are_dense(kind, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_NUMBERS", V * chunk)
    (_, original, augmented), _ = make_roles(**HEADS[kind])
    # Trained further: surer of what it says, with a head of its own
    head = original.head._replace(weight=original.head.weight + 0.3 * augmented.head.weight)
    augmented = HeadInput(1.3 * original.hidden_states, head)
    teacher = unlearning_teacher_logits(plain_logits(original), plain_logits(augmented), ALPHA)
    dense = teacher.argmax(-1)
    ours, entropy, gap = teacher_labels(original, augmented, ALPHA)
    assert torch.equal(ours, dense)
    distribution = torch.distributions.Categorical(logits=teacher)
    torch.testing.assert_close(entropy, distribution.entropy(), rtol=1e-4, atol=1e-5)
    gained = torch.relu(plain_logits(augmented) - plain_logits(original)).mean(-1)
    torch.testing.assert_close(gap, gained, rtol=1e-4, atol=1e-5)
    assert (dense != plain_logits(original).argmax(-1)).any()


def test_label_penalty_by_hand():
    # UNDIAL (2402.10052): soft labels softmax(z_o − γ onehot(label)) and the cross-entropy with them. z_o = (2, 1, 0),
    # label 0, γ = 1: softmax(1, 1, 0) = (e, e, 1) / (2e + 1) = (0.42232, 0.42232, 0.15536), of entropy
    # 2 · 0.42232 · 0.86199 + 0.15536 · 1.86199 = 1.01736. A uniform student's cross-entropy is ln 3 = 1.09861, and the
    # forward KL their difference, 0.08126. The gradient of both is π_s − π_t.
    student = HeadInput(torch.zeros(1, 3, requires_grad=True), LMHead(torch.eye(3)))
    original = HeadInput(torch.tensor([[2.0, 1.0, 0.0]]), LMHead(torch.eye(3)))
    losses = chunked_divergence(student, original, torch.tensor([0]), beta=0.0, label_penalty=1.0)
    assert losses.teacher_entropy.item() == pytest.approx(1.01736, abs=1e-5)
    assert losses.loss.item() == pytest.approx(0.08126, abs=1e-5)
    assert losses.loss.item() + losses.teacher_entropy.item() == pytest.approx(math.log(3), abs=1e-5)
    (grad,) = torch.autograd.grad(losses.loss, student.hidden_states)
    assert grad[0].tolist() == pytest.approx([-0.08899, -0.08899, 0.17797], abs=1e-5)
    assert original.hidden_states.tolist() == [[2.0, 1.0, 0.0]]  # cached states stay what they are


@pytest.mark.parametrize("beta", [1.0, 0.0])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 7, N])
def test_label_penalty_is_dense(beta, kind, chunk, monkeypatch):
    """The penalty is on the final logits: after scale and soft cap."""
    monkeypatch.setattr(chunked, "_CHUNK_NUMBERS", V * chunk)
    (student, original, augmented), labels = make_roles(**HEADS[kind])
    leaves = trainable(student)
    for other, alpha in ((None, 0.0), (augmented, ALPHA)):
        losses = chunked_divergence(student, original, labels, other, alpha, beta, label_penalty=2.5)
        teacher = plain_logits(original)
        if other is not None:
            teacher = teacher - alpha * torch.relu(plain_logits(other) - teacher)
        teacher = (teacher - 2.5 * torch.nn.functional.one_hot(labels, V)).detach()
        dense = dense_divergence(plain_logits(student), teacher, beta).sum()
        torch.testing.assert_close(losses.loss, dense, rtol=1e-5, atol=1e-5)
        assert_same_gradients(losses.loss, dense, leaves)


def test_label_penalty_gives_the_gradient_of_the_cross_entropy():
    (student, original, _), labels = make_roles(bias=True)
    leaves = trainable(student)
    loss = chunked_divergence(student, original, labels, beta=0.0, label_penalty=10.0).loss
    soft_labels = (plain_logits(original) - 10.0 * torch.nn.functional.one_hot(labels, V)).softmax(-1)
    dense = torch.nn.functional.cross_entropy(plain_logits(student), soft_labels, reduction="sum")
    assert loss < dense - 1  # by the teacher's entropy
    assert_same_gradients(loss, dense, leaves)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 7, N])
def test_label_log_probs_are_dense(kind, chunk, monkeypatch):
    """Values, and gradients that arrive with another weight at each token, as they do through a loss of answers."""
    monkeypatch.setattr(chunked, "_CHUNK_NUMBERS", V * chunk)
    (student, *_), labels = make_roles(**HEADS[kind])
    leaves = trainable(student)
    ours = label_log_probs(student, labels)
    dense = plain_logits(student).log_softmax(-1)[range(N), labels]
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-2, 3, N)
    assert_same_gradients((weights * ours).sum(), (weights * dense).sum(), leaves)
    # Two answers and a curve, so that the upstream gradient depends on the values
    ours, dense = label_log_probs(student, labels), plain_logits(student).log_softmax(-1)[range(N), labels]
    losses = [-torch.nn.functional.logsigmoid(x[:5].sum() / 9) * x[5:].mean() for x in (ours, dense)]
    assert_same_gradients(*losses, leaves)


def test_label_log_probs_of_a_tied_head(monkeypatch):
    """The weight is the head and, through the hidden states, the embedding: both gradients add up."""
    monkeypatch.setattr(chunked, "_CHUNK_NUMBERS", V * 5)
    (student, *_), labels = make_roles(softcap=6.0)
    weight, weights = student.head.weight.requires_grad_(), torch.linspace(-1, 2, N)
    student = HeadInput(torch.tanh(weight[(labels + 1) % V]), student.head)
    ours = (weights * label_log_probs(student, labels)).sum()
    dense = (weights * plain_logits(student).log_softmax(-1)[range(N), labels]).sum()
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)
    pairs = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (ours, dense)]
    assert (pairs[0] - pairs[1]).abs().max() <= 1e-5 * pairs[1].abs().max()


@pytest.mark.parametrize("kind", ["plain", "bias, scale and softcap"])
def test_label_log_probs_in_bfloat16(kind, monkeypatch):
    """Values as in float32; gradients are rounded once, at the end."""
    monkeypatch.setattr(chunked, "_CHUNK_NUMBERS", V * 7)
    (student, *_), labels = make_roles(dtype=torch.bfloat16, **HEADS[kind])
    leaves, weights = trainable(student), torch.linspace(-2, 3, N)
    ours = label_log_probs(student, labels)
    dense = plain_logits(student).log_softmax(-1)[range(N), labels]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)
    assert_same_gradients((weights * ours).sum(), (weights * dense).sum(), leaves, rtol=2**-7)


def test_label_log_probs_of_a_frozen_head_and_under_autocast():
    (student, *_), labels = make_roles(bias=True)
    student.hidden_states.requires_grad_()
    plain = label_log_probs(student, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = label_log_probs(student, labels)
    values.sum().backward()
    assert torch.equal(values, plain)
    assert student.head.weight.grad is None
    dense = plain_logits(student).log_softmax(-1)[range(N), labels].sum()
    torch.testing.assert_close(student.hidden_states.grad, torch.autograd.grad(dense, student.hidden_states)[0])
    with torch.no_grad():
        assert not label_log_probs(student, labels).requires_grad


def test_npo_by_hand():
    # 2404.05868, eq. 3, as (2/β) ln(1 + (π_θ/π_o)^β). β = 0.5, log-ratios −0.5 and +0.5:
    # 4 ln(1 + e^−0.25) = 4 · 0.575939 and 4 ln(1 + e^0.25) = 4 · 0.825939.
    losses = npo_losses(torch.tensor([-2.0, -1.0]), torch.tensor([-1.5, -1.5]), beta=0.5)
    assert losses.tolist() == pytest.approx([2.303758, 3.303758], abs=1e-5)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_npo_starts_at_two_log_two_over_beta(beta):
    log_probs = torch.tensor([-40.0, -3.0], requires_grad=True)
    losses = npo_losses(log_probs, log_probs.detach().clone(), beta)
    assert losses.tolist() == pytest.approx([2 * math.log(2) / beta] * 2, rel=1e-6)
    losses.sum().backward()
    assert log_probs.grad.tolist() == [1.0, 1.0]  # there it is gradient ascent's


def test_npo_becomes_gradient_ascent():
    """The gradient is 2 (π_θ/π_o)^β / (1 + (π_θ/π_o)^β): for β → 0 that of `log π_θ`, and for a forgotten answer 0."""
    log_probs = torch.tensor([-20.0, -8.0, -2.0], requires_grad=True)
    original = torch.tensor([-5.0, -5.0, -5.0])
    for beta, expected in (
        # 2 / (1 + e^15), 2 / (1 + e^3), 2 / (1 + e^−3)
        (1.0, [6.11804e-7, 0.0948517, 1.9051483]),
        # 2 / (1 + e^0.015), …: 1 plus half of the exponent
        (1e-3, [0.9925001, 0.9985, 1.0015]),
        (1e-6, [1.0, 1.0, 1.0]),
    ):
        (grad,) = torch.autograd.grad(npo_losses(log_probs, original, beta).sum(), log_probs)
        assert grad.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-12), beta


def test_simnpo_by_hand():
    # 2410.07163, eq. 5, as (2/β) ln(1 + exp((β/|y|) ln π_θ + γ)). β = 2, γ = 0.5; ln π_θ = −6 of 3 tokens and −2 of 2:
    # ln(1 + e^−3.5) = 0.029750 and ln(1 + e^−1.5) = 0.201413. Without γ: ln(1 + e^−4) and ln(1 + e^−2).
    arguments = torch.tensor([-6.0, -2.0]), torch.tensor([3.0, 2.0])
    assert simnpo_losses(*arguments, beta=2.0, gamma=0.5).tolist() == pytest.approx([0.029750, 0.201413], abs=1e-5)
    assert simnpo_losses(*arguments, beta=2.0, gamma=0.0).tolist() == pytest.approx([0.018150, 0.126928], abs=1e-5)
    # The gradient is (2/|y|) times 1 / (1 + e^(3.5)) and 1 / (1 + e^(1.5)): a forgotten answer pulls less.
    log_probs = arguments[0].requires_grad_()
    (grad,) = torch.autograd.grad(simnpo_losses(log_probs, arguments[1], beta=2.0, gamma=0.5).sum(), log_probs)
    assert grad.tolist() == pytest.approx([2 / 3 * 0.0293122, 0.1824255], abs=1e-6)


def test_alpha_zero_is_the_original():
    (student, original, augmented), labels = make_roles(shared=True)
    student = HeadInput(original.hidden_states.clone().requires_grad_(), student.head)
    loss = chunked_divergence(student, original, labels, augmented, alpha=0.0).loss
    loss.backward()
    assert loss.item() == 0.0
    assert student.hidden_states.grad.abs().max() == 0.0


def test_bfloat16_products_are_not_rounded():
    """Of 16-bit inputs the logits are those of float32: rounding them would cost three decimal places."""
    (student, original, augmented), labels = make_roles(dtype=torch.bfloat16)
    widened = [
        HeadInput(h.float(), head._replace(weight=head.weight.float())) for h, head in (student, original, augmented)
    ]
    ours = chunked_divergence(student, original, labels, augmented, ALPHA).loss
    torch.testing.assert_close(
        ours, chunked_divergence(*widened[:2], labels, widened[2], ALPHA).loss, rtol=1e-6, atol=1e-5
    )


def test_no_token_gives_a_differentiable_zero():
    (student, original, augmented), labels = make_roles()
    nothing = [HeadInput(role.hidden_states[:0].clone(), role.head) for role in (student, original, augmented)]
    nothing[0].hidden_states.requires_grad_()
    loss = chunked_divergence(*nothing[:2], labels[:0], nothing[2], ALPHA).loss
    loss.backward()
    assert loss.item() == 0.0
    assert [part.shape for part in teacher_labels(*nothing[1:], ALPHA)] == 3 * [(0,)]
    nothing[0].hidden_states.grad = None
    label_log_probs(nothing[0], labels[:0]).sum().backward()
    assert nothing[0].hidden_states.grad.shape == (0, H)


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
        chunked_divergence(*roles[:2], labels, roles[2], ALPHA).loss.backward()
        chunked_divergence(*roles[:2], labels, beta=0.0, label_penalty=3.0).loss.backward()
        chunked_nll(roles[0], labels, teacher_labels(*roles[1:], ALPHA)[0]).loss.backward()
        label_log_probs(roles[0], labels).sum().backward()
    assert largest.numbers == max(V * 4, V * H)


def test_unknown_divergence_is_refused():
    (student, original, augmented), labels = make_roles()
    with pytest.raises(ValueError, match="`beta` must be 1.0"):
        chunked_divergence(student, original, labels, augmented, ALPHA, beta=0.5)
