# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Evaluate models and adapters on TOFU, or on records of your own.

# TOFU, several adapters of one base in one engine
```bash
trl-rkld eval --model_name_or_path outputs/rkld outputs/npo --forget_split forget05 \\
    --retain_logs results/retain95/TOFU_EVAL.json --output_dir results
```

# A deletion request: before and after, with a report
```bash
trl-rkld eval --model_name_or_path forgotten --compare_to path/to/model/before \\
    --forget_dataset forget.jsonl --retain_dataset keep.jsonl --output_dir evaluation
```
"""

from importlib import resources
from pathlib import Path

from trl import TrlParser

from unlearn_eval.config import EvalConfig
from unlearn_eval.documents import markdown_table
from unlearn_eval.evaluation import run as run_evaluation
from unlearn_eval.results import EvalLog, summarise

from ..recipes_index import resolve_config


def run(arguments: list[str]) -> int:
    """
    Run `trl-rkld eval`.

    Args:
        arguments (`list[str]`):
            Command-line arguments.

    Returns:
        `int`:
            Exit code.
    """
    arguments = resolve_config(arguments, configs(), f"one of {', '.join(configs())}, which come with the package")
    (config,) = make_parser().parse_args_and_config(arguments)
    logs = run_evaluation(config)
    print(f"\n{format_table(logs)}")
    print(f"💾 Results saved to {config.output_dir}.")
    return 0


def make_parser() -> TrlParser:
    """The command's parser."""
    return TrlParser(EvalConfig, prog="trl-rkld eval", allow_abbrev=False)


def configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(str(resources.files("unlearn_eval.configs"))).glob("*.yaml"))}


def format_table(logs: list[EvalLog]) -> str:
    """
    A markdown table of the aggregates, a column for each model, and why some are missing.

    Args:
        logs (`list[EvalLog]`):
            Logs of ours.

    Returns:
        `str`:
            The table, readable as plain text.
    """
    summaries = [summarise(log) for log in logs]
    metrics = sorted({metric for summary in summaries for metric in summary})
    cells = [["metric", *(log["metadata"]["model"] for log in logs)]]
    for metric in metrics:
        cells.append([metric, *(f"{summary[metric]:.4g}" if metric in summary else "-" for summary in summaries)])
        if metric == "forget_quality":  # the same p means another thing with other n
            cells.append(
                [
                    "  KS distance D (n)",
                    *(
                        f"{log[metric]['ks_d']:.4g} ({log[metric]['n']})" if metric in summary else "-"
                        for log, summary in zip(logs, summaries, strict=True)
                    ),
                ]
            )
    table = markdown_table(cells, ["<", *">" * len(logs)])
    notes = {f"{metric}: {entry['reason']}" for log in logs for metric, entry in log.items() if "reason" in entry}
    return table + "".join(f"{note}\n" for note in sorted(notes))
