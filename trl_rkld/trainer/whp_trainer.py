# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import textwrap
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..losses import TokenLosses, chunked_nll, teacher_labels
from ..teacher.roles import counted_labels
from .rkld_trainer import RKLDTrainer
from .whp_config import WHPConfig


class WHPTrainer(RKLDTrainer):
    """
    Trainer for unlearning by the hard labels of the teacher that [`RKLDTrainer`] distils, as in [Who's Harry Potter?
    Approximate Unlearning in LLMs](https://huggingface.co/papers/2310.02238).

    The loss is the negative log-likelihood of the teacher's likeliest token in the place of each token to forget. (The
    paper also replaces names by generic ones, which is for a single known subject and is left out.)

    This class is a wrapper around the [`RKLDTrainer`] class and inherits all of its attributes and methods. Its
    arguments are those of [`RKLDTrainer`].
    """

    _tag_names = ["trl", "whp"]
    _name = "WHP"
    _paper = {
        "title": "Who's Harry Potter? Approximate Unlearning in LLMs",
        "id": "2310.02238",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{eldan2023whos,
                title   = {{Who's Harry Potter? Approximate Unlearning in LLMs}},
                author  = {Ronen Eldan and Mark Russinovich},
                journal = {arXiv preprint arXiv:2310.02238},
                year    = {2023}
            }"""),
    }

    config_class = WHPConfig

    def forget_losses(self, model: PreTrainedModel | PeftModel, inputs: dict[str, torch.Tensor]) -> TokenLosses:
        original, augmented = self.teacher.original(inputs), self.teacher.augmented(inputs)
        targets, entropy, gap = teacher_labels(original, augmented, self.args.alpha)
        losses = chunked_nll(self.student(model, inputs), counted_labels(inputs), targets)
        return losses._replace(teacher_entropy=entropy, teacher_gap=gap)

    def method_settings(self) -> dict[str, Any]:
        settings = super().method_settings()
        del settings["beta"]
        return settings
