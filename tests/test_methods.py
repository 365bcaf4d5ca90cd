# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Every method: its loss in a whole run is the paper's, it forgets, and settings that must not matter do not."""

import dataclasses
import gc
import inspect
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import FORGET, RETAIN, assert_two_processes_are_one, config, history, rows, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainerCallback
from trl.trainer.utils import create_model_from_path

import trl_rkld
from trl_rkld.cli import main
from trl_rkld.data import tokenize_row
from trl_rkld.methods import METHODS, method_class
from trl_rkld.run_record import read_record
from trl_rkld.teacher.prepare import needed_bytes


BASELINES = ["grad-diff", "npo", "simnpo", "undial", "whp"]
KEYS = ("loss", "forget_loss", "retain_loss", "forget_prob", "retain_prob", "grad_norm")


def lora():
    return LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", lora_dropout=0.5)


def make(method, row, source, tokenizer, folder, retain=None, data=None, augmented_model=None, **kwargs):
    """A trainer of any method. `row` is how the model comes, `source` a path or a model."""
    arguments = {"augmented_model": augmented_model} if augmented_model is not None else {}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    if "trained adapter" in row:
        extra = {"quantization_config": quantization} if "4-bit" in row else {}
        source = get_peft_model(create_model_from_path(source, dtype=torch.float32, **extra), lora())
        torch.manual_seed(3)
        for name, parameter in source.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    elif "new adapter" in row:
        arguments |= {"peft_config": lora(), "quantization_config": quantization if "4-bit" in row else None}
    init = {"model_init_kwargs": {"dtype": "float32"}} if isinstance(source, str) else {}
    return method_class(method, "Trainer")(
        source,
        args=config(folder, method_class(method, "Config"), **init, **kwargs),
        train_dataset=rows(FORGET) if data is None else data,
        retain_dataset=None if retain is None else rows(retain),
        processing_class=tokenizer,
        **arguments,
    )


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def learn(tokenizer, path, steps):
    """Save a tiny model that was trained on all records."""
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    samples = [tokenize_row(row, tokenizer) for row in rows(FORGET + RETAIN).to_list()]
    length = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.tensor([s["input_ids"] + [0] * (length - len(s["input_ids"])) for s in samples])
    labels = torch.tensor([s["labels"] + [-100] * (length - len(s["labels"])) for s in samples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def memorised(tokenizer, tmp_path_factory):
    """A tiny model that knows all records by heart."""
    return learn(tokenizer, tmp_path_factory.mktemp("memorised"), steps=20)


@pytest.fixture(scope="module")
def half_memorised(tokenizer, tmp_path_factory):
    """The same, stopped where the records are neither unknown nor certain: no loss of them is saturated."""
    return learn(tokenizer, tmp_path_factory.mktemp("half_memorised"), steps=8)


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
    Loss and gradient norm of the first three steps are those of a loop of a few lines, which has the models' own logits,
    autograd, and one answer at a time. From the second step on the student is no longer the original.
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
                self.shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


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
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == trainer.evaluate(trainer.train_dataset)["eval_loss"]


def test_only_an_augmented_model_needs_room_for_weights(tokenizer, tmp_path):
    """The weights are put aside while an augmented model is trained in them; NPO writes a number a token."""
    needed = {}
    for method in ("rkld", *BASELINES):
        model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
        needed[method] = needed_bytes(make(method, "full", model, tokenizer, tmp_path / method))
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert {method for method, size in needed.items() if size >= weights} == {"rkld", "whp"}


# ---- Forgetting ----


def unlearn(method, row, memorised, tokenizer, folder, retain=None, **kwargs):
    """Probabilities of the forgotten and the retained answers before and after."""
    augmented = {"augmented_learning_rate": 2e-3, "augmented_num_train_epochs": 10} if method == "whp" else {}
    trainer = make(
        method,
        row,
        memorised,
        tokenizer,
        folder,
        RETAIN,
        retain_coef=0.0 if retain is None else 1.0,
        retain_loss_type=retain or "nll",
        **({"learning_rate": 2e-3, "num_train_epochs": 4, "warmup_steps": 0} | augmented | kwargs),
    )
    metrics = trainer.train().metrics
    return {key: metrics[key] for key in metrics if "_prob_" in key}


@pytest.mark.parametrize("row", ["new adapter", "4-bit new adapter"])
@pytest.mark.parametrize("method", BASELINES)
def test_adapters_forget(method, row, memorised, tokenizer, tmp_path):
    probability = unlearn(method, row, memorised, tokenizer, tmp_path, learning_rate=1e-2)
    assert probability["forget_prob_before"] > 0.7
    assert probability["forget_prob_after"] < 0.5 * probability["forget_prob_before"]


@pytest.mark.parametrize("method", BASELINES)
def test_full_weights_forget_and_a_retain_loss_keeps(method, memorised, tokenizer, tmp_path):
    without, nll, kl = (
        unlearn(method, "full", memorised, tokenizer, tmp_path / str(retain), retain) for retain in (None, "nll", "kl")
    )
    assert without["forget_prob_before"] > 0.9
    assert without["retain_prob_before"] > 0.9
    for probability in (without, nll, kl):
        assert probability["forget_prob_after"] < 0.5 * probability["forget_prob_before"]
    for probability in (nll, kl):
        assert probability["retain_prob_after"] > without["retain_prob_after"] + 0.05


# ---- What must not matter ----


@pytest.mark.parametrize(
    ("method", "row", "retain_loss_type"),
    [
        *((method, "full", "kl") for method in BASELINES),
        ("npo", "full", "nll"),
        ("npo", "new adapter", "kl"),
        ("npo", "trained adapter", "nll"),
        ("undial", "trained adapter", "kl"),
        ("whp", "new adapter", "nll"),
    ],
)
def test_cached_is_live(method, row, retain_loss_type, half_memorised, tokenizer, tmp_path):
    trajectories = []
    for precompute_teacher in (True, False):
        trainer = make(
            method,
            row,
            half_memorised,
            tokenizer,
            tmp_path / str(precompute_teacher),
            RETAIN,
            precompute_teacher=precompute_teacher,
            retain_loss_type=retain_loss_type,
            learning_rate=2e-3,
        )
        trainer.train()
        keys = KEYS + (("teacher_gap",) if method == "whp" else ())
        trajectories.append(torch.tensor(history(trainer, *keys)))
    assert len(trajectories[0]) == 6
    torch.testing.assert_close(*trajectories, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("method", BASELINES)
def test_batch_size_times_accumulation(method, batch_size, half_memorised, tokenizer, tmp_path):
    """
    One batch of four, or accumulated: each token, or each answer, weighs the same. The answers differ in length, and the
    epoch ends in a window of one sample.
    """
    augmented = {"augmented_learning_rate": 1e-3} if method == "whp" else {}
    whole, parts = (
        make(
            method,
            "full",
            half_memorised,
            tokenizer,
            tmp_path / str(size),
            RETAIN,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            learning_rate=1e-3,
            **augmented,
        )
        for size in (4, batch_size)
    )
    lengths = [sum(label != -100 for label in labels) for labels in whole.train_dataset["labels"]]
    assert len(set(lengths)) == len(lengths)
    whole.train(), parts.train()
    assert len(history(whole, *KEYS)) == 4
    torch.testing.assert_close(
        torch.tensor(history(whole, *KEYS)), torch.tensor(history(parts, *KEYS)), rtol=1e-4, atol=1e-4
    )


def test_whole_answers_weigh_the_same_in_two_processes(tmp_path):
    assert_two_processes_are_one(tmp_path, "npo")


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


# ---- Resuming ----


class _Killed(Exception):
    pass


def killed(method, tokenizer, source, folder, monkeypatch, row="full", **kwargs):
    """A run that dies in its fourth step, after a checkpoint at the second of three in an epoch."""
    trainer_class = method_class(method, "Trainer")
    training_step = trainer_class.training_step

    def dying_step(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise _Killed
        return training_step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_class, "training_step", dying_step)
        trainer = make(method, row, source, tokenizer, folder, save_strategy="steps", save_steps=2, **kwargs)
        with pytest.raises(_Killed):
            trainer.train()


@pytest.mark.parametrize(
    ("method", "row", "precompute_teacher", "cache"),
    [
        ("npo", "full", True, "kept"),
        ("npo", "full", True, "lost"),
        ("npo", "trained adapter", True, "lost"),
        ("npo", "trained adapter", False, "none"),
        ("undial", "full", True, "kept"),
        ("simnpo", "full", True, "none"),
        ("whp", "new adapter", True, "kept"),
    ],
)
def test_resumed_is_uninterrupted(
    method, row, precompute_teacher, cache, half_memorised, tokenizer, tmp_path, monkeypatch
):
    settings = {"precompute_teacher": precompute_teacher, "learning_rate": 2e-3, "retain": RETAIN}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make(method, row, half_memorised, tokenizer, tmp_path / "whole", **settings, **saving)
    whole.train()
    killed(method, tokenizer, half_memorised, tmp_path / "cut", monkeypatch, row, **settings)
    files = list((tmp_path / "cut" / "teacher").rglob("*.safetensors"))
    assert [path.name for path in files] == ([] if cache == "none" else ["teacher.safetensors"])
    if cache == "lost":
        files[0].unlink()
    resumed = make(method, row, half_memorised, tokenizer, tmp_path / "cut", **settings, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed, *KEYS) == history(whole, *KEYS)
    for name, parameter in parameters(resumed).items():
        assert torch.equal(parameter, parameters(whole)[name]), name


@pytest.mark.parametrize(
    ("before", "after"), [("rkld", "whp"), ("npo", "undial"), ("npo", "simnpo"), ("simnpo", "grad-diff")]
)
def test_a_checkpoint_of_another_method_is_refused(before, after, llama_path, tokenizer, tmp_path, monkeypatch):
    killed(before, tokenizer, llama_path, tmp_path, monkeypatch)
    trainer = make(after, "full", llama_path, tokenizer, tmp_path)
    with pytest.raises(ValueError, match=f"was not made by {METHODS[after][0]}. It can't be resumed"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("method", "settings", "change", "message"),
    [
        ("npo", {"beta": 0.1}, {"beta": 0.2}, "another teacher: `beta` changed"),
        ("undial", {}, {"label_penalty": 3.0}, "another teacher: `label_penalty` changed"),
        ("simnpo", {}, {"gamma": 0.5}, "other settings: `gamma` changed"),
        ("grad-diff", {}, {"data": rows(FORGET[:4])}, "other settings: the forget set changed"),
        ("simnpo", {"retain": RETAIN}, {"retain": RETAIN[:4]}, "other settings: the retain set changed"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    method, settings, change, message, llama_path, tokenizer, tmp_path, monkeypatch
):
    killed(method, tokenizer, llama_path, tmp_path, monkeypatch, **settings)
    trainer = make(method, "full", llama_path, tokenizer, tmp_path, **(settings | change))
    with pytest.raises(ValueError, match=f"can't be resumed with {message} since"):
        trainer.train(resume_from_checkpoint=True)


# ---- The command line ----


@pytest.fixture
def command(half_memorised, tmp_path, monkeypatch):
    """Runs `trl-rkld <method> --config` in a folder with data, as a user does: accelerate starts another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for name, pairs in (("forget", FORGET), ("keep", RETAIN)):
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    settings = {
        "model_name_or_path": half_memorised,
        "dataset_name": "forget.jsonl",
        "retain_dataset_name": "keep.jsonl",
        "output_dir": "output",
        "teacher_cache_dir": "teacher",
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.002,
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def run(method, *arguments, **change):
        Path("config.yaml").write_text(yaml.safe_dump(settings | change))
        return main([method, "--config", "config.yaml", *map(str, arguments)])

    return run


def test_npo_on_the_command_line(command, capfd):
    """Trains and saves; resumed from a checkpoint, ends in the same weights; the card names the method."""
    assert command("npo", beta=0.2) == 0
    record = read_record("output")
    assert (record["method"], record["finished"], record["settings"]["beta"]) == ("NPO", True, 0.2)
    card = Path("output/README.md").read_text()
    for part in ("2404.05868", "with NPO", "`beta` | 0.2", "zhang2024negative"):
        assert part in card, part
    weights = load_file("output/model.safetensors")
    for number in (4, 6):
        shutil.rmtree(f"output/checkpoint-{number}")
    Path("output/model.safetensors").unlink()
    assert command("npo", "--resume_from_checkpoint", "output", beta=0.2) == 0  # the whole one in it
    again = load_file("output/model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    output = "".join(capfd.readouterr())
    assert not any(question in output or answer in output for question, answer in FORGET)


@pytest.mark.parametrize("method", ["npo", "whp"])
def test_dry_run(method, command, capfd):
    assert command(method, "--dry_run", "true") == 0
    output = capfd.readouterr().out
    assert "Updates:   6, of 2 samples each" in output
    assert not any(Path("output").iterdir())


@pytest.mark.parametrize(
    ("method", "argument"),
    [("npo", "augmented_model_name_or_path"), ("undial", "alpha"), ("grad-diff", "beta"), ("simnpo", "label_penalty")],
)
def test_arguments_of_other_methods_are_unknown(method, argument, command, capfd):
    """In the config file, and on the command line, where accelerate must not take them either."""
    assert command(method, **{argument: 1}) == 2
    assert f"unknown key in the config file: `{argument}`" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        command(method, f"--{argument}", "x")
    assert argument in capfd.readouterr().err
    assert not Path("output").exists()


def test_an_augmented_model_may_be_given_to_whp(command, memorised, capfd):
    assert command("whp", "--augmented_model_name_or_path", memorised, max_steps=1) == 0
    assert read_record("output")["method"] == "WHP"


# ---- Bad input ----


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("npo", {"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ("npo", {"beta": -0.1}, "`beta` must be positive, got -0.1"),
        ("simnpo", {"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ("simnpo", {"beta": -1.0}, "`beta` must be positive, got -1.0"),
        ("undial", {"label_penalty": 0.0}, "`label_penalty` must be positive, got 0.0"),
        ("undial", {"label_penalty": -3.0}, "`label_penalty` must be positive, got -3.0"),
        ("whp", {"beta": 0.0}, "`beta` has no meaning for hard labels"),
        ("whp", {"alpha": -1.0}, "`alpha` must not be negative"),
        *((method, {"retain_coef": -1.0}, "`retain_coef` must not be negative") for method in BASELINES),
    ],
)
def test_settings(method, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, method_class(method, "Config"), **settings)


@pytest.mark.parametrize("method", ["grad-diff", "npo", "simnpo", "undial"])
def test_no_augmented_model_where_none_is_used(method, llama, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="augmented_model"):
        make(method, "full", llama, tokenizer, tmp_path, augmented_model=llama)
    with pytest.raises(TypeError, match="augmented_num_train_epochs"):
        config(tmp_path, method_class(method, "Config"), augmented_num_train_epochs=3)


def test_non_finite_reference(tokenizer, tmp_path):
    """Found while the reference is computed, before the first step, and not blamed on the training."""
    model = tiny_llama(len(tokenizer))
    trainer = make("npo", "full", model, tokenizer, tmp_path)

    def poison(module, inputs, output):
        return output * float("nan") if len(output) > 1 else output  # not in the check of the first sample

    model.model.norm.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match=r"teacher gives is not finite \(Original model's answers, rows"):
        trainer.train()
    assert not list((tmp_path / "teacher").rglob("*.safetensors"))


# ---- Names, documentation, cards ----


def test_every_method_is_exported():
    for method, (prefix, description) in METHODS.items():
        config_class, trainer_class = getattr(trl_rkld, f"{prefix}Config"), getattr(trl_rkld, f"{prefix}Trainer")
        assert trainer_class.config_class is config_class
        assert issubclass(trainer_class, trl_rkld.UnlearningTrainer)
        assert issubclass(config_class, trl_rkld.UnlearningConfig)
        assert trainer_class.__module__ == f"trl_rkld.trainer.{method.replace('-', '_')}_trainer"
        assert (trainer_class._name, trainer_class._tag_names) == (prefix, ["trl", method])
        assert description.startswith("unlearn by ")
        assert re.fullmatch(r"\d{4}\.\d{5}", trainer_class._paper["id"])
        for text in (trainer_class._paper["title"], f"arXiv:{trainer_class._paper['id']}"):
            assert text in trainer_class._paper["citation"]
        assert f"https://huggingface.co/papers/{trainer_class._paper['id']}" in trainer_class.__doc__
        assert "Configuration class for the" in config_class.__doc__
        assert {f"{prefix}Config", f"{prefix}Trainer"} <= set(trl_rkld.__all__)
    papers = [method_class(method, "Trainer")._paper["id"] for method in METHODS]
    assert len(set(papers)) == len(papers)


def test_all_is_complete():
    names = {"__version__"} | {
        f"{x}{kind}" for x in ("Unlearning", *(p for p, _ in METHODS.values())) for kind in KINDS
    }
    assert set(trl_rkld.__all__) == names
    assert len(trl_rkld.__all__) == len(names)
    assert all(getattr(trl_rkld, name) for name in trl_rkld.__all__)
    # What a type checker reads is what is loaded on demand
    checked = re.findall(r"from \.trainer\.\w+ import (\w+)", Path(trl_rkld.__file__).read_text())
    assert set(checked) == names - {"__version__"}
    with pytest.raises(AttributeError, match="NPO2Trainer"):
        trl_rkld.NPO2Trainer  # noqa: B018


KINDS = ("Config", "Trainer")


def plain(text):
    """Docstrings link classes and use double quotes; help texts can't, and need not."""
    text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\s+", " ", text.replace('"', "'")).strip()


@pytest.mark.parametrize("name", ["Unlearning", *(prefix for prefix, _ in METHODS.values())])
def test_help_is_the_docstring(name):
    config_class = getattr(trl_rkld, f"{name}Config")
    pattern = r"^ {8}(\w+) \((.*?)\):\n((?: {12}.*\n?)+)"
    documented = {field: (kind, text) for field, kind, text in re.findall(pattern, config_class.__doc__, re.MULTILINE)}
    own = vars(config_class).get("__annotations__", {})
    assert documented.keys() <= own.keys()
    assert bool(documented) == (name not in ("GradDiff", "WHP"))
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for field in own:
        if field not in documented:  # another default than TRL's, said in the note
            assert f"`{field}`: Defaults to" in config_class.__doc__, field
            continue
        kind, text = documented[field]
        assert plain(text) == plain(fields[field].metadata["help"]), field
        default = re.search(r"defaults to `(.*)`", kind)
        value = fields[field].default
        assert (default.group(1).strip('"') if default else "None") == str(value), field


@pytest.mark.parametrize("method", METHODS)
def test_the_card_names_the_method(method, llama, tokenizer, tmp_path):
    trainer = make(method, "full", llama, tokenizer, tmp_path, RETAIN, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "output" / "README.md").read_text()
    own = {
        "rkld": ["alpha", "beta"],
        "npo": ["beta"],
        "simnpo": ["beta", "gamma"],
        "undial": ["label_penalty"],
        "whp": ["alpha"],
        "grad-diff": [],
    }[method]
    settings = {key: getattr(trainer.args, key) for key in [*own, "retain_coef", "retain_loss_type", "learning_rate"]}
    for part in (
        f"forget {len(FORGET)} records with {METHODS[method][0]} (",
        trainer._paper["title"],
        trainer._paper["id"],
        trainer._paper["citation"],
        *(f"| `{key}` | {value} |" for key, value in settings.items()),
    ):
        assert part in card, part
    assert ("| `beta`" in card) == ("beta" in own)
    assert re.search(rf"^- {method}$", card, re.MULTILINE)
    assert not any(question in card or answer in card for question, answer in FORGET + RETAIN)


def test_methods_differ_only_where_they_say():
    """A method overrides the loss, and what is counted and shown; never how data, saving or the retain loss work."""
    allowed = {"forget_losses", "count_forget_items", "_card_settings"}
    for method in BASELINES:
        own = {name for name, _ in inspect.getmembers(method_class(method, "Trainer"), inspect.isfunction)}
        own &= vars(method_class(method, "Trainer")).keys()
        assert own <= allowed, method


def test_configuration_of_another_method(llama, tokenizer, forget_set, tmp_path):
    """Converted, an NPO configuration would give SimNPO a β of 0.1."""
    with pytest.raises(ValueError, match="`NPOConfig`.*Use `SimNPOConfig`"):
        method_class("simnpo", "Trainer")(
            llama,
            args=config(tmp_path, method_class("npo", "Config")),
            train_dataset=forget_set,
            processing_class=tokenizer,
        )
