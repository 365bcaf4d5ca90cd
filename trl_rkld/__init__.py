# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import importlib
from typing import TYPE_CHECKING

from .version import __version__


if TYPE_CHECKING:
    from .trainer import RKLDConfig, RKLDTrainer, UnlearningConfig, UnlearningTrainer

__all__ = ["RKLDConfig", "RKLDTrainer", "UnlearningConfig", "UnlearningTrainer", "__version__"]


def __getattr__(name: str):
    # TRL takes seconds to import, and commands such as `trl-rkld recipes` do not need it.
    if name in __all__:
        return getattr(importlib.import_module(".trainer", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
