# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Forget and retain sets as the trainers want them: checked, counted tokens only, one retained sample a forget sample."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from unlearn_eval.prompts import Template
from unlearn_eval.records import load_records, tokenize_record


__all__ = ["DataCollatorForUnlearning", "RetainSampler", "load_records", "tokenize_row"]


def in_memory(dataset: Dataset) -> Dataset:
    """Copy a data set away from the disk cache, so that what is derived from it is not cached on disk either."""
    # Types that are inferred anew may not fit, and Arrow's errors quote values.
    return Dataset.from_list(dataset.to_list(), dataset.features) if dataset.cache_files else dataset


def tokenize_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template) -> dict[str, list[int]]:
    """
    Tokenise a record for training.

    Args:
        row (`dict`):
            Row with `question` and `answer`, `messages`, or `prompt` and `completion`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        template ([`~unlearn_eval.prompts.Template`]):
            How questions are put.

    Returns:
        `dict`:
            `input_ids`, and `labels` with `-100` where a token is not counted.
    """
    tokens = tokenize_record(row, tokenizer, template)
    return {
        "input_ids": tokens.prompt_ids + tokens.answer_ids,
        "labels": [-100] * len(tokens.prompt_ids) + tokens.answer_ids,
    }


def tokenize_numbered_row(
    row: dict[str, Any], index: int, name: str, tokenizer: PreTrainedTokenizerBase, template: Template
) -> dict[str, list[int]]:
    """[`tokenize_row`], with the number of the row in the messages of errors."""
    try:
        return tokenize_row(row, tokenizer, template)
    except ValueError as error:
        raise ValueError(f"Row {index} of the {name} dataset: {error}") from None


def tokenize_rows(
    rows: Iterable[dict[str, Any]],
    name: str,
    max_length: int | None,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> list[dict[str, list[int]]]:
    """[`tokenize_numbered_row`] for all rows of a data set, and [`check_rows`] of what comes of it."""
    tokenized = [tokenize_numbered_row(row, index, name, tokenizer, template) for index, row in enumerate(rows)]
    check_rows(tokenized, max_length, name)
    return tokenized


def check_rows(rows: Iterable[dict[str, Any]], max_length: int | None, name: str) -> None:
    """
    Raise, with the number of the row and never its text, where nothing is counted or the end would be cut off.

    Args:
        rows (`Iterable[dict]`):
            Rows with `input_ids` and `labels`.
        max_length (`int`, *optional*):
            Longest sequence, in tokens.
        name (`str`):
            Name of the data set, for the message.
    """
    for index, row in enumerate(rows):
        check_row(row, index, max_length, name)


def check_row(row: dict[str, Any], index: int, max_length: int | None, name: str) -> dict[str, Any]:
    """[`check_rows`] for the one row at `index` (`int`), which is returned."""
    length = len(row["input_ids"])
    if max_length is not None and length > max_length:
        raise ValueError(
            f"Row {index} of the {name} dataset has {length} tokens, so `max_length={max_length}` would cut its "
            f"answer off. Raise `max_length` to at least {length}, or shorten or split the record."
        )
    if all(label == -100 for label in row["labels"][1:]):
        raise ValueError(
            f"Row {index} of the {name} dataset has no counted token (an empty answer?). Fill it in or remove it."
        )
    return row


def check_overlap(forget: Dataset, retain: Dataset) -> None:
    """Raise where a record stands in both sets: it can't be forgotten and kept."""
    kept = {tuple(ids): index for index, ids in enumerate(retain["input_ids"])}
    both = [(i, kept[tuple(ids)]) for i, ids in enumerate(forget["input_ids"]) if tuple(ids) in kept]
    if both:
        raise ValueError(
            f"{len(both)} record(s) stand in the forget set and in `retain_dataset`, the first as row {both[0][0]} and "
            f"row {both[0][1]}. Remove them from one of the two."
        )


class RetainSampler:
    """
    Which retained sample goes with a forget sample: a pure function of (seed, epoch, index), so the same with any
    number of processes or workers and after a resume. Walks through shuffles of the retain set, so that each of its
    samples is drawn before any is drawn again.

    Args:
        seed (`int`):
            Seed of the shuffles.
        num_forget (`int`):
            Size of the forget set.
        num_retain (`int`):
            Size of the retain set.
    """

    def __init__(self, seed: int, num_forget: int, num_retain: int):
        self.seed, self.num_forget, self.num_retain = seed, num_forget, num_retain
        self._shuffle = functools.lru_cache(maxsize=2)(self._new_shuffle)

    def __call__(self, epoch: int, index: int) -> int:
        """Index of the retained sample for forget sample `index` (`int`) in epoch `epoch` (`int`)."""
        round_, position = divmod(epoch * self.num_forget + index, self.num_retain)
        return int(self._shuffle(round_)[position])

    def _new_shuffle(self, round_: int) -> np.ndarray:
        return np.random.default_rng([self.seed, round_]).permutation(self.num_retain)


class DataCollatorForUnlearning(DataCollatorForLanguageModeling):
    """TRL's collator, plus `sample_id` of shape `(batch_size,)`: the key of a sample's cached teacher states."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call(examples)
        if "sample_id" in examples[0]:
            output["sample_id"] = torch.tensor([example["sample_id"] for example in examples])
        return output
