# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""A trainer of any method, for a model that comes in any way."""

import torch
from conftest import FORGET, config, rows
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig
from trl.trainer.utils import create_model_from_path

from trl_rkld.methods import METHODS, method_class


BASELINES = [method for method in METHODS if method != "rkld"]


def lora():
    return LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", lora_dropout=0.5)


def make(method, row, source, tokenizer, folder, retain=None, data=None, augmented_model=None, **kwargs):
    """A trainer of any method. `row` is how the model comes, `source` a path or a model."""
    torch.manual_seed(3)  # adapters are drawn when they are made, whatever test was run before
    arguments = {"augmented_model": augmented_model} if augmented_model is not None else {}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    if "trained adapter" in row:
        extra = {"quantization_config": quantization} if "4-bit" in row else {}
        source = get_peft_model(create_model_from_path(source, dtype=torch.float32, **extra), lora())
        for name, parameter in source.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    elif "new adapter" in row:
        arguments |= {"peft_config": lora(), "quantization_config": quantization if "4-bit" in row else None}
    init = {"model_init_kwargs": {"dtype": "float32"}} if isinstance(source, str) else {}
    return method_class(method, "Trainer")(
        source,
        args=config(folder, method_class(method, "Config"), **init, **kwargs),
        train_dataset=rows(FORGET) if data is None else data,
        retain_dataset=None if retain is None else rows(retain),
        processing_class=tokenizer,
        **arguments,
    )
