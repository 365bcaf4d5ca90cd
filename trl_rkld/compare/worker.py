# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Does one job, in a process of its own: `python -m trl_rkld.compare.worker FOLDER`, where `FOLDER/task.json` says what.

Whatever was finished before a kill is not done again: a training goes on from its last epoch, an evaluation from its
journal.
"""

import gc
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from transformers.trainer import TRAINER_STATE_NAME

from unlearn_eval import EvalConfig
from unlearn_eval.callback import BEST_FOLDER, RECORD_FILE
from unlearn_eval.evaluation import run
from unlearn_eval.files import read_json, write_json
from unlearn_eval.prompts import TEMPLATE_SETTINGS
from unlearn_eval.results import EVAL_FILE

from ..methods import method_class, script_of
from ..run_record import ResumeError, checkpoints
from .arguments import parse
from .case_study import examine
from .config import TRAINED_COMMANDS
from .data import training_sets
from .plan import DONE_FILE, HISTORY_FILE, TASK_FILE


# The history of what is made in one step.
NO_EPOCHS = {"epochs": [], "chosen": None, "last": None}


def main(folder: Path) -> None:
    """
    Do the job of a folder.

    Args:
        folder (`Path`):
            The job's folder.
    """
    start = time.monotonic()
    task = read_json(folder / TASK_FILE)
    if task["options"] is not None:
        task["settings"]["evaluation"] |= task["options"]["evaluation"]
    {"finetune": finetune, "evaluate": evaluate_reference, "unlearn": unlearn}[task["kind"]](folder, **task)
    seconds = None if task["goes_on"] else round(time.monotonic() - start)  # known of a job done in one go
    write_json(folder / DONE_FILE, {"seconds": seconds})


def finetune(folder: Path, settings: dict[str, Any], use_cpu: bool, **_: Any) -> None:
    """Fine-tune the target, a retain-only or an augmented model into the folder itself."""
    from ..scripts.finetune import make_trainer

    ours = _trained(settings["model"], folder, use_cpu) | {"seed": settings["seed"]}
    parsed = parse("finetune", "`finetune`", settings["arguments"], **ours)
    sets = training_sets(**settings["sets"])
    trainer = make_trainer(*parsed, forget_set=sets.get("forget"), retain_set=sets.get("retain"))
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    trainer.save_model(str(folder))
    _remove_checkpoints(folder)


def evaluate_reference(folder: Path, settings: dict[str, Any], options: dict[str, Any], **_: Any) -> None:
    """The full evaluation of target or retain-only model."""
    _evaluate(settings["model"], folder, settings)
    examine(settings["model"], folder, settings, options["case_study"])


def unlearn(folder: Path, settings: dict[str, Any], options: dict[str, Any], use_cpu: bool, **_: Any) -> None:
    """Unlearn, evaluate each epoch, and the chosen and the last epoch in full."""
    if settings["command"] == "teacher":
        _evaluate_teacher(folder, settings)
        return
    models = folder / "model"
    if not (folder / HISTORY_FILE).is_file():
        is_trained = settings["command"] in TRAINED_COMMANDS
        write_json(
            folder / HISTORY_FILE, _train(models, settings, use_cpu) if is_trained else _subtract(models, settings)
        )
    _remove_checkpoints(models)
    history = read_json(folder / HISTORY_FILE)
    _evaluate(str(models / BEST_FOLDER), folder / "chosen", settings)
    if history["last"] != history["chosen"]:  # else one model, one evaluation
        _evaluate(str(models / "last"), folder / "last", settings)
    if models.is_dir():  # else a kill has left nothing to do
        examine(str(models / BEST_FOLDER), folder / "chosen", settings, options["case_study"])
    if not options["keep_models"]:
        removed = folder / "model.removed"
        if models.is_dir():
            models.rename(removed)  # half removed, it must not be taken for a whole one
        shutil.rmtree(removed, ignore_errors=True)


def _train(models: Path, settings: dict[str, Any], use_cpu: bool) -> dict[str, Any]:
    from .peak import PeakCallback

    trainer = make_unlearning_trainer(settings, models, use_cpu)
    evaluation = settings["evaluation"]
    shared = ("dataset_name", "max_samples", "batch_tokens", "dtype", *TEMPLATE_SETTINGS)
    callback = PeakCallback(
        trainer,
        forget_split=settings["forget_split"],
        retain_logs=settings["retain_logs"],
        max_retain_samples=settings["epoch_retain_samples"],
        **{name: evaluation[name] for name in shared if name in evaluation},
    )
    trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(models))
    except ResumeError as error:  # its teacher was made on another device, say, and is gone
        _begin_anew(models, str(error))
    trainer.save_model(str(models / "last"))
    best = models / BEST_FOLDER / RECORD_FILE
    if not best.is_file() or read_json(best)["step"] != callback.best["step"]:
        # A run that was killed and went on saw other numbers the second time (another device?).
        _begin_anew(models, "The best epoch's model is of another epoch.")
    result = {"epochs": callback.history[1:], "chosen": callback.best["epoch"], "last": callback.history[-1]["epoch"]}
    del trainer, callback
    gc.collect()
    return result


def _begin_anew(models: Path, why: str) -> NoReturn:
    _remove_checkpoints(models)
    shutil.rmtree(models)
    raise RuntimeError(f"{why} Start again: this run begins anew.")


def make_unlearning_trainer(settings: dict[str, Any], folder: Path, use_cpu: bool) -> Any:
    """
    The trainer of a run.

    Args:
        settings (`dict`):
            The job's settings.
        folder (`Path`):
            `output_dir` of the trainer.
        use_cpu (`bool`):
            Whether to leave GPUs alone.

    Returns:
        [`~transformers.Trainer`]:
            One of ours, or of TRL.
    """
    command, arguments = settings["command"], settings["arguments"]
    sets = training_sets(**settings["sets"])
    forget, retain = sets["forget"], sets.get("retain")
    ours = _trained(settings["model"], folder, use_cpu) | {"seed": settings["seed"]}
    where = f"`runs`, {command}"
    if command in ("idk", "dpo"):
        script, _ = script_of(command)
        parsed = parse(command, where, arguments, **ours, refusals_path=settings["refusals_path"])
        return script.make_trainer(*parsed, forget_set=forget, retain_set=retain)

    from ..scripts.unlearn import make_trainer

    ours["retain_loss_type"] = None if retain is None else settings["retain"]
    ours["augmented_model_name_or_path"] = settings.get("augmented_model")
    parsed = parse(command, where, arguments, **ours)
    return make_trainer(method_class(command, "Trainer"), *parsed, train_dataset=forget, retain_dataset=retain)


def _subtract(models: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Task arithmetic: one model, no epochs."""
    from ..scripts.task_vector import subtract

    shutil.rmtree(models, ignore_errors=True)
    subtract(settings["model"], settings["augmented_model"], str(models / BEST_FOLDER), **settings["arguments"])
    return NO_EPOCHS


def _evaluate_teacher(folder: Path, settings: dict[str, Any]) -> None:
    """The teacher: no model is made."""
    from .teacher import evaluate_teacher

    alpha = settings["arguments"].get("alpha", method_class("rkld", "Config").alpha)
    evaluate_teacher(settings["model"], settings["augmented_model"], alpha, _eval_config(settings, folder / "chosen"))
    write_json(folder / HISTORY_FILE, NO_EPOCHS)


def _trained(model: str, folder: Path, use_cpu: bool) -> dict[str, Any]:
    return {
        "model_name_or_path": model,
        "output_dir": str(folder),
        "use_cpu": use_cpu or None,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "report_to": "none",
    }


def _evaluate(model: str, folder: Path, settings: dict[str, Any]) -> None:
    if not (folder / EVAL_FILE).is_file():
        # Checked is that it is asked as it was trained: if it has nothing to say, its method destroyed it.
        run(_eval_config(settings | {"model": model}, folder), may_be_silent=True)


def _eval_config(settings: dict[str, Any], folder: Path) -> EvalConfig:
    return EvalConfig(
        model_name_or_path=[settings["model"]],
        output_dir=str(folder),
        forget_split=settings["forget_split"],
        retain_logs=settings["retain_logs"],
        score_backend="transformers",  # as after each epoch
        **settings["evaluation"],
    )


def _last_checkpoint(folder: Path) -> str | None:
    # By its name: the Trainer would take one that was not written to its end.
    complete = checkpoints(str(folder))
    return str(complete[-1]) if complete else None


def _remove_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        (path / TRAINER_STATE_NAME).unlink(missing_ok=True)  # half removed, it must not be taken for a whole one
        shutil.rmtree(path)


def _die_with_parent() -> None:
    """The parent holds the other end of the standard input: killed, it takes this process and its children along."""
    os.read(sys.stdin.fileno(), 1)
    if os.getpgrp() == os.getpid():  # as `run_jobs` starts it
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_die_with_parent, daemon=True).start()
    main(Path(sys.argv[1]))
