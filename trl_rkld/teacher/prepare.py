# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Teacher preparation: how each way of passing a model becomes an original and an augmented model."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from unlearn_eval.fingerprint import hash_json, hash_model, hash_samples, hash_weights
from unlearn_eval.models import without_peft
from unlearn_eval.quantization import is_quantized, keep_quantized_weights

from ..adapters import base_of, check_initialisation, own_base
from ..run_record import ResumeError, plain_record, write_record
from .augmented import adapter_role, copy_adapter, keep_augmented_model, restored_weights
from .given import check_same_precision, load_like
from .private_folder import PrivateFolder, save_private
from .roles import AUGMENTED, Role
from .teacher import CachedTeacher, LiveTeacher, frozen_head, read_fingerprint
from .token_states import TokenStates


if TYPE_CHECKING:
    from ..trainer.unlearning_trainer import UnlearningTrainer

logger = get_logger(__name__)

REFERENCE = "ref"  # TRL's name for a frozen copy of the adapter that is trained


def prepare_teacher(
    trainer: "UnlearningTrainer",
    folder: PrivateFolder,
    fingerprint: dict[str, str],
    expected_digest: str | None,
    stack: ExitStack,
) -> CachedTeacher | LiveTeacher:
    """
    Make the teacher of a run, or read back the one that it had before it was interrupted.

    Args:
        trainer ([`UnlearningTrainer`]):
            Trainer whose model is still the original.
        folder ([`~trl_rkld.teacher.private_folder.PrivateFolder`]):
            The run's private folder, open.
        fingerprint (`dict[str, str]`):
            Hashes of what the teacher is made from, [`teacher_fingerprint`].
        expected_digest (`str`, *optional*):
            Digest of the teacher that the checkpoint being resumed was trained with.
        stack (`ExitStack`):
            Closed when training ends: undoes what a live teacher did to the model.

    Returns:
        [`~trl_rkld.teacher.teacher.CachedTeacher`] or [`~trl_rkld.teacher.teacher.LiveTeacher`]:
            The teacher.
    """
    path = folder.teacher_file
    if path.is_file() and read_fingerprint(path) == fingerprint:
        teacher = CachedTeacher.load(path, Role(trainer.model).head(), trainer.accelerator.device)
        if expected_digest is None or teacher.digest() == expected_digest:
            return teacher
    if trainer.args.precompute_teacher:
        teacher = _cached_teacher(trainer, folder)
    else:
        teacher = _live_teacher(trainer, folder, stack)
    if expected_digest is not None and teacher.digest() != expected_digest:
        raise ResumeError(
            f"The teacher of this run is gone from `teacher_cache_dir={str(folder.root)!r}`, and the one made anew "
            "differs from it in its last digits (another device or number of threads?). Resuming would change the "
            "teacher midway. Start again without `resume_from_checkpoint`."
        )
    if trainer.args.precompute_teacher:
        if trainer.accelerator.is_main_process:
            teacher.save(path, fingerprint)
        trainer.accelerator.wait_for_everyone()
    return teacher


def teacher_fingerprint(trainer: "UnlearningTrainer") -> dict[str, str]:
    """
    Hashes of what a run's teacher is made from. α and β are not among them: the cached states serve any.

    Args:
        trainer ([`UnlearningTrainer`]):
            Trainer whose model is still the original.

    Returns:
        `dict[str, str]`:
            SHA-256 of `"model"`, `"data"` and `"settings"`.
    """
    args = trainer.args
    augmented = trainer.augmented_model
    if isinstance(augmented, str):
        augmented = hash_weights(Path(augmented)) if Path(augmented).is_dir() else augmented
    elif augmented is not None:
        augmented = hash_model(augmented)
    world_size = trainer.accelerator.num_processes
    settings = {
        "augmented_model": augmented,
        "seed": args.seed,
        "optimizer": [str(args.optim), args.weight_decay, args.max_grad_norm, str(args.lr_scheduler_type)],
        "batch": [args.per_device_train_batch_size, args.gradient_accumulation_steps, world_size],
        "precision": [str(trainer.model.dtype), args.bf16, args.fp16],
        "retain_loss_type": args.retain_loss_type,
        **trainer.augmented_settings(),
    }
    return {
        "model": hash_model(trainer.model),
        "data": hash_json([hash_samples(dataset) for dataset in trainer.teacher_datasets()]),
        "settings": hash_json(settings),
    }


def needed_bytes(trainer: "UnlearningTrainer") -> int:
    """Upper bound of what a run writes into its private folder, in bytes."""
    config = without_peft(trainer.model).config.get_text_config()
    tokens = sum(len(ids) for dataset in trainer.teacher_datasets() for ids in dataset["input_ids"])
    cache = 2 * 4 * tokens * config.hidden_size if trainer.args.precompute_teacher else 0
    # What an augmented model is trained in: the original weights, or a live teacher's augmented ones.
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    # Without one, a trained head is kept as it was; with one, the two heads are part of the above.
    head = Role(trainer.model).head().weight
    heads = head.numel() * head.element_size() if head.requires_grad else 0
    return cache + (2 * trained if trainer.uses_augmented_model else heads)


def _cached_teacher(trainer: "UnlearningTrainer", folder: PrivateFolder) -> CachedTeacher:
    student_head = Role(trainer.model).head()
    datasets = trainer.teacher_datasets()
    num_scored = 1 + len(trainer.eval_datasets())
    scored, retained = concatenate_datasets(datasets[:num_scored]), datasets[num_scored:]
    arguments = (trainer.data_collator, trainer.args.per_device_train_batch_size, trainer.accelerator)

    def states(role: Role, dataset: Dataset, whose: str) -> TokenStates:
        def values(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return role.head_input(batch, trainer.accelerator).hidden_states

        return TokenStates.compute(values, dataset, *arguments, f"{whose} model's states")

    # Before anything is trained, the student is the original; where its adapter is new, so is the base without it.
    original = adapter_role(trainer.model, None) if trainer.has_new_adapter else Role(trainer.model)
    teacher = CachedTeacher(student_head)
    if trainer.uses_original_logits or retained:
        seen = [scored, *retained] if trainer.uses_original_logits else retained
        teacher.original_states = states(original, concatenate_datasets(seen), "Original")
        teacher.original_head = frozen_head(original, student_head)
    if trainer.uses_original_log_probs:
        log_probs = partial(original.label_log_probs, accelerator=trainer.accelerator)
        teacher.original_answers = TokenStates.compute(log_probs, scored, *arguments, "Original model's answers")
    if trainer.uses_augmented_model:
        with _augmented_role(trainer, folder) as augmented:
            teacher.augmented_states = states(augmented, scored, "Augmented")
            teacher.augmented_head = frozen_head(augmented, student_head)
    return teacher


def _live_teacher(trainer: "UnlearningTrainer", folder: PrivateFolder, stack: ExitStack) -> LiveTeacher:
    model, accelerator = trainer.model, trainer.accelerator
    if not isinstance(model, PeftModel):
        logger.warning(
            "`precompute_teacher=False` with full weights keeps the original model in memory beside the student"
            f"{', and the augmented one' if trainer.uses_augmented_model else ''}."
        )
        original = Role(_clone(model))
    elif trainer.has_new_adapter:
        original = adapter_role(model, None)
    else:
        copy_adapter(model, trainer.student_adapter, REFERENCE)
        stack.callback(model.delete_adapter, REFERENCE)
        original = adapter_role(model, REFERENCE)
    augmented = None
    if trainer.uses_augmented_model:
        if trainer.augmented_model is None and not isinstance(model, PeftModel):
            with _augmented_role(trainer, folder):  # in the student's own weights, which are given back
                augmented = Role(_clone(model))
        else:
            augmented = stack.enter_context(_augmented_role(trainer, folder))
    return LiveTeacher(original, augmented, accelerator)


def _augmented_role(trainer: "UnlearningTrainer", folder: PrivateFolder) -> AbstractContextManager[Role]:
    """The augmented model while the context lasts: given, or made in a second adapter or in the student's weights."""
    if trainer.augmented_model is not None:
        return _given(trainer)
    if isinstance(trainer.model, PeftModel):
        return _trained_adapter(trainer, folder)
    return _trained_weights(trainer, folder)


@contextmanager
def _given(trainer: "UnlearningTrainer") -> Iterator[Role]:
    model, given = trainer.model, trainer.augmented_model
    if isinstance(given, str) and isinstance(model, PeftModel) and base_of(given) == own_base(model):
        check_initialisation(PeftConfig.from_pretrained(given))
        model.load_adapter(given, AUGMENTED, is_trainable=False)
        with _second_adapter(trainer) as role:
            yield role
        return
    if isinstance(given, str):
        given = load_like(given, model, trainer.args.model_init_kwargs)
        check_same_precision(given, model)
    keep_quantized_weights(without_peft(given))
    if not (is_quantized(without_peft(given)) or trainer.is_model_parallel):
        given.to(trainer.accelerator.device)
    yield Role(given)


@contextmanager
def _trained_adapter(trainer: "UnlearningTrainer", folder: PrivateFolder) -> Iterator[Role]:
    copy_adapter(trainer.model, trainer.student_adapter, AUGMENTED)
    if trainer.args.disable_dropout:
        trainer.disable_dropout()
    with _second_adapter(trainer) as role:
        trainer.model.set_adapter(AUGMENTED)
        _train_or_read(trainer, folder)
        trainer.model.set_adapter(trainer.student_adapter)
        _keep(trainer, role)
        yield role


@contextmanager
def _second_adapter(trainer: "UnlearningTrainer") -> Iterator[Role]:
    try:
        yield adapter_role(trainer.model, AUGMENTED)
    finally:
        trainer.model.set_adapter(trainer.student_adapter)
        trainer.model.delete_adapter(AUGMENTED)


@contextmanager
def _trained_weights(trainer: "UnlearningTrainer", folder: PrivateFolder) -> Iterator[Role]:
    process = trainer.accelerator
    path = folder.path / "original.safetensors"
    with restored_weights(trainer.model, path, process.is_main_process, process.wait_for_everyone):
        _train_or_read(trainer, folder)
        _keep(trainer, Role(trainer.model))
        yield Role(trainer.model)


def _train_or_read(trainer: "UnlearningTrainer", folder: PrivateFolder) -> None:
    """Train the augmented model in the trainable parameters. A live teacher's is kept on disk, for a resumed run."""
    model, process = trainer.model, trainer.accelerator
    path = folder.path / "augmented.safetensors"
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if path.is_file():
        with torch.no_grad():
            for name, tensor in load_file(path).items():
                trainable[name].copy_(tensor)
        return
    trainer.train_augmented(folder.path)
    if not trainer.args.precompute_teacher:
        if process.is_main_process:
            save_private({name: parameter.detach().contiguous() for name, parameter in trainable.items()}, path)
        process.wait_for_everyone()


def _keep(trainer: "UnlearningTrainer", role: Role) -> None:
    folder = trainer.args.augmented_output_dir
    if folder is not None and trainer.accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # an earlier run's, which may have other files
        keep_augmented_model(role, folder, trainer.processing_class)
        write_record(folder, plain_record("augmented", role.model))


def _clone(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model. Not by `deepcopy`: TRL's patched forward would go on using the weights of the first one."""
    with torch.device(model.device):
        clone = type(model)._from_config(model.config, dtype=model.dtype)
    clone.load_state_dict(model.state_dict())
    return clone.requires_grad_(False).eval()
