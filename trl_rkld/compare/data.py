# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Which rows of TOFU each model learns, forgets and keeps."""

from datasets import Dataset

from unlearn_eval.questions import load_configuration


_RETAIN_SETS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


def retain_set(dataset_name: str, split: str, max_retain_samples: int | None) -> Dataset:
    """
    The rows that stand for the retain set of a split.

    Args:
        dataset_name (`str`):
            TOFU: Hub id, or a folder with its files.
        split (`str`):
            Forget split.
        max_retain_samples (`int`, *optional*):
            First rows of `full`, among which are those of `retain_perturbed`: the retain set of every split, also
            where the target has learnt more than these and the split. If `None`, the split's own retain set.

    Returns:
        [`~datasets.Dataset`]:
            Rows with `question` and `answer`.
    """
    if max_retain_samples is None:
        return Dataset.from_list(load_configuration(dataset_name, _RETAIN_SETS[split]))
    rows = load_configuration(dataset_name, "full")[:max_retain_samples]
    if any(row in rows for row in load_configuration(dataset_name, split)):
        raise ValueError(f"`max_retain_samples={max_retain_samples}` reaches into {split}: give a smaller number.")
    return Dataset.from_list(rows)


def training_sets(
    dataset_name: str, forget_split: str | None, retain_split: str | None, max_retain_samples: int | None
) -> dict[str, Dataset]:
    """
    What a model is trained on: target, retain-only or augmented model, or one that unlearns.

    Args:
        dataset_name (`str`):
            TOFU: Hub id, or a folder with its files.
        forget_split (`str`, *optional*):
            Forget split; none for a retain-only model.
        retain_split (`str`, *optional*):
            Forget split whose retain set is meant; none for an augmented model, or where no retain term is.
        max_retain_samples (`int`, *optional*):
            See [`retain_set`].

    Returns:
        `dict[str, Dataset]`:
            `"forget"` and `"retain"`, as far as they are asked for.
    """
    sets = {}
    if forget_split is not None:
        sets["forget"] = Dataset.from_list(load_configuration(dataset_name, forget_split))
    if retain_split is not None:
        sets["retain"] = retain_set(dataset_name, retain_split, max_retain_samples)
    return sets
