# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What is refused when a trainer is constructed, with the remedy."""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)

from unlearn_eval.models import without_peft
from unlearn_eval.prompts import Template
from unlearn_eval.quantization import is_quantized, keep_quantized_weights

from ..adapters import check_adapter, check_initialisation, student_adapter
from ..losses import lm_head_of
from ..run_record import read_record
from .unlearning_config import UnlearningConfig


logger = get_logger(__name__)


def check_arguments(
    args: UnlearningConfig,
    train_dataset: Dataset | IterableDataset | None,
    retain_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    quantization_config: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
) -> None:
    """Raise on what can be refused before a model is loaded. Arguments as in [`UnlearningTrainer`]."""
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: the records to forget.")
    evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in (("train", train_dataset), ("retain", retain_dataset), *evaluation.items()):
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"The {name} dataset is empty. Pass at least one record.")
    if isinstance(train_dataset, IterableDataset):
        if args.stop_at_forget_prob is not None:
            raise ValueError("`stop_at_forget_prob` can't be measured on a streaming `train_dataset`. Load it whole.")
        if args.precompute_teacher:
            raise ValueError(
                "A streaming `train_dataset` can't be cached. Set `precompute_teacher=False`, or load it whole."
            )
        if retain_dataset is not None:
            raise ValueError(
                "A streaming `train_dataset` can't be paired with a `retain_dataset`. Load it whole, without streaming."
            )
    if any(isinstance(dataset, IterableDataset) for dataset in evaluation.values()):
        raise TypeError("`eval_dataset` can't be streamed. Load it whole, without streaming.")
    if retain_dataset is not None and not isinstance(retain_dataset, Dataset):
        raise TypeError(f"`retain_dataset` must be a `Dataset`, got `{type(retain_dataset).__name__}`.")
    if isinstance(peft_config, PromptLearningConfig):
        raise ValueError(
            f"`{type(peft_config).__name__}` puts virtual tokens before the text, which shifts every position. Use "
            "LoRA (`peft.LoraConfig`)."
        )
    if peft_config is not None:
        check_initialisation(peft_config)
    if quantization_config is not None and not quantization_config.load_in_4bit:
        raise ValueError("Only 4-bit quantisation is supported. Set `load_in_4bit=True` in `quantization_config`.")
    output_dir = Path(args.output_dir).resolve()
    for name in ("teacher_cache_dir", "augmented_output_dir"):
        folder = getattr(args, name, None)
        if folder is not None and Path(folder).resolve().is_relative_to(output_dir):
            raise ValueError(
                f"`{name}` must not lie in `output_dir`, which is saved and pushed. Choose another folder."
            )
        if name == "augmented_output_dir" and folder is not None:
            check_free(Path(folder))


def check_is_text(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """Raise on a processor of texts and images, which TRL's trainer would take."""
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            "Vision-language models are not supported. Load a text model, and pass its tokenizer as `processing_class`."
        )


def check_free(augmented_output_dir: Path) -> None:
    """Raise where the augmented model would replace anything but an augmented model."""
    is_taken = augmented_output_dir.exists() and any(augmented_output_dir.iterdir())
    if is_taken and (read_record(augmented_output_dir) or {}).get("method") != "augmented":
        raise ValueError(f"`augmented_output_dir={str(augmented_output_dir)!r}` is not empty. Choose a new folder.")


def warn_of_dates(args: UnlearningConfig, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> None:
    """Say so where a run that is resumed on another day would train on other prompts. `row` is one of its records."""
    if isinstance(row.get("completion"), str) or row.get("chat_template_kwargs"):
        return
    remedy = Template.of(args).date_remedy(tokenizer)
    if remedy is not None:
        logger.warning(f"The chat template prints today's date: a run can't be resumed on another day. {remedy}")


def warn_slow_bfloat16(args: TrainingArguments) -> None:
    """Say so where TRL's default precision is emulated: without AVX-512 a step takes some twenty times as long."""
    if args.bf16 and args.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        logger.warning(
            "This CPU computes in bfloat16, TRL's default, many times slower than in float32. Set `bf16=False`."
        )


def check_model(model: PreTrainedModel | PeftModel, distributed_type: DistributedType) -> None:
    """Raise on a model, or a way to distribute it, that can't be unlearned with. Keeps 4-bit weights from repacking."""
    if distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"{distributed_type.value} is not supported: the teacher needs whole weights. Use one process or DDP, and "
            "4-bit QLoRA where memory is short."
        )
    causal_lm = without_peft(model)
    if is_quantized(causal_lm) and not getattr(causal_lm, "is_loaded_in_4bit", False):
        raise ValueError("The model is quantised, but not in 4-bit. Load it whole or with `load_in_4bit=True`.")
    keep_quantized_weights(causal_lm)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The model has no trainable parameters. Load its adapter with `PeftModel.from_pretrained(..., "
            "is_trainable=True)`, or pass `peft_config`."
        )
    lm_head_of(causal_lm)
    if isinstance(model, PeftModel):
        name = student_adapter(model)
        check_adapter(model.active_peft_config)
        others = [n for n, p in model.named_parameters() if p.requires_grad and f".{name}." not in f"{n}."]
        if others:
            raise ValueError(
                f"Beside the adapter, `{others[0]}` is trainable, so that with the adapter off the model would not stay "
                "the original one. Freeze it."
            )
