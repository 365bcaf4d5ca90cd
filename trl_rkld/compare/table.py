# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The comparison's CSV, its two tables and Figure 3, from whatever jobs are done."""

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from unlearn_eval.documents import markdown_table
from unlearn_eval.files import read_json, write_atomically
from unlearn_eval.metrics import MODEL_UTILITY_METRICS
from unlearn_eval.plots import COLUMNS, RETAIN_ONLY, TARGET, missing_coordinates, write_plots
from unlearn_eval.results import EVAL_FILE, EvalLog, aggregate, read_log
from unlearn_eval.rows import row_from_log

from .plan import HISTORY_FILE, Job


# Beside the columns of the figure: what is scored after each epoch, and the nine parts of model utility.
EPOCH_COLUMNS = ("forget_truth_ratio", "retain_prob", "retain_truth_ratio")
ALL_COLUMNS = (*COLUMNS, *EPOCH_COLUMNS, *MODEL_UTILITY_METRICS)
_OF_HISTORY = ("forget_quality", "ks_d", "forget_prob", "extraction_strength", *EPOCH_COLUMNS)

# Where the target, which knows everything, has a larger p, no smaller one can be expected of any method.
_TELLS_APART = 0.01

Row = dict[str, Any]


def all_rows(jobs: list[Job]) -> list[Row]:
    """
    The rows of all jobs that are done, in the plan's order.

    Args:
        jobs (`list[Job]`):
            The plan.

    Returns:
        `list[Row]`:
            A row for each reference and each (method, setting, split, seed, epoch), with `ALL_COLUMNS`.
    """
    return [row for job in jobs if job.is_done and job.row is not None for row in _rows(job)]


def _rows(job: Job) -> list[Row]:
    if job.kind == "evaluate":
        return [_full_row(read_log(job.folder / EVAL_FILE), job.row)]
    history = read_json(job.folder / HISTORY_FILE)
    logs = {history["chosen"]: read_log(job.folder / "chosen" / EVAL_FILE)}
    if (job.folder / "last").is_dir():
        logs[history["last"]] = read_log(job.folder / "last" / EVAL_FILE)
    rows = []
    for entry in history["epochs"] or [{"epoch": None}]:
        epoch = entry["epoch"]
        row = dict.fromkeys(ALL_COLUMNS) | job.row | {"epoch": epoch and round(epoch), "chosen": 0}
        row |= {name: entry.get(name) for name in _OF_HISTORY}
        if epoch in logs:
            full = _full_row(logs[epoch], job.row) | {"epoch": row["epoch"]}
            row |= full | {name: entry[name] for name in EPOCH_COLUMNS if name in entry}
            row["chosen"] = int(epoch == history["chosen"])
        rows.append(row)
    for row in rows:
        row["n"] = rows[0]["n"] or next(row["n"] for row in rows if row["n"])
    return rows


def _full_row(log: EvalLog, row: Row) -> Row:
    values = row_from_log(log, row["method"], setting=row["setting"], seed=row["seed"])
    if row["method"] == RETAIN_ONLY:
        values |= {"forget_quality": 1.0, "ks_d": 0.0}  # of a model against itself
    parts = {name: aggregate(log, name) for name in MODEL_UTILITY_METRICS}
    return dict.fromkeys(ALL_COLUMNS) | values | {"forget_truth_ratio": aggregate(log, "forget_truth_ratio")} | parts


def write_results(jobs: list[Job], output_dir: Path) -> list[Path]:
    """
    Write `results.csv`, `table.md`, and the figure where something can be drawn. The same results give the same bytes.

    Args:
        jobs (`list[Job]`):
            The plan.
        output_dir (`Path`):
            Folder.

    Returns:
        `list[Path]`:
            The files.
    """
    rows = all_rows(jobs)
    if not rows:
        return []
    files = [output_dir / "results.csv", output_dir / "table.md"]
    write_atomically(files[0], _csv(rows).encode())
    write_atomically(files[1], tables(rows).encode())
    points = [{name: row[name] for name in COLUMNS} for row in rows if _is_shown(row)]
    if any(not missing_coordinates(row, "retain_utility") for row in points):
        files += write_plots(points, output_dir, stem="figure", utility="retain_utility")
    return files


def _is_shown(row: Row) -> bool:
    return row["chosen"] == 1 or row["method"] in (TARGET, RETAIN_ONLY)


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ALL_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def tables(rows: list[Row]) -> str:
    """
    The tables "chosen epoch" and "last epoch" of each split in markdown, with mean and standard deviation over the
    seeds.

    Args:
        rows (`list[Row]`):
            Rows of [`all_rows`].

    Returns:
        `str`:
            The text.
    """
    parts = []
    for split in dict.fromkeys(row["split"] for row in rows):
        of_split = _with_share_kept([row for row in rows if row["split"] == split])
        last: dict[tuple, Row] = {}
        for row in of_split:
            last[row["method"], row["setting"], row["seed"]] = row
        parts.append(
            f"## {split}, epoch of the highest forget quality (the first of equals)\n\n{_table(list(filter(_is_shown, of_split)))}"
        )
        parts.append(f"## {split}, last epoch\n\n{_table(list(last.values()))}")
        target = next((row["forget_quality"] for row in of_split if row["method"] == TARGET), None)
        if target is not None and target >= _TELLS_APART:
            parts.append(
                f"The target itself has p = {target:.2g}: the questions are too few, or it never learnt them. Forget quality can't "
                "tell methods apart.\n"
            )
    return "\n".join(parts)


def _with_share_kept(rows: list[Row]) -> list[Row]:
    """With `kept`: retain utility over the target's."""
    target = next((row["retain_utility"] for row in rows if row["method"] == TARGET), None)
    known = [bool(target) and row["retain_utility"] is not None for row in rows]  # of nothing there is no share
    return [
        row | {"kept": row["retain_utility"] / target if is_known else None}
        for row, is_known in zip(rows, known, strict=True)
    ]


def _table(rows: list[Row]) -> str:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["setting"]), []).append(row)
    cells = [["method", "setting", "seeds", *_CELLS]]
    for (method, setting), group in groups.items():
        seeds = "" if method in (TARGET, RETAIN_ONLY) else str(len(group))
        cells.append([method, setting or "", seeds, *(cell(group) for cell in _CELLS.values())])
    return markdown_table(cells, ["<", "<", *">" * (len(_CELLS) + 1)])


def _spread(name: str, digits: int) -> Callable[[list[Row]], str]:
    def cell(rows: list[Row]) -> str:
        values = [row[name] for row in rows if row[name] is not None]
        if not values:
            return ""
        text = f"{mean(values):.{digits}f}"
        return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"

    return cell


def _quality(rows: list[Row]) -> str:
    # p-values of several orders of magnitude: their mean is that of the largest.
    values = [row["forget_quality"] for row in rows if row["forget_quality"] is not None]
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2g}"
    middle = math.exp(mean(math.log(max(value, 1e-300)) for value in values))
    return f"{middle:.2g} ({min(values):.1g} to {max(values):.1g})"


_CELLS: dict[str, Callable[[list[Row]], str]] = {
    "epoch": _spread("epoch", 0),
    "n": lambda rows: str(rows[0]["n"]),
    "D": _spread("ks_d", 3),
    "forget quality p, geometric mean (range)": _quality,
    "retain utility": _spread("retain_utility", 3),
    "over the target's": _spread("kept", 2),
    "model utility": _spread("model_utility", 3),
    "forget prob": _spread("forget_prob", 3),
    "forget ROUGE": _spread("forget_rouge", 3),
    "extraction strength": _spread("extraction_strength", 3),
}
