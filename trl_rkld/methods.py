# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The unlearning methods by name, found without importing TRL."""

import importlib
from types import ModuleType


# Command: prefix of its classes, and what it does. The classes are in `trainer/<command>_config.py` and `_trainer.py`.
METHODS = {
    "rkld": ("RKLD", "unlearn by reverse-KL distillation"),
    "grad-diff": ("GradDiff", "unlearn by gradient ascent (GA, GradDiff)"),
    "npo": ("NPO", "unlearn by negative preference optimisation"),
    "simnpo": ("SimNPO", "unlearn by NPO without a reference model"),
    "undial": ("UNDIAL", "unlearn by distilling adjusted logits"),
    "whp": ("WHP", "unlearn by hard labels of the teacher (Who's Harry Potter)"),
}


def script_of(command: str) -> tuple[ModuleType, list[str]]:
    """
    Find the script of a command that trains.

    Args:
        command (`str`):
            A method, `"idk"`, `"dpo"` or `"finetune"`.

    Returns:
        `tuple`:
            The module, and the first arguments of its parser and its `main`: one script serves all methods, and is
            told which.
    """
    script, first = ("unlearn", [command]) if command in METHODS else (command, [])
    return importlib.import_module(f".scripts.{script}", __package__), first


def method_class(method: str, kind: str) -> type:
    """
    Find a class of a method.

    Args:
        method (`str`):
            Name of a method, such as `"grad-diff"`.
        kind (`str`):
            `"Config"` or `"Trainer"`.

    Returns:
        `type`:
            The class, such as [`GradDiffTrainer`].
    """
    module = f".trainer.{method.replace('-', '_')}_{kind.lower()}"
    return getattr(importlib.import_module(module, __package__), METHODS[method][0] + kind)
