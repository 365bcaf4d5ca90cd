# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""How long a comparison takes, roughly: tokens, floating-point operations a token, and how many of them this machine does."""

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unlearn_eval.files import read_json
from unlearn_eval.questions import load_configuration

from ..methods import METHODS
from .config import TRAINED_COMMANDS, CompareConfig
from .data import training_sets
from .plan import DONE_FILE, Job
from .runner import Slot


# Shares of the matrix product's speed that training and scoring reach, and tokens of a question, an answer and a prompt's
# template. Finished jobs correct what is wrong with them.
_UTILISATION = 0.3
_TOKENS = 90
_ANSWERS = 7  # of a question in the evaluation: the true one, its paraphrase, five wrong ones
_OTHER_QUESTIONS = (100, 117)  # real authors, world facts


class Estimate:
    """
    Seconds that jobs take.

    Args:
        config ([`CompareConfig`]):
            Configuration.
        jobs (`list[Job]`):
            The plan.
        slot (`Slot`):
            Where a job runs.
    """

    def __init__(self, config: CompareConfig, jobs: list[Job], slot: Slot):
        self.config = config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model_name_or_path))
        self.flops_per_token = 2 * sum(parameter.numel() for parameter in model.parameters())
        dtypes = {
            torch.float32 if settings.get("bf16") is False else torch.bfloat16
            for settings in (config.finetune, config.common)
        }
        self.speed = _UTILISATION * min(matmul_speed(slot, dtype) for dtype in dtypes)
        self.sizes = {
            split: len(load_configuration(config.dataset_name, split))
            for split in {*config.splits, config.target_split}
        }
        self.jobs = jobs
        # Once: data sets from the Hub take a second to look at.
        self.rough = {job.name: self._rough(job) for job in jobs}

    def seconds(self, job: Job) -> float:
        """Estimate for a job, as if nothing of it were done; finished jobs, best those of its kind, correct it."""
        done = {other.name: read_json(other.folder / DONE_FILE)["seconds"] for other in self.jobs if other.is_done}
        timed = [other for other in self.jobs if done.get(other.name) is not None]
        timed = [other for other in timed if other.kind == job.kind] or timed
        took = sum(done[other.name] for other in timed)
        return self.rough[job.name] * (took / sum(self.rough[other.name] for other in timed) if timed else 1.0)

    def _rough(self, job: Job) -> float:
        # A training step is three forward passes' work.
        forward = {"finetune": self._finetune, "evaluate": self._evaluate, "unlearn": self._unlearn}[job.kind]
        return max(1.0, forward(job.settings) * self.flops_per_token / self.speed)

    def _finetune(self, settings: dict[str, Any]) -> float:
        size = sum(map(len, training_sets(**settings["sets"]).values()))
        return 3 * _TOKENS * size * float(settings["arguments"].get("num_train_epochs", 3))

    def _evaluate(self, settings: dict[str, Any]) -> float:
        caps = settings["evaluation"]
        sizes = [self.sizes[settings["forget_split"]], caps.get("max_retain_samples", 400), *_OTHER_QUESTIONS]
        questions = sum(min(size, caps.get("max_samples") or size) for size in sizes)
        generated = 2 if settings["evaluation"].get("max_new_tokens", 200) else 1
        return generated * questions * _ANSWERS * _TOKENS / 2

    def _unlearn(self, settings: dict[str, Any]) -> float:
        full = self._evaluate(settings)
        if settings["command"] not in TRAINED_COMMANDS:
            return full
        size = self.sizes[settings["forget_split"]]
        samples = size * (1 if settings["retain"] == "none" else 2)
        scored = (size + self.config.epoch_retain_samples) * _ANSWERS * _TOKENS / 2
        epochs = settings["arguments"].get("num_train_epochs", 10 if settings["command"] in METHODS else 3)
        return float(epochs) * (3 * _TOKENS * samples + scored) + 2 * full


def matmul_speed(slot: Slot, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a matrix product, with the threads that a job has."""
    device = "cuda" if slot["CUDA_VISIBLE_DEVICES"] else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(int(slot.get("OMP_NUM_THREADS", threads)))
    size = 1024 if device == "cpu" else 8192
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    torch.set_num_threads(threads)
    if device == "cuda":  # a job is about to start on this GPU
        del matrix
        torch.cuda.empty_cache()
    return best


def in_words(seconds: float) -> str:
    """A duration, such as `"1 h 05 min"`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "< 1 min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
