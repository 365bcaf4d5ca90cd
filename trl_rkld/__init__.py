# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import importlib
from typing import TYPE_CHECKING

from .methods import METHODS, method_class
from .version import __version__


if TYPE_CHECKING:
    from .trainer.grad_diff_config import GradDiffConfig
    from .trainer.grad_diff_trainer import GradDiffTrainer
    from .trainer.npo_config import NPOConfig
    from .trainer.npo_trainer import NPOTrainer
    from .trainer.rkld_config import RKLDConfig
    from .trainer.rkld_trainer import RKLDTrainer
    from .trainer.simnpo_config import SimNPOConfig
    from .trainer.simnpo_trainer import SimNPOTrainer
    from .trainer.undial_config import UNDIALConfig
    from .trainer.undial_trainer import UNDIALTrainer
    from .trainer.unlearning_config import UnlearningConfig
    from .trainer.unlearning_trainer import UnlearningTrainer
    from .trainer.whp_config import WHPConfig
    from .trainer.whp_trainer import WHPTrainer

_BASE = {"UnlearningConfig": "unlearning_config", "UnlearningTrainer": "unlearning_trainer"}
_CLASSES = {prefix + kind: (method, kind) for method, (prefix, _) in METHODS.items() for kind in ("Config", "Trainer")}

__all__ = ["__version__", *_BASE, *_CLASSES]


def __getattr__(name: str):
    # TRL takes seconds to import, and commands such as `trl-rkld recipes` do not need it.
    if name in _CLASSES:
        return method_class(*_CLASSES[name])
    if name in _BASE:
        return getattr(importlib.import_module(f".trainer.{_BASE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
