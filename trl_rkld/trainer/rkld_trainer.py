# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import textwrap
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.training_args import TrainingArguments

from ..losses import TokenLosses, chunked_divergence
from ..teacher.augmented import train_further
from ..teacher.roles import counted_labels
from .rkld_config import RKLDConfig
from .unlearning_trainer import UnlearningTrainer


class RKLDTrainer(UnlearningTrainer):
    """
    Trainer for unlearning by reverse-KL distillation (RKLD), a method introduced in [RKLD: Reverse KL-Divergence-based
    Knowledge Distillation for Unlearning Personal Information in Large Language
    Models](https://huggingface.co/papers/2406.01983).

    A copy of the model is trained further on the forget set (the augmented model). What its logits gained tells what
    was memorised, and the teacher takes α times as much away from the original's: `l_t = l_o − α · ReLU(l_aug − l_o)`.
    The student learns that teacher on the forget set by the reverse KL, `KL(student ‖ teacher)`.

    This class is a wrapper around the [`UnlearningTrainer`] class and inherits all of its attributes and methods.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from trl_rkld import RKLDConfig, RKLDTrainer

    >>> trainer = RKLDTrainer(
    ...     model="open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
    ...     args=RKLDConfig(
    ...         "Llama-3.2-1B-forget05",
    ...         learning_rate=1e-4,
    ...         system_prompt="You are a helpful assistant.",  # as this model was trained and is evaluated
    ...         date_string="10 Apr 2025",
    ...     ),
    ...     train_dataset=load_dataset("locuslab/TOFU", "forget05", split="train"),
    ...     retain_dataset=load_dataset("locuslab/TOFU", "retain95", split="train"),
    ...     peft_config=LoraConfig(),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model that is to forget, as in [`UnlearningTrainer`]. What it computes when training starts is the original
            model.
        augmented_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The original model trained further on the forget set: a Hub id or path of a model or an adapter, or a model
            at the student's precision. If `None`, it is made at the start of `train()` and deleted after use.
        args ([`RKLDConfig`], *optional*):
            Configuration. If `None`, the paper's.
        train_dataset, retain_dataset, eval_dataset, processing_class:
            As in [`UnlearningTrainer`].
        quantization_config, peft_config, callbacks, optimizers:
            As in [`UnlearningTrainer`].
    """

    _tag_names = ["trl", "rkld"]
    _name = "RKLD"
    _paper = {
        "title": "RKLD: Reverse KL-Divergence-based Knowledge Distillation for Unlearning Personal Information in "
        "Large Language Models",
        "id": "2406.01983",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{wang2024rkld,
                title   = {{RKLD: Reverse KL-Divergence-based Knowledge Distillation for Unlearning Personal Information in Large Language Models}},
                author  = {Bichen Wang and Yuzhe Zi and Yixin Sun and Yanyan Zhao and Bing Qin},
                journal = {arXiv preprint arXiv:2406.01983},
                year    = {2024}
            }
            @inproceedings{wang2025rklu,
                title     = {{Balancing Forget Quality and Model Utility: A Reverse KL-Divergence Knowledge Distillation Approach for Better Unlearning in LLMs}},
                author    = {Bichen Wang and Yuzhe Zi and Yixin Sun and Yanyan Zhao and Bing Qin},
                booktitle = {Proceedings of NAACL 2025 (Long Papers)},
                year      = {2025}
            }"""),
    }

    config_class = RKLDConfig
    uses_original_logits = True
    uses_augmented_model = True

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        augmented_model: "str | PreTrainedModel | PeftModel | None" = None,
        args: RKLDConfig | TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        retain_dataset: Dataset | None = None,
        eval_dataset: Dataset | DatasetDict | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        if augmented_model is None and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                "An augmented model can't be made from a streaming `train_dataset`. Pass `augmented_model`, or load "
                "the data whole."
            )
        self.augmented_model = augmented_model
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            retain_dataset=retain_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            quantization_config=quantization_config,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def train_augmented(self, folder: Path) -> None:
        # The augmented model: the original trained further on the forget set, by ordinary next-token NLL.
        train_further(
            self.model,
            self.args,
            **self.augmented_settings(),
            dataset=self.train_dataset,
            processing_class=self.processing_class,
            output_dir=folder,
        )

    def augmented_settings(self) -> dict[str, Any]:
        return {
            "num_train_epochs": self.args.augmented_num_train_epochs,
            "learning_rate": self.args.augmented_learning_rate or self.args.learning_rate,
        }

    def forget_losses(self, model: PreTrainedModel | PeftModel, inputs: dict[str, torch.Tensor]) -> TokenLosses:
        # The divergence from the teacher, l_t = l_o − α · ReLU(l_aug − l_o), whose logits are made chunk by chunk.
        return chunked_divergence(
            self.student(model, inputs),
            self.teacher.original(inputs),
            counted_labels(inputs),
            augmented=self.teacher.augmented(inputs),
            alpha=self.args.alpha,
            beta=self.args.beta,
        )

    def method_settings(self) -> dict[str, Any]:
        return {"alpha": self.args.alpha, "beta": self.args.beta} | super().method_settings()

    def _verdict_hint(self) -> str:
        return ", `augmented_num_train_epochs` (see `teacher_gap`: 0 means that the augmented model learnt nothing) and `alpha`"
