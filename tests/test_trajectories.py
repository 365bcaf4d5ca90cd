# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Settings that must not matter give one training trajectory; those recorded here must stay what they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_two_processes_are_one, config, history, tiny_llama
from peft import LoraConfig

from trl_rkld import RKLDTrainer


KEYS = ("loss", "forget_loss", "retain_loss", "grad_norm")


def run(tokenizer, folder, data, retain, peft=False, resume=None, **kwargs):
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3) if peft else None
    trainer = RKLDTrainer(
        tiny_llama(len(tokenizer), tie_word_embeddings=True),
        args=config(folder, **kwargs),
        train_dataset=data,
        retain_dataset=retain,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(first, second, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(
        torch.tensor(history(first, *KEYS)), torch.tensor(history(second, *KEYS)), rtol=rtol, atol=atol
    )
    torch.testing.assert_close(parameters(first), parameters(second), rtol=rtol, atol=atol)


@pytest.mark.parametrize("retain_loss_type", ["nll", "kl"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_times_accumulation(batch_size, retain_loss_type, tokenizer, forget_set, retain_set, tmp_path):
    """One batch of four, or accumulated: the same tokens weigh the same. The epoch ends in a window of one sample."""
    whole, parts = (
        run(
            tokenizer,
            tmp_path / str(size),
            forget_set,
            retain_set,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            retain_loss_type=retain_loss_type,
        )
        for size in (4, batch_size)
    )
    assert_same(whole, parts)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("precompute_teacher", [True, False])
def test_gradient_checkpointing(precompute_teacher, peft, kwargs, tokenizer, forget_set, retain_set, tmp_path):
    runs = [
        run(
            tokenizer,
            tmp_path / str(checkpointing),
            forget_set,
            retain_set,
            peft=peft,
            precompute_teacher=precompute_teacher,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=dict(kwargs) if kwargs and checkpointing else None,
        )
        for checkpointing in (False, True)
    ]
    assert_same(*runs)


def test_dataloader_workers(tokenizer, forget_set, retain_set, tmp_path):
    reference = run(tokenizer, tmp_path / "reference", forget_set, retain_set)
    other = run(tokenizer, tmp_path / "other", forget_set, retain_set, dataloader_num_workers=2)
    assert_same(reference, other, rtol=0, atol=0)


def test_of_a_large_retain_set_only_what_is_drawn_is_cached(tokenizer, forget_set, retain_set, tmp_path):
    """Five of its seven samples, with the retain loss "kl" for one epoch: cached and live agree."""
    settings = {"retain_loss_type": "kl", "num_train_epochs": 1}
    cached, live = (
        run(tokenizer, tmp_path / str(precompute), forget_set, retain_set, precompute_teacher=precompute, **settings)
        for precompute in (True, False)
    )
    assert [len(dataset) for dataset in cached.teacher_datasets()] == [5, 5]
    assert_same(cached, live, rtol=1e-3, atol=1e-4)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("cache", ["kept", "lost"])
@pytest.mark.parametrize("precompute_teacher", [True, False])
@pytest.mark.parametrize("peft", [False, True])
def test_resumed_mid_epoch_is_uninterrupted(
    peft, precompute_teacher, cache, tokenizer, forget_set, retain_set, tmp_path, monkeypatch
):
    """Killed in its fourth step, after a checkpoint at the second of three in an epoch, the run ends the same."""
    settings = dict(peft=peft, precompute_teacher=precompute_teacher, save_strategy="steps", save_steps=2)
    whole = run(tokenizer, tmp_path / "whole", forget_set, retain_set, **settings)

    training_step = RKLDTrainer.training_step

    def dying_step(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise _Killed
        return training_step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RKLDTrainer, "training_step", dying_step)
        with pytest.raises(_Killed):
            run(tokenizer, tmp_path / "cut", forget_set, retain_set, **settings)
    (folder,) = (path for path in (tmp_path / "cut" / "teacher").iterdir() if path.is_dir())
    if cache == "lost":
        for path in folder.glob("*.safetensors"):
            path.unlink()
    resumed = run(tokenizer, tmp_path / "cut", forget_set, retain_set, resume=True, **settings)
    assert history(resumed, *KEYS) == history(whole, *KEYS)
    for name, parameter in parameters(resumed).items():
        assert torch.equal(parameter, parameters(whole)[name]), name


def test_golden_losses(tokenizer, forget_set, retain_set, tmp_path):
    """Recorded with float32 on the CPU; a change of the method, the order of samples or the weighting shows here."""
    trainer = run(tokenizer, tmp_path, forget_set, retain_set)
    path = Path(__file__).parent / "golden_losses.json"
    losses = [list(row) for row in history(trainer, "forget_loss", "retain_loss")]
    if os.environ.get("TRL_RKLD_RECORD_GOLDEN"):
        path.write_text(json.dumps(losses, indent=1) + "\n")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(json.loads(path.read_text())), rtol=1e-4, atol=1e-5)


def test_two_processes_are_one(tmp_path):
    assert_two_processes_are_one(tmp_path)


@pytest.mark.parametrize("moment", ["augmented training", "caching", "training", "saving"])
def test_killed_run_goes_on(moment, tokenizer, forget_set, retain_set, tmp_path):
    """SIGKILL, at different moments of a run in its own process: started again, it ends as the uninterrupted one."""
    settings = dict(save_strategy="steps", save_steps=2)
    script = Path(__file__).parent / "killed_run.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(tmp_path / "cut"), moment]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == -9, finished.stderr[-3000:]
    has_checkpoint = any((tmp_path / "cut" / "output").glob("checkpoint-*/trainer_state.json"))
    assert has_checkpoint == (moment in ("training", "saving"))
    resumed = run(tokenizer, tmp_path / "cut", forget_set, retain_set, resume=has_checkpoint, **settings)
    whole = run(tokenizer, tmp_path / "whole", forget_set, retain_set, **settings)
    assert history(resumed, *KEYS) == history(whole, *KEYS)
    for name, parameter in parameters(resumed).items():
        assert torch.equal(parameter, parameters(whole)[name]), name
    assert not list((tmp_path / "cut" / "teacher").iterdir())
