# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Everything that can be wrong, before the first job starts."""

from dataclasses import fields
from importlib.util import find_spec
from math import isfinite
from typing import Any

import torch
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
    get_scheduler,
)
from trl import ModelConfig, get_peft_config

from unlearn_eval import EvalConfig
from unlearn_eval.evaluation import check_packages
from unlearn_eval.job import check_lengths
from unlearn_eval.models import without_peft
from unlearn_eval.prompts import TEMPLATE_SETTINGS, Template
from unlearn_eval.questions import load_configuration, load_tofu, tofu_questions

from ..adapters import is_adapter
from ..data import tokenize_rows
from ..losses import lm_head_of
from .arguments import check_keys, parse
from .config import TRAINED_COMMANDS, CompareConfig
from .data import training_sets
from .plan import Job, check_folders


# What the comparison itself decides, and what the evaluation of each epoch can't follow.
_RESERVED = (
    "model_name_or_path",
    "output_dir",
    "forget_split",
    "dataset_name",
    "forget_dataset",
    "retain_dataset",
    "holdout_dataset",
    "retain_logs",
    "compare_to",
    "question_key",
    "compat",
    "score_backend",
    "load_in_4bit",
    "attn_implementation",
    "model_revision",
    # A job has one GPU.
    "tensor_parallel_size",
    "data_parallel_size",
)


# Settings of the commands that don't train.
_NUMBERS = {"teacher": ("alpha",), "task-vector": ("scale", "dtype")}


def check_everything(config: CompareConfig, jobs: list[Job]) -> None:
    """
    Raise on a setting that a command would refuse, on data that are missing, on a folder that holds something else.

    Args:
        config ([`CompareConfig`]):
            Configuration.
        jobs (`list[Job]`):
            The plan.
    """
    check_packages("rouge_score", "scipy", "matplotlib")  # now, not after the first training
    check_keys("`evaluation`", config.evaluation, _RESERVED)
    for key in config.evaluation.keys() - {field.name for field in fields(EvalConfig)}:
        raise ValueError(f"`evaluation`: `{key}` is no setting of `trl-rkld eval`.")
    models = {name: getattr(config, name) for name in ("model_name_or_path", "target_model_name_or_path")}
    models |= {f"retain_model_name_or_path[{split}]": one for split, one in config.retain_model_name_or_path.items()}
    for field, name in models.items():
        try:
            if name is not None and is_adapter(name):
                raise ValueError("It is an adapter; merge it (`trl-rkld merge`).")
            if name is not None:
                AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"`{field}`: {name} can't be loaded. {error}") from None
    max_lengths: dict[tuple, list[int | None]] = {}
    tried: set[str] = set()
    for job in jobs:
        if job.kind == "finetune":
            max_length = _check_finetune(job, config, tried)
        else:
            _check_evaluation(job)
            max_length = _check_run(job, config, tried) if job.kind == "unlearn" else None
        if job.kind == "finetune" or job.settings.get("command") in TRAINED_COMMANDS:
            max_lengths.setdefault(tuple(job.settings["sets"].values()), []).append(max_length)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    _check_data(config, tokenizer, AutoConfig.from_pretrained(config.model_name_or_path))
    template = _template(config)
    for sets, several in max_lengths.items():
        shortest = min((one for one in several if one is not None), default=None)
        for name, dataset in training_sets(*sets).items():
            tokenize_rows(dataset, name, shortest, tokenizer, template)
    check_folders(jobs)


def _check_finetune(job: Job, config: CompareConfig, tried: set[str]) -> int | None:
    """Raise on settings that `finetune` would refuse; return the length of the records that it can take."""
    settings = job.settings
    is_augmented = settings["seed"] is not None
    where = "`finetune`, `augment` or the `augment` of `runs`" if is_augmented else "`finetune`"
    _check_template(where, settings["arguments"], config.evaluation)
    _, training_args, model_args = parse("finetune", where, settings["arguments"], **_own_arguments(job, config))
    _check_training(where, training_args)
    for name in ("use_peft", "load_in_4bit", "load_in_8bit"):
        if getattr(model_args, name):
            raise ValueError(f"{where}: target, retain-only and augmented models are whole models. Remove `{name}`.")
    _check_model(where, model_args, _target(config) if is_augmented else config.model_name_or_path, tried)
    return training_args.max_length


def _check_evaluation(job: Job) -> None:
    """Raise on settings that `eval` would refuse."""
    try:
        EvalConfig(
            model_name_or_path=[job.settings["model"]],
            output_dir=str(job.folder),
            forget_split=job.settings["forget_split"],
            **job.settings["evaluation"],
            **job.options["evaluation"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"`evaluation`: {error}") from None


def _check_run(job: Job, config: CompareConfig, tried: set[str]) -> int | None:
    """Raise on settings that a run's command would refuse; return the length of the records that it can take."""
    settings = job.settings
    where = f"`runs`, {settings['command']}" + (f" ({job.row['setting']})" if job.row["setting"] else "")
    if settings["command"] not in TRAINED_COMMANDS:
        _check_numbers(where, settings["arguments"], _NUMBERS[settings["command"]])
        return None
    where = f"`common` or {where}"
    _check_template(where, settings["arguments"], config.evaluation)
    path = settings["refusals_path"]
    script_args, training_args, model_args = parse(
        settings["command"], where, settings["arguments"], **_own_arguments(job, config), refusals_path=path
    )
    if training_args.num_train_epochs < 1 or training_args.num_train_epochs % 1:
        raise ValueError(f"{where}: `num_train_epochs` must be at least 1, and whole: one of the epochs is chosen.")
    _check_training(where, training_args)
    if model_args.load_in_8bit or (model_args.load_in_4bit and not model_args.use_peft):
        raise ValueError(f"{where}: quantised weights can't be trained whole. Use `load_in_4bit` with `use_peft`.")
    _check_model(where, model_args, _target(config), tried)
    if path is not None:
        script_args.refusals()
    return training_args.max_length


def _target(config: CompareConfig) -> str:
    return config.target_model_name_or_path or config.model_name_or_path


def _own_arguments(job: Job, config: CompareConfig) -> dict[str, Any]:
    """What the comparison itself gives to a command that trains."""
    return {
        "model_name_or_path": job.settings["model"],
        "output_dir": str(job.folder),
        "use_cpu": config.use_cpu or None,
    }


def _check_training(where: str, args: TrainingArguments) -> None:
    """Raise on what a Trainer would fail at in its first step, or do nothing with."""
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{where}: `{name}` must be at least 1, and is {getattr(args, name)}.")
    for name in ("learning_rate", "num_train_epochs"):
        if getattr(args, name) <= 0:
            raise ValueError(f"{where}: `{name}` must be positive, and is {getattr(args, name)}.")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: `lr_scheduler_type` or `lr_scheduler_kwargs`: {error}") from None


def _check_model(where: str, model_args: ModelConfig, name: str, tried: set[str]) -> None:
    """Raise where attention, quantisation or adapter don't go with the model. Its weights are not read."""
    if model_args.load_in_4bit and find_spec("bitsandbytes") is None:
        raise ValueError(f"{where}: `load_in_4bit` needs bitsandbytes: `pip install bitsandbytes`.")
    peft_config = get_peft_config(model_args)
    key = f"{name} {model_args.attn_implementation} {peft_config}"  # most jobs differ in other things
    if key in tried:
        return
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(name), attn_implementation=model_args.attn_implementation
            )
            if peft_config is not None:
                model = get_peft_model(model, peft_config)
            lm_head_of(without_peft(model))  # no method of ours, nor TRL's DPO, trains an adapter there
    except (ImportError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    tried.add(key)


def _check_numbers(where: str, arguments: dict[str, Any], taken: tuple[str, ...]) -> None:
    """Raise on what the commands that don't train can't take."""
    for key, value in arguments.items():
        if key not in taken:
            raise ValueError(f"{where}: `{key}` is none of its settings, {', '.join(taken)}.")
        if key == "dtype" and value not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"{where}: `dtype` must be bfloat16, float16 or float32, and is {value!r}.")
        if key != "dtype" and (isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value)):
            raise ValueError(f"{where}: `{key}` must be a number, and is {value!r} (YAML wants a point: 1.0e-4).")
        if key == "alpha" and value < 0:
            raise ValueError(f"{where}: `alpha` must not be negative, and is {value!r}.")


def _check_template(where: str, arguments: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Raise where questions are put in one way in training and in another in evaluation."""
    for key in TEMPLATE_SETTINGS:
        if arguments.get(key) != evaluation.get(key):
            raise ValueError(
                f"{where}: `{key}` is {evaluation.get(key)!r} in `evaluation` and {arguments.get(key)!r} here: give the same."
            )


def _template(config: CompareConfig) -> Template:
    return Template(**{key: config.evaluation.get(key) for key in TEMPLATE_SETTINGS})


def _check_data(config: CompareConfig, tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> None:
    template = _template(config)
    remedy = template.date_remedy(tokenizer)
    if remedy is not None:
        raise ValueError(f"The chat template prints today's date: over midnight all questions would change. {remedy}")
    max_new_tokens = config.evaluation.get("max_new_tokens", EvalConfig.max_new_tokens)
    if config.case_study["questions"] and max_new_tokens == 0:
        raise ValueError(
            "`case_study`: `questions` are asked, and `max_new_tokens=0` of `evaluation` leaves no answer."
        )
    for split in config.splits:
        rows = load_tofu(config.dataset_name, split)
        sets = {
            name: tofu_questions(name, rows[name], tokenizer, template, "question")
            for name in rows
            if name != "holdout"
        }
        check_lengths(sets, model_config, max_new_tokens, config.model_name_or_path)
        forget = load_configuration(config.dataset_name, split)
        beginnings = config.case_study["beginnings"]
        for index in [*config.case_study["questions"], *(one["row"] for one in beginnings)]:
            if not isinstance(index, int) or not 0 <= index < len(forget):
                raise ValueError(f"`case_study` has row {index!r}, which is none of {split}'s {len(forget)}.")
        for one in beginnings:
            num_words = len(forget[one["row"]]["answer"].split())
            if one["words"] >= num_words:
                raise ValueError(
                    f"`case_study`: `words` is {one['words']}, and the answer of {split}'s row {one['row']} has {num_words}: "
                    "give fewer, so that something comes after them."
                )
