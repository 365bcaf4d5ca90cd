# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Started by `test_a_killed_run_goes_on`: an evaluation that kills its own process before the n-th batch of a kind."""

import json
import os
import signal
import sys

import conftest  # noqa: F401  (one thread)

from unlearn_eval.backends.transformers import TransformersBackend
from unlearn_eval.evaluation import evaluate


model, settings, moment, times = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
function, calls = getattr(TransformersBackend, moment), []


def killing(*args, **kwargs):
    calls.append(1)
    if len(calls) == times:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)


setattr(TransformersBackend, moment, killing)
evaluate(model, **settings)
