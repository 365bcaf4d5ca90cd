# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import textwrap

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..losses import TokenLosses, chunked_nll
from ..teacher.roles import counted_labels
from .grad_diff_config import GradDiffConfig
from .unlearning_trainer import UnlearningTrainer


class GradDiffTrainer(UnlearningTrainer):
    """
    Trainer for gradient ascent (GA) on the forget set and, with a retain set, gradient difference (GradDiff) or GA+KL:
    baselines of [TOFU: A Task of Fictitious Unlearning for LLMs](https://huggingface.co/papers/2401.06121).

    The loss is the negative log-likelihood of the forget set with its sign turned: it has no lower bound, and a model
    trained on it for long breaks.

    This class is a wrapper around the [`UnlearningTrainer`] class and inherits all of its attributes and methods. Its
    arguments are those of [`UnlearningTrainer`].
    """

    _tag_names = ["trl", "grad-diff"]
    _name = "GradDiff"
    _paper = {
        "title": "TOFU: A Task of Fictitious Unlearning for LLMs",
        "id": "2401.06121",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{maini2024tofu,
                title   = {{TOFU: A Task of Fictitious Unlearning for LLMs}},
                author  = {Pratyush Maini and Zhili Feng and Avi Schwarzschild and Zachary C. Lipton and J. Zico Kolter},
                journal = {arXiv preprint arXiv:2401.06121},
                year    = {2024}
            }"""),
    }

    config_class = GradDiffConfig

    def forget_losses(self, model: PreTrainedModel | PeftModel, inputs: dict[str, torch.Tensor]) -> TokenLosses:
        losses = chunked_nll(self.student(model, inputs), counted_labels(inputs))
        return losses._replace(loss=-losses.loss)
