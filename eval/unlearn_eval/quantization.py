# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""4-bit models."""

from torch import nn
from transformers import PreTrainedModel

from .models import without_peft


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether a model was loaded quantised; transformers gives only such models a quantiser."""
    return getattr(model, "hf_quantizer", None) is not None


def keep_quantized_weights(model: PreTrainedModel) -> None:
    """
    Keep bitsandbytes from repacking 4-bit weights on the CPU.

    With AVX-512 BF16, a `Linear4bit` in evaluation mode replaces its weights by a packed form with scales rounded to
    bfloat16, for good: the original model measured then would not be the one that is trained.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model, changed in place if it is a 4-bit one.
    """
    if not is_quantized(model):
        return

    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    "bitsandbytes has repacked the 4-bit model for inference on the CPU, with rounded scales. Pass "
                    "a freshly loaded model that has not generated or evaluated anything yet."
                )
            module.support_avx512bf16_for_cpu = False


def quantized_parameters(model: nn.Module) -> set[int]:
    """The `id` of each parameter that holds packed 4-bit weights; `model` may be a PEFT wrapper."""
    if not is_quantized(without_peft(model)):
        return set()

    from bitsandbytes.nn import Params4bit

    return {id(parameter) for parameter in model.parameters() if isinstance(parameter, Params4bit)}
