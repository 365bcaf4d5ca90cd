# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""A model with or without a PEFT wrapper, its modes, and the memory that it leaves."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
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


def free_memory() -> None:
    """Give back what models that are gone have left behind, before the next one comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
