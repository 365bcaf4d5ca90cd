# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What a frozen model gave once, for counted tokens only: hidden states that enter its head, or log-probabilities."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from datasets import Dataset

from .roles import answer_lengths, batches


class TokenStates:
    """
    A tensor row or a number for each counted token of many samples, on the CPU.

    Args:
        states (`torch.Tensor`):
            Hidden states of shape `(total_tokens, hidden_size)`, in the dtype that enters the head, or
            log-probabilities of the labels, of shape `(total_tokens,)`.
        starts (`torch.Tensor`):
            Where each sample starts, of shape `(num_samples + 1,)`: sample `i` has the rows `starts[i]:starts[i + 1]`.
            A sample without rows is not cached.
    """

    def __init__(self, states: torch.Tensor, starts: torch.Tensor):
        self.states, self.starts = states, starts

    @classmethod
    def compute(
        cls,
        values: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        dataset: Dataset,
        collator: Callable,
        batch_size: int,
        accelerator: Accelerator,
        description: str,
    ) -> "TokenStates":
        """
        Run a model over a data set once.

        Args:
            values (`Callable`):
                From a batch to the values of its counted tokens: hidden states, or [`Role.label_log_probs`].
            dataset ([`~datasets.Dataset`]):
                Samples with `input_ids`, `labels` and `sample_id`.
            collator, batch_size, accelerator, description:
                As in [`~trl_rkld.teacher.roles.batches`].

        Returns:
            [`TokenStates`]:
                States of the data set's samples, by their `sample_id`.
        """
        sample_ids = torch.tensor(dataset["sample_id"])
        lengths = torch.zeros(int(sample_ids.max()) + 1, dtype=torch.long)
        lengths[sample_ids] = torch.tensor([sum(x != -100 for x in labels[1:]) for labels in dataset["labels"]])
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        states = None
        for batch in batches(dataset, collator, batch_size, accelerator, description):
            found = values(batch)
            if not torch.isfinite(found).all():
                raise FloatingPointError(
                    f"What the teacher gives is not finite ({description}, rows {batch['rows']} of its "
                    "data). Check the model's weights, or use `bf16=True` or float32 instead of float16."
                )
            if states is None:
                states = torch.empty(int(starts[-1]), *found.shape[1:], dtype=found.dtype)
            ids = batch["sample_id"].tolist()
            for sample, rows in zip(ids, found.cpu().split(lengths[ids].tolist()), strict=True):
                states[starts[sample] : starts[sample + 1]] = rows
        return cls(states, starts)

    def of(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        States of a batch, in the order of [`~trl_rkld.teacher.roles.counted_hidden_states`].

        Args:
            inputs (`dict`):
                Batch with `sample_id` and `labels`.

        Returns:
            `torch.Tensor`:
                Values of the batch's counted tokens, on its device.
        """
        ids, labels = inputs["sample_id"].tolist(), inputs["labels"]
        rows = [self.states[self.starts[i] : self.starts[i + 1]] for i in ids if i + 1 < len(self.starts)]
        if [len(states) for states in rows] != answer_lengths(labels).tolist():
            raise ValueError(
                "A sample has no cached teacher states. Pass every evaluation set as `eval_dataset` when constructing "
                "the trainer, or set `precompute_teacher=False`."
            )
        return torch.cat(rows).to(labels.device, non_blocking=True)
