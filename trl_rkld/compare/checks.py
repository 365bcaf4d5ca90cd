# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Everything that can be wrong, before the first job starts."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from unlearn_eval import EvalConfig
from unlearn_eval.questions import Template, load_configuration, load_tofu, tofu_questions

from .arguments import parse
from .config import TRAINED_COMMANDS, CompareConfig
from .data import learnt_sets, retain_set
from .plan import Job, check_folders


def check_everything(config: CompareConfig, jobs: list[Job]) -> None:
    """
    Raise on a setting that a command would refuse, on data that are missing, on a folder that holds something else.

    Args:
        config ([`CompareConfig`]):
            Configuration.
        jobs (`list[Job]`):
            The plan.
    """
    if "forget_split" in config.evaluation or "retain_logs" in config.evaluation or "output_dir" in config.evaluation:
        raise ValueError("`evaluation`: split, logs and folder are decided by the comparison itself. Remove them.")
    for job in jobs:
        _check_settings(job, config)
    names = [config.model_name_or_path, config.target_model_name_or_path, *config.retain_model_name_or_path.values()]
    for name in filter(None, names):
        AutoConfig.from_pretrained(name)
    _check_data(config)
    check_folders(jobs)


def _check_settings(job: Job, config: CompareConfig) -> None:
    settings = job.settings
    ours = {"model_name_or_path": settings["model"], "output_dir": str(job.folder), "use_cpu": config.use_cpu or None}
    if job.kind == "finetune":
        arguments = {key: value for key, value in settings["arguments"].items() if key != "seed"}
        parse("finetune", "`finetune`, `augment`", arguments, **ours)
        return
    try:
        EvalConfig(
            model_name_or_path=[settings["model"]],
            output_dir=str(job.folder),
            forget_split=settings["forget_split"],
            **settings["evaluation"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"`evaluation`: {error}") from None
    if job.kind != "unlearn":
        return
    taken = {"teacher": {"alpha"}, "task-vector": {"scale", "dtype"}}.get(settings["command"])
    if taken is not None and not taken.issuperset(settings["arguments"]):
        raise ValueError(f"`runs`, {settings['command']}: it takes no more than {', '.join(sorted(taken))}.")
    if settings["command"] in TRAINED_COMMANDS:
        where = f"`runs`, {settings['command']} ({job.row['setting']})"
        parse(settings["command"], where, settings["arguments"], **ours, refusals_path=settings["refusals_path"])


def _check_data(config: CompareConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    names = ("system_prompt", "date_string", "question_template")
    template = Template(*(config.evaluation.get(name) for name in names), False)
    for split in config.splits:
        for name, rows in load_tofu(config.dataset_name, split).items():
            if name != "holdout":
                tofu_questions(name, rows[:1], tokenizer, template, "question")
        retain_set(config.dataset_name, split, config.max_retain_samples)
        num_rows = len(load_configuration(config.dataset_name, split))
        for index in [*config.case_study["questions"], *(one["row"] for one in config.case_study["beginnings"])]:
            if not 0 <= index < num_rows:
                raise ValueError(f"`case_study` has row {index}, which is none of {split}'s {num_rows}.")
    if config.target_model_name_or_path is None:
        learnt_sets(config.dataset_name, config.target_split, config.target_split, config.max_retain_samples)
    if config.refusals_path is not None and not Path(config.refusals_path).is_file():
        raise FileNotFoundError(f"`refusals_path={config.refusals_path!r}` does not exist.")
