# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Started by `test_killed_run_goes_on`: a run that kills its own process, as the machine would, at a given moment."""

import os
import signal
import sys
from pathlib import Path

import conftest
from conftest import FORGET, RETAIN, config, rows, tiny_llama
from transformers import Trainer

from trl_rkld import RKLDTrainer
from trl_rkld.teacher import prepare


folder, moment = Path(sys.argv[1]), sys.argv[2]


def kill_at(owner, name, times):
    """Kill the process when a function is called for the `times`-th time."""
    function, calls = getattr(owner, name), []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, killing)


if moment == "augmented training":
    kill_at(Trainer, "training_step", 4)
elif moment == "caching":
    kill_at(prepare.CachedTeacher, "save", 1)
elif moment == "training":
    kill_at(RKLDTrainer, "training_step", 4)
else:  # while the second checkpoint is written
    kill_at(RKLDTrainer, "_save_optimizer_and_scheduler", 2)
tokenizer = conftest.build_tokenizer()
trainer = RKLDTrainer(
    tiny_llama(len(tokenizer), tie_word_embeddings=True),
    args=config(folder, save_strategy="steps", save_steps=2),
    train_dataset=rows(FORGET),
    retain_dataset=rows(RETAIN),
    processing_class=tokenizer,
)
trainer.train()
