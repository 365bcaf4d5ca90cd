# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""From a configuration to jobs in the order of their value: each a model, an evaluation or a run, in a folder of its own."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn_eval.files import read_json
from unlearn_eval.fingerprint import hash_contents, hash_json

from .config import CompareConfig, uses_augmented_model


JOB_FILE, HISTORY_FILE, DONE_FILE = "job.json", "history.json", "done.json"
TASK_FILE, LOG_FILE, KEEP_FILE = "task.json", "log.txt", "keep"

# Settings of the evaluation that decide no number: what does not fit into memory may go on in smaller batches.
_HOW_COMPUTED = {
    "batch_size",
    "batch_tokens",
    "gpu_memory_utilization",
    "overwrite",
}


@dataclass(frozen=True)
class Job:
    """
    Something to compute.

    Args:
        name (`str`):
            Name, unique among the jobs.
        kind (`str`):
            What the worker does: `"finetune"`, `"evaluate"` or `"unlearn"`.
        folder (`Path`):
            Where its result goes.
        settings (`dict`):
            Everything that decides the result, in JSON's types.
        needs (`tuple[str]`):
            Names of the jobs that must be done before.
        row (`dict`, *optional*):
            The columns by which its result is known in the table; models have none.
        options (`dict`, *optional*):
            What may differ from an earlier start: what is kept, and how it is computed.
        keep (`bool`, *optional*):
            Of an augmented model: whether it stays when no other job needs it any more. `None` of all else, which does.
    """

    name: str
    kind: str
    folder: Path
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    row: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep: bool | None = None

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return (self.folder / DONE_FILE).is_file()


def make_plan(config: CompareConfig) -> list[Job]:
    """
    All jobs of a comparison, in the order in which they are started: the references, then the runs seed by seed, each
    after what it needs.

    Args:
        config ([`CompareConfig`]):
            Configuration.

    Returns:
        `list[Job]`:
            The jobs.
    """
    plan = _Plan(config)
    for split in sorted(set(config.splits)):
        plan.add_reference("retain", split)
        plan.add_reference("target", split)
    for seed in dict.fromkeys(seed for run in config.runs for seed in run["seeds"]):
        for split in sorted(set(config.splits)):
            for run in config.runs:
                if seed in run["seeds"]:
                    plan.add_run(run, split, seed)
    return list(plan.jobs.values())


def left_to_do(jobs: list[Job]) -> list[Job]:
    """
    The jobs whose results are missing, and the models that these need; a model that nothing needs any more is not
    made.

    Args:
        jobs (`list[Job]`):
            The plan.

    Returns:
        `list[Job]`:
            Some of them, in order.
    """
    wanted = {job.name for job in jobs if job.row is not None and not job.is_done}
    for job in reversed(jobs):  # each stands after what it needs
        if job.name in wanted and not job.is_done:
            wanted.update(job.needs)
    return [job for job in jobs if job.name in wanted and not job.is_done]


def remove_temporary(jobs: list[Job]) -> None:
    """Delete the augmented models that no job needs any more: they know the forget set better than any other model."""
    needed = {need for job in left_to_do(jobs) for need in job.needs}
    for job in jobs:
        if job.keep is None or not job.folder.is_dir():
            continue
        if job.keep:
            (job.folder / KEEP_FILE).touch()  # another comparison may share it, and keep none
        elif job.name not in needed and not (job.folder / KEEP_FILE).exists():
            (job.folder / DONE_FILE).unlink(missing_ok=True)  # half removed, it must not be taken for a whole one
            shutil.rmtree(job.folder)


def check_folders(jobs: list[Job]) -> None:
    """Raise where jobs' folders hold results of other settings, be it unfinished ones."""
    others = [job for job in jobs if _has_begun(job.folder) and read_json(job.folder / JOB_FILE) != job.settings]
    if others:
        folders = ", ".join(f"`{job.folder}`" for job in others)
        different = ", ".join(_differences(read_json(others[0].folder / JOB_FILE), others[0].settings))
        files = " (`contents`: models and data files of the same names)" if "contents" in different else ""
        raise ValueError(
            f"{folders}: results of other settings are there. In the first, {different} differ{files}. Choose another "
            "`output_dir` (or `models_dir`), give the run another `setting`, or remove what is named."
        )


def _has_begun(folder: Path) -> bool:
    """Whether a job has left more than it was started with: one that failed before may be given other settings."""
    started_with = [folder / name for name in (JOB_FILE, TASK_FILE, LOG_FILE)]
    return started_with[0].is_file() and any(path.is_file() and path not in started_with for path in folder.rglob("*"))


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Names of settings that differ: `"seed"`, `"arguments.learning_rate"`."""
    names = []
    for key in sorted(theirs.keys() | ours.keys()):
        one, other = theirs.get(key), ours.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            names += [f"{key}.{name}" for name in _differences(one, other)]
        elif one != other:
            names.append(key)
    return names


class _Plan:
    def __init__(self, config: CompareConfig):
        self.config, self.jobs = config, {}
        self.output_dir, self.models_dir = Path(config.output_dir), Path(config.models_dir)
        self.hashes: dict[str, str] = {}

    def add_reference(self, method: str, split: str) -> None:
        """Target or retain-only model, and its evaluation on a split."""
        name, retain_logs, needs = f"{method}-{split}", None, (self._model(method, split),)
        if method == "target":
            retain_logs, needs = self._log(split), (*needs, f"retain-{split}")
        settings = {
            "model": self._model_path(method, split),
            "forget_split": split,
            "retain_logs": retain_logs,
            "evaluation": self._evaluation(),
            "contents": self._contents(self.config.dataset_name, self._given(method, split)),
        }
        row = {"split": split, "method": method, "setting": None, "seed": None}
        self._add(name, "evaluate", self.output_dir / "references" / name, settings, needs, row, self._options())

    def add_run(self, run: dict[str, Any], split: str, seed: int) -> None:
        """A method's run with one seed."""
        config, command = self.config, run["command"]
        setting = "" if run["setting"] is None else f"-{_slug(run['setting'])}"
        name = f"{split}-{_slug(run['method'])}{setting}-seed{seed}"
        if name in self.jobs:
            raise ValueError(
                f"Two `runs` have the folder {name}: tell them apart by `setting`, in letters, digits and points."
            )
        needs = (self._model("target", split), f"retain-{split}")
        settings = {
            "command": command,
            "model": self._model_path("target", split),
            "forget_split": split,
            "retain": run["retain"],
            "sets": self._sets(split, None if run["retain"] == "none" else split),
            "seed": seed,
            "arguments": (config.common if command not in ("task-vector", "teacher") else {})
            | config.settings_of(run),
            "refusals_path": config.refusals_path if command in ("idk", "dpo") else None,
            "retain_logs": self._log(split),
            "evaluation": self._evaluation(),
            "epoch_retain_samples": config.epoch_retain_samples,
        }
        sources = (config.dataset_name, self._given("target", split), settings["refusals_path"])
        settings["contents"] = self._contents(*sources)
        if uses_augmented_model(command):
            augmented = self._augmented(run, split, seed)
            needs, settings["augmented_model"] = (*needs, augmented), str(self.jobs[augmented].folder)
        row = {"split": split, "method": run["method"], "setting": run["setting"], "seed": seed}
        self._add(name, "unlearn", self.output_dir / "runs" / name, settings, needs, row, self._options())

    def _evaluation(self) -> dict[str, Any]:
        given = self.config.evaluation
        return {"dataset_name": self.config.dataset_name} | {k: given[k] for k in given.keys() - _HOW_COMPUTED}

    def _options(self) -> dict[str, Any]:
        given = self.config.evaluation
        how_computed = {key: given[key] for key in given.keys() & _HOW_COMPUTED}
        return {
            "keep_models": self.config.keep_models,
            "case_study": self.config.case_study,
            "evaluation": how_computed,
        }

    def _log(self, split: str) -> str:
        return str(self.output_dir / "references" / f"retain-{split}" / "TOFU_EVAL.json")

    def _given(self, method: str, split: str) -> str | None:
        """The user's own reference model."""
        if method == "target":
            return self.config.target_model_name_or_path
        return self.config.retain_model_name_or_path.get(split)

    def _is_shared(self, method: str) -> bool:
        """Whether one reference model serves all splits: the target does; the retain-only one where its set is the same."""
        return method == "target" or self.config.max_retain_samples is not None

    def _model_path(self, method: str, split: str) -> str:
        ours = self.models_dir / (method if self._is_shared(method) else f"{method}-{split}")
        return self._given(method, split) or str(ours)

    def _model(self, method: str, split: str) -> str | None:
        """Add the fine-tuning of a reference model, unless it is given."""
        if self._given(method, split) is not None:
            return None
        path, config = self._model_path(method, split), self.config
        settings = {
            "model": config.model_name_or_path,
            "sets": self._sets(
                forget_split=config.target_split if method == "target" else None,
                retain_split=config.target_split if self._is_shared(method) else split,
            ),
            "seed": None,
            "arguments": config.finetune,
            "contents": self._contents(config.dataset_name, config.model_name_or_path),
        }
        return self._add(f"model-{Path(path).name}", "finetune", Path(path), settings, ())

    def _augmented(self, run: dict[str, Any], split: str, seed: int) -> str:
        """Add the training of an augmented model; runs that need the same share it."""
        target = self._model("target", split)
        arguments = self.config.finetune | self.config.augment | run.get("augment", {})
        settings = {
            "model": self._model_path("target", split),
            "sets": self._sets(split, None),
            "seed": seed,
            "arguments": arguments,
            "contents": self._contents(self.config.dataset_name, self._given("target", split)),
        }
        name = f"augmented-{split}-seed{seed}-{hash_json(arguments)[:8]}"
        keep = self.config.keep_models
        return self._add(f"model-{name}", "finetune", self.models_dir / name, settings, (target,), keep=keep)

    def _sets(self, forget_split: str | None, retain_split: str | None) -> dict[str, Any]:
        """What a job trains on, as [`training_sets`] takes it."""
        sets = {"dataset_name": self.config.dataset_name, "forget_split": forget_split, "retain_split": retain_split}
        return sets | {"max_retain_samples": None if retain_split is None else self.config.max_retain_samples}

    def _contents(self, *paths: str | None) -> list[str]:
        """Hashes of what lies in local files and folders: under the same name there may be another model the next time."""
        local = [path for path in paths if path is not None and (Path(path).is_file() or Path(path).is_dir())]
        for path in set(local) - self.hashes.keys():
            self.hashes[path] = hash_contents(Path(path))
        return [self.hashes[path] for path in local]

    def _add(self, name, kind, folder, settings, needs, row=None, options=None, keep=None) -> str:
        needs = tuple(dict.fromkeys(need for need in needs if need is not None))
        # What it is made from is part of what it is.
        settings = settings | {"needs": {need: hash_json(self.jobs[need].settings) for need in needs}}
        self.jobs.setdefault(name, Job(name, kind, folder, settings, needs, row, options, keep))
        return name


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.")
