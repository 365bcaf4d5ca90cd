# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`unlearning.json`: what a saved model says of the run that made it. Counts and hashes, never texts."""

import json
import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from unlearn_eval.files import write_json
from unlearn_eval.models import without_peft
from unlearn_eval.quantization import is_quantized

from .version import __version__


FILE_NAME = "unlearning.json"


def write_record(folder: str | Path, record: dict[str, Any]) -> None:
    """
    Write a record beside a saved model, complete or not at all.

    Args:
        folder (`str` or `Path`):
            Folder of the model.
        record (`dict`):
            The record.
    """
    write_json(Path(folder) / FILE_NAME, record)


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """
    Read the record of a saved model.

    Args:
        folder (`str` or `Path`):
            Folder of the model.

    Returns:
        `dict` or `None`:
            The record, if there is one.
    """
    path = Path(folder) / FILE_NAME
    return json.loads(path.read_text()) if path.is_file() else None


def base_record(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """
    How the weights below a model, or below its adapter, were held: what merging and evaluation need to know.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.

    Returns:
        `dict`:
            `"dtype"` and `"quantization"`. Name and revision of an adapter's base stand in its configuration.
    """
    causal_lm = without_peft(model)
    quantized = is_quantized(causal_lm)
    return {
        "dtype": str(causal_lm.dtype).removeprefix("torch."),
        "quantization": causal_lm.hf_quantizer.quantization_config.to_dict() if quantized else None,
    }


def plain_record(method: str, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """The record of a model that was not made by an [`UnlearningTrainer`]; `method` says how. See [`base_record`]."""
    record = {"trl_rkld_version": __version__, "method": method, "finished": True, "forget_set": None, "adapter": None}
    return record | base_record(model)


def checkpoints(output_dir: str) -> list[Path]:
    """The checkpoints in an output folder that were written to their end, oldest first."""
    paths = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()
    ]
    return sorted(filter(_is_whole, paths), key=lambda path: int(path.name.split("-")[-1]))


def _is_whole(checkpoint: Path) -> bool:
    try:  # the Trainer writes its state last, and a kill or a full disk may cut it off
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def mark_finished(output_dir: str) -> None:
    """Note in a run's checkpoints that the run went to its end: each of them is now a model like any other."""
    for path in [*checkpoints(output_dir), Path(output_dir) / "best"]:  # `TofuEvalCallback` keeps the best epoch there
        record = read_record(path)
        if record is not None:
            write_record(path, record | {"finished": True})


def refuse_unfinished(model_path: str, forget_set: str | None, output_dir: str, adapter: str | None = None) -> None:
    """
    Raise where a model is a checkpoint of an unfinished run that forgets the same records: it would be taken for the
    original.

    Args:
        model_path (`str`):
            Where the model was loaded from.
        forget_set (`str`, *optional*):
            SHA-256 of the forget set. A streamed one has none, and can't be told from another.
        output_dir (`str`):
            Output folder of the run, among whose checkpoints the model may be.
        adapter (`str`, *optional*):
            SHA-256 of the adapter's weights: PEFT does not say where an adapter was loaded from.
    """
    if forget_set is None:
        return
    # A model that was built in memory has no path.
    records = {model_path: read_record(model_path)} if model_path else {}
    if adapter is not None:
        records |= {str(path): read_record(path) for path in checkpoints(output_dir)}
    for path, record in records.items():
        if record is None or record["finished"] or record["forget_set"] != forget_set:
            continue
        if path != model_path and record["adapter"] != adapter:
            continue
        raise ValueError(
            f"The model `{path}` is a checkpoint of an unfinished run on this very forget set. Pass the original "
            f"model and `resume_from_checkpoint={path!r}` to go on with that run. To take it as a model of its "
            f"own instead, set `finished` to `true` in its `{FILE_NAME}`."
        )


def complete_checkpoint(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """
    Find the checkpoint to resume from.

    Args:
        output_dir (`str`):
            Output folder of the run.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            A checkpoint; a folder with checkpoints, of which the last whole one is taken; or `True` for `output_dir`.

    Returns:
        `str` or `None`:
            Folder of a checkpoint that was written to its end.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is not True and _is_whole(Path(resume_from_checkpoint)):
        return str(resume_from_checkpoint)
    folder = output_dir if resume_from_checkpoint is True else str(resume_from_checkpoint)
    found = checkpoints(folder)
    if not found:
        raise ValueError(
            f"`resume_from_checkpoint`: {folder!r} has no whole checkpoint, and is none. Name a checkpoint or a run's "
            "`output_dir`, or start without it."
        )
    return str(found[-1])


def stopped_at(checkpoint: str) -> int | None:
    """
    Find out whether a callback had stopped a run when a checkpoint was written: the Trainer would go on from there.

    Args:
        checkpoint (`str`):
            Folder of a whole checkpoint.

    Returns:
        `int` or `None`:
            The checkpoint's step, if the run had been stopped there before its last one.
    """
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    stopped = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
    return state.global_step if stopped and state.global_step < state.max_steps else None


class ResumeError(ValueError):
    """A checkpoint can't be resumed from: it is of another run, or its teacher is gone."""


def check_same_run(checkpoint: str, current: dict[str, Any]) -> str | None:
    """
    Raise where a checkpoint was made by another method, with other settings, from other data or with another teacher;
    return the digest of its teacher.
    """
    record = read_record(checkpoint)
    if record is None or record["method"] != current["method"]:
        raise ResumeError(f"The checkpoint `{checkpoint}` was not made by {current['method']}. It can't be resumed.")
    keys = record["settings"].keys() | current["settings"].keys()
    changed = [f"`{key}`" for key in sorted(keys) if record["settings"].get(key) != current["settings"].get(key)]
    if record["forget_set"] != current["forget_set"]:
        changed.append("the forget set")
    if record["retain_set"] != current["retain_set"]:
        changed.append("the retain set")
    teacher = current["teacher"] or {}
    changed += [f"the {part}" for part, value in teacher.items() if (record["teacher"] or {}).get(part) != value]
    if changed:
        raise ResumeError(
            f"The checkpoint `{checkpoint}` can't be resumed: {', '.join(changed)} changed since. "
            "Pass the same original model, data and settings as before, or start without `resume_from_checkpoint`."
        )
    return record["teacher_digest"]
