# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The unlearning teacher itself, asked without distilling it: a point of the paper's Figure 3."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from unlearn_eval import EvalConfig
from unlearn_eval.backends.transformers import TransformersBackend, last_hidden_states
from unlearn_eval.checkpoints import load_base, resolve_checkpoint
from unlearn_eval.evaluation import finish, load_rows
from unlearn_eval.fingerprint import hash_json
from unlearn_eval.job import Job
from unlearn_eval.lm_head import head_logits
from unlearn_eval.results import read_log

from ..losses import unlearning_teacher_logits


class TeacherBackend(TransformersBackend):
    """
    Scores and generates by `l_t = l_o − α · ReLU(l_aug − l_o)`, from two models side by side.

    Args:
        original, augmented ([`~transformers.PreTrainedModel`]):
            The two models.
        alpha (`float`):
            Strength α.
        end_ids, batch_tokens, batch_size:
            As in [`~unlearn_eval.backends.transformers.TransformersBackend`].
    """

    def __init__(
        self,
        original: PreTrainedModel,
        augmented: PreTrainedModel,
        alpha: float,
        end_ids: Sequence[int],
        batch_tokens: int,
        batch_size: int,
    ):
        super().__init__(original, end_ids, batch_tokens, batch_size)
        self.models, self.alpha = (original, augmented.eval()), alpha

    def _hidden_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([last_hidden_states(model, **inputs) for model in self.models], dim=-1)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        halves = zip(self.models, hidden_states.chunk(2, dim=-1), strict=True)
        return unlearning_teacher_logits(*(head_logits(model, states) for model, states in halves), self.alpha)

    def _logits_processors(self, attention_mask: torch.Tensor) -> list[LogitsProcessor]:
        return [_TeacherProcessor(self.models[1], self.alpha, attention_mask)]


class _TeacherProcessor(LogitsProcessor):
    """Turns the original model's next logits into the teacher's, while the augmented model reads along."""

    def __init__(self, augmented: PreTrainedModel, alpha: float, attention_mask: torch.Tensor):
        self.augmented, self.alpha, self.mask = augmented, alpha, attention_mask
        self.cache = DynamicCache(config=augmented.config)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        read = self.cache.get_seq_length()
        self.mask = torch.nn.functional.pad(self.mask, (0, input_ids.shape[1] - self.mask.shape[1]), value=1)
        outputs = self.augmented(
            input_ids=input_ids[:, read:],
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0)[:, read:],
            past_key_values=self.cache,
            use_cache=True,
        )
        return unlearning_teacher_logits(scores, outputs.logits[:, -1].float(), self.alpha)


def evaluate_teacher(original: str, augmented: str, alpha: float, config: EvalConfig) -> None:
    """
    Evaluate the teacher as [`~unlearn_eval.evaluate`] does a model, in float32: α multiplies what rounding leaves.

    Args:
        original, augmented (`str`):
            Folders or Hub ids of the two models.
        alpha (`float`):
            Strength α.
        config ([`~unlearn_eval.EvalConfig`]):
            Configuration, with the transformers backend; the results go into its `output_dir`.
    """
    config = replace(config, dtype="float32", backend="transformers", score_backend="transformers")
    checkpoints = [resolve_checkpoint(name, config) for name in (original, augmented)]
    if any(one.adapter is not None for one in checkpoints):
        raise ValueError(
            "`teacher` takes whole models. Merge the adapter (`trl-rkld merge`), or leave the teacher out."
        )
    # What the result is known by: both models and α.
    hashes = {
        f"{name}_{key}": value
        for name, one in zip(("original", "augmented"), checkpoints, strict=True)
        for key, value in one.hashes.items()
    }
    checkpoint = replace(checkpoints[0], name=f"teacher (alpha {alpha:g})", hashes=hashes | {"alpha": f"{alpha:g}"})
    retain_log = None if config.retain_logs is None else read_log(config.retain_logs)
    job = Job(checkpoint, load_rows(config), config, None if retain_log is None else hash_json(retain_log))
    models = [load_base(one, config) for one in checkpoints]
    backend = TeacherBackend(*models, alpha, job.end_ids, config.batch_tokens, config.batch_size)
    try:
        for task in ("score", "generate"):
            job.run(task, backend)
        finish(job, Path(config.output_dir), retain_log, may_be_silent=True)
    finally:
        job.close()
