# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`--dry_run`: every check that needs no weights, one sample, the number of updates, the memory."""

import math
import sys

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from ..adapters import is_adapter
from ..losses.chunked import _CHUNK_NUMBERS
from .loading import check_model_arguments, model_init_kwargs, read_adapter


def dry_run(trainer_class, args, model_args: ModelConfig, tokenizer, data: dict) -> None:
    """
    Construct the trainer around a model without weights, so that everything is checked, and print what would happen.

    Args:
        trainer_class (`type`):
            Trainer to construct.
        args ([`UnlearningConfig`]):
            Its configuration.
        model_args ([`~trl.ModelConfig`]):
            Command-line arguments on the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        data (`dict`):
            `train_dataset`, `retain_dataset` and `eval_dataset`, and the path of an `augmented_model`, if one is
            given.
    """

    class WithoutWeights(trainer_class):
        def _move_model_to_device(self, model, device):
            pass  # there is nothing to move

        def _adapter_hash(self):
            return None

    check_model_arguments(model_args)
    init_kwargs = model_init_kwargs(model_args, args)
    name, revision, in_4bit = model_args.model_name_or_path, init_kwargs["revision"], model_args.load_in_4bit
    peft_config, adapter = get_peft_config(model_args), None
    if is_adapter(name):
        _, adapter, record = read_adapter(model_args)
        adapter.inference_mode, adapter.init_lora_weights = False, True  # not the way in which it was made
        name, revision = adapter.base_model_name_or_path, adapter.revision or "main"
        in_4bit |= record.get("quantization") is not None
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=init_kwargs["trust_remote_code"])
    dtype = (config.dtype or torch.float32) if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=init_kwargs["trust_remote_code"]
        )
        if adapter is not None:
            model, peft_config = get_peft_model(model, adapter), None
    args.model_init_kwargs = None
    trainer = WithoutWeights(model, args=args, processing_class=tokenizer, peft_config=peft_config, **data)
    _print_sample(trainer.train_dataset[0], tokenizer)
    _print_updates(trainer)
    _print_memory(trainer, in_4bit)


def _print_sample(sample: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    if not sys.stdout.isatty():
        print("Sample: shown on a terminal only, since it is a text of the forget set.")
        return
    print("First sample to forget, counted tokens in brackets:\n")
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        text = tokenizer.decode([token])
        print(f"\033[1m[{text}]\033[0m" if label != -100 else text, end="")
    print("\n")


def _print_updates(trainer) -> None:
    args, num_samples = trainer.args, len(trainer.train_dataset)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    updates = args.max_steps if args.max_steps > 0 else math.ceil(num_samples / batch) * args.num_train_epochs
    counted = sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels)
    total = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    print(f"To forget: {num_samples} records, {total} tokens, {counted} of them counted")
    if trainer.retain_dataset is not None:
        print(f"To keep:   {len(trainer.retain_dataset)} records")
    print(f"Updates:   {updates:.0f}, of {batch} samples each, at a learning rate of up to {args.learning_rate:g}")


def _print_memory(trainer, in_4bit: bool) -> None:
    model, args = trainer.model, trainer.args
    linear = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    head = id(trainer.accelerator.unwrap_model(model).get_output_embeddings().weight)
    weights = trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        quantized = in_4bit and id(parameter) in linear - {head} and not parameter.requires_grad
        # NF4: half a byte each, and a float32 scale for 64 of them
        weights += parameter.numel() * (0.5 + 4 / 64 if quantized else parameter.element_size())
    config = model.config.get_text_config()
    longest = sorted(map(len, trainer.train_dataset["input_ids"]))[-args.per_device_train_batch_size :]
    tokens = len(longest) * max(longest)
    width = 2 if args.bf16 or args.fp16 else 4
    layers = config.num_hidden_layers
    # Inputs of each layer with checkpointing; else about 17 tensors of the hidden size in each.
    activations = tokens * config.hidden_size * width * (layers + 17 if args.gradient_checkpointing else 17 * layers)
    loss = 5 * 4 * max(_CHUNK_NUMBERS, config.vocab_size)
    full = trainer.student_adapter is None
    retain_kl = trainer.retain_dataset is not None and args.retain_loss_type == "kl"
    num_heads = trainer.uses_augmented_model + (trainer.uses_original_logits or retain_kl)
    heads = num_heads * config.vocab_size * config.hidden_size * 4 if full else 0
    rows = {
        "weights": weights,
        "gradients and AdamW states": trained * 12,
        "activations (rough)": activations,
        "loss": loss,
        "frozen heads of the teacher": heads,
    }
    print("Memory:")
    for name, size in (rows | {"in all (rough)": sum(rows.values())}).items():
        print(f"  {name:<28} {size / 1e9:7.2f} GB")
