# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Compare unlearning methods: train the references, unlearn by each method, evaluate every epoch, write table and figure.

```bash
trl-rkld compare --config smollm2-135m/tofu/compare
```

Killed at any moment and started again, it goes on where it was, and ends with the same CSV: to the last bit on a CPU
with as many threads and the transformers backend, elsewhere to the last digits in which any two runs differ.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from trl import TrlParser

from ..compare.case_study import write_case_study
from ..compare.checks import check_everything
from ..compare.config import CompareConfig
from ..compare.estimate import Estimate, in_words
from ..compare.plan import Job, check_folders, left_to_do, make_plan, remove_temporary
from ..compare.runner import Slot, run_jobs, slots
from ..compare.table import all_rows, tables, write_results
from ..recipes_index import resolve_recipe


def run(arguments: list[str]) -> int:
    """
    Run `trl-rkld compare`.

    Args:
        arguments (`list[str]`):
            Command-line arguments.

    Returns:
        `int`:
            Exit code: 1 where a job failed.
    """
    (config,) = make_parser().parse_args_and_config(resolve_recipe(arguments), fail_with_unknown_args=True)
    jobs = make_plan(config)
    check_everything(config, jobs)
    free = slots(config.use_cpu, config.cpu_jobs)
    estimate = Estimate(config, jobs, free[0])
    show_plan(jobs, estimate, len(free))
    if config.dry_run:
        return 0
    output_dir = Path(config.output_dir)
    with _locked({output_dir.resolve(), Path(config.models_dir).resolve()}):  # comparisons may share models
        check_folders(jobs)
        failed = _run(jobs, estimate, free, output_dir)
    print(f"\n{tables(all_rows(jobs))}")
    for path in [*write_results(jobs, output_dir), write_case_study(jobs, output_dir)]:
        if path is not None:
            print(f"💾 {path}")
    for folder in sorted(set(Path(config.models_dir).glob("augmented-*")) - {job.folder for job in jobs}):
        print(f"🗑️ {folder} is an augmented model of no run in this file. It knows the forget set: delete it.")
    if failed:
        print(
            f"{len(failed)} jobs failed or could not start: {', '.join(job.name for job in failed)}. Start again for them."
        )
    return 1 if failed else 0


@contextmanager
def _locked(folders: set[Path]) -> Iterator[None]:
    with ExitStack() as stack:
        for folder in sorted(folders):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(folder / "compare.lock").acquire(timeout=0))
            except Timeout:
                raise ValueError(f"Another comparison is running in `{folder}`. Wait for it.") from None
        yield


def _run(jobs: list[Job], estimate: Estimate, free: list[Slot], output_dir: Path) -> list[Job]:
    def on_done(job: Job, seconds: float) -> None:
        todo = left_to_do(jobs)
        left = sum(map(estimate.seconds, todo)) / len(free)
        print(
            f"{time.strftime('%H:%M')} ✓ {job.name} ({in_words(seconds)}); {len(todo)} left, about {in_words(left)}",
            flush=True,
        )
        try:
            remove_temporary(jobs)
            write_results(jobs, output_dir)
        except OSError as error:  # a full disk, say: the jobs go on, and this is done again at the end
            print(f"The results could not be written: {error}", flush=True)

    return run_jobs(jobs, free, on_done)


def show_plan(jobs: list[Job], estimate: Estimate, num_slots: int) -> None:
    """Print the jobs in the order in which they are started, and how long they take."""
    print("Plan, in the order of value:")
    todo = left_to_do(jobs)
    for job in jobs:
        words = in_words(estimate.seconds(job)) if job in todo else "done" if job.is_done else "not needed any more"
        print(f"  {job.name:<60} {words}")
    total = sum(map(estimate.seconds, todo)) / num_slots
    print(f"About {in_words(total)}, {num_slots} at once. An estimate: finished jobs correct it.", flush=True)


def make_parser():
    """The command's parser."""
    return TrlParser(CompareConfig, prog="trl-rkld compare", allow_abbrev=False)
