# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""A job's settings as the commands' own parsers understand them: what a command refuses, a comparison refuses."""

import json
from typing import Any

from ..methods import script_of


# What the comparison itself decides.
_RESERVED = (
    "model_name_or_path",
    "model_revision",
    "chat_template_path",
    "eos_token",
    "output_dir",
    "seed",
    "dataset_name",
    "dataset_config",
    "retain_dataset_name",
    "retain_dataset_config",
    "refusals_path",
    "max_retain_samples",
    "retain_loss_type",
    "augmented_model_name_or_path",
    "save_strategy",
    "save_total_limit",
    "report_to",
    "eval_strategy",
    "resume_from_checkpoint",
    "push_to_hub",
    "dry_run",
    "eval_on_start",
    "eval_dataset_name",
    # An augmented model is a job of its own, which runs share: see `augment`.
    "augmented_num_train_epochs",
    "augmented_learning_rate",
    "augmented_output_dir",
    # A run that goes on after a kill must end as it would have.
    "save_only_model",
    "ignore_data_skip",
    "stop_at_forget_prob",
    "max_steps",
)


def parse(command: str, where: str, arguments: dict[str, Any], **ours: Any) -> tuple[Any, ...]:
    """
    Parse settings with a command's parser.

    Args:
        command (`str`):
            `"finetune"`, `"idk"`, `"dpo"` or a method.
        where (`str`):
            Where the settings stand in the config file, for messages.
        arguments (`dict`):
            The user's settings.
        ours (`dict`):
            Those that the comparison decides; `None` is left out.

    Returns:
        `tuple`:
            Script arguments, training arguments and model arguments.

    Raises:
        [`ValueError`]: If a setting is unknown, reserved or refused.
    """
    check_keys(where, arguments, _RESERVED)
    module, first = script_of(command)
    parser = module.make_parser(*first)
    ours = {key: value for key, value in ours.items() if value is not None}
    strings = [text for item in (arguments | ours).items() for text in _strings(*item)]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(strings, return_remaining_strings=True)
    except SystemExit:  # argparse has said why
        raise ValueError(f"{where}: a setting has a value of the wrong kind, see above.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    if unknown and not unknown[0].startswith("--"):
        raise ValueError(f"{where}: a setting has a list, and takes one value: `{unknown[0]}` is too many.")
    if unknown:
        raise ValueError(f"{where}: `{unknown[0].removeprefix('--')}` is no setting of `trl-rkld {command}`.")
    return tuple(parsed)


def check_keys(where: str, settings: dict[str, Any], reserved: tuple[str, ...]) -> None:
    """Raise on settings that the comparison decides, and on those without a value. `where` is for messages."""
    for key, value in settings.items():
        if key in reserved:
            raise ValueError(f"{where}: `{key}` is decided by the comparison itself. Remove it.")
        if value is None:  # on a command line it would be the word "None"
            raise ValueError(f"{where}: `{key}` has no value. Give one, or leave it out for the default.")


def _strings(key: str, value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}", json.dumps(value) if isinstance(value, (dict, bool)) else str(value)]
