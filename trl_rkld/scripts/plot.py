# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Draw model utility against forget quality, and write the table beside it; no model needed.

```bash
trl-rkld plot --results saves/eval/rkld saves/eval/npo --labels RKLD NPO --target saves/eval/full \\
    --retain saves/eval/retain99 --output_dir figure
trl-rkld plot --csv results.csv --output_dir figure
```
"""

import argparse
import re
from pathlib import Path
from typing import Any

from unlearn_eval.plots import RETAIN_ONLY, TARGET, UTILITIES, missing_coordinates, rows_to_markdown, write_plots
from unlearn_eval.results import EVAL_FILE, EvalLog, read_log
from unlearn_eval.rows import read_csv, row_from_log, split_of


def run(arguments: list[str]) -> int:
    """
    Run `trl-rkld plot`.

    Args:
        arguments (`list[str]`):
            Command-line arguments.

    Returns:
        `int`:
            Exit code.
    """
    parser = argparse.ArgumentParser(
        prog="trl-rkld plot", description="Draw model utility against forget quality, and write the table beside it."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--results",
        nargs="+",
        metavar="DIR",
        help=f"folders that hold a {EVAL_FILE}, or whose checkpoint-<step> or epoch-<n> do (one run, a point an epoch)",
    )
    source.add_argument("--csv", metavar="FILE", help="rows instead of logs, such as this command writes")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="a name for each result (default: its folder's)")
    parser.add_argument("--target", nargs="+", default=[], metavar="DIR", help="log before unlearning; one a split")
    parser.add_argument(
        "--retain", nargs="+", default=[], metavar="DIR", help="log of the retain-only model; one a split"
    )
    parser.add_argument(
        "--retain_logs",
        nargs="+",
        default=[],
        metavar="FILE",
        help="as --retain, but not drawn: for forget quality, where a log has none",
    )
    parser.add_argument(
        "--utility",
        choices=UTILITIES,
        default=UTILITIES[0],
        help="of the x axis (retain_utility: for models that never knew real authors and world facts)",
    )
    parser.add_argument("--output_dir", required=True, help="folder for the picture and the table")
    args = parser.parse_args(arguments)
    if args.csv is not None:
        if args.labels or args.target or args.retain or args.retain_logs:
            raise ValueError(
                "--labels, --target, --retain and --retain_logs go with --results: a CSV names its methods."
            )
        rows = read_csv(args.csv)
    else:
        rows = read_rows(args.results, args.labels, args.target, args.retain, args.retain_logs)
    print(rows_to_markdown(rows))
    for row in rows:
        missing = missing_coordinates(row, args.utility)
        if missing:
            epoch = "" if row.get("epoch") is None else f", epoch {row['epoch']}"
            print(f"Not drawn: {row['method']} on {row['split']}{epoch} (no {' and no '.join(missing)})")
    for path in write_plots(rows, args.output_dir, utility=args.utility):
        print(f"Written: {path}")
    return 0


def read_rows(
    results: list[str], labels: list[str] | None, target: list[str], retain: list[str], retain_logs: list[str]
) -> list[dict[str, Any]]:
    """
    Read logs into rows.

    Args:
        results (`list[str]`):
            Folders, see [`find_logs`].
        labels (`list[str]`, *optional*):
            Their methods. Defaults to the folders' names.
        target (`list[str]`):
            Logs of the model before unlearning, one a split.
        retain (`list[str]`):
            Logs of the retain-only model, one a split.
        retain_logs (`list[str]`):
            The same, not to be drawn.

    Returns:
        `list[dict[str, Any]]`:
            Rows for [`write_plots`], the reference marks first.

    Raises:
        [`FileNotFoundError`]: If a folder holds no log.
        [`ValueError`]: If a log is faulty, or two of one split have one name.
    """
    if labels is not None and len(labels) != len(results):
        raise ValueError(f"--labels has {len(labels)} names and --results {len(results)} folders: give one for each.")
    references: dict[str, EvalLog] = {}
    for path in [*retain_logs, *retain]:
        log = read_log(path)
        references.setdefault(split_of(log), log)

    series = [(TARGET, {None: path}) for path in target] + [(RETAIN_ONLY, {None: path}) for path in retain]
    paths = [Path(result).resolve() for result in results]
    names = labels or [path.parent.name if path.is_file() else path.name for path in paths]
    series += [(name, find_logs(folder)) for name, folder in zip(names, results, strict=True)]
    rows, seen = [], set()
    for method, logs in series:
        new = []
        for epoch, path in logs.items():
            log = read_log(path)
            new.append(row_from_log(log, method, epoch=epoch, retain_log=references.get(split_of(log))))
        # Two of one name would be drawn as one run.
        twice = seen & {(row["split"], method) for row in new}
        if twice:
            raise ValueError(f"Two results on {min(twice)[0]} are called `{method}`: tell them apart by --labels.")
        seen |= {(row["split"], method) for row in new}
        rows += new
    unused = references.keys() - {row["split"] for row in rows}
    if unused:
        raise ValueError(
            f"--retain_logs has a log of {min(unused)}, on which no result is: give one of the same split."
        )
    return rows


def find_logs(folder: str | Path) -> dict[int | None, Path]:
    """
    The logs of a result.

    Args:
        folder (`str` or `Path`):
            A `TOFU_EVAL.json`, a folder that holds one, or a folder whose sub-folders `checkpoint-<step>` or
            `epoch-<n>` do, themselves or in `evals` (open-unlearning evaluates a run in training there).

    Returns:
        `dict[int | None, Path]`:
            The one log with `None`, or the logs of a run by epoch: n, or the place of the checkpoint among them all.

    Raises:
        [`FileNotFoundError`]: If there is none.
        [`ValueError`]: If there are logs in sub-folders of both names.
    """
    folder = Path(folder)
    if folder.is_file() or (folder / EVAL_FILE).is_file():
        return {None: folder}
    logs: dict[str, dict[int, Path]] = {"checkpoint": {}, "epoch": {}}
    for path in [*folder.glob(f"*/{EVAL_FILE}"), *folder.glob(f"*/evals/{EVAL_FILE}")]:
        match = re.fullmatch(r"(checkpoint|epoch)-(\d+)", path.relative_to(folder).parts[0])
        if match:
            logs[match[1]].setdefault(int(match[2]), path)
    if logs["checkpoint"] and logs["epoch"]:
        raise ValueError(f"{folder} has results of both `checkpoint-<step>` and `epoch-<n>`: remove those of one.")
    found = logs["epoch"] or dict(enumerate((path for _, path in sorted(logs["checkpoint"].items())), start=1))
    if not found:
        raise FileNotFoundError(
            f"{folder} has no {EVAL_FILE}, nor have sub-folders called checkpoint-<step> or epoch-<n>: give the folder of "
            "one result or of one run."
        )
    return dict(sorted(found.items()))
