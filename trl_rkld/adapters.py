# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Adapters: which folder is one, what it is for, and which of them leave the base model as it was."""

from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from transformers.utils.peft_utils import find_adapter_config_file
from trl.trainer.utils import get_config_model_id


def is_adapter(path_or_id: str) -> bool:
    """Whether a local folder or a Hub id is that of a PEFT adapter."""
    return find_adapter_config_file(path_or_id) is not None


def base_of(adapter: str) -> tuple[str, str] | None:
    """Name and revision of an adapter's base; nothing of a whole model."""
    if not is_adapter(adapter):
        return None
    peft_config = PeftConfig.from_pretrained(adapter)
    return peft_config.base_model_name_or_path, peft_config.revision or "main"


def own_base(model: PeftModel) -> tuple[str, str]:
    """Name and revision of the base of a model's adapter."""
    return get_config_model_id(model.get_base_model().config), model.active_peft_config.revision or "main"


def student_adapter(model: PeftModel) -> str:
    """Name of the one active adapter of a model: the one that is trained."""
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"The model has the active adapters {model.active_adapters}. Activate one (`model.set_adapter`) and merge "
            "the others."
        )
    if model.active_peft_config.is_prompt_learning:
        raise ValueError("Prompt-learning adapters are not supported: they shift every position. Use LoRA.")
    if model.active_adapters != ["default"]:
        raise ValueError(
            f"The adapter is called {model.active_adapters[0]!r}. Load it as TRL does, with `adapter_name='default'`."
        )
    return model.active_adapters[0]


def check_initialisation(peft_config: PeftConfig) -> None:
    """Raise where a new adapter is not the identity on the base model, or is made by changing the base model."""
    name = "init_lora_weights" if isinstance(peft_config, LoraConfig) else "init_weights"  # of LoHa, LoKr, OFT, …
    initialisation = getattr(peft_config, name, True)
    if initialisation not in (True, "gaussian"):
        raise ValueError(
            f"With `{name}={initialisation!r}` a new adapter is no identity, or the base weights change: with "
            f"the adapter off, the model would not be the original one. Use `{name}=True`."
        )
    check_adapter(peft_config)


def check_adapter(peft_config: PeftConfig) -> None:
    """
    Raise where an adapter trains biases of the base model, which stay when it is off, or works in the forward pass of
    PEFT's wrapper, which the losses go around.
    """
    if peft_config.peft_type == PeftType.ADALORA or getattr(peft_config, "alora_invocation_tokens", None) is not None:
        raise ValueError(
            "AdaLoRA, and LoRA with `alora_invocation_tokens`, are not supported: they need PEFT's own forward pass. Use "
            "plain LoRA."
        )
    if getattr(peft_config, "bias", "none") != "none":
        raise ValueError(
            f"With `bias={peft_config.bias!r}` the base model's biases are trained, and with the adapter off the model "
            "would not be the original one. Leave the PEFT config's `bias` at 'none'."
        )
