# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Starts the jobs, each in a process of its own, as soon as what they need is done and a slot is free."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from unlearn_eval.files import write_json

from .plan import JOB_FILE, LOG_FILE, TASK_FILE, Job, left_to_do, remove_temporary


# Where a job runs, as environment variables: `CUDA_VISIBLE_DEVICES`, empty on the CPU.
Slot = dict[str, str]


def slots(use_cpu: bool, cpu_jobs: int) -> list[Slot]:
    """
    Where jobs run at once: one on each visible GPU, or several on the CPU.

    Args:
        use_cpu (`bool`):
            Whether to leave GPUs alone.
        cpu_jobs (`int`):
            Jobs at once on the CPU. Several share its cores evenly, unless `OMP_NUM_THREADS` says otherwise.

    Returns:
        `list[Slot]`:
            Environment variables for each.
    """
    if use_cpu or not torch.cuda.is_available():
        slot = {"CUDA_VISIBLE_DEVICES": ""}
        if cpu_jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            slot["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // cpu_jobs))
        return [slot] * cpu_jobs
    count = torch.cuda.device_count()  # the variable may name more than there are
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    devices = [device.strip() for device in visible.split(",") if device.strip()]
    if not visible.startswith("MIG-"):  # of these a process sees only one
        devices = devices[:count]
    return [{"CUDA_VISIBLE_DEVICES": device} for device in devices]


def run_jobs(jobs: list[Job], free: list[Slot], on_done: Callable[[Job, float], Any]) -> list[Job]:
    """
    Do all jobs that are left to do. One that fails keeps only those from starting that need it. A GPU on which two
    have failed, one after the other, is left out while there are others: it would soon have taken all.

    Args:
        jobs (`list[Job]`):
            The plan.
        free (`list[Slot]`):
            [`slots`].
        on_done (`Callable`):
            Called with each job that is done, and the seconds that it took.

    Returns:
        `list[Job]`:
            Those that failed, or could not start.
    """
    remove_temporary(jobs)  # what a kill has left
    free, waiting = list(free), left_to_do(jobs)
    done = {job.name for job in jobs if job not in waiting}
    running: list[tuple[Job, Slot, subprocess.Popen, float]] = []
    failed: list[Job] = []
    in_a_row: Counter[str] = Counter()  # failures on a GPU since one was done there
    try:
        while True:
            ready = (job for job in list(waiting) if done.issuperset(job.needs))
            while free and (job := next(ready, None)) is not None:
                waiting.remove(job)
                slot = free.pop(0)
                try:
                    running.append((job, slot, _start(job, slot), time.monotonic()))
                except OSError as error:  # a full disk, say
                    free.append(slot)
                    if running:  # it may have room when one of these has ended
                        waiting.insert(0, job)
                        break
                    failed.append(job)
                    print(f"✗ {job.name} could not start: {error}", flush=True)
            if not running:
                return failed + waiting
            time.sleep(0.2)
            ended = [one for one in running if one[2].poll() is not None]
            for one in ended:
                job, slot, process, start = one
                running.remove(one)
                _kill(process)  # its vLLM engine, if it died by itself
                gpu = slot["CUDA_VISIBLE_DEVICES"]
                if job.is_done:
                    in_a_row[gpu] = 0
                    done.add(job.name)
                    on_done(job, time.monotonic() - start)
                else:
                    in_a_row[gpu] += 1
                    failed.append(job)
                    print(
                        f"✗ {job.name} failed (exit code {process.returncode}); its log: {job.folder / LOG_FILE}",
                        flush=True,
                    )
                if gpu and in_a_row[gpu] > 1 and (free or running):
                    print(f"✗ GPU {gpu} is left out: two jobs have failed there, one after the other.", flush=True)
                else:
                    free.append(slot)
    finally:
        for _, _, process, _ in running:
            _kill(process)
            process.wait()


def _kill(worker: subprocess.Popen) -> None:
    """Kill a worker, or what is left of it, with the processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)


def _start(job: Job, slot: Slot) -> subprocess.Popen:
    job.folder.mkdir(parents=True, exist_ok=True)
    goes_on = (job.folder / JOB_FILE).is_file()
    write_json(job.folder / JOB_FILE, job.settings)
    task = {
        "kind": job.kind,
        "settings": job.settings,
        "options": job.options,
        "use_cpu": not slot["CUDA_VISIBLE_DEVICES"],
        "goes_on": goes_on,
    }
    write_json(job.folder / TASK_FILE, task)
    with open(job.folder / LOG_FILE, "ab") as log:
        return subprocess.Popen(
            # -P: a file `select.py` where the command is started must not be taken for Python's own
            [sys.executable, "-P", "-m", "trl_rkld.compare.worker", str(job.folder)],
            stdin=subprocess.PIPE,  # never written to; its end tells the worker that this process is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | slot,
            start_new_session=True,
        )
