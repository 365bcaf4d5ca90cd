# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass, field

from .unlearning_config import UnlearningConfig


@dataclass
class UNDIALConfig(UnlearningConfig):
    r"""
    Configuration class for the [`UNDIALTrainer`].

    This class includes only the parameters that are specific to UNDIAL training. For a full list of training
    arguments, please refer to the [`UnlearningConfig`] and [`~transformers.TrainingArguments`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        label_penalty (`float`, *optional*, defaults to `10.0`):
            What is taken away from the original model's logit of each token to forget. The paper's implementation uses
            3 to 30.
    """

    label_penalty: float = field(
        default=10.0,
        metadata={
            "help": "What is taken away from the original model's logit of each token to forget. The paper's "
            "implementation uses 3 to 30."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.label_penalty <= 0:
            raise ValueError(f"`label_penalty` must be positive, got {self.label_penalty}.")
