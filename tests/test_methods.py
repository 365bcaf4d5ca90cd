# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Every method in whole trainings: it forgets, settings that must not matter do not, and a killed run goes on."""

import pytest
import torch
from conftest import FORGET, RETAIN, assert_two_processes_are_one, history, rows
from methods_setup import BASELINES, make

from trl_rkld.methods import METHODS, method_class


KEYS = ("loss", "forget_loss", "retain_loss", "forget_prob", "retain_prob", "grad_norm")


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


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
    One batch of four, or accumulated: each token, or each answer, weighs the same. The answers differ in length, and
    the epoch ends in a window of one sample.
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
        ("npo", "new adapter, 4-bit", True, "kept"),
        ("npo", "trained adapter, 4-bit", True, "lost"),
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
        assert parameter.dtype == parameters(whole)[name].dtype


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
        ("npo", {"beta": 0.1}, {"beta": 0.2}, "`beta` changed"),
        ("undial", {}, {"label_penalty": 3.0}, "`label_penalty` changed"),
        ("simnpo", {}, {"gamma": 0.5}, "`gamma` changed"),
        ("grad-diff", {}, {"data": rows(FORGET[:4])}, "the forget set changed"),
        ("simnpo", {"retain": RETAIN}, {"retain": RETAIN[:4]}, "the retain set changed"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    method, settings, change, message, llama_path, tokenizer, tmp_path, monkeypatch
):
    killed(method, tokenizer, llama_path, tmp_path, monkeypatch, **settings)
    trainer = make(method, "full", llama_path, tokenizer, tmp_path, **(settings | change))
    with pytest.raises(ValueError, match=f"can't be resumed: {message} since"):
        trainer.train(resume_from_checkpoint=True)
