# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass

from .unlearning_config import UnlearningConfig


@dataclass
class GradDiffConfig(UnlearningConfig):
    r"""
    Configuration class for the [`GradDiffTrainer`], which has no parameters of its own. For the training arguments,
    please refer to the [`UnlearningConfig`] and [`~transformers.TrainingArguments`] documentation.
    """
