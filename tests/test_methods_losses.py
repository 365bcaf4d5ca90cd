# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Every method: its loss in a whole run is the paper's, and of the frozen models it keeps only what it needs."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import FORGET, RETAIN, history, rows, tiny_llama
from methods_setup import BASELINES, make
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from trl_rkld.teacher.prepare import needed_bytes


# ---- The loss of a whole run ----


def answers(model, samples):
    """Logits and labels of each answer by itself, without padding: `(tokens, vocabulary)` and `(tokens,)`."""
    result = []
    for sample in samples:
        labels = torch.tensor(sample["labels"])[1:]
        logits = model(torch.tensor([sample["input_ids"]])).logits[0, :-1]
        result.append((logits[labels != -100], labels[labels != -100]))
    return result


def likelihood(logits, labels):
    return logits.log_softmax(-1)[range(len(labels)), labels]


def probabilities_of(samples):
    """Geometric mean over the tokens of each answer, `(answers,)`."""
    return torch.stack([likelihood(logits, labels).mean().exp() for logits, labels in samples])


def oracle_forget_loss(method, args, student, original, augmented):
    """Mean over the tokens or over the answers, in plain torch; each argument is a list of `(logits, labels)`."""
    if method == "npo":
        ratios = [likelihood(*s).sum() - likelihood(*o).sum() for s, o in zip(student, original, strict=True)]
        return torch.stack([2 / args.beta * torch.log(1 + torch.exp(args.beta * ratio)) for ratio in ratios]).mean()
    if method == "simnpo":
        rewards = [args.beta / len(labels) * likelihood(logits, labels).sum() for logits, labels in student]
        return torch.stack([2 / args.beta * torch.log(1 + torch.exp(r + args.gamma)) for r in rewards]).mean()
    labels = torch.cat([labels for _, labels in student])
    student, original, augmented = (
        torch.cat([logits for logits, _ in role]) for role in (student, original, augmented)
    )
    if method == "grad-diff":
        return -F.cross_entropy(student, labels)
    if method == "undial":
        soft = (original - args.label_penalty * F.one_hot(labels, original.shape[1])).softmax(-1)
        entropy = -torch.special.xlogy(soft, soft).sum(-1).mean()
        return F.cross_entropy(student, soft) - entropy
    teacher = original - args.alpha * torch.relu(augmented - original)
    if method == "whp":
        return F.cross_entropy(student, teacher.argmax(-1))
    log_probs = student.log_softmax(-1)
    return (log_probs.exp() * (log_probs - teacher.log_softmax(-1))).sum(-1).mean()


@pytest.mark.parametrize("retain_loss_type", ["nll", "kl"])
@pytest.mark.parametrize("method", ["rkld", *BASELINES])
def test_three_steps_of_plain_torch(method, retain_loss_type, half_memorised, memorised, tokenizer, tmp_path):
    """
    Loss and gradient norm of the first three steps are those of a loop of a few lines, which has the models' own
    logits, autograd, and one answer at a time. From the second step on the student is no longer the original.
    """
    names = {"npo": {"beta": 0.3}, "simnpo": {"beta": 1.5, "gamma": 0.4}, "undial": {"label_penalty": 4.0}}
    settings = names.get(method, {})
    learning_rate, retain_coef = 0.01, 0.7
    student, original, augmented = map(
        AutoModelForCausalLM.from_pretrained, (half_memorised, half_memorised, memorised)
    )
    given = {"augmented_model": memorised} if method in ("rkld", "whp") else {}
    trainer = make(
        method,
        "full",
        half_memorised,
        tokenizer,
        tmp_path,
        RETAIN[: len(FORGET)],  # all of them in each epoch, which is one step
        retain_loss_type=retain_loss_type,
        retain_coef=retain_coef,
        per_device_train_batch_size=len(FORGET),
        num_train_epochs=3,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="sgd",
        weight_decay=0.0,
        max_grad_norm=1e9,
        **settings,
        **given,
    )
    forget, retain = trainer.train_dataset.to_list(), trainer.retain_dataset.to_list()
    assert len({sum(label != -100 for label in sample["labels"]) for sample in forget}) > 2  # of unequal lengths
    metrics = trainer.train().metrics

    with torch.no_grad():
        frozen = [answers(model, forget) for model in (original, augmented)]
        kept = torch.cat([logits for logits, _ in answers(original, retain)]).log_softmax(-1)
    expected, probabilities = [], []
    for _ in range(3):
        learnt = (answers(student, forget), answers(student, retain))
        probabilities.append([probabilities_of(each) for each in learnt])
        forget_loss = oracle_forget_loss(method, trainer.args, learnt[0], *frozen)
        retained = learnt[1]
        logits, labels = torch.cat([x for x, _ in retained]), torch.cat([x for _, x in retained])
        if retain_loss_type == "nll":
            retain_loss = F.cross_entropy(logits, labels)
        else:
            retain_loss = (kept.exp() * (kept - logits.log_softmax(-1))).sum(-1).mean()
        loss = forget_loss + retain_coef * retain_loss
        student.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
        means = [each.mean().item() for each in probabilities[-1]]
        expected.append((loss.item(), forget_loss.item(), retain_loss.item(), norm.item(), *means))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= learning_rate * parameter.grad
    keys = ("loss", "forget_loss", "retain_loss", "grad_norm", "forget_prob", "retain_prob")
    torch.testing.assert_close(torch.tensor(history(trainer, *keys)), torch.tensor(expected), rtol=2e-4, atol=2e-4)
    for name, before in zip(("forget", "retain"), probabilities[0], strict=True):
        assert metrics[f"{name}_prob_before"] == pytest.approx(before.mean().item(), rel=2e-4)
    with torch.no_grad():
        after = probabilities_of(answers(student, forget))
    assert metrics["forget_prob_after"] == pytest.approx(after.mean().item(), rel=2e-4)
    assert metrics["forget_kept"] == (after > 0.5 * probabilities[0][0]).sum()
    assert expected[0][1] != pytest.approx(expected[2][1], rel=1e-2)


@pytest.mark.parametrize(
    ("method", "settings", "loss"),
    [
        # A model whose head is zero says 1/V of each token.
        ("grad-diff", {}, lambda v: -math.log(v)),  # mean of log π over the tokens
        ("npo", {"beta": 0.2}, lambda v: 2 * math.log(2) / 0.2),
        # The mean log-probability of each answer's tokens is −ln V: (2/β) ln(1 + e^γ V^−β)
        ("simnpo", {"beta": 0.5, "gamma": 1.0}, lambda v: 4 * math.log(1 + math.e * v**-0.5)),
        # The teacher has V − 1 tokens of weight 1 and one of e^−2: ln V less its entropy ln Z + 2 e^−2 / Z
        (
            "undial",
            {"label_penalty": 2.0},
            lambda v: math.log(v) - math.log(v - 1 + math.exp(-2)) - 2 * math.exp(-2) / (v - 1 + math.exp(-2)),
        ),
        ("whp", {}, lambda v: math.log(v)),
    ],
)
def test_first_loss_by_hand(method, settings, loss, tokenizer, tmp_path):
    model = tiny_llama(len(tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    augmented = {"augmented_model": tiny_llama(len(tokenizer), seed=1)} if method == "whp" else {}
    trainer = make(method, "full", model, tokenizer, tmp_path, max_steps=1, **settings, **augmented)
    trainer.train()
    assert history(trainer, "forget_loss")[0][0] == pytest.approx(loss(len(tokenizer)), rel=2e-5, abs=1e-6)
    assert history(trainer, "loss")[0][0] == pytest.approx(loss(len(tokenizer)), abs=1e-4)
    assert history(trainer, "forget_prob")[0][0] == pytest.approx(1 / len(tokenizer), rel=1e-4)


@pytest.mark.parametrize("precompute_teacher", [True, False])
@pytest.mark.parametrize(
    "row", ["full", "new adapter", "trained adapter", "4-bit new adapter", "4-bit trained adapter"]
)
def test_npo_starts_at_two_log_two_over_beta(row, precompute_teacher, llama_path, tokenizer, tmp_path):
    """The reference is the model as it came, with its adapter if that was trained before, and without dropout."""
    trainer = make(
        "npo",
        row,
        llama_path,
        tokenizer,
        tmp_path,
        beta=0.25,
        max_steps=1,
        precompute_teacher=precompute_teacher,
        per_device_train_batch_size=len(FORGET),  # the cache's batches have the training batch's shape
    )
    trainer.train()
    ((loss,),) = history(trainer, "forget_loss")
    assert loss == pytest.approx(8 * math.log(2), rel=1e-6)


def test_streamed_answers(half_memorised, tokenizer, tmp_path):
    """NPO's reference, live, on samples that have no number."""
    stream = rows(FORGET).to_iterable_dataset()
    settings = {"beta": 0.5, "max_steps": 3, "learning_rate": 2e-3, "warmup_steps": 0, "precompute_teacher": False}
    trainer = make("npo", "full", half_memorised, tokenizer, tmp_path, data=stream, **settings)
    trainer.train()
    losses = [loss for (loss,) in history(trainer, "forget_loss")]
    assert losses[0] == pytest.approx(4 * math.log(2), rel=1e-6)
    assert losses[2] < losses[0]


def test_evaluation_is_the_same_loss(half_memorised, tokenizer, tmp_path):
    """Of one batch of answers, some of them only in the evaluation set; the cached reference is the original."""
    settings = {"learning_rate": 2e-3, "per_device_eval_batch_size": 8, "beta": 0.3}
    trainer = make("npo", "full", half_memorised, tokenizer, tmp_path, RETAIN[2:], data=rows(FORGET), **settings)
    other = make("npo", "full", half_memorised, tokenizer, tmp_path / "x", data=rows(FORGET[3:] + RETAIN[:2]))
    evaluation = other.train_dataset.remove_columns("sample_id")
    trainer = type(trainer)(
        half_memorised,
        args=trainer.args,
        train_dataset=rows(FORGET),
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    original = AutoModelForCausalLM.from_pretrained(half_memorised)
    with torch.no_grad():
        student, reference = (answers(model.eval(), evaluation.to_list()) for model in (trainer.model, original))
        expected = oracle_forget_loss("npo", trainer.args, student, reference, None)
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_hard_labels_say_whether_the_augmented_model_learnt(half_memorised, memorised, tokenizer, tmp_path):
    """The verdict's hint sends people to `teacher_gap`; it is RKLD's."""
    gaps = []
    for method in ("rkld", "whp"):
        settings = {"augmented_model": memorised, "max_steps": 1}
        trainer = make(method, "full", half_memorised, tokenizer, tmp_path / method, **settings)
        trainer.train()
        gaps.append(history(trainer, "teacher_gap")[0][0])
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-5)
    assert abs(gaps[0]) > 1e-3


# ---- What is kept of the frozen models ----


class _Spy(TrainerCallback):
    """What is alive and on disk in the midst of training."""

    def __init__(self, folder):
        self.folder, self.known = folder, {id(x) for x in gc.get_objects() if isinstance(x, PreTrainedModel)}

    def on_step_end(self, args, state, control, **kwargs):
        gc.collect()
        new = [x for x in gc.get_objects() if isinstance(x, PreTrainedModel) and id(x) not in self.known]
        self.causal_lms = [model for model in new if model.get_output_embeddings() is not None]
        self.shapes = {}
        for path in self.folder.rglob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                self.shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}


@pytest.mark.parametrize("row", ["full", "trained adapter"])
def test_npo_keeps_a_number_a_token_and_no_second_model(row, llama_path, tokenizer, tmp_path):
    spy = _Spy(tmp_path / "teacher")
    trainer = make("npo", row, llama_path, tokenizer, tmp_path, RETAIN, max_steps=1)
    trainer.add_callback(spy)
    trainer.train()
    counted = sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels)
    expected = {"answers.states": [counted], "answers.starts": [len(FORGET) + 1]}
    assert spy.shapes == expected
    assert {name: list(tensor.shape) for name, tensor in trainer.teacher.tensors().items()} == expected
    assert len(spy.causal_lms) == 1
    if row == "trained adapter":
        assert list(trainer.model.peft_config) == ["default"]


@pytest.mark.parametrize("method", BASELINES)
def test_cache_holds_what_the_method_needs(method, llama, tokenizer, tmp_path):
    """With the retain loss "kl": hidden states of the forgotten samples only where the forget loss has logits."""
    trainer = make(method, "full", llama, tokenizer, tmp_path, RETAIN, max_steps=1, retain_loss_type="kl")
    trainer.train()
    starts = trainer.teacher.original_states.starts
    held = starts[len(FORGET)].item() > 0
    assert held == (method in ("undial", "whp"))
    assert starts[-1] > starts[len(FORGET)]
    assert (trainer.teacher.original_answers is not None) == (method == "npo")
    assert (trainer.teacher.augmented_states is not None) == (method == "whp")


@pytest.mark.parametrize("method", ["grad-diff", "simnpo"])
def test_without_a_reference_there_is_no_teacher(method, llama, tokenizer, tmp_path):
    trainer = make(method, "full", llama, tokenizer, tmp_path, RETAIN, max_steps=1)
    trainer.train()
    assert trainer.teacher is None
    assert not (tmp_path / "teacher").exists()
    trainer.evaluate(trainer.train_dataset)  # needs none, either


def test_only_an_augmented_model_needs_room_for_weights(tokenizer, tmp_path):
    """The weights are put aside while an augmented model is trained in them; NPO writes a number a token."""
    needed = {}
    for method in ("rkld", *BASELINES):
        model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
        needed[method] = needed_bytes(make(method, "full", model, tokenizer, tmp_path / method))
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert {method for method, size in needed.items() if size >= weights} == {"rkld", "whp"}
