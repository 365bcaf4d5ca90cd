# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The paper's choice of the epoch."""

from unlearn_eval import TofuEvalCallback


class PeakCallback(TofuEvalCallback):
    """
    [`~unlearn_eval.TofuEvalCallback`] that keeps the epoch of the highest forget quality, the first of equals,
    whatever the utility: what the RKLD paper reports of each method (https://huggingface.co/papers/2406.01983, section
    "Experiments").
    """

    def __init__(self, trainer, **kwargs):
        super().__init__(trainer, metric_for_best="forget_quality", min_utility=0.0, **kwargs)

    def _rank(self, entry):
        return (entry["forget_quality"],)  # of equals, the first stays
