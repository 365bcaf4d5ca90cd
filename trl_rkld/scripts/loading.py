# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""From a name to a model, as the training scripts want it."""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, ModelConfig, SFTConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from ..adapters import is_adapter
from ..run_record import read_record
from ..teacher.given import device_map_kwargs


logger = get_logger(__name__)


def model_init_kwargs(model_args: ModelConfig, training_args: SFTConfig | DPOConfig) -> dict[str, Any]:
    """
    Arguments of `from_pretrained`, as TRL's scripts make them.

    Args:
        model_args ([`~trl.ModelConfig`]):
            Command-line arguments on the model.
        training_args ([`~trl.SFTConfig`] or [`~trl.DPOConfig`]):
            Those on the training, whose `model_init_kwargs` win.

    Returns:
        `dict`:
            The arguments.
    """
    kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    return kwargs | (training_args.model_init_kwargs or {})


def local_folder(name: str, revision: str | None = None) -> str:
    """Folder of a model or an adapter: itself, or where the Hub's files have come to lie."""
    return name if Path(name).is_dir() else snapshot_download(name, revision=revision)


def trainer_tokenizer(model_args: ModelConfig, training_args: SFTConfig | DPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that a script trains."""
    return load_tokenizer(model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code)


def load_tokenizer(name: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or of an adapter or its base."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        if not is_adapter(name):
            raise
        adapter = PeftConfig.from_pretrained(name, revision=revision)
        return AutoTokenizer.from_pretrained(
            adapter.base_model_name_or_path, revision=adapter.revision or "main", trust_remote_code=trust_remote_code
        )


def train_and_save(trainer: Trainer) -> None:
    """Train, save and push, and say so."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.accelerator.print("✅ Training completed.")
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


def check_model_arguments(model_args: ModelConfig) -> None:
    """Raise on arguments that don't go together, before anything is loaded."""
    if model_args.load_in_8bit:
        raise ValueError("`load_in_8bit` is not supported. Use `load_in_4bit`.")
    adapter = is_adapter(model_args.model_name_or_path)
    if adapter and model_args.use_peft:
        raise ValueError(
            f"`model_name_or_path={model_args.model_name_or_path!r}` is an adapter, which is trained on. Remove "
            "`use_peft`, or merge it first (`trl-rkld merge`)."
        )
    if model_args.load_in_4bit and not adapter and not model_args.use_peft:
        raise ValueError("4-bit weights can't be trained whole. Set `use_peft`, or remove `load_in_4bit`.")


def check_template_is_the_models(training_args: SFTConfig) -> None:
    """Raise on another template or end of turn: TRL would exchange them after the records are tokenised here."""
    for name in ("chat_template_path", "eos_token"):
        if getattr(training_args, name) is not None:
            raise ValueError(f"`{name}` is not supported here: set it in the tokenizer of `model_name_or_path`.")


def read_adapter(model_args: ModelConfig) -> tuple[str, PeftConfig, dict[str, Any]]:
    """
    What an adapter stands on.

    Args:
        model_args ([`~trl.ModelConfig`]):
            Command-line arguments, whose `model_name_or_path` is an adapter.

    Returns:
        `tuple[str, PeftConfig, dict]`:
            Its folder, its configuration and the record of the run that made it, empty if that was not one of ours.
    """
    folder = local_folder(model_args.model_name_or_path, model_args.model_revision)
    return folder, PeftConfig.from_pretrained(folder), read_record(folder) or {}


def trainer_model_arguments(model_args: ModelConfig, training_args: SFTConfig | DPOConfig) -> dict[str, Any]:
    """
    `model`, `quantization_config` and `peft_config` of a trainer. An adapter is loaded on its base and trained on.

    Args:
        model_args ([`~trl.ModelConfig`]):
            Command-line arguments on the model.
        training_args ([`~trl.SFTConfig`] or [`~trl.DPOConfig`]):
            Those on the training; its `model_init_kwargs` is set to what the trainer loads the model with.

    Returns:
        `dict`:
            Keyword arguments.
    """
    check_model_arguments(model_args)
    init_kwargs = model_init_kwargs(model_args, training_args)
    training_args.model_init_kwargs = None  # an adapter is loaded here
    quantization = get_quantization_config(model_args)
    if quantization is not None and model_args.dtype == "float32" and torch.cuda.is_available():
        logger.warning(
            "4-bit weights with `dtype=float32` compute in float32, which is slow on a GPU. Set `dtype: bfloat16`."
        )
    if not is_adapter(model_args.model_name_or_path):
        training_args.model_init_kwargs = init_kwargs
        peft_config = get_peft_config(model_args)
        if peft_config is not None:
            peft_config.revision = init_kwargs["revision"]
        return {
            "model": model_args.model_name_or_path,
            "quantization_config": quantization,
            "peft_config": peft_config,
        }
    folder, peft_config, record = read_adapter(model_args)
    base_kwargs = init_kwargs | {"revision": peft_config.revision or "main"} | device_map_kwargs()
    if quantization is not None:
        base_kwargs["quantization_config"] = quantization
    if record.get("quantization") is not None:  # an adapter goes on with the weights that it was made for
        base_kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(record["quantization"])
        base_kwargs["dtype"] = record["dtype"]
    model = create_model_from_path(peft_config.base_model_name_or_path, **base_kwargs)
    return {"model": PeftModel.from_pretrained(model, folder, is_trainable=True)}
