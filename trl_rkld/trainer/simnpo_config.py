# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass, field

from .unlearning_config import UnlearningConfig


@dataclass
class SimNPOConfig(UnlearningConfig):
    r"""
    Configuration class for the [`SimNPOTrainer`].

    This class includes only the parameters that are specific to SimNPO training. For a full list of training
    arguments, please refer to the [`UnlearningConfig`] and [`~transformers.TrainingArguments`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        beta (`float`, *optional*, defaults to `2.5`):
            Inverse temperature β of the loss, whose reward is the mean log-probability of an answer's tokens.
        gamma (`float`, *optional*, defaults to `0.0`):
            Margin γ of that reward. (open-unlearning's `gamma` is another thing, the weight of the forget loss: a
            `gamma` of 0.125 there corresponds to `retain_coef=8` here.)
    """

    beta: float = field(
        default=2.5,
        metadata={
            "help": "Inverse temperature β of the loss, whose reward is the mean log-probability of an answer's tokens."
        },
    )
    gamma: float = field(
        default=0.0,
        metadata={
            "help": "Margin γ of that reward. (open-unlearning's `gamma` is another thing, the weight of the forget loss: "
            "a `gamma` of 0.125 there corresponds to `retain_coef=8` here.)"
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
