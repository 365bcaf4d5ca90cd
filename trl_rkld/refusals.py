# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Refusals in the place of the answers to forget: read from a text file, one a line, and drawn for each record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from unlearn_eval.records import check_answers


def read_refusals(path: str) -> list[str]:
    """
    Read refusals from a text file.

    Args:
        path (`str`):
            UTF-8 text, one refusal a line. Blank lines, and blanks around a refusal, are left out.

    Returns:
        `list[str]`:
            The refusals, in the file's order.

    Raises:
        [`ValueError`] or [`OSError`]: If the file is missing, empty or not UTF-8.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"`refusals_path={path!r}` is not a file. Name a text file with one refusal a line.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"`refusals_path={path!r}` is not UTF-8 text. Save it as UTF-8.") from None
    refusals = [line.strip() for line in lines if line.strip()]
    if not refusals:
        raise ValueError(f"`refusals_path={path!r}` holds no refusal. Write some into it, one a line.")
    return refusals


def draw_refusal(refusals: Sequence[str], seed: int, index: int) -> str:
    """
    The refusal that goes with a record: a pure function of seed and index, whatever the number of records.

    Args:
        refusals (`Sequence[str]`):
            The refusals.
        seed (`int`):
            Seed of the run.
        index (`int`):
            Row of the record.

    Returns:
        `str`:
            One of the refusals, each as likely as the others.
    """
    return refusals[np.random.default_rng([seed, index]).integers(len(refusals))]


def question_answers(dataset: Dataset, name: str) -> list[dict[str, Any]]:
    """
    Rows of a data set of questions and answers, checked.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data set.
        name (`str`):
            What it is called in messages: `"forget"` or `"retain"`.

    Returns:
        `list[dict]`:
            Rows with `question` and `answer`.

    Raises:
        [`ValueError`]: If a column is missing, or a question or an answer blank.
    """
    if not {"question", "answer"} <= set(dataset.column_names):
        raise ValueError(
            f"The {name} dataset has no columns `question` and `answer`, which refusals (`refusals_path`) need: a "
            "refusal answers a question in the answer's place. Rename its columns, or write the records so."
        )
    rows = dataset.select_columns(["question", "answer"]).to_list()
    check_answers(rows, name)
    return rows


def refused(rows: Sequence[dict[str, Any]], refusals: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """
    Records whose answers are refusals.

    Args:
        rows (`Sequence[dict]`):
            Rows with `question` and `answer`.
        refusals (`Sequence[str]`):
            The refusals.
        seed (`int`):
            Seed of the run.

    Returns:
        `list[dict]`:
            The questions, each with its refusal as `answer`.
    """
    return [
        {"question": row["question"], "answer": draw_refusal(refusals, seed, index)} for index, row in enumerate(rows)
    ]
