# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Teacher preparation: how each way of passing a model becomes an original and an augmented model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file
from trl.trainer.utils import create_model_from_path, get_config_model_id

from unlearn_eval.fingerprint import hash_json, hash_model, hash_samples, hash_weights
from unlearn_eval.models import without_peft
from unlearn_eval.quantization import is_quantized, keep_quantized_weights

from ..run_record import ResumeError, write_record
from ..trainer.saves_record import plain_record
from .augmented import (
    adapter_role,
    copy_adapter,
    keep_augmented_model,
    restored_weights,
)
from .private_folder import PrivateFolder
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
    teacher = CachedTeacher()
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


@contextmanager
def _augmented_role(trainer: "UnlearningTrainer", folder: PrivateFolder) -> Iterator[Role]:
    """The augmented model while the context lasts: given, or made in the student's weights or in a second adapter."""
    model, given = trainer.model, trainer.augmented_model
    if given is not None and not isinstance(given, str):
        keep_quantized_weights(without_peft(given))
        if not (is_quantized(without_peft(given)) or trainer.is_model_parallel):
            given.to(trainer.accelerator.device)
        yield Role(given)
    elif given is not None and isinstance(model, PeftModel) and _base_of(given) == _own_base(model):
        check_initialisation(PeftConfig.from_pretrained(given))
        model.load_adapter(given, AUGMENTED, is_trainable=False)
        try:
            yield adapter_role(model, AUGMENTED)
        finally:
            model.delete_adapter(AUGMENTED)
            model.set_adapter(trainer.student_adapter)
    elif given is not None:
        loaded = load_like(given, model, trainer.args.model_init_kwargs)
        check_same_precision(loaded, model)
        keep_quantized_weights(without_peft(loaded))
        yield Role(loaded.to(trainer.accelerator.device) if not trainer.is_model_parallel else loaded)
    elif isinstance(model, PeftModel):
        copy_adapter(model, trainer.student_adapter, AUGMENTED)
        if trainer.args.disable_dropout:
            trainer.disable_dropout()
        try:
            model.set_adapter(AUGMENTED)
            _train_or_read(trainer, folder)
            model.set_adapter(trainer.student_adapter)
            role = adapter_role(model, AUGMENTED)
            _keep(trainer, role)
            yield role
        finally:
            model.set_adapter(trainer.student_adapter)
            model.delete_adapter(AUGMENTED)
    else:
        process = trainer.accelerator
        with restored_weights(
            model, folder.path / "original.safetensors", process.is_main_process, process.wait_for_everyone
        ):
            _train_or_read(trainer, folder)
            _keep(trainer, Role(model))
            yield Role(model)


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
            partial = path.with_suffix(".partial")
            save_file({name: parameter.detach().contiguous() for name, parameter in trainable.items()}, partial)
            partial.chmod(0o600)
            partial.replace(path)
        process.wait_for_everyone()


def _keep(trainer: "UnlearningTrainer", role: Role) -> None:
    folder = trainer.args.augmented_output_dir
    if folder is not None and trainer.accelerator.is_main_process:
        keep_augmented_model(role, folder, trainer.processing_class)
        write_record(folder, plain_record("augmented", role.model))


def _clone(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model. Not by `deepcopy`: TRL's patched forward would go on using the weights of the first one."""
    with torch.device(model.device):
        clone = type(model)._from_config(model.config, dtype=model.dtype)
    clone.load_state_dict(model.state_dict())
    return clone.requires_grad_(False).eval()


def is_adapter(path_or_id: str) -> bool:
    """Whether a local folder or a Hub id is that of a PEFT adapter."""
    return find_adapter_config_file(path_or_id) is not None


def _base_of(adapter: str) -> tuple[str, str] | None:
    """Name and revision of an adapter's base; nothing of a whole model."""
    if not is_adapter(adapter):
        return None
    peft_config = PeftConfig.from_pretrained(adapter)
    return peft_config.base_model_name_or_path, peft_config.revision or "main"


def _own_base(model: PeftModel) -> tuple[str, str]:
    return get_config_model_id(model.get_base_model().config), model.active_peft_config.revision or "main"


def load_like(path_or_id: str, model: PreTrainedModel | PeftModel, init_kwargs: dict | None) -> PreTrainedModel:
    """
    Load a model, or an adapter with its base, at the precision and quantisation of another.

    Args:
        path_or_id (`str`):
            Local folder or Hub id of a model or of an adapter.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The other.
        init_kwargs (`dict`, *optional*):
            Further arguments of `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]:
            The model, frozen.
    """
    causal_lm = without_peft(model)
    # Of another attention the logits differ, and α multiplies that.
    kwargs = {"attn_implementation": causal_lm.config._attn_implementation} | dict(init_kwargs or {})
    kwargs |= {"dtype": causal_lm.dtype} | device_map_kwargs()
    if is_quantized(causal_lm):
        kwargs["quantization_config"] = causal_lm.hf_quantizer.quantization_config
    base = _base_of(path_or_id)
    name, kwargs["revision"] = base or (path_or_id, "main")  # the student's revision is that of another repository
    loaded = create_model_from_path(name, **kwargs)
    if base is not None:
        loaded = PeftModel.from_pretrained(loaded, path_or_id)
    return loaded.requires_grad_(False).eval()


def device_map_kwargs() -> dict[str, None]:
    """Keeps `create_model_from_path` from splitting a model over all GPUs where each has a process, as TRL does."""
    distributed = PartialState().distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
    return {"device_map": None} if distributed else {}


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


def check_augmented_model(augmented: str | PreTrainedModel | PeftModel, model: PreTrainedModel | PeftModel) -> None:
    """Raise where a given augmented model can't be found, or is not like the model. A path's weights are not read."""
    if not isinstance(augmented, str):
        check_same_precision(augmented, model)
        return
    name, revision = _base_of(augmented) or (augmented, "main")
    config = AutoConfig.from_pretrained(name, revision=revision)
    _check_same_vocabulary(
        config.get_text_config().vocab_size, without_peft(model).config.get_text_config().vocab_size
    )


def _check_same_vocabulary(augmented: int, student: int) -> None:
    if augmented != student:
        raise ValueError(
            f"`augmented_model` has {augmented} tokens in its vocabulary and the model {student}. It must be the same "
            "model trained further."
        )


def check_same_precision(teacher: PreTrainedModel | PeftModel, student: PreTrainedModel | PeftModel) -> None:
    """Raise where the augmented model has another vocabulary, dtype or quantisation than the student."""
    teacher, student = without_peft(teacher), without_peft(student)
    _check_same_vocabulary(*(model.get_output_embeddings().weight.shape[0] for model in (teacher, student)))
    precisions = [(str(model.dtype), _quantization(model)) for model in (teacher, student)]
    if precisions[0] != precisions[1]:
        raise ValueError(
            f"`augmented_model` is held as {precisions[0]} and the model as {precisions[1]} (dtype, quantisation). "
            "α would multiply that difference. Load both alike, or pass `augmented_model` as a path: it is then."
        )


def _quantization(model: PreTrainedModel) -> str | None:
    if not is_quantized(model):
        return None
    config = model.hf_quantizer.quantization_config
    kind = f"{config.quant_method} {config.bnb_4bit_quant_type} double={config.bnb_4bit_use_double_quant}"
    return f"{kind} compute={config.bnb_4bit_compute_dtype}"
