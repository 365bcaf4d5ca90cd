# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Started by `test_two_processes_are_one` under torchrun: one short run, whose numbers the main process writes down."""

import json
import sys
from pathlib import Path

import conftest
from conftest import FORGET, RETAIN, config, history, rows, tiny_llama

from trl_rkld import RKLDTrainer


folder, processes = Path(sys.argv[1]), int(sys.argv[2])
tokenizer = conftest.build_tokenizer()
trainer = RKLDTrainer(
    tiny_llama(len(tokenizer), tie_word_embeddings=True),
    args=config(
        folder / f"run{processes}",
        per_device_train_batch_size=4 // processes,
        ddp_backend="gloo",
        retain_loss_type="kl",
        eval_strategy="no",
    ),
    # An even number of samples: an odd one would be padded with a sample seen twice.
    train_dataset=rows(FORGET[:4]),
    retain_dataset=rows(RETAIN),
    processing_class=tokenizer,
)
trainer.train()
if trainer.is_world_process_zero():
    keys = ("forget_loss", "retain_loss", "forget_prob", "retain_prob", "teacher_gap", "grad_norm")
    numbers = {key: [row[0] for row in history(trainer, key)] for key in keys}
    numbers["weights"] = [p.double().sum().item() for p in trainer.model.parameters()]
    (folder / f"{processes}.json").write_text(json.dumps(numbers))
