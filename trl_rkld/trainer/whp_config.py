# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass

from .rkld_config import RKLDConfig


@dataclass
class WHPConfig(RKLDConfig):
    r"""
    Configuration class for the [`WHPTrainer`]. Its parameters are those of [`RKLDConfig`], less `beta`: hard labels
    leave no divergence to choose.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.beta != 1.0:
            raise ValueError("`beta` has no meaning for hard labels. Leave it unset.")
