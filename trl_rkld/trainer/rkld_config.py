# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import os
from dataclasses import dataclass, field

from .unlearning_config import UnlearningConfig


@dataclass
class RKLDConfig(UnlearningConfig):
    r"""
    Configuration class for the [`RKLDTrainer`].

    This class includes only the parameters that are specific to RKLD training. For a full list of training arguments,
    please refer to the [`UnlearningConfig`] and [`~transformers.TrainingArguments`] documentation. The defaults are
    those of the [paper](https://huggingface.co/papers/2406.01983), for full fine-tuning of 7B models. LoRA, small
    models and small forget sets need higher learning rates: the recipes say theirs.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the teacher

        alpha (`float`, *optional*, defaults to `8.0`):
            Strength α of the unlearning teacher `l_t = l_o − α · ReLU(l_aug − l_o)`. The paper finds 4 to 12 useful.
        augmented_num_train_epochs (`float`, *optional*, defaults to `10.0`):
            Epochs for which the augmented ("strengthened") model is trained further on the forget set. Unused where
            an `augmented_model` is given.
        augmented_learning_rate (`float`, *optional*):
            Learning rate of that training. If `None`, `learning_rate`.
        augmented_output_dir (`str`, *optional*):
            Folder in which to keep the augmented model, outside `output_dir`. If `None`, it is deleted: it knows the
            forget set better than any other model.

        > Parameters that control the training

        beta (`float`, *optional*, defaults to `1.0`):
            Divergence to minimise: `1.0` is the reverse KL `KL(student ‖ teacher)`, `0.0` the forward KL
            `KL(teacher ‖ student)`, as in [`~trl.DistillationTrainer`].
    """

    # Parameters that control the teacher
    alpha: float = field(
        default=8.0,
        metadata={
            "help": "Strength α of the unlearning teacher `l_t = l_o − α · ReLU(l_aug − l_o)`. The paper finds 4 to "
            "12 useful."
        },
    )
    augmented_num_train_epochs: float = field(
        default=10.0,
        metadata={
            "help": "Epochs for which the augmented ('strengthened') model is trained further on the forget set. "
            "Unused where an `augmented_model` is given."
        },
    )
    augmented_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of that training. If `None`, `learning_rate`."},
    )
    augmented_output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which to keep the augmented model, outside `output_dir`. If `None`, it is deleted: it "
            "knows the forget set better than any other model."
        },
    )

    # Parameters that control the training
    beta: float = field(
        default=1.0,
        metadata={
            "help": "Divergence to minimise: `1.0` is the reverse KL `KL(student ‖ teacher)`, `0.0` the forward KL "
            "`KL(teacher ‖ student)`, as in `DistillationTrainer`."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.augmented_output_dir is not None:
            self.augmented_output_dir = os.path.expanduser(self.augmented_output_dir)
        if self.alpha < 0:
            raise ValueError(f"`alpha` must not be negative, got {self.alpha}.")
        if self.beta not in (0.0, 1.0):
            raise ValueError(f"`beta` must be 1.0 (reverse KL) or 0.0 (forward KL), got {self.beta}.")
        if self.augmented_num_train_epochs <= 0:
            raise ValueError(f"`augmented_num_train_epochs` must be positive, got {self.augmented_num_train_epochs}.")
        if self.augmented_learning_rate is not None and self.augmented_learning_rate <= 0:
            raise ValueError(f"`augmented_learning_rate` must be positive, got {self.augmented_learning_rate}.")
