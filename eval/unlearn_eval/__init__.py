# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The TOFU evaluation harness of trl-rkld. It never imports `trl_rkld`, and importing it loads nothing heavy."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .callback import TofuEvalCallback
    from .config import EvalConfig
    from .evaluation import evaluate

__all__ = ["EvalConfig", "TofuEvalCallback", "evaluate"]

_MODULES = {"EvalConfig": "config", "TofuEvalCallback": "callback", "evaluate": "evaluation"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
