# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import os
from dataclasses import dataclass, field

from trl import SFTConfig


@dataclass
class UnlearningConfig(SFTConfig):
    r"""
    Configuration class for the [`UnlearningTrainer`]: what every unlearning method shares.

    This class includes only the parameters that are specific to unlearning. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] and [`~trl.SFTConfig`] documentation. Note that default
    values in this class may differ from those in [`~trl.SFTConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the model

        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model, LoRA's included. The teacher never drops anything, so a student
            that does differs from it for no reason.

        > Parameters that control the data preprocessing

        system_prompt (`str`, *optional*):
            System message put before questions and conversations that have none. Use the same in evaluation. If
            `None`, the chat template's own default applies.
        date_string (`str`, *optional*):
            Date shown to chat templates that print one (Llama 3), such as `"10 Apr 2025"`. Use the same in evaluation.
        question_template (`str`, *optional*):
            Plain format with a `{question}` field, used for question/answer data instead of the chat template, such
            as `"[INST] {question} [/INST]"`. The answer follows it directly. A tokenizer without a chat template gets
            TOFU's `"Question: {question}\nAnswer: "`.

        > Parameters that control the training

        retain_coef (`float`, *optional*, defaults to `1.0`):
            Weight λ of the retain loss. Without a `retain_dataset` there is none.
        retain_loss_type (`str`, *optional*, defaults to `"nll"`):
            Loss on the retained samples: `"nll"` is their negative log-likelihood, `"kl"` the forward KL from the
            original model, `KL(original ‖ student)`.
        precompute_teacher (`bool`, *optional*, defaults to `True`):
            Whether to compute the hidden states of the original (and, for RKLD, the augmented) model once, before the
            first step, and free what made them. Exact, and the models need not live through training. If `False`,
            they are computed live at each step.
        teacher_cache_dir (`str`, *optional*):
            Folder for private temporary files: the cached hidden states (of a live teacher, the augmented model's
            trained weights), so that a resumed run has the same teacher, and the original weights while the augmented
            model is trained. Deleted when training completes. Must be outside `output_dir`. Defaults to `trl_rkld` in
            the user's cache folder.
        stop_at_forget_prob (`float`, *optional*):
            End training after the first epoch at whose end the mean probability of the forgotten answers (of the
            first 400 of them) is at or below this. The probability of an answer is `p(answer)^(1/tokens)`.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `1e-5` instead of `2e-5`.
    > - `weight_decay`: Defaults to `0.01` instead of `0.0`.
    > - `num_train_epochs`: Defaults to `10` instead of `3`.
    > - `warmup_steps`: Defaults to the first epoch instead of `0` (with `max_steps`, to the first
    >   `1 / num_train_epochs` of these); to none where there is one epoch or less.
    > - `gradient_accumulation_steps`: Defaults to `4` instead of `1`, an effective batch of 32 on one device.
    > - `logging_steps`: Defaults to `1` instead of `10`.
    """

    # Parameters whose default values are overridden from SFTConfig
    learning_rate: float = field(
        default=1e-5,
        metadata={"help": "The initial learning rate for AdamW."},
    )
    weight_decay: float = field(
        default=0.01,
        metadata={"help": "Weight decay for AdamW."},
    )
    num_train_epochs: float = field(
        default=10.0,
        metadata={"help": "Total number of training epochs to perform."},
    )
    warmup_steps: float | None = field(
        default=None,
        metadata={
            "help": "Steps of linear warm-up, or their ratio if smaller than 1. If `None`, it lasts for the first epoch (of "
            "`max_steps`, for `1 / num_train_epochs`)."
        },
    )
    gradient_accumulation_steps: int = field(
        default=4,
        metadata={"help": "Number of updates steps to accumulate before performing a backward/update pass."},
    )
    logging_steps: float = field(
        default=1,
        metadata={
            "help": "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "will be interpreted as ratio of total training steps."
        },
    )

    # Parameters that control the model
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Whether to disable dropout in the model, LoRA's included. The teacher never drops anything, so a "
            "student that does differs from it for no reason."
        },
    )

    # Parameters that control the data preprocessing
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System message put before questions and conversations that have none. Use the same in "
            "evaluation. If `None`, the chat template's own default applies."
        },
    )
    date_string: str | None = field(
        default=None,
        metadata={
            "help": "Date shown to chat templates that print one (Llama 3), such as `'10 Apr 2025'`. Use the same in "
            "evaluation."
        },
    )
    question_template: str | None = field(
        default=None,
        metadata={
            "help": "Plain format with a `{question}` field, used for question/answer data instead of the chat "
            "template, such as `'[INST] {question} [/INST]'`. The answer follows it directly. A tokenizer without a "
            "chat template gets TOFU's `'Question: {question}\\nAnswer: '`."
        },
    )

    # Parameters that control the training
    retain_coef: float = field(
        default=1.0,
        metadata={"help": "Weight λ of the retain loss. Without a `retain_dataset` there is none."},
    )
    retain_loss_type: str = field(
        default="nll",
        metadata={
            "help": "Loss on the retained samples: `'nll'` is their negative log-likelihood, `'kl'` the forward KL "
            "from the original model, `KL(original ‖ student)`.",
            "choices": ["nll", "kl"],
        },
    )
    precompute_teacher: bool = field(
        default=True,
        metadata={
            "help": "Whether to compute the hidden states of the original (and, for RKLD, the augmented) model once, "
            "before the first step, and free what made them. Exact, and the models need not live through training. If "
            "`False`, they are computed live at each step."
        },
    )
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for private temporary files: the cached hidden states (of a live teacher, the augmented model's "
            "trained weights), so that a resumed run has the same teacher, and the original weights while the augmented "
            "model is trained. Deleted when training completes. Must be outside `output_dir`. Defaults to `trl_rkld` in "
            "the user's cache folder."
        },
    )
    stop_at_forget_prob: float | None = field(
        default=None,
        metadata={
            "help": "End training after the first epoch at whose end the mean probability of the forgotten answers (of "
            "the first 400 of them) is at or below this. The probability of an answer is `p(answer)^(1/tokens)`."
        },
    )

    def __post_init__(self):
        if self.warmup_steps is None:
            self.warmup_steps = 1 / self.num_train_epochs if self.num_train_epochs > 1 else 0
        super().__post_init__()
        if self.teacher_cache_dir is not None:
            self.teacher_cache_dir = os.path.expanduser(self.teacher_cache_dir)
        if self.packing or self.padding_free or self.eval_packing:
            raise ValueError(
                "`packing` and `padding_free` are not supported: each forgotten record is matched with the teacher's "
                "states of that record. Leave `packing`, `eval_packing` and `padding_free` at `False`."
            )
        if self.assistant_only_loss or self.completion_only_loss is False:
            raise ValueError(
                "`assistant_only_loss=True` and `completion_only_loss=False` are not supported: what counts is the "
                "completion, the last turn of the assistant in `messages`, or every token of a text. Leave both unset."
            )
        if (self.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ValueError(
                "`skip_prepare_dataset` is not supported: rows are checked and numbered when they are prepared. "
                "Tokenised data (`input_ids`, `labels`) need no flag."
            )
        if self.use_liger_kernel:
            raise ValueError(
                "`use_liger_kernel` is not supported: it would change the model between the original's states and the augmented "
                "model's. The loss never builds the logits anyway."
            )
        if self.torch_compile:
            raise ValueError(
                "`torch_compile` is not supported: the losses go around the compiled forward pass. Remove it."
            )
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError("`bf16_full_eval` and `fp16_full_eval` would round the weights. Use `bf16` or `fp16`.")
        if self.retain_loss_type not in ("nll", "kl"):
            raise ValueError(f"`retain_loss_type` must be 'nll' or 'kl', got {self.retain_loss_type!r}.")
        if self.learning_rate <= 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")
        if self.retain_coef < 0:
            raise ValueError(f"`retain_coef` must not be negative, got {self.retain_coef}.")
        if self.stop_at_forget_prob is not None and not 0 < self.stop_at_forget_prob < 1:
            raise ValueError(f"`stop_at_forget_prob` must lie between 0 and 1, got {self.stop_at_forget_prob}.")
        if self.question_template is not None and "{question}" not in self.question_template:
            raise ValueError("`question_template` must contain `{question}`, such as '[INST] {question} [/INST]'.")
        if (self.label_smoothing_factor or 0) > 0 or self.loss_type != "nll":
            raise ValueError("`label_smoothing_factor` and `loss_type` have no meaning here. Leave them unset.")
