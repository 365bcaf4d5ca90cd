# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Result logs in open-unlearning's schema: `TOFU_EVAL.json` (items and aggregates) and `TOFU_SUMMARY.json` (aggregates).

Its logs are read here, and ours load there: we add keys, never change one. No message in this file holds a question,
an answer or a generation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from .files import read_json, write_json
from .metrics.checks import finite_array, finite_number
from .metrics.utility import MODEL_UTILITY_METRICS


EVAL_FILE = "TOFU_EVAL.json"
SUMMARY_FILE = "TOFU_SUMMARY.json"
METADATA = "metadata"
"""The one key of a log that is not a metric. open-unlearning ignores keys that it does not know."""

TOFU_SPLITS = {40: "forget01", 200: "forget05", 300: "forget10, capped at 300", 400: "forget10"}
"""The forget split that a number of items tells of; locuslab/tofu scores no more than 300."""

_TEXTS_REMEDY = (
    "evaluate it again, or remove the texts (`input`, `ground_truth`, `generation`) to keep the stored scores"
)
_RETAIN_REMEDY = "give the log of the retain-only model evaluated on the same forget split"


class ProbabilityItem(TypedDict):
    """One item of a `*_Prob` metric; a list where the item has several answers (`*_PERT_Prob`)."""

    prob: float | list[float]
    avg_loss: NotRequired[float | list[float]]  # nats per token; absent in `*_Prob_normalised`


class RougeItem(TypedDict):
    """One item of a `*_ROUGE` metric. Texts are there only where the user asked for them."""

    rouge1_recall: float
    rougeL_f1: float
    rougeL_recall: float
    input: NotRequired[str]
    ground_truth: NotRequired[str]
    generation: NotRequired[str]


class ScoreItem(TypedDict):
    """One item of a truth ratio, of a memorization metric or of one half of an attack."""

    score: float


class Metric(TypedDict):
    """One metric. `agg_value` is `None` where it could not be computed; ours then give a `reason`."""

    agg_value: float | None
    value_by_index: NotRequired[dict[str, ProbabilityItem | RougeItem | ScoreItem]]
    reason: NotRequired[str]
    not_read: NotRequired[int]  # true answers that ROUGE can't read, and of which it says 0


class ForgetQualityMetric(Metric):
    """`forget_quality`; `agg_value` is the p-value, the other two are ours."""

    ks_d: NotRequired[float]
    n: NotRequired[int]


class MiaMetric(TypedDict):
    """One membership inference attack; `agg_value` and `auc` are the same number."""

    forget: Metric
    holdout: Metric
    auc: float
    agg_value: float


class Metadata(TypedDict, total=False):
    """How a log of ours came about. No texts, no paths of the machine."""

    model: str  # name of the folder, or Hub id
    adapter_of: str  # name of its base, where the model is an adapter
    forget_split: str  # "forget01", …, or "own data"
    question_key: str
    max_samples: int | None
    max_new_tokens: int
    num_questions: dict[str, int]  # by question set
    backend: str  # of the generations, or "none"
    score_backend: str
    compat: str | None
    log_texts: bool
    dtype: str
    quantization: str | None  # "nf4", "nf4, nested", …
    attention: str | None  # implementation, where one was asked for
    date: str  # ISO 8601, UTC
    versions: dict[str, str]
    seeds: dict[str, int]
    hashes: dict[
        str, str
    ]  # SHA-256 of "weights" (and "adapter"), "data", "forget_set", "holdout_set", "template", "retain_log"


EvalLog = dict[str, Metric | ForgetQualityMetric | MiaMetric | Metadata]
Summary = dict[str, float]


def read_unchecked(path: str | Path) -> dict[str, Any]:
    """
    Read a log as it stands, of an older schema, too.

    Args:
        path (`str` or `Path`):
            A file, or a folder that holds a `TOFU_EVAL.json`.

    Returns:
        `dict`:
            The log.

    Raises:
        [`FileNotFoundError`]: If there is no such file.
        [`ValueError`]: If the file is not JSON or not an object.
    """
    path = Path(path)
    if path.is_dir():
        path = path / EVAL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a {EVAL_FILE}, or a folder that holds one.")
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error} Give a {EVAL_FILE}, or evaluate again.") from None


def read_log(path: str | Path) -> EvalLog:
    """
    Read and validate a `TOFU_EVAL.json`.

    Args:
        path (`str` or `Path`):
            The file, or the folder that holds it.

    Returns:
        `EvalLog`:
            The log.

    Raises:
        [`FileNotFoundError`]: If there is no such file.
        [`ValueError`]: If the file is not JSON, or [`validate_log`] finds a fault.
    """
    log = read_unchecked(path)
    validate_log(log, name=str(path))
    return log


def write_results(output_dir: str | Path, log: EvalLog) -> tuple[Path, Path]:
    """
    Validate a log and write `TOFU_EVAL.json` and `TOFU_SUMMARY.json`. A faulty log overwrites nothing.

    Args:
        output_dir (`str` or `Path`):
            The folder.
        log (`EvalLog`):
            The log.

    Returns:
        `tuple[Path, Path]`:
            The two files.

    Raises:
        [`ValueError`]: If [`validate_log`] finds a fault.
    """
    validate_log(log)
    eval_path, summary_path = Path(output_dir) / EVAL_FILE, Path(output_dir) / SUMMARY_FILE
    write_json(eval_path, dict(sorted(log.items())))
    write_json(summary_path, summarise(log))
    return eval_path, summary_path


def summarise(log: EvalLog) -> Summary:
    """
    The aggregates of a log, less those that only feed others (the nine of model utility, paraphrased and wrong
    answers).

    Args:
        log (`EvalLog`):
            The log.

    Returns:
        `Summary`:
            Aggregate by metric, sorted by name, nulls left out.
    """
    inputs = {*MODEL_UTILITY_METRICS, "ra_Q_A_Prob", "wf_Q_A_Prob"}
    return {
        name: metric["agg_value"]
        for name, metric in sorted(log.items())
        if name != METADATA
        and name not in inputs
        and "_PARA_" not in name
        and "_PERT_" not in name
        and metric["agg_value"] is not None
    }


def ordered_items(by_index: Mapping[str, Any], name: str) -> list[Any]:
    """
    The items of a metric in the order of their indices.

    Args:
        by_index (`Mapping[str, Any]`):
            Items by index, "0" to "n-1" in any order.
        name (`str`):
            Name of the metric, for the message.

    Returns:
        `list`:
            The n items.

    Raises:
        [`ValueError`]: If there is no item, or the indices are not 0 to n-1.
    """
    if not isinstance(by_index, Mapping) or not by_index:
        raise ValueError(f"{name} has no items: evaluate it again.")
    try:
        by_number = {int(index): item for index, item in by_index.items()}
    except ValueError:
        raise ValueError(f"{name} has an index that is not a whole number: indices must be 0 to n-1.") from None
    missing = [index for index in range(len(by_number)) if index not in by_number]
    if missing:
        raise ValueError(
            f"{name} misses items: it has {len(by_number)}, but not index {missing[0]}. Indices must be 0 to n-1; evaluate "
            "it again."
        )
    return [by_number[index] for index in range(len(by_number))]


def item_values(metric: Metric, field: str, name: str) -> np.ndarray:
    """
    One number, or one list of numbers, of each item of a metric, in the order of the indices.

    Args:
        metric (`Metric`):
            A metric with `value_by_index`.
        field (`str`):
            The field of the items, such as `"avg_loss"`.
        name (`str`):
            Name of the metric, for the message.

    Returns:
        `np.ndarray` of shape `[n]` or `[n, k]`:
            The values, all finite.

    Raises:
        [`ValueError`]: If items or values are missing, NaN or infinite, or differ in length.
    """
    items = ordered_items(metric["value_by_index"], name)
    for index, item in enumerate(items):
        if not isinstance(item, Mapping) or field not in item:
            raise ValueError(f"{name} has no `{field}` at index {index}: evaluate it again.")
    return finite_array(f"{name}/{field}", [item[field] for item in items], ndim=(1, 2))


def item_texts(metric: Metric, field: str, name: str) -> list[list[str]] | None:
    """
    The texts of each item of a `*_ROUGE` metric, in the order of the indices.

    Args:
        metric (`Metric`):
            A metric with `value_by_index`.
        field (`str`):
            `"ground_truth"` or `"generation"`.
        name (`str`):
            Name of the metric, for the message.

    Returns:
        `list[list[str]]` or `None`:
            For each item its texts (one, unless the item has several answers), or `None` if the log holds no texts.

    Raises:
        [`ValueError`]: If some items have a text and others none.
    """
    items = ordered_items(metric["value_by_index"], name)
    if not any(field in item for item in items):
        return None
    texts = [item.get(field) for item in items]
    texts = [text if isinstance(text, list) else [text] for text in texts]
    for index, group in enumerate(texts):
        if not all(isinstance(text, str) for text in group):
            raise ValueError(f"{name} has no text in `{field}` at index {index}, but at others: evaluate it again.")
    return texts


def validate_log(log: EvalLog, name: str = "the log") -> None:
    """
    Check that a log is whole: every metric has every item, every number is finite, no empty generation has a ROUGE
    above 0.

    Args:
        log (`EvalLog`):
            The log.
        name (`str`, *optional*, defaults to `"the log"`):
            What to call it in messages, its path for instance.

    Raises:
        [`ValueError`]: Naming the metric, the index and the remedy, at the first fault.
    """
    metrics = {metric: entry for metric, entry in log.items() if metric != METADATA}
    if not metrics:
        raise ValueError(f"{name} has no metrics: give a {EVAL_FILE}.")
    lengths: dict[str, tuple[str, int]] = {}
    for metric, entry in metrics.items():
        if not isinstance(entry, Mapping) or "agg_value" not in entry:
            raise ValueError(
                f"{name}: {metric} is no metric with an `agg_value`. Is it a {SUMMARY_FILE}? Give the {EVAL_FILE} beside it."
            )
        if entry["agg_value"] is not None:
            finite_number(f"{name}: {metric}/agg_value", entry["agg_value"])
        for part, items in metric_parts(metric, entry).items():
            n = _validate_items(items, f"{name}: {part}")
            question_set = _question_set(part)
            first, first_n = lengths.setdefault(question_set, (part, n))
            if n != first_n:
                raise ValueError(
                    f"{name}: {part} has {n} items but {first} has {first_n}, both on the {question_set} set: one of them is "
                    "incomplete; evaluate it again."
                )


def validate_retain_log(log: EvalLog, retain_log: EvalLog) -> None:
    """
    Check that a retain-only model's log was made on the same forget set. Both must be valid on their own.

    Args:
        log (`EvalLog`):
            The log of the model judged.
        retain_log (`EvalLog`):
            The log of the retain-only model.

    Raises:
        [`ValueError`]: If one has no forget truth ratio, or they differ in split, in length or in the questions.
    """
    ours, theirs = (one.get(METADATA, {}) for one in (log, retain_log))
    for name in ("forget_split", "question_key"):
        if name in ours and ours[name] != theirs.get(name, ours[name]):
            raise ValueError(f"The log is of {ours[name]} and the retain log of {theirs[name]}: {_RETAIN_REMEDY}.")
    for name in ("forget_set", "holdout_set"):
        hashes = {one["hashes"].get(name) for one in (ours, theirs) if "hashes" in one} - {None}
        if len(hashes) > 1:
            raise ValueError(f"The log and the retain log are of another {name.replace('_', ' ')}: {_RETAIN_REMEDY}.")
    metric = "forget_Q_A_ROUGE"
    validate_same_questions(
        *(forget_length(one, name) for one, name in ((log, "The log"), (retain_log, "The retain log"))),
        *(
            item_texts(one[metric], "ground_truth", metric) if has_items(one, metric) else None
            for one in (log, retain_log)
        ),
    )


def validate_same_questions(
    n: int, n_retain: int, references: list[list[str]] | None, retain_references: list[list[str]] | None
) -> None:
    """
    Check that two logs score the same forget set, as far as they tell.

    Args:
        n (`int`):
            Number of forget items of the model judged.
        n_retain (`int`):
            The same for the retain-only model.
        references (`list[list[str]]` or `None`):
            Reference answers of the first, if its log has texts.
        retain_references (`list[list[str]]` or `None`):
            Reference answers of the second, if its log has texts.

    Raises:
        [`ValueError`]: If the lengths differ, or more than half of the reference answers.
    """
    if n != n_retain:
        one, other = (
            f"{length} ({TOFU_SPLITS[length]})" if length in TOFU_SPLITS else length for length in (n, n_retain)
        )
        raise ValueError(f"The log has {one} forget items and the retain log {other}: {_RETAIN_REMEDY}.")
    if references and retain_references:
        # A tokenizer's round trip may change a space here or there; another split changes nearly every answer.
        different = sum(one != other for one, other in zip(references, retain_references, strict=True))
        if different > n / 2:
            raise ValueError(f"{different} of {n} reference answers differ in log and retain log: {_RETAIN_REMEDY}.")


def validate_generations(generations: list[list[str]], rouge: np.ndarray, name: str) -> None:
    """
    Check that an empty generation has no score: where texts were lost, ROUGE can't be recomputed from them.

    Args:
        generations (`list[list[str]]` of length n):
            The generated texts of each item.
        rouge (`np.ndarray` of shape `[n]` or `[n, k]`):
            Stored ROUGE-L recall of each text.
        name (`str`):
            Name of the metric, for the message.

    Raises:
        [`ValueError`]: If an empty generation has a ROUGE above 0.
    """
    empty = np.array([not text.strip() for group in generations for text in group])
    scored = np.flatnonzero(empty & (rouge.ravel() > 0))
    if len(scored):
        index = int(scored[0]) // len(generations[0])
        raise ValueError(
            f"{name} has {len(scored)} empty generation(s) with a ROUGE above 0, the first at index {index}: {_TEXTS_REMEDY}."
        )


def has_items(log: EvalLog, metric: str) -> bool:
    """Does the log have this metric, with items?"""
    return "value_by_index" in log.get(metric, {})


def aggregate(log: EvalLog, metric: str) -> float | None:
    """The aggregate of a metric, `None` where the log has it not or as a null."""
    return log.get(metric, {}).get("agg_value")


def forget_length(log: EvalLog, name: str) -> int:
    """Number of items of the forget set, or a `ValueError` if the log has no forget truth ratio."""
    if not has_items(log, "forget_truth_ratio"):
        raise ValueError(f"{name} has no forget_truth_ratio with items: evaluate that metric.")
    return len(log["forget_truth_ratio"]["value_by_index"])


def metric_parts(metric: str, entry: Metric | MiaMetric) -> dict[str, Metric]:
    """The parts of a metric that have items, by name: itself, or the two halves of an attack, or none."""
    if "value_by_index" in entry:
        return {metric: entry}
    return {f"{metric}/{half}": entry[half] for half in ("forget", "holdout") if has_items(entry, half)}


def _question_set(part: str) -> str:
    if part.endswith("/holdout"):
        return "holdout"
    prefix = part.split("_")[0]
    return prefix if prefix in ("retain", "ra", "wf") else "forget"


def _validate_items(metric: Metric, name: str) -> int:
    """Check the items of one part and return their number."""
    if metric.get("agg_value") is not None:
        finite_number(f"{name}/agg_value", metric["agg_value"])
    items = ordered_items(metric["value_by_index"], name)
    known = ("prob", "avg_loss", "score", "rouge1_recall", "rougeL_f1", "rougeL_recall")
    fields = [field for field in known if isinstance(items[0], Mapping) and field in items[0]]
    if not fields:
        raise ValueError(f"{name} has no known value at index 0: expected one of {', '.join(known)}.")
    values = {field: item_values(metric, field, name) for field in fields}
    if "rougeL_recall" in values:
        generations = item_texts(metric, "generation", name)
        if generations is not None:
            validate_generations(generations, values["rougeL_recall"], name)
    return len(items)
