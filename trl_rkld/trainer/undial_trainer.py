# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import textwrap
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..losses import TokenLosses, chunked_divergence
from ..teacher.roles import counted_labels
from .undial_config import UNDIALConfig
from .unlearning_trainer import UnlearningTrainer


class UNDIALTrainer(UnlearningTrainer):
    """
    Trainer for UNDIAL, a method introduced in [UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in
    Large Language Models](https://huggingface.co/papers/2402.10052).

    The teacher is the original model with `label_penalty` taken away from the logit of each token to forget, and the
    loss is the cross-entropy with it. What is minimised here is the forward KL `KL(teacher ‖ student)`: the same
    gradient, since the two differ by the teacher's entropy.

    This class is a wrapper around the [`UnlearningTrainer`] class and inherits all of its attributes and methods. Its
    arguments are those of [`UnlearningTrainer`].
    """

    _tag_names = ["trl", "undial"]
    _name = "UNDIAL"
    _paper = {
        "title": "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
        "id": "2402.10052",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{dong2024undial,
                title   = {{UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models}},
                author  = {Yijiang River Dong and Hongzhou Lin and Mikhail Belkin and Ramon Huerta and Ivan Vulić},
                journal = {arXiv preprint arXiv:2402.10052},
                year    = {2024}
            }"""),
    }

    config_class = UNDIALConfig
    uses_original_logits = True

    def forget_losses(self, model: PreTrainedModel | PeftModel, inputs: dict[str, torch.Tensor]) -> TokenLosses:
        return chunked_divergence(
            self.student(model, inputs),
            self.teacher.original(inputs),
            counted_labels(inputs),
            beta=0.0,
            label_penalty=self.args.label_penalty,
        )

    def method_settings(self) -> dict[str, Any]:
        return {"label_penalty": self.args.label_penalty} | super().method_settings()
