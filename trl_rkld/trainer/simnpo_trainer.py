# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import textwrap
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..losses import TokenLosses, label_log_probs, simnpo_losses
from ..teacher.roles import answer_lengths, counted_labels, sum_of_answers
from .simnpo_config import SimNPOConfig
from .unlearning_trainer import UnlearningTrainer


class SimNPOTrainer(UnlearningTrainer):
    """
    Trainer for SimNPO, a method introduced in [Simplicity Prevails: Rethinking Negative Preference Optimization for
    LLM Unlearning](https://huggingface.co/papers/2410.07163).

    NPO without a reference model, on log-probabilities divided by the answers' lengths:
    `−(2/β) log σ(−(β/|y|) log π_θ(y|x) − γ)`, averaged over the answers.

    This class is a wrapper around the [`UnlearningTrainer`] class and inherits all of its attributes and methods. Its
    arguments are those of [`UnlearningTrainer`].
    """

    _tag_names = ["trl", "simnpo"]
    _name = "SimNPO"
    _paper = {
        "title": "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
        "id": "2410.07163",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{fan2024simplicity,
                title   = {{Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning}},
                author  = {Chongyu Fan and Jiancheng Liu and Licong Lin and Jinghan Jia and Ruiqi Zhang and Song Mei and Sijia Liu},
                journal = {arXiv preprint arXiv:2410.07163},
                year    = {2024}
            }"""),
    }

    config_class = SimNPOConfig

    def forget_losses(self, model: PreTrainedModel | PeftModel, inputs: dict[str, torch.Tensor]) -> TokenLosses:
        log_probs = label_log_probs(self.student(model, inputs), counted_labels(inputs))
        answers = sum_of_answers(log_probs, inputs["labels"])
        lengths = answer_lengths(inputs["labels"]).to(answers.device)
        losses = simnpo_losses(answers, lengths, self.args.beta, self.args.gamma)
        return TokenLosses.without_teacher(losses.sum(), log_probs)

    def count_forget_items(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tensor(len(inputs["labels"]))  # the loss is one of whole answers

    def method_settings(self) -> dict[str, Any]:
        return {"beta": self.args.beta, "gamma": self.args.gamma} | super().method_settings()
