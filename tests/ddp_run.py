# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Started under torchrun by tests of two processes: one short run of a method, whose numbers the main process writes down."""

import json
import sys
from pathlib import Path

import conftest
import torch
from conftest import FORGET, RETAIN, config, history, rows, tiny_llama

from trl_rkld.methods import method_class


folder, processes = Path(sys.argv[1]), int(sys.argv[2])
method = sys.argv[3] if len(sys.argv) > 3 else "rkld"
tokenizer = conftest.build_tokenizer()
trainer_class = method_class(method, "Trainer")
trainer = trainer_class(
    tiny_llama(len(tokenizer), tie_word_embeddings=True),
    args=config(
        folder / f"run{processes}",
        method_class(method, "Config"),
        per_device_train_batch_size=4 // processes,
        ddp_backend="gloo",
        retain_loss_type="kl",
        eval_strategy="no",
        num_train_epochs=4,  # the first is the warm-up, of one step at a rate of zero
    ),
    # An even number of samples: an odd one would be padded with a sample seen twice.
    train_dataset=rows(FORGET[:4]),
    retain_dataset=rows(RETAIN),
    processing_class=tokenizer,
)
trainer.train()
if trainer.is_world_process_zero():
    keys = ["forget_loss", "retain_loss", "forget_prob", "retain_prob", "grad_norm"]
    keys += ["teacher_gap"] if trainer.uses_augmented_model else []
    numbers = {key: [row[0] for row in history(trainer, key)] for key in keys}
    torch.save(torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach(), folder / f"{processes}.pt")
    (folder / f"{processes}.json").write_text(json.dumps(numbers))
trainer.end()  # a process that exits with its group open may abort
