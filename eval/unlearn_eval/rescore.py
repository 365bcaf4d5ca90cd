# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Recompute every aggregate of a result log from its per-item values; no model needed.

Reads open-unlearning's `TOFU_EVAL.json` and the `eval_log_aggregated.json` of locuslab/tofu, the retired evaluator.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

from .documents import markdown_table
from .metrics import (
    MODEL_UTILITY_METRICS,
    RETAIN_UTILITY_METRICS,
    answer_probability,
    auc,
    closer_to_1_better,
    explain_zero,
    forget_quality,
    mean_over_items,
    model_utility,
    option_normalised_probability,
    privleak,
    prob_mean,
    retain_utility,
    rouge_scores,
    true_better,
    truth_ratio,
)
from .metrics.checks import finite_array, same_length
from .metrics.truth_ratio import ForgetQuality
from .results import (
    METADATA,
    EvalLog,
    has_items,
    item_texts,
    item_values,
    metric_parts,
    ordered_items,
    validate_generations,
    validate_log,
    validate_retain_log,
    validate_same_questions,
)


LEGACY_TASKS = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "ra",
    "eval_real_world_wo_options.json": "wf",
}
"""The four parts of a legacy log and the prefix of open-unlearning's metrics for the same questions."""

# These attacks score in 32 bits and the reference averages their scores as such; it takes all other means in 64 bits.
MEAN_IN_32_BITS = ("mia_min_k/", "mia_min_k_plus_plus/", "mia_gradnorm/")


class Row(TypedDict):
    """One aggregate, old and new."""

    stored: float | None
    recomputed: float | None
    deviation: NotRequired[float]  # absolute, where both are there
    item_deviation: NotRequired[float]  # largest of the per-item values, where they too can be recomputed
    n: NotRequired[int]
    aggregation: NotRequired[str]
    note: NotRequired[str]  # why a value is absent, or zero, or other than one may think


class Rescored(TypedDict):
    """Every aggregate of a log, old and new."""

    format: Literal["open_unlearning", "tofu_legacy"]
    rows: dict[str, Row]
    forget_quality: ForgetQuality | None
    max_deviation: float | None


def rescore(eval_log: Mapping[str, Any], retain_log: Mapping[str, Any] | None = None) -> Rescored:
    """
    Recompute every aggregate of a log from its per-item values.

    ROUGE is recomputed from the texts where the log has them, truth ratios and normalised probabilities from the
    losses and probabilities of the single answers. A legacy log stores no aggregates: its rows take open-unlearning's
    names, use the formulas of locuslab/tofu@bdc209e (no guards), and give those that in-training evaluation there
    reports under `*_arithmetic` besides.

    Args:
        eval_log (`Mapping[str, Any]`):
            A `TOFU_EVAL.json` or a legacy `eval_log_aggregated.json`, loaded ([`results.read_unchecked`]).
        retain_log (`Mapping[str, Any]`, *optional*):
            The log of the retain-only model, in the same format: forget quality and privacy leakage need it.

    Returns:
        `Rescored`:
            A row for each aggregate (`stored`, `recomputed`, their `deviation`), forget quality with D and n, and the
            largest deviation. `recomputed` is `None`, with a `note`, where the log lacks what the metric needs.

    Raises:
        [`ValueError`]: If a log is neither of the two formats, items are missing, or the retain log is of another
            format, split or length.
    """
    legacy = is_legacy(eval_log)
    if retain_log is not None and is_legacy(retain_log) != legacy:
        raise ValueError(
            f"The {'log' if legacy else 'retain log'} is a legacy one (locuslab/tofu), the other is not: give both in one "
            "format."
        )
    rows, quality = (_rescore_legacy if legacy else _rescore_open_unlearning)(eval_log, retain_log)
    deviations = [row["deviation"] for row in rows.values() if "deviation" in row]
    return Rescored(
        format="tofu_legacy" if legacy else "open_unlearning",
        rows=rows,
        forget_quality=quality,
        max_deviation=max(deviations, default=None),
    )


def is_legacy(log: Mapping[str, Any]) -> bool:
    """Is this an `eval_log_aggregated.json` of locuslab/tofu?"""
    return any(task in log for task in LEGACY_TASKS)


def format_table(rescored: Rescored) -> str:
    """
    A markdown table of stored and recomputed aggregates, readable as plain text too.

    Args:
        rescored (`Rescored`):
            Output of [`rescore`].

    Returns:
        `str`:
            The table, ending in a newline.
    """
    # Field, heading, number format and alignment of each column after the first.
    columns = (
        ("stored", "stored", ".6g", ">"),
        ("recomputed", "recomputed", ".6g", ">"),
        ("deviation", "deviation", ".1e", ">"),
        ("item_deviation", "per item", ".1e", ">"),
        ("n", "n", "d", ">"),
        ("note", "note", "", "<"),
    )
    cells = [["metric", *(heading for _, heading, _, _ in columns)]]
    for name, row in sorted(rescored["rows"].items()):
        numbers = ("-" if row.get(field) is None else format(row[field], form) for field, _, form, _ in columns)
        cells.append([name, *numbers])
    return markdown_table(cells, ["<", *(align for *_, align in columns)])


def _row(stored: float | None, recomputed: float | None, **details: Any) -> Row:
    """A row with its deviation; details that are `None` are left out."""
    row = Row(stored=stored, recomputed=recomputed)
    row.update({key: value for key, value in details.items() if value is not None})
    if stored is not None and recomputed is not None:
        row["deviation"] = abs(stored - recomputed)
    return row


def _largest_difference(old: np.ndarray, new: np.ndarray) -> float:
    return float(np.abs(old - new).max())


def _rescore_open_unlearning(log: EvalLog, retain_log: EvalLog | None) -> tuple[dict[str, Row], ForgetQuality | None]:
    validate_log(log)
    if retain_log is not None:
        validate_log(retain_log, name="the retain log")
        validate_retain_log(log, retain_log)
    rows: dict[str, Row] = {}
    for metric, entry in log.items():
        if metric == METADATA:
            continue
        for part, items in metric_parts(metric, entry).items():
            rows[part] = _item_row(log, part, items)
        if _has_attack(log, metric):
            rows[metric] = _attack_row(metric, entry)
        elif metric not in rows:
            rows[metric] = _row(entry["agg_value"], None, note="no per-item values in the log")

    quality = None
    stored = log.get("forget_quality", {}).get("agg_value")
    if retain_log is None:
        rows["forget_quality"] = _row(stored, None, note="needs the retain-only model's log")
    else:
        quality = forget_quality(*(_truth_ratios(one, "forget_truth_ratio") for one in (log, retain_log)))
        rows["forget_quality"] = _forget_quality_row(stored, quality)
    rows |= _utility_rows(
        rows, {name: log[name]["agg_value"] for name in ("model_utility", "retain_utility") if name in log}
    )
    if "privleak" in log:
        rows["privleak"] = _privleak_row(log, retain_log)
    return rows, quality


def _item_row(log: EvalLog, part: str, metric: Any) -> Row:
    """The row of one metric, or of one half of an attack, that has items."""
    stored = metric.get("agg_value")
    n = len(metric["value_by_index"])
    fields = ordered_items(metric["value_by_index"], part)[0]
    if part.lower().endswith("truth_ratio"):
        return _truth_ratio_row(log, part, stored, n)
    if "rougeL_recall" in fields:
        return _rouge_row(part, metric, stored, n)
    if "prob" in fields:
        return _probability_row(log, part, stored, n)
    scores = item_values(metric, "score", part)
    theirs_in_32_bits = METADATA not in log and part.startswith(MEAN_IN_32_BITS)
    mean = float(scores.astype(np.float32).mean()) if theirs_in_32_bits else mean_over_items(scores)
    return _row(stored, mean, n=n, aggregation="mean over items")


def _probability_row(log: EvalLog, part: str, stored: float | None, n: int) -> Row:
    values, item_deviation = item_values(log[part], "prob", part), None
    right, wrong = part.replace("_Prob_normalised", "_Prob"), part.replace("_Prob_normalised", "_PERT_Prob")
    if part.endswith("_Prob_normalised") and has_items(log, right) and has_items(log, wrong):
        old = values
        values = option_normalised_probability(*(item_values(log[name], "prob", name) for name in (right, wrong)))
        item_deviation = _largest_difference(old, values)
    return _row(stored, mean_over_items(values), n=n, aggregation="mean over items", item_deviation=item_deviation)


def _rouge_row(part: str, metric: Any, stored: float | None, n: int) -> Row:
    old = item_values(metric, "rougeL_recall", part)
    references, generations = (item_texts(metric, field, part) for field in ("ground_truth", "generation"))
    if references is None or generations is None:
        note = "mean of the stored per-item values: the log holds no texts"
        return _row(stored, mean_over_items(old), n=n, aggregation="mean over items", note=note)
    scores = rouge_scores([*chain(*references)], [*chain(*generations)])
    new = {field: np.array([score[field] for score in scores]) for field in scores[0]}
    stored_fields = ordered_items(metric["value_by_index"], part)[0].keys() & new.keys()
    item_deviation = max(
        _largest_difference(item_values(metric, field, part).ravel(), new[field]) for field in stored_fields
    )
    recomputed = mean_over_items(new["rougeL_recall"].reshape(old.shape))
    return _row(stored, recomputed, n=n, aggregation="mean over items", item_deviation=item_deviation)


def _losses(log: EvalLog, part: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Losses of the right and of the wrong answers behind a truth ratio, if the log has them."""
    prefix = part.split("_")[0]
    right = f"{prefix}_Q_A_Prob" if prefix in ("ra", "wf") else f"{prefix}_Q_A_PARA_Prob"
    wrong = f"{prefix}_Q_A_PERT_Prob"
    if not (has_items(log, right) and has_items(log, wrong)):
        return None
    losses = item_values(log[right], "avg_loss", right), item_values(log[wrong], "avg_loss", wrong)
    # The reference averages several right answers, too; TOFU has one.
    return losses[0].reshape(len(losses[0]), -1).mean(axis=1), losses[1].reshape(len(losses[1]), -1)


def _truth_ratios(log: EvalLog, part: str) -> np.ndarray:
    losses = _losses(log, part)
    return item_values(log[part], "score", part) if losses is None else truth_ratio(*losses)


def _truth_ratio_row(log: EvalLog, part: str, stored: float | None, n: int) -> Row:
    ratios = _truth_ratios(log, part)
    aggregate = closer_to_1_better if part.startswith("forget") else true_better
    recomputed = aggregate(ratios)
    losses = _losses(log, part)
    if losses is None:
        note = "from the stored per-item values: the log holds no losses of the single answers"
        return _row(stored, recomputed, n=n, aggregation=aggregate.__name__, note=note)
    # A log does not say which aggregation made it, and open-unlearning offers a third one.
    paper = prob_mean(truth_ratio(*losses, guard=0.0))
    if stored is not None and abs(stored - paper) < 1e-6 < abs(stored - recomputed):
        note = f"aggregated by prob_mean, as stored; {aggregate.__name__} gives {recomputed:.6g}"
        return _row(stored, paper, n=n, aggregation="prob_mean", note=note)
    item_deviation = _largest_difference(ratios, item_values(log[part], "score", part))
    return _row(stored, recomputed, n=n, aggregation=aggregate.__name__, item_deviation=item_deviation)


def _has_attack(log: EvalLog, metric: str) -> bool:
    return len(metric_parts(metric, log.get(metric, {}))) == 2


def _attack_auc(entry: Any, metric: str) -> float:
    return auc(*(item_values(entry[half], "score", f"{metric}/{half}") for half in ("forget", "holdout")))


def _attack_row(metric: str, entry: Any) -> Row:
    note = None
    if entry.get("auc", entry["agg_value"]) != entry["agg_value"]:
        note = f"`auc` in the log is another number: {entry['auc']}"
    n = len(entry["forget"]["value_by_index"])
    return _row(entry["agg_value"], _attack_auc(entry, metric), n=n, aggregation="AUC", note=note)


def _forget_quality_row(stored: float | None, quality: ForgetQuality) -> Row:
    note = f"D = {quality['ks_d']:.4g}"
    return _row(stored, quality["p"], n=quality["n"], aggregation="KS test, p-value", note=note)


def _privleak_row(log: EvalLog, retain_log: EvalLog | None) -> Row:
    stored = log["privleak"]["agg_value"]
    if not _has_attack(log, "mia_min_k"):
        return _row(stored, None, note="needs mia_min_k with items")
    model_auc = _attack_auc(log["mia_min_k"], "mia_min_k")
    default = privleak(model_auc)
    if retain_log is None:
        if stored is not None and abs(stored - default) > 1e-9:
            return _row(stored, None, note="needs the retain-only model's log")
        return _row(stored, default, aggregation="privleak", note="against AUC 0.5, without a retain log")
    if not _has_attack(retain_log, "mia_min_k"):
        return _row(stored, None, note="needs mia_min_k with items in the retain log")
    recomputed = privleak(model_auc, _attack_auc(retain_log["mia_min_k"], "mia_min_k"))
    against_default = stored is not None and abs(stored - default) < 1e-9 < abs(stored - recomputed)
    note = "stored against AUC 0.5, recomputed against the retain log" if against_default else None
    return _row(stored, recomputed, aggregation="privleak", note=note)


def _utility_rows(rows: Mapping[str, Row], stored: Mapping[str, float | None], suffix: str = "") -> dict[str, Row]:
    """Model utility and retain utility from the recomputed aggregates; `suffix` names the truth ratios to take."""
    new = {
        metric: rows.get(metric + suffix if metric.endswith("Truth_Ratio") else metric, {}).get("recomputed")
        for metric in MODEL_UTILITY_METRICS
    }
    utilities = {}
    for name, utility, metrics in (
        ("model_utility", model_utility, MODEL_UTILITY_METRICS),
        ("retain_utility", retain_utility, RETAIN_UTILITY_METRICS),
    ):
        aggregates = {metric: new[metric] for metric in metrics}
        missing = [metric for metric, value in aggregates.items() if value is None]
        if missing:
            row = _row(stored.get(name), None, note=f"needs {', '.join(missing)}")
        else:
            aggregation = f"harmonic mean of {len(metrics)}"
            row = _row(stored.get(name), utility(aggregates), aggregation=aggregation, note=explain_zero(aggregates))
        utilities[name + suffix] = row
    return utilities


def _rescore_legacy(
    log: Mapping[str, Any], retain_log: Mapping[str, Any] | None
) -> tuple[dict[str, Row], ForgetQuality | None]:
    rows: dict[str, Row] = {}
    for task, prefix in LEGACY_TASKS.items():
        if task in log:
            rows |= _legacy_task_rows(log[task], task, prefix)
    rows |= _utility_rows(rows, {})
    rows |= _utility_rows(rows, {}, suffix="_arithmetic")

    forget_task = "eval_log_forget.json"
    logs = [log] if retain_log is None else [log, retain_log]
    if retain_log is None or not all(forget_task in one for one in logs):
        missing = "the retain-only model's log" if retain_log is None else f"{forget_task} in both logs"
        rows["forget_quality"] = _row(None, None, note=f"needs {missing}")
        return rows, None
    ratios = [_legacy_truth_ratios(one[forget_task], forget_task) for one in logs]
    references = [_legacy_texts(one[forget_task], forget_task, 2) for one in logs]
    validate_same_questions(*(len(one) for one in ratios), *references)
    quality = forget_quality(*ratios)
    rows["forget_quality"] = _forget_quality_row(None, quality)
    return rows, quality


def _legacy_task_rows(task: Mapping[str, Any], name: str, prefix: str) -> dict[str, Row]:
    """The rows of one of the four parts of a legacy log."""
    losses = _legacy_values(task, "avg_gt_loss", name)
    wrong_losses = _legacy_values(task, "average_perturb_loss", name)
    rouge = _legacy_values(task, "rougeL_recall", name)
    ratios = _legacy_truth_ratios(task, name)
    arithmetic_ratios = _legacy_truth_ratios(task, name, "arithmetic")
    same_length(f"{name}/avg_gt_loss", losses, f"{name}/avg_paraphrased_loss", ratios)
    same_length(f"{name}/avg_gt_loss", losses, f"{name}/rougeL_recall", rouge)
    mean = {"n": len(losses), "aggregation": "mean over items"}

    rows = {f"{prefix}_Q_A_Prob": _row(None, mean_over_items(answer_probability(losses)), **mean)}
    if prefix in ("ra", "wf"):
        normalised = option_normalised_probability(
            answer_probability(losses), answer_probability(wrong_losses), guard=0.0
        )
        item_deviation = None
        if "normalized_gt_loss" in task:
            item_deviation = _largest_difference(normalised, np.exp(-_legacy_values(task, "normalized_gt_loss", name)))
        rows[f"{prefix}_Q_A_Prob_normalised"] = _row(
            None, mean_over_items(normalised), item_deviation=item_deviation, **mean
        )

    generations, references = (_legacy_texts(task, name, position) for position in (1, 2))
    item_deviation, note = None, "mean of the stored per-item values: the log holds no texts"
    if generations is not None:
        validate_generations(generations, rouge, f"{name}/generated_text")
        scores = rouge_scores([*chain(*references)], [*chain(*generations)])
        old, rouge = rouge, np.array([score["rougeL_recall"] for score in scores])
        item_deviation, note = _largest_difference(old, rouge), None
    rows[f"{prefix}_Q_A_ROUGE"] = _row(None, mean_over_items(rouge), item_deviation=item_deviation, note=note, **mean)

    metric = "forget_truth_ratio" if prefix == "forget" else f"{prefix}_Truth_Ratio"
    aggregate = closer_to_1_better if prefix == "forget" else true_better
    item_deviation = None
    if "truth_ratio" in task:
        item_deviation = _largest_difference(ratios, _legacy_values(task, "truth_ratio", name))
    details = {"n": len(losses), "aggregation": aggregate.__name__}
    rows[metric] = _row(None, aggregate(ratios), item_deviation=item_deviation, **details)
    note = "arithmetic mean over wrong answers: the paper's formula"
    rows[f"{metric}_arithmetic"] = _row(None, aggregate(arithmetic_ratios), note=note, **details)
    return rows


def _legacy_truth_ratios(
    task: Mapping[str, Any], name: str, wrong_mean: Literal["geometric", "arithmetic"] = "geometric"
) -> np.ndarray:
    right, wrong = (_legacy_values(task, field, name) for field in ("avg_paraphrased_loss", "average_perturb_loss"))
    return truth_ratio(right, wrong, guard=0.0, wrong_mean=wrong_mean)


def _legacy_values(task: Mapping[str, Any], field: str, name: str) -> np.ndarray:
    if field not in task:
        raise ValueError(f"{name} has no `{field}`: give the eval_log_aggregated.json that locuslab/tofu wrote.")
    items = ordered_items(task[field], f"{name}/{field}")
    return finite_array(f"{name}/{field}", items, ndim=2 if field == "average_perturb_loss" else 1)


def _legacy_texts(task: Mapping[str, Any], name: str, position: int) -> list[list[str]] | None:
    """Generations (`position` 1) or reference answers (2) of a part of a legacy log, if it holds texts."""
    if "generated_text" not in task:
        return None
    return [[item[position]] for item in ordered_items(task["generated_text"], f"{name}/generated_text")]
