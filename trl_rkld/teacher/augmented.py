# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The augmented ("strengthened") model: the original trained further on the forget set."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import use_adapter

from unlearn_eval.models import free_memory

from ..progress import NamedProgressCallback
from .private_folder import save_private
from .roles import AUGMENTED, Role


class _AugmentedTrainer(SFTTrainer):
    _tag_names = []  # the model being trained is the user's, and keeps its tags


def train_further(
    model: nn.Module,
    args: SFTConfig,
    num_train_epochs: float,
    learning_rate: float,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    output_dir: Path,
) -> None:
    """
    Train a model further on the forget set, in place, with TRL's [`~trl.SFTTrainer`]. Nothing is saved or reported.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model whose trainable parameters are trained.
        args ([`~trl.SFTConfig`]):
            Configuration of the unlearning run; batch size, precision, optimizer and seed are taken from it.
        num_train_epochs (`float`):
            Epochs, with linear warm-up over the first where there are more; then as `args.lr_scheduler_type` says.
        learning_rate (`float`):
            Highest learning rate.
        dataset ([`~datasets.Dataset`]):
            Tokenised forget set.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        output_dir (`Path`):
            A private folder; the trainer wants one.
    """
    args = copy.copy(args)
    args.output_dir = str(output_dir)
    args.num_train_epochs, args.max_steps = num_train_epochs, -1
    args.learning_rate = learning_rate
    args.warmup_steps = 1 / num_train_epochs if num_train_epochs > 1 else 0
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.report_to, args.push_to_hub, args.load_best_model_at_end, args.eval_on_start = [], False, False, False
    args.dataset_kwargs, args.model_init_kwargs, args.chat_template_path = {"skip_prepare_dataset": True}, None, None
    args.logging_nan_inf_filter = False  # a loss that is not finite must show in the mean
    # The trainers patch the model's forward (fused head, autocast); the outer one shall find it as it was.
    patched = [(module, module.__dict__.get("forward")) for module in _forward_owners(model)]
    try:
        trainer = _AugmentedTrainer(
            model=model,
            args=args,
            train_dataset=dataset.remove_columns("sample_id"),
            processing_class=processing_class,
        )
        if not args.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(NamedProgressCallback("Training the augmented model"))
        output = trainer.train()
        trainer.accelerator.free_memory()
        del trainer
    finally:
        for module, forward in patched:
            module.__dict__.pop("_original_forward", None)
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward
        model.zero_grad(set_to_none=True)
    if not math.isfinite(output.training_loss):
        raise FloatingPointError(
            f"The augmented model's training loss is not finite after {output.global_step} steps. Lower "
            "`augmented_learning_rate`, or use `bf16=True` or float32."
        )
    free_memory()


def _forward_owners(model: nn.Module) -> list[nn.Module]:
    return [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]


@contextmanager
def restored_weights(model: nn.Module, path: Path, is_writer: bool, wait) -> Iterator[None]:
    """
    Let a model's own weights be trained away for a while. They are kept in a file, not in memory, and come back bit
    for bit.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        path (`Path`):
            File for the weights, in a private folder.
        is_writer (`bool`):
            Whether this process writes the file.
        wait (`Callable`):
            Waits for the other processes.
    """
    # Named parameters list tied weights once; buffers are not trained.
    if is_writer:
        save_private({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, path)
    wait()
    try:
        yield
    finally:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(name))
        wait()
        if is_writer:
            path.unlink()


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """
    Add a frozen copy of an adapter; the active one stays active.

    Args:
        model ([`~peft.PeftModel`]):
            Model with the adapter `source`.
        source, target (`str`):
            Names of the adapters.
    """
    peft_config = copy.deepcopy(model.peft_config[source])
    # Its values are overwritten below; another initialisation (PiSSA, OLoRA, …) would change the base weights.
    if isinstance(peft_config, LoraConfig):
        peft_config.init_lora_weights = True
    model.add_adapter(target, peft_config)
    for name, parameter in model.named_parameters():
        if f".{source}." in f"{name}.":
            copied = model.get_parameter(f"{name}.".replace(f".{source}.", f".{target}.")[:-1])
            copied.data = parameter.data.clone()
            copied.requires_grad_(False)
    model.set_adapter(source)


def adapter_role(model: PeftModel, name: str | None) -> Role:
    """The role that a PEFT model has with one of its adapters, or with none, switched on."""
    return Role(model, partial(use_adapter, model, name))


def keep_augmented_model(role: Role, folder: str, processing_class: PreTrainedTokenizerBase) -> None:
    """
    Save the augmented model, because the user asked for it.

    Args:
        role ([`Role`]):
            The augmented model.
        folder (`str`):
            Where to.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, saved beside it.
    """
    if isinstance(role.model, PeftModel):
        role.model.save_pretrained(folder, selected_adapters=[AUGMENTED])
        # PEFT puts an adapter that is not called "default" into a folder of its own.
        adapter = Path(folder, AUGMENTED)
        for file in adapter.iterdir():
            file.replace(Path(folder, file.name))
        adapter.rmdir()
    else:
        role.model.save_pretrained(folder)
    processing_class.save_pretrained(folder)
