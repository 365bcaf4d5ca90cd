# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What a comparison is made of."""

import json
from dataclasses import dataclass, field
from typing import Any

from unlearn_eval.config import default_backend
from unlearn_eval.questions import FORGET_SPLITS

from ..methods import METHODS, method_class


# Commands of a run beside the methods' own.
OTHER_COMMANDS = ("idk", "dpo", "task-vector", "teacher")
# Commands that train, epoch by epoch.
TRAINED_COMMANDS = (*METHODS, "idk", "dpo")
RETAIN_TERMS = ("none", "nll", "kl")

_RUN_KEYS = {"command", "method", "setting", "retain", "seeds", "augment"}


def uses_augmented_model(command: str) -> bool:
    """Whether a run needs an augmented model, made beforehand."""
    if command in METHODS:
        return method_class(command, "Trainer").uses_augmented_model
    return command in ("task-vector", "teacher")


@dataclass
class CompareConfig:
    """
    Configuration of `trl-rkld compare`.

    Parameters:
        model_name_or_path (`str`):
            Model that learns TOFU first: Hub id or folder.
        output_dir (`str`):
            Folder for the runs, the CSV, the tables and the figure.
        runs (`list[dict]`):
            What is compared, in the order of value. Each has a `command` (a method's, or `"idk"`, `"dpo"`,
            `"task-vector"`, `"teacher"`) and what that command takes, beside `method` (its name in the table; the
            command's, with `_` for `-`, by default), `setting` (what tells it from other runs of the method), `retain`
            (`"none"`, the default, `"nll"` or `"kl"`), `seeds` and `augment` (to differ from those below).
        dataset_name (`str`, *optional*, defaults to `"locuslab/TOFU"`):
            TOFU: Hub id, or a folder with its files.
        splits (`list[str]`, *optional*, defaults to `["forget05"]`):
            Forget splits.
        seeds (`list[int]`, *optional*, defaults to `[42]`):
            Seeds of the runs.
        target_split (`str`, *optional*):
            Largest split that the target model has learnt. Defaults to the largest of `splits`.
        max_retain_samples (`int`, *optional*):
            Rows of `full`, from the first on, that stand for the retain set, in training and in evaluation. If `None`,
            the split's own retain set; TOFU scores the first 400 of `full`.
        models_dir (`str`, *optional*):
            Folder of target, retain-only and augmented models, which comparisons may share. Defaults to `models` in
            `output_dir`.
        target_model_name_or_path (`str`, *optional*):
            A model that knows TOFU already, instead of fine-tuning one.
        retain_model_name_or_path (`dict[str, str]`, *optional*):
            Retain-only models of the splits, instead of fine-tuning them.
        finetune (`dict`, *optional*):
            Settings of fine-tuning the target and the retain-only models: those of `trl-rkld finetune`.
        augment (`dict`, *optional*):
            What is different in training the augmented models: the target trained further on the forget set.
        common (`dict`, *optional*):
            Settings of all runs that train.
        evaluation (`dict`, *optional*):
            Settings of [`~unlearn_eval.EvalConfig`] for the full evaluations. Its prompt and precision hold after each
            epoch, too.
        epoch_retain_samples (`int`, *optional*, defaults to `100`):
            Retained questions that are scored after each epoch, at most `max_retain_samples`.
        refusals_path (`str`, *optional*):
            File of refusals for `idk` and `dpo`, one a line.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to leave GPUs alone.
        cpu_jobs (`int`, *optional*, defaults to `1`):
            Jobs at once where there is no GPU, each with its share of the cores. Where other work wants these, too, a
            job a core finishes far sooner than one on all of them, whose threads wait for each other.
        case_study (`dict`, *optional*):
            What goes into `case_study.md`: `questions`, rows of the forget set whose answers before and after are
            written, and `beginnings`, each with a `row` and a number of `words`: after the first so many words of that
            row's answer, the likeliest next ones are written. These are texts that are to be forgotten, so none by
            default.
        keep_models (`bool`, *optional*, defaults to `False`):
            Whether to keep the unlearned and the augmented models. Target and retain-only model stay in `models_dir`
            anyway.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check everything, print the plan, and stop.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model that learns TOFU first."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for runs, CSV, tables and figure."})
    runs: list[dict] = field(default_factory=list, metadata={"help": "What is compared (in the config file)."})
    dataset_name: str = field(default="locuslab/TOFU", metadata={"help": "TOFU: Hub id, or a folder with its files."})
    splits: list[str] = field(default_factory=lambda: ["forget05"], metadata={"help": "Forget splits."})
    seeds: list[int] = field(default_factory=lambda: [42], metadata={"help": "Seeds of the runs."})
    target_split: str | None = field(
        default=None,
        metadata={"help": "Largest split that the target model has learnt. Defaults to that of `splits`."},
    )
    max_retain_samples: int | None = field(
        default=None, metadata={"help": "First rows of `full` that stand for the retain set."}
    )
    models_dir: str | None = field(
        default=None, metadata={"help": "Folder of target, retain-only and augmented models."}
    )
    target_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model that knows TOFU already, instead of fine-tuning one."}
    )
    retain_model_name_or_path: dict = field(
        default_factory=dict, metadata={"help": "Retain-only models of the splits, instead of fine-tuning them."}
    )
    finetune: dict = field(default_factory=dict, metadata={"help": "Settings of fine-tuning (in the config file)."})
    augment: dict = field(default_factory=dict, metadata={"help": "Settings of the augmented models' training."})
    common: dict = field(default_factory=dict, metadata={"help": "Settings of all runs that train."})
    evaluation: dict = field(default_factory=dict, metadata={"help": "Settings of the full evaluations."})
    epoch_retain_samples: int = field(
        default=100, metadata={"help": "Retained questions that are scored after each epoch."}
    )
    refusals_path: str | None = field(default=None, metadata={"help": "File of refusals, one a line."})
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave GPUs alone."})
    cpu_jobs: int = field(default=1, metadata={"help": "Jobs at once where there is no GPU; they share its cores."})
    case_study: dict = field(default_factory=dict, metadata={"help": "What goes into case_study.md, texts included."})
    keep_models: bool = field(
        default=False, metadata={"help": "Whether to keep the unlearned and the augmented models."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check everything, print the plan, and stop."})

    def __post_init__(self):
        for name in ("model_name_or_path", "output_dir", "runs", "splits", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is required.")
        for name in ("runs", "splits"):
            if not isinstance(getattr(self, name), list):
                raise ValueError(f"`{name}` must be a list, and is {getattr(self, name)!r}.")
        for name in ("retain_model_name_or_path", "finetune", "augment", "common", "evaluation", "case_study"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"`{name}` must hold names and values, and is {getattr(self, name)!r}.")
        for name in ("runs", "finetune", "augment", "common", "evaluation", "case_study"):
            try:
                json.dumps(getattr(self, name))
            except TypeError as error:  # YAML makes a date of 2025-04-10
                raise ValueError(
                    f"`{name}` has a value that is no text, number, list or mapping ({error}): quote it."
                ) from None
        # Written down: vLLM that is installed between two starts must not make half of the numbers.
        self.evaluation = {"backend": default_backend()} | self.evaluation
        for name in ("max_retain_samples", "epoch_retain_samples", "cpu_jobs"):
            value = getattr(self, name)
            if value is None and name == "max_retain_samples":
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}={value}` must be a whole number of at least 1.")
        self._check_seeds("`seeds`", self.seeds)
        if self.max_retain_samples is not None:  # what was never learnt can't be kept
            self.epoch_retain_samples = min(self.epoch_retain_samples, self.max_retain_samples)
            self.evaluation = {"max_retain_samples": self.max_retain_samples} | self.evaluation
            scored = self.evaluation["max_retain_samples"]
            if isinstance(scored, int) and scored > self.max_retain_samples:
                raise ValueError(
                    f"`evaluation`: `max_retain_samples={scored}` is more than the {self.max_retain_samples} rows that the "
                    "models learn (`max_retain_samples`): what was never learnt can't be kept. Lower it."
                )
        target_splits = [] if self.target_split is None else [self.target_split]
        names = {"splits": self.splits, "target_split": target_splits}
        for name, splits in (names | {"retain_model_name_or_path": self.retain_model_name_or_path}).items():
            for split in splits:
                if split not in FORGET_SPLITS:
                    raise ValueError(
                        f"`{name}`: `{split}` is not one of TOFU's forget splits, {', '.join(FORGET_SPLITS)}."
                    )
        self.target_split = self.target_split or max(self.splits)
        if max(self.splits) > self.target_split:
            raise ValueError(
                f"`target_split={self.target_split}` is smaller than {max(self.splits)}, which the target must have learnt."
            )
        self._check_case_study()
        self.models_dir = self.models_dir or f"{self.output_dir}/models"
        self.runs = [self._checked(run, index) for index, run in enumerate(self.runs)]
        names = [(run["method"], run["setting"]) for run in self.runs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"Two `runs` are called {twice[0]}: tell them apart by `setting`.")

    def _check_case_study(self) -> None:
        self.case_study = {"questions": [], "beginnings": []} | self.case_study
        if set(self.case_study) != {"questions", "beginnings"}:
            raise ValueError("`case_study` takes `questions` and `beginnings`.")
        if not all(isinstance(one, list) for one in self.case_study.values()):
            raise ValueError("`questions` and `beginnings` of `case_study` must be lists.")
        if any(set(one) != {"row", "words"} for one in self.case_study["beginnings"]):
            raise ValueError("Each of `beginnings` in `case_study` takes a `row` and a number of `words`.")
        if any(not isinstance(one["words"], int) or one["words"] < 1 for one in self.case_study["beginnings"]):
            raise ValueError("`words` of `beginnings` in `case_study` must be a number of at least 1.")

    def _checked(self, run: dict[str, Any], index: int) -> dict[str, Any]:
        if not isinstance(run, dict) or not isinstance(run.get("augment", {}), dict):
            raise ValueError(f"`runs[{index}]`, and its `augment`, must hold names and values.")
        command = run.get("command")
        if command not in (*METHODS, *OTHER_COMMANDS):
            raise ValueError(
                f"`runs[{index}]` has the command {command!r}: use one of {', '.join((*METHODS, *OTHER_COMMANDS))}."
            )
        run = {"method": command.replace("-", "_"), "setting": None, "retain": "none", "seeds": self.seeds} | run
        if run["retain"] not in RETAIN_TERMS:
            raise ValueError(f"`runs[{index}]` has `retain: {run['retain']!r}`: use one of {', '.join(RETAIN_TERMS)}.")
        if run["retain"] == "none" and "retain_coef" in run:
            raise ValueError(
                f"`runs[{index}]` has `retain_coef`, and no `retain`: set it to nll or kl, or remove both."
            )
        run["method"] = str(run["method"])
        if run["setting"] is not None:
            run["setting"] = str(run["setting"])  # such as `setting: 8.0`
        if "augment" in run and not uses_augmented_model(command):
            raise ValueError(f"`runs[{index}]` ({command}) has no augmented model. Remove `augment`.")
        self._check_seeds(f"`seeds` of `runs[{index}]`", run["seeds"])
        if run["method"] in ("target", "retain"):
            raise ValueError(f"`runs[{index}]` is called `{run['method']}`, which is a reference's name.")
        if command in ("idk", "dpo") and self.refusals_path is None:
            raise ValueError(f"`runs[{index}]` ({command}) needs `refusals_path`: a file of refusals, one a line.")
        possible = {"idk": ("none", "nll"), "dpo": ("none",), "task-vector": ("none",), "teacher": ("none",)}
        if run["retain"] not in possible.get(command, RETAIN_TERMS):
            raise ValueError(
                f"`runs[{index}]` ({command}) has `retain: {run['retain']}`: it takes {', '.join(possible[command])}."
            )
        return run

    @staticmethod
    def _check_seeds(where: str, seeds: Any) -> None:
        if not isinstance(seeds, list) or not seeds:
            raise ValueError(f"{where} must be a list of seeds, and is {seeds!r}.")
        for seed in seeds:
            if not isinstance(seed, int) or not 0 <= seed < 2**32:
                raise ValueError(f"{where}: {seed!r} is no seed. Give whole numbers from 0 to {2**32 - 1}.")

    @staticmethod
    def settings_of(run: dict[str, Any]) -> dict[str, Any]:
        """What a run passes on to its command."""
        return {key: value for key, value in run.items() if key not in _RUN_KEYS}
