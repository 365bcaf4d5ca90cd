# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import textwrap
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..losses import TokenLosses, label_log_probs, npo_losses
from ..teacher.roles import counted_labels, sum_of_answers
from .npo_config import NPOConfig
from .unlearning_trainer import UnlearningTrainer


class NPOTrainer(UnlearningTrainer):
    """
    Trainer for negative preference optimisation (NPO), a method introduced in [Negative Preference Optimization: From
    Catastrophic Collapse to Effective Unlearning](https://huggingface.co/papers/2404.05868).

    DPO with the answers to forget as rejected and without chosen ones: `−(2/β) log σ(−β log(π_θ(y|x) / π_o(y|x)))`,
    averaged over the answers. The original model's log-probabilities are computed once, before the first step.

    This class is a wrapper around the [`UnlearningTrainer`] class and inherits all of its attributes and methods. Its
    arguments are those of [`UnlearningTrainer`].
    """

    _tag_names = ["trl", "npo"]
    _name = "NPO"
    _paper = {
        "title": "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
        "id": "2404.05868",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhang2024negative,
                title   = {{Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning}},
                author  = {Ruiqi Zhang and Licong Lin and Yu Bai and Song Mei},
                journal = {arXiv preprint arXiv:2404.05868},
                year    = {2024}
            }"""),
    }

    config_class = NPOConfig
    uses_original_log_probs = True

    def forget_losses(self, model: PreTrainedModel | PeftModel, inputs: dict[str, torch.Tensor]) -> TokenLosses:
        log_probs = label_log_probs(self.student(model, inputs), counted_labels(inputs))
        original = self.teacher.original_log_probs(inputs).to(log_probs.device)
        answers = sum_of_answers(log_probs, inputs["labels"])
        losses = npo_losses(answers, sum_of_answers(original, inputs["labels"]), self.args.beta)
        return TokenLosses.without_teacher(losses.sum(), log_probs)

    def count_forget_items(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tensor(len(inputs["labels"]))  # the loss is one of whole answers

    def method_settings(self) -> dict[str, Any]:
        return {"beta": self.args.beta} | super().method_settings()
