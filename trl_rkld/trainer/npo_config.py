# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass, field

from .unlearning_config import UnlearningConfig


@dataclass
class NPOConfig(UnlearningConfig):
    r"""
    Configuration class for the [`NPOTrainer`].

    This class includes only the parameters that are specific to NPO training. For a full list of training arguments,
    please refer to the [`UnlearningConfig`] and [`~transformers.TrainingArguments`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        beta (`float`, *optional*, defaults to `0.1`):
            Inverse temperature β of the loss. The smaller, the closer to gradient ascent.
    """

    beta: float = field(
        default=0.1,
        metadata={"help": "Inverse temperature β of the loss. The smaller, the closer to gradient ascent."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
