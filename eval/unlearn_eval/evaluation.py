# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The evaluation of one or more checkpoints, from their names to result files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count, groupby
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .backends import ScoreRequest
from .canary import check_adapter, check_agreement, choose
from .checkpoints import Checkpoint, resolve_checkpoint, transformers_backends, vllm_backends
from .config import EvalConfig
from .fingerprint import hash_json, hash_rows
from .job import Job
from .journal import decode_scores, encode_scores, score_key
from .questions import load_tofu
from .records import load_records
from .results import (
    EVAL_FILE,
    METADATA,
    EvalLog,
    forget_length,
    has_items,
    item_texts,
    read_log,
    read_unchecked,
    validate_same_questions,
    write_results,
)


logger = logging.get_logger(__name__)


def evaluate(model_name_or_path: str | Sequence[str], **settings: Any) -> EvalLog | list[EvalLog]:
    """
    Evaluate one or more models or adapters and write their results.

    Args:
        model_name_or_path (`str` or `Sequence[str]`):
            Folder or Hub id; of several, adapters of one base share one engine.
        settings:
            All other arguments of [`EvalConfig`].

    Returns:
        `EvalLog` or `list[EvalLog]`:
            What `TOFU_EVAL.json` holds, or a list of that in the order of the models.

    Raises:
        [`ValueError`]: If settings, data or logs don't fit together, before any model is loaded. Nothing is
            overwritten.
        [`ValueError`]: Later, if vLLM and transformers disagree about a model, or a model answers nothing at all. What
            was computed is kept for the next start.
    """
    single = isinstance(model_name_or_path, str)
    names = [model_name_or_path] if single else list(model_name_or_path)
    logs = run(EvalConfig(model_name_or_path=names, **settings))
    return logs[0] if single else logs


def run(config: EvalConfig, may_be_silent: bool = False) -> list[EvalLog]:
    """
    [`evaluate`] with its settings as a configuration.

    Args:
        config ([`EvalConfig`]):
            Configuration.
        may_be_silent (`bool`, *optional*, defaults to `False`):
            Whether a model that answers nothing at all is a result, of ROUGE 0, and no mistake: where the prompt is
            known to be that of its training.

    Returns:
        `list[EvalLog]`:
            A log for each `model_name_or_path`.
    """
    check_packages("rouge_score", "scipy", *([] if config.compare_to is None else ["matplotlib"]))
    retain_log = None if config.retain_logs is None else read_log(config.retain_logs)
    rows = load_rows(config)
    if retain_log is not None:
        check_retain_log(config, rows, retain_log)
    names = [*config.model_name_or_path, *([] if config.compare_to is None else [config.compare_to])]
    checkpoints = [resolve_checkpoint(name, config) for name in names]
    folders = result_folders([checkpoint.name for checkpoint in checkpoints], config)
    if config.score_backend == "vllm" or (config.backend == "vllm" and config.max_new_tokens > 0):
        from .backends.vllm import check_served

        for checkpoint in checkpoints:
            if checkpoint.changes_base:
                raise ValueError(
                    f"vLLM can't serve the adapter `{checkpoint.name}`, which changes its base (`init_lora_weights` or "
                    "`bias`). Merge it (`trl-rkld merge`), or use `--backend transformers`."
                )
            if checkpoint.adapter is not None:  # now, not after transformers' part
                check_served(str(checkpoint.adapter))
    retain_hash = None if retain_log is None else hash_json(retain_log)
    jobs = [Job(checkpoint, rows, config, retain_hash) for checkpoint in checkpoints]
    for job, folder in zip(jobs, folders, strict=True):
        check_output(job, folder, config.overwrite)
    try:
        for _, group in groupby(sorted(jobs, key=_engine), _engine):
            some = list(group)
            with _keeping_failure(*some):
                compute(some, config)
        logs = finish_all(jobs, folders, retain_log, may_be_silent)
    finally:
        for job in jobs:
            job.close()
    if config.compare_to is None:
        return logs
    from .report import write_report

    write_report(config.output_dir, before=logs[-1], after=logs[0])
    return logs[:-1]


def check_packages(*names: str) -> None:
    """Raise where packages are missing that metrics and pictures need: at once, not after what takes long."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"`{name}` is not installed: `pip install 'trl-rkld[eval]'`.")


def _engine(job: Job) -> str:
    """What jobs must share to share an engine: a backend ends all answers in the same way."""
    return repr((job.checkpoint.engine, job.end_ids, job.masked_token_id))


def load_rows(config: EvalConfig) -> dict[str, list[Mapping[str, Any]]]:
    """
    Load the question sets.

    Args:
        config ([`EvalConfig`]):
            Configuration.

    Returns:
        `dict[str, list[Mapping]]`:
            Rows by set: TOFU's five, or those of the user's own that are given.
    """
    if config.forget_dataset is None:
        rows = load_tofu(config.dataset_name, config.forget_split, config.max_samples)
    else:
        paths = {"forget": config.forget_dataset, "retain": config.retain_dataset, "holdout": config.holdout_dataset}
        rows = {
            name: load_records(path).to_list()[: config.max_samples]
            for name, path in paths.items()
            if path is not None
        }
    if "retain" in rows:
        rows["retain"] = rows["retain"][: config.max_retain_samples]
    return rows


def check_retain_log(config: EvalConfig, rows: Mapping[str, Sequence[Mapping[str, Any]]], retain_log: EvalLog) -> None:
    """
    Check that the retain-only model's log is of the same questions.

    Args:
        config ([`EvalConfig`]):
            Configuration.
        rows (`Mapping[str, Sequence[Mapping]]`):
            The question sets.
        retain_log (`EvalLog`):
            The log, valid on its own.

    Raises:
        [`ValueError`]: If it is of another split or length, or has other questions.
    """
    metadata, forget_rows = retain_log.get(METADATA, {}), rows["forget"]
    split = "own data" if config.forget_dataset is not None else config.forget_split
    for name, ours in (("forget_split", split), ("question_key", config.question_key)):
        if metadata.get(name, ours) != ours:
            raise ValueError(
                f"`retain_logs` is of `{name}={metadata[name]}`, and this evaluation of `{ours}`: evaluate the retain-only "
                "model on the same questions."
            )
    metric = "forget_Q_A_ROUGE"
    references = item_texts(retain_log[metric], "ground_truth", metric) if has_items(retain_log, metric) else None
    ours = [[str(row["answer"]).strip()] for row in forget_rows] if "answer" in forget_rows[0] else None
    # Own data may lack what forget quality needs; the log is for privacy leakage then.
    scored = "perturbed_answer" not in forget_rows[0] and has_items(retain_log, "forget_Q_A_Prob")
    n = len(retain_log["forget_Q_A_Prob"]["value_by_index"]) if scored else forget_length(retain_log, "`retain_logs`")
    validate_same_questions(len(forget_rows), n, ours, references)
    whole = all(row.get("answer", True) for row in forget_rows)  # else the row is named later
    hashes = metadata.get("hashes", {})
    if whole and hashes.get("forget_set") not in (None, hash_rows(forget_rows)):
        raise ValueError("`retain_logs` is of other questions: evaluate the retain-only model on the same forget set.")
    if "holdout" in rows and hashes.get("holdout_set") not in (None, hash_rows(rows["holdout"])):
        raise ValueError("`retain_logs` is of another holdout set: evaluate the retain-only model with the same one.")


def result_folders(names: Sequence[str], config: EvalConfig) -> list[Path]:
    """A folder for each checkpoint: `output_dir` for a single one, else one below it, named after the checkpoint."""
    folder = Path(config.output_dir)
    if len(config.model_name_or_path) == 1:
        return [folder, folder / "before"][: len(names)]
    plain = [name.replace("/", "--") for name in names]
    numbered: list[str] = []
    for name in plain:
        others = (f"{name}-{number}" for number in count(1))
        taken = {*plain, *numbered}
        numbered.append(name if plain.count(name) == 1 else next(other for other in others if other not in taken))
    return [folder / name for name in numbered]


def check_output(job: Job, folder: Path, overwrite: bool) -> None:
    """
    Check that no other result would be replaced.

    Args:
        job ([`~unlearn_eval.job.Job`]):
            What is to be evaluated.
        folder (`Path`):
            Folder for its result.
        overwrite (`bool`):
            Whether another result may be replaced.

    Raises:
        [`ValueError`]: If the folder holds the result of another model, other data or other settings.
    """
    path = folder / EVAL_FILE
    if overwrite or not path.is_file():
        return
    theirs, ours = read_unchecked(path).get(METADATA, {}), job.metadata()
    # A retain-only model's log may be added to a result, not taken away or exchanged.
    if theirs.get("hashes", {}).get("retain_log") is None:
        ours["hashes"].pop("retain_log", None)
    different = [name for name, value in ours.items() if theirs.get(name) != value]
    if different:
        raise ValueError(
            f"`output_dir` holds another result ({path}): it differs in {', '.join(different)}. Choose another folder, or set "
            "`overwrite`."
        )


def compute(jobs: Sequence[Job], config: EvalConfig) -> None:
    """
    Compute what is missing of checkpoints that share a base, one backend after another: never two models in memory. One
    whose numbers are wrong (`failure` says why) keeps no other from being computed; one that can't be loaded does.

    Args:
        jobs (`Sequence[Job]`):
            The checkpoints.
        config ([`EvalConfig`]):
            Configuration.
    """
    if config.score_backend == config.backend:
        phases = [(config.backend, ("score", "generate"))]
    else:
        phases = [(config.score_backend, ("score",)), (config.backend, ("generate",))]
    for name, tasks in phases:
        if any(job.missing(task) for job in _whole(jobs) for task in tasks):
            _run_phase(name, tasks, _whole(jobs), config)


def _whole(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.failure is None]


def _run_phase(name: str, tasks: Sequence[str], jobs: Sequence[Job], config: EvalConfig) -> None:
    # A function of its own: when it ends, nothing holds the model any more.
    if name == "vllm":
        score_canaries(jobs, config)
        jobs = _whole(jobs)
        if not jobs:
            return
    with open_backends(name, jobs, config) as activate:
        for job in jobs:
            with _keeping_failure(job):
                if name == "vllm":
                    check_canary(job, activate)
                backend = activate(job.checkpoint)
                for task in tasks:
                    job.run(task, backend)


@contextmanager
def _keeping_failure(*jobs: Job) -> Iterator[None]:
    """What is wrong with some checkpoints is told when the others are done."""
    try:
        yield
    except ValueError as error:
        failed = _whole(jobs)
        names = ", ".join(f"`{job.checkpoint.name}`" for job in failed)
        failure = ValueError(f"{names}: {error}")
        for job in failed:
            job.failure = failure


@contextmanager
def open_backends(name: str, jobs: Sequence[Job], config: EvalConfig) -> Iterator[Callable[[Checkpoint | None], Any]]:
    """The backends of checkpoints that share a base, by checkpoint (`None`: the bare base), while the context lasts."""
    checkpoints = [job.checkpoint for job in jobs]
    end_ids = sorted({token for job in jobs for token in job.end_ids})
    if name == "transformers":
        with transformers_backends(checkpoints, config, end_ids, jobs[0].masked_token_id) as activate:
            yield activate
    else:
        with vllm_backends(checkpoints, config, end_ids, max(job.longest for job in jobs)) as activate:
            yield activate


def score_canaries(jobs: Sequence[Job], config: EvalConfig) -> None:
    """Score each checkpoint's canary with transformers, as far as it is not known."""
    missing = [
        [request for request in choose(job.requests()) if score_key(request) not in job.journal("transformers")]
        for job in jobs
    ]
    if not any(missing):
        return
    with open_backends("transformers", jobs, config) as activate:
        for job, requests in zip(jobs, missing, strict=True):
            with _keeping_failure(job):
                for index, scores in activate(job.checkpoint).score(requests):
                    job.journal("transformers").add(score_key(requests[index]), encode_scores(scores))


def check_canary(job: Job, activate: Callable[[Checkpoint | None], Any]) -> None:
    """Hold vLLM's scores of a few answers against those of transformers, and an adapter's against its base's."""
    requests, known = choose(job.requests()), job.journal("transformers")
    expected = [decode_scores(known[score_key(request)]).avg_loss for request in requests]
    found = average_losses(activate(job.checkpoint), requests)
    check_agreement(job.checkpoint.name, expected, found)
    if job.checkpoint.adapter is not None:
        check_adapter(job.checkpoint.name, found, average_losses(activate(None), requests))


def average_losses(backend: Any, requests: Sequence[ScoreRequest]) -> list[float]:
    """Average losses of answers on a backend, in nats per token."""
    scores = dict(backend.score(requests))
    return [scores[index].avg_loss for index in range(len(requests))]


def finish_all(
    jobs: Sequence[Job], folders: Sequence[Path], retain_log: EvalLog | None, may_be_silent: bool
) -> list[EvalLog]:
    """[`finish`] for each checkpoint; one that fails does not keep the others from being written."""
    logs, failures = [], list(dict.fromkeys(job.failure for job in jobs if job.failure is not None))
    for job, folder in zip(jobs, folders, strict=True):
        if job.failure is not None:
            continue
        try:
            logs.append(finish(job, folder, retain_log, may_be_silent))
        except ValueError as error:
            failures.append(error)
    if failures:
        raise ValueError(" ".join(str(failure) for failure in failures))
    return logs


def finish(job: Job, folder: Path, retain_log: EvalLog | None, may_be_silent: bool) -> EvalLog:
    """Build the log of a checkpoint, say what is odd about it, and write it."""
    empty = [name for name in job.sets if job.empty_generations(name)]
    # An unlearned model may have nothing to say of what it forgot; one that says nothing of anything is asked wrongly.
    others = [name for name in job.sets if name not in ("forget", "holdout")]
    if others and set(others) <= set(empty) and not may_be_silent:
        raise ValueError(
            f"{job.checkpoint.name} answers every question with nothing: are chat template and `system_prompt` those of its "
            "training? To evaluate it without ROUGE set `max_new_tokens=0`."
        )
    if empty:
        logger.warning(f"{job.checkpoint.name} answers every question of {', '.join(empty)} with nothing: ROUGE is 0.")
    log = job.log(retain_log)
    if retain_log is not None:
        _warn_of_differences(log[METADATA], retain_log.get(METADATA))
    _remove_report_of_another(folder, log)
    write_results(folder, log)
    return log


def _remove_report_of_another(folder: Path, log: EvalLog) -> None:
    """A result is overwritten: a page on the model that it was of must not lie beside the new one."""
    path = folder / EVAL_FILE
    if not path.is_file():
        return
    old, new = (one.get(METADATA, {}).get("hashes", {}) for one in (read_unchecked(path), log))
    if any(old.get(name) != new.get(name) for name in ("weights", "adapter", "data")):
        from .report import STEM, SUFFIXES

        for suffix in SUFFIXES:
            (folder / f"{STEM}.{suffix}").unlink(missing_ok=True)


def _warn_of_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> None:
    if theirs is None:
        logger.warning(
            "`retain_logs` does not say how it was made (open-unlearning?). Forget quality compares like with like only if "
            "both logs are made in one way: evaluate the retain-only model here, too, or use `compat=open_unlearning`."
        )
        return
    names = ("score_backend", "dtype", "quantization", "attention", "compat")
    different = [
        f"{name} {theirs.get(name)} there, {ours.get(name)} here"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
    different += ["template"] if theirs.get("hashes", {}).get("template") != ours["hashes"]["template"] else []
    if different:
        logger.warning(
            f"`retain_logs` was made in another way ({'; '.join(different)}): forget quality may tell the ways apart instead "
            "of the models. Evaluate the retain-only model in the same way."
        )
