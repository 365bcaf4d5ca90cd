# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Imported at the start of every process by `test_killed_comparison_goes_on`: the worker of one job kills the comparison
that started it, at a given moment, and then hangs as if in a long computation.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path


def kill_parent():
    Path(os.environ["KILLED_WORKER"]).write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def kill_at_call(owner, name, times):
    """Kill the parent when a function is called for the `times`-th time, and never come back."""
    function, calls = getattr(owner, name), []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == times:
            kill_parent()
        return function(*args, **kwargs)

    setattr(owner, name, killing)


def kill_while_removing(folder_name):
    """Kill the parent when a folder has lost its first files."""
    rmtree = shutil.rmtree

    def killing(path, *args, **kwargs):
        if Path(path).name == folder_name:
            for file in Path(path).glob("model*"):
                file.unlink()
            kill_parent()
        return rmtree(path, *args, **kwargs)

    shutil.rmtree = killing


job, moment, what = os.environ["KILL_AT"].split()
if "trl_rkld.compare.worker" in sys.orig_argv and Path(sys.orig_argv[-1]).name == job:
    if moment == "rmtree":
        kill_while_removing(what)
    elif moment == "generate":
        from unlearn_eval.backends.transformers import TransformersBackend

        kill_at_call(TransformersBackend, "generate", int(what))
    else:
        from transformers import Trainer

        kill_at_call(Trainer, moment, int(what))
