# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Starts the jobs, one a device, each in a process of its own, as soon as what they need is done."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from unlearn_eval.results import write_json

from .plan import JOB_FILE, Job, left_to_do, remove_temporary


def devices(use_cpu: bool) -> list[str]:
    """
    The devices that jobs run on.

    Args:
        use_cpu (`bool`):
            Whether to leave GPUs alone.

    Returns:
        `list[str]`:
            A value of `CUDA_VISIBLE_DEVICES` for each: those of the visible GPUs, or the empty one for the CPU.
    """
    if use_cpu or not torch.cuda.is_available():
        return [""]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def run_jobs(jobs: list[Job], free: list[str], on_done: Callable[[Job, float], Any]) -> list[Job]:
    """
    Do all jobs that are left to do. One that fails keeps only those from starting that need it.

    Args:
        jobs (`list[Job]`):
            The plan.
        free (`list[str]`):
            [`devices`].
        on_done (`Callable`):
            Called with each job that is done, and the seconds that it took.

    Returns:
        `list[Job]`:
            Those that failed, or could not start.
    """
    remove_temporary(jobs)  # what a kill has left
    free, waiting = list(free), left_to_do(jobs)
    done = {job.name for job in jobs if job not in waiting}
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
    failed: list[Job] = []
    try:
        while True:
            for job in [job for job in waiting if done.issuperset(job.needs)][: len(free)]:
                waiting.remove(job)
                device = free.pop(0)
                running[device] = (job, _start(job, device), time.monotonic())
            if not running:
                return failed + waiting
            time.sleep(0.2)
            for device, (job, process, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[device]
                free.append(device)
                if process.returncode == 0 and job.is_done:
                    done.add(job.name)
                    on_done(job, time.monotonic() - start)
                else:
                    failed.append(job)
                    print(f"✗ {job.name} failed; its log: {job.folder / 'log.txt'}", flush=True)
    finally:
        for _, process, _ in running.values():
            process.kill()


def _start(job: Job, device: str) -> subprocess.Popen:
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / JOB_FILE, job.settings)
    task = {"kind": job.kind, "settings": job.settings, "options": job.options, "use_cpu": device == ""}
    write_json(job.folder / "task.json", task)
    with open(job.folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trl_rkld.compare.worker", str(job.folder)],
            stdin=subprocess.PIPE,  # never written to; its end tells the worker that this process is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": device},
        )
