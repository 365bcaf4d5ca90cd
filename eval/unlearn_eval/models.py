# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""A model with or without a PEFT wrapper, and its modes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


def without_peft(model: nn.Module) -> PreTrainedModel:
    """The causal language model below a PEFT wrapper, if it has one."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
