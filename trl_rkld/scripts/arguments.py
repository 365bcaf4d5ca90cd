# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass, field

from transformers import IntervalStrategy
from trl import ScriptArguments


@dataclass
class RecordScriptArguments(ScriptArguments):
    """
    What all training commands take: which records to forget, and which to keep.

    Args:
        dataset_name (`str`):
            Forget set: a JSON, JSONL, CSV or Parquet file, or a Hub id.
        dataset_config, dataset_train_split (`str`, *optional*):
            Configuration and split of a Hub id.
        retain_dataset_name, retain_dataset_config, retain_dataset_split (`str`, *optional*):
            The same for the retain set.
        max_retain_samples (`int`, *optional*):
            Use only the first rows of the retain set.
    """

    retain_dataset_name: str | None = field(
        default=None, metadata={"help": "Retain set: a JSON, JSONL, CSV or Parquet file, or a Hub id."}
    )
    retain_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the retain set on the Hub."}
    )
    retain_dataset_split: str = field(default="train", metadata={"help": "Split of the retain set on the Hub."})
    max_retain_samples: int | None = field(
        default=None, metadata={"help": "Use only the first rows of the retain set."}
    )

    def __post_init__(self):
        if self.dataset_streaming:
            raise ValueError("`dataset_streaming` is for Python only: pass a trainer an `IterableDataset`. Remove it.")
        if self.max_retain_samples is not None and self.max_retain_samples < 1:
            raise ValueError(
                f"`max_retain_samples={self.max_retain_samples}` must be positive. To keep nothing, remove `retain_dataset_name`."
            )
        for name in ("retain_dataset_config", "max_retain_samples"):
            if getattr(self, name) is not None and self.retain_dataset_name is None:
                raise ValueError(f"`{name}` is set, and no `retain_dataset_name`: nothing would be kept. Set it, too.")

    def forget_set(self):
        """Load the forget set."""
        from ..data import load_records

        if self.dataset_name is None:
            raise ValueError("`dataset_name` is required: the file or Hub id of the records to forget.")
        return load_records(self.dataset_name, self.dataset_config, self.dataset_train_split)

    def retain_set(self):
        """Load the retain set, if there is one."""
        from ..data import load_records

        if self.retain_dataset_name is None:
            return None
        dataset = load_records(self.retain_dataset_name, self.retain_dataset_config, self.retain_dataset_split)
        if self.max_retain_samples is None:
            return dataset
        return dataset.select(range(min(self.max_retain_samples, len(dataset))))


@dataclass
class UnlearningScriptArguments(RecordScriptArguments):
    """
    [`RecordScriptArguments`] of the unlearning methods.

    Args:
        eval_dataset_name, eval_dataset_config, eval_dataset_split (`str`, *optional*):
            The same for the evaluation set, needed where `eval_strategy` is not `"no"`.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check everything, and print one sample with its counted tokens marked (on a terminal only), the number of
            updates and an estimate of the memory. Loads no weights.
    """

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Evaluation set, needed where `eval_strategy` is not 'no'."}
    )
    eval_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the evaluation set on the Hub."}
    )
    eval_dataset_split: str = field(default="train", metadata={"help": "Split of the evaluation set on the Hub."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check everything, and print one sample with its counted tokens marked (on a terminal only), the "
            "number of updates and an estimate of the memory. Loads no weights."
        },
    )

    def eval_set(self, eval_strategy: IntervalStrategy):
        """Load the evaluation set, if one is needed."""
        from ..data import load_records

        if eval_strategy == "no":
            return None
        if self.eval_dataset_name is None:
            raise ValueError(
                f"`eval_strategy={eval_strategy.value}` needs `eval_dataset_name`. Set that, or `eval_strategy` to 'no'."
            )
        return load_records(self.eval_dataset_name, self.eval_dataset_config, self.eval_dataset_split)


@dataclass
class AugmentedScriptArguments(UnlearningScriptArguments):
    """
    [`UnlearningScriptArguments`] of methods with an augmented model.

    Args:
        augmented_model_name_or_path (`str`, *optional*):
            Augmented model to use instead of making one: path or Hub id of a model or an adapter.
    """

    augmented_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Augmented model to use instead of making one: path or Hub id of a model or an adapter."},
    )


@dataclass
class TemplateScriptArguments(RecordScriptArguments):
    """
    [`RecordScriptArguments`] of the commands by TRL's own trainers, whose configurations don't say how questions are
    put.

    Args:
        system_prompt (`str`, *optional*):
            System message put before questions.
        date_string (`str`, *optional*):
            Date shown to templates that print one.
        question_template (`str`, *optional*):
            Plain format with a `{question}` field, instead of the chat template.
    """

    system_prompt: str | None = field(default=None, metadata={"help": "System message put before questions."})
    date_string: str | None = field(default=None, metadata={"help": "Date shown to templates that print one."})
    question_template: str | None = field(
        default=None,
        metadata={
            "help": "Plain format with a `{question}` field, instead of the chat template: '[INST] {question} [/INST]', say."
        },
    )


@dataclass
class RefusalScriptArguments(TemplateScriptArguments):
    """
    [`TemplateScriptArguments`] of the commands that train on refusals.

    Args:
        refusals_path (`str`):
            Text file of refusals, one a line.
    """

    refusals_path: str | None = field(default=None, metadata={"help": "Text file of refusals, one a line."})

    def refusals(self):
        """Read the refusals."""
        from ..refusals import read_refusals

        if self.refusals_path is None:
            raise ValueError("`refusals_path` is required: a text file with one refusal a line.")
        return read_refusals(self.refusals_path)
