# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
from .rkld_config import RKLDConfig
from .rkld_trainer import RKLDTrainer
from .unlearning_config import UnlearningConfig
from .unlearning_trainer import UnlearningTrainer


__all__ = ["RKLDConfig", "RKLDTrainer", "UnlearningConfig", "UnlearningTrainer"]
