# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What is asked: TOFU's question sets, or the user's own, as token ids."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .metrics import has_rouge_words
from .prompts import OpenUnlearningTemplate, Template, TokenizedAnswer
from .records import (
    LOCAL_SUFFIXES,
    check_answers,
    check_columns,
    column_names,
    is_tokenized_here,
    labels_of,
    load_records,
    tokenize_record,
)


FORGET_SPLITS = ("forget01", "forget05", "forget10")

Row = Mapping[str, Any]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class QuestionSet:
    """
    Questions with the answers to score, all lists of one length n.

    Attributes:
        name (`str`):
            `"forget"`, `"retain"`, `"ra"` (real authors), `"wf"` (world facts) or `"holdout"`.
        answers (`list[TokenizedAnswer]`):
            The true answers.
        paraphrased (`list[TokenizedAnswer]`, *optional*):
            The true answers in other words.
        perturbed (`list[list[TokenizedAnswer]]`, *optional*):
            Wrong answers, equally many for each question.
        prompts (`list[list[int]]`, *optional*):
            What the model continues. `None` where there is no question to ask.
        questions, references (`list[str]`):
            Texts of questions and true answers: for ROUGE and zlib, never written unless asked for.
    """

    name: str
    answers: list[TokenizedAnswer]
    paraphrased: list[TokenizedAnswer] | None
    perturbed: list[list[TokenizedAnswer]] | None
    prompts: list[list[int]] | None
    questions: list[str]
    references: list[str]

    @cached_property
    def not_read_by_rouge(self) -> list[int]:
        """The true answers of whose letters ROUGE knows few or none."""
        return [i for i, reference in enumerate(self.references) if not has_rouge_words(reference)]

    @property
    def is_read_by_rouge(self) -> bool:
        """Whether ROUGE says something of the set: it can read most of its true answers."""
        return len(self.not_read_by_rouge) < len(self.references) / 2

    def requests(self) -> list[TokenizedAnswer]:
        """All answers to score."""
        return [*self.answers, *(self.paraphrased or []), *(a for group in self.perturbed or [] for a in group)]

    def answers_of(self, index: int) -> list[TokenizedAnswer]:
        """All answers to score after one question."""
        right = [some[index] for some in (self.answers, self.paraphrased) if some is not None]
        return right + (self.perturbed[index] if self.perturbed is not None else [])


def load_tofu(dataset_name: str, forget_split: str, max_samples: int | None = None) -> dict[str, list[Row]]:
    """
    Load TOFU's question sets.

    Args:
        dataset_name (`str`):
            Hub id, or a folder with a JSONL, JSON, CSV or Parquet file for each configuration.
        forget_split (`str`):
            `"forget01"`, `"forget05"` or `"forget10"`.
        max_samples (`int`, *optional*):
            Take the first rows of each set only.

    Returns:
        `dict[str, list[Row]]`:
            Rows by question set. `"holdout"` is left out where the data have none: it is not part of TOFU's first
            release.

    Raises:
        [`ValueError`]: If the split is unknown.
        [`FileNotFoundError`]: If a file is missing.
    """
    if forget_split not in FORGET_SPLITS:
        raise ValueError(f"`forget_split={forget_split!r}` is not one of {', '.join(FORGET_SPLITS)}.")
    configurations = {
        "forget": f"{forget_split}_perturbed",
        "retain": "retain_perturbed",
        "ra": "real_authors_perturbed",
        "wf": "world_facts_perturbed",
        "holdout": forget_split.replace("forget", "holdout"),
    }
    sets = {}
    for name, configuration in configurations.items():
        rows = load_configuration(dataset_name, configuration, required=name != "holdout")
        if rows is not None:
            sets[name] = rows[:max_samples]
    return sets


def load_configuration(dataset_name: str, configuration: str, required: bool = True) -> list[Row] | None:
    """
    Load one of TOFU's configurations.

    Args:
        dataset_name (`str`):
            Hub id, or a folder with a file for each configuration.
        configuration (`str`):
            Such as `"forget05"`, `"full"` or `"real_authors_perturbed"`.
        required (`bool`, *optional*, defaults to `True`):
            Whether to raise where it is missing.

    Returns:
        `list[Row]` or `None`:
            Its rows.
    """
    folder = Path(dataset_name).expanduser()
    if not folder.is_dir():
        if folder.suffix in LOCAL_SUFFIXES or folder.is_file():
            raise ValueError(
                f"`dataset_name={dataset_name!r}` is a file. Give a Hub id or the folder of TOFU's files; for records of "
                "your own use `forget_dataset` and `retain_dataset`."
            )
        if dataset_name.startswith(("/", ".", "~")):
            raise FileNotFoundError(
                f"`dataset_name={dataset_name!r}` does not exist. Give a Hub id or the folder of TOFU's files."
            )
        try:
            return load_dataset(dataset_name, configuration, split="train").to_list()
        except ValueError as error:
            if required:
                raise
            if "BuilderConfig" not in str(error):  # they may have it: without the Hub, its cache has not
                logger.warning(f"{configuration} can't be loaded, and is left out: {str(error).splitlines()[0]}")
            return None
    paths = [path for path in (folder / f"{configuration}{suffix}" for suffix in LOCAL_SUFFIXES) if path.is_file()]
    if paths:
        return load_records(str(paths[0])).to_list()
    if required:
        raise FileNotFoundError(
            f"`dataset_name={dataset_name!r}` has no {configuration}.jsonl. Needed are the files of locuslab/TOFU, for the "
            "evaluation the `_perturbed` ones; for records of your own use `forget_dataset` and `retain_dataset`."
        )
    return None


def ends_of_answers(
    tokenizer: PreTrainedTokenizerBase, eos_token_id: int | list[int] | None, answers: Iterable[TokenizedAnswer]
) -> list[int]:
    """
    Tokens that end an answer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, with an end token of its own or none.
        eos_token_id (`int` or `list[int]`, *optional*):
            The model's end tokens.
        answers (`Iterable[TokenizedAnswer]`):
            Answers with the special token that the template puts after them.

    Returns:
        `list[int]`:
            Token ids in order.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {tokenizer.eos_token_id, *(eos_token_id if isinstance(eos_token_id, list) else [eos_token_id])}
    ends |= {answer.answer_ids[-1] for answer in answers} & special
    return sorted(ends - {None})


def tofu_questions(
    name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: Template, question_key: str
) -> QuestionSet:
    """
    Tokenise one of TOFU's question sets.

    Args:
        name (`str`):
            Name of the set.
        rows (`Sequence[Row]`):
            Rows with `question`, `answer` and, but for the holdout set, wrong answers (and a paraphrased one).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        template ([`Template`]):
            How questions are put.
        question_key (`str`):
            Column of the question in the forget and the retain set.

    Returns:
        [`QuestionSet`]:
            The set.

    Raises:
        [`ValueError`]: If a column or a text is missing; it names the row.
    """
    key = question_key if name in ("forget", "retain") else "question"
    columns = [key, "answer"]
    columns += ["paraphrased_answer"] if name in ("forget", "retain") else []
    columns += ["perturbed_answer"] if name != "holdout" else []
    _check_texts(rows, columns, name)
    return _question_answer_set(name, rows, key, set(columns), tokenizer, template)


def own_questions(
    name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: Template
) -> QuestionSet:
    """
    Tokenise records of the user's, in any format that the trainer takes by default (plain texts in a column `text`).

    Args:
        name (`str`):
            `"forget"`, `"retain"` or `"holdout"`.
        rows (`Sequence[Row]`):
            Records. With TOFU's columns beside `question` and `answer` they give a truth ratio, too.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        template ([`Template`]):
            How questions are put.

    Returns:
        [`QuestionSet`]:
            The set; without prompts where the records are plain texts.

    Raises:
        [`ValueError`]: If the format is unknown or a record is empty; it names the row.
    """
    check_columns(rows[0], "text", name)
    check_answers(rows, name)
    if {"question", "answer"} <= rows[0].keys():
        columns = {"question", "answer"} | ({"paraphrased_answer", "perturbed_answer"} & rows[0].keys())
        _check_texts(rows, sorted(columns), name)
        return _question_answer_set(name, rows, "question", columns, tokenizer, template)
    if isinstance(template, OpenUnlearningTemplate):
        raise ValueError(f"The {name} dataset needs the columns question and answer for `compat`.")
    answers = [_tokenize_numbered(row, index, name, tokenizer, template) for index, row in enumerate(rows)]
    references = [tokenizer.decode(answer.answer_ids, skip_special_tokens=True).strip() for answer in answers]
    if "" in references:
        raise ValueError(
            f"Row {references.index('')} of the {name} dataset: nothing of its text is counted. Remove it."
        )
    is_plain_text = not is_tokenized_here(rows[0]) and "input_ids" not in rows[0]
    return QuestionSet(
        name=name,
        answers=answers,
        paraphrased=None,
        perturbed=None,
        prompts=None if is_plain_text else [list(answer.prompt_ids) for answer in answers],
        questions=[tokenizer.decode(answer.prompt_ids, skip_special_tokens=True) for answer in answers],
        references=references,
    )


def _question_answer_set(
    name: str,
    rows: Sequence[Row],
    key: str,
    columns: set[str],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> QuestionSet:
    def tokenize(index: int, row: Row, column: str, answer: str) -> TokenizedAnswer:
        tokens = template.tokenize(tokenizer, row[key], answer)
        if not tokens.answer_ids:
            raise ValueError(
                f"Row {index} of the {name} set has no counted token in `{column}`: shorten or remove it."
            )
        return tokens

    def all_of(column: str) -> list[TokenizedAnswer] | None:
        if column not in columns:
            return None
        return [tokenize(index, row, column, row[column]) for index, row in enumerate(rows)]

    perturbed = None
    if "perturbed_answer" in columns:
        perturbed = [
            [tokenize(index, row, "perturbed_answer", answer) for answer in row["perturbed_answer"]]
            for index, row in enumerate(rows)
        ]
    answers = all_of("answer")
    references = [row["answer"].strip() for row in rows]
    return QuestionSet(
        name=name,
        answers=answers,
        paraphrased=all_of("paraphrased_answer"),
        perturbed=perturbed,
        prompts=[template.prompt(tokenizer, row[key], answer) for row, answer in zip(rows, answers, strict=True)],
        questions=[row[key] for row in rows],
        references=references,
    )


def _check_texts(rows: Sequence[Row], columns: Sequence[str], name: str) -> None:
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        raise ValueError(
            f"The {name} set has no column `{missing[0]}`; it has {', '.join(column_names(rows[0]))}. Give the "
            "`_perturbed` files of TOFU, or another `question_key`."
        )
    for index, row in enumerate(rows):
        for column in columns:
            value = row.get(column)
            texts = value if column == "perturbed_answer" and isinstance(value, list) else [value]
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(
                    f"Row {index} of the {name} set has an empty or missing `{column}` (rows count from 0). Fill it in or "
                    "remove the row."
                )
        if "perturbed_answer" in columns:
            wrong = [row["perturbed_answer"] for row in (row, rows[0])]
            if not all(isinstance(answers, list) for answers in wrong) or len(wrong[0]) != len(wrong[1]):
                raise ValueError(
                    f"Row {index} of the {name} set needs a list of {len(wrong[1])} texts in `perturbed_answer`, as row 0 "
                    "has: the truth ratio averages over equally many wrong answers."
                )


def _tokenize_numbered(
    row: Row, index: int, name: str, tokenizer: PreTrainedTokenizerBase, template: Template
) -> TokenizedAnswer:
    try:
        if is_tokenized_here(row):
            return tokenize_record(row, tokenizer, template)
        if "input_ids" in row:
            ids, labels = row["input_ids"], labels_of(row)
            # The first token of a sequence has nothing before it that could predict it.
            start = next((i for i, label in enumerate(labels) if i > 0 and label != -100), len(ids))
        else:
            text, end = row["text"], tokenizer.eos_token
            ids, start = tokenizer(text if text.endswith(end) else text + end)["input_ids"], 1  # as TRL does
        if start >= len(ids):
            raise ValueError("it has no counted token")
        if "input_ids" in row and -100 in labels[start:]:
            raise ValueError(
                "it has tokens that are not counted (-100) after counted ones; make a record of each part"
            )
        return TokenizedAnswer(list(ids[:start]), list(ids[start:]))
    except ValueError as error:
        raise ValueError(f"Row {index} of the {name} dataset: {error}") from None
