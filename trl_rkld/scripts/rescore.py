# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Recompute every aggregate of an existing TOFU log from its per-item values; no model needed.

```bash
trl-rkld rescore --eval_logs saves/eval/model/TOFU_EVAL.json --retain_logs saves/eval/retain99/TOFU_EVAL.json
```
"""

import argparse
from pathlib import Path

from unlearn_eval.files import write_json
from unlearn_eval.rescore import format_table, rescore
from unlearn_eval.results import read_unchecked


def run(arguments: list[str]) -> int:
    """
    Run `trl-rkld rescore`.

    Args:
        arguments (`list[str]`):
            Command-line arguments.

    Returns:
        `int`:
            Exit code.
    """
    parser = argparse.ArgumentParser(
        prog="trl-rkld rescore", description="Recompute every aggregate of a TOFU log from its per-item values."
    )
    parser.add_argument(
        "--eval_logs", required=True, help="TOFU_EVAL.json of open-unlearning, or eval_log_aggregated.json of TOFU"
    )
    parser.add_argument("--retain_logs", help="the same of the retain-only model, for forget quality and privleak")
    parser.add_argument("--output_dir", help="folder for RESCORED.json (default: only print)")
    args = parser.parse_args(arguments)
    retain_log = read_unchecked(args.retain_logs) if args.retain_logs is not None else None
    rescored = rescore(read_unchecked(args.eval_logs), retain_log)
    print(format_table(rescored))
    if rescored["max_deviation"] is not None:
        print(f"\nLargest deviation from what the file says: {rescored['max_deviation']:.1e}")
    if args.output_dir is not None:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output_dir) / "RESCORED.json", rescored)
    return 0
