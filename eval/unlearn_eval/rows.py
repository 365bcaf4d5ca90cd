# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Rows of the table and the picture ([`plots`]), from result logs and from CSV."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .metrics import RETAIN_UTILITY_METRICS, forget_quality, retain_utility
from .plots import COLUMNS
from .results import METADATA, TOFU_SPLITS, EvalLog, aggregate, has_items, item_values, validate_retain_log


def row_from_log(
    log: EvalLog,
    method: str,
    *,
    setting: str | None = None,
    seed: int | None = None,
    epoch: float | None = None,
    chosen: bool | None = None,
    retain_log: EvalLog | None = None,
) -> dict[str, Any]:
    """
    The row of one result. What the log has not, or has as a null, is `None`.

    Args:
        log (`EvalLog`):
            A valid log, ours or open-unlearning's.
        method (`str`):
            Name of the method, or `"target"` or `"retain"` for the reference marks.
        setting (`str`, *optional*):
            Its setting, such as `"LoRA"`.
        seed (`int`, *optional*):
            Seed of the run.
        epoch (`float`, *optional*):
            Epoch of the run.
        chosen (`bool`, *optional*):
            Whether this is the run's chosen epoch.
        retain_log (`EvalLog`, *optional*):
            A valid log of the retain-only model on the same forget set: where the log has truth ratios, forget quality
            and D are computed against this one. A stored p may be one against another.

    Returns:
        `dict[str, Any]`:
            A value for each of `COLUMNS`.

    Raises:
        [`ValueError`]: If the retain log is of another forget set.
    """
    quality = log.get("forget_quality", {})
    p, ks_d = quality.get("agg_value"), quality.get("ks_d")
    if retain_log is not None and has_items(log, "forget_truth_ratio"):
        validate_retain_log(log, retain_log)
        ratios = (item_values(one["forget_truth_ratio"], "score", "forget_truth_ratio") for one in (log, retain_log))
        test = forget_quality(*ratios)
        p, ks_d = test["p"], test["ks_d"]
    return {
        "split": split_of(log),
        "method": method,
        "setting": setting,
        "seed": seed,
        "epoch": epoch,
        "chosen": chosen,
        "n": count_forget_items(log),
        "forget_quality": p,
        "ks_d": ks_d,
        "model_utility": aggregate(log, "model_utility"),
        "retain_utility": retain_utility_of(log),
        "forget_prob": aggregate(log, "forget_Q_A_Prob"),
        "forget_rouge": aggregate(log, "forget_Q_A_ROUGE"),
        "extraction_strength": aggregate(log, "extraction_strength"),
    }


def retain_utility_of(log: EvalLog) -> float | None:
    """Retain utility from the three aggregates of the retain set, `None` where one is missing."""
    values = {metric: aggregate(log, metric) for metric in RETAIN_UTILITY_METRICS}
    return None if None in values.values() else retain_utility(values)


def count_forget_items(log: EvalLog) -> int | None:
    """Number of items of the forget set, `None` where the log has no items of it."""
    for metric in ("forget_truth_ratio", "forget_Q_A_Prob", "forget_Q_A_ROUGE"):
        if has_items(log, metric):
            return len(log[metric]["value_by_index"])
    return None


def split_of(log: EvalLog) -> str:
    """The forget split, from the metadata or from the number of items; `"own data"` where that is none of TOFU's."""
    return log.get(METADATA, {}).get("forget_split") or TOFU_SPLITS.get(count_forget_items(log), "own data")


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """
    Read rows from a CSV file such as [`plots.rows_to_csv`] writes.

    Args:
        path (`str` or `Path`):
            The file. Empty fields are `None`; columns other than `COLUMNS` are left out.

    Returns:
        `list[dict[str, Any]]`:
            The rows, for [`plots.write_plots`].

    Raises:
        [`FileNotFoundError`]: If there is no such file.
        [`ValueError`]: If it has no column `split` or `method`, a line is too long or too short, or a field is no
            number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a CSV file with the columns {', '.join(COLUMNS)}.")
    with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
        reader = csv.DictReader(file)
        missing = [column for column in ("split", "method") if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column `{missing[0]}`: its first line must name {', '.join(COLUMNS)}.")
        rows = []
        for line in reader:
            if None in line or None in line.values():
                raise ValueError(
                    f"{path} has another number of fields in line {reader.line_num} than in the first: quote fields that "
                    "hold commas."
                )
            where = f"{path}, line {reader.line_num}"
            rows.append({column: _parse(column, line[column], where) for column in COLUMNS if column in line})
    return rows


def _parse(column: str, text: str, where: str) -> Any:
    text = text.strip()
    if not text:
        return None
    try:
        return _PARSERS.get(column, _number)(text)
    except (KeyError, ValueError):
        expected = "True or False" if column == "chosen" else "a number"
        raise ValueError(f"{where}: {column} is {text!r}: give {expected}, or nothing.") from None


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return int(text) if text.lstrip("+-").isdigit() else number


_PARSERS: dict[str, Callable[[str], Any]] = {
    "split": str,
    "method": str,
    "setting": str,
    "chosen": lambda text: {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
        text.lower()
    ],
}
