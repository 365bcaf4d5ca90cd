# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Cached hidden states: what the heads of the teacher's models get, for counted tokens only."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from datasets import Dataset

from .roles import Role, batches


class HiddenStates:
    """
    Last hidden states of the counted tokens of many samples, on the CPU.

    Args:
        states (`torch.Tensor`):
            Hidden states of shape `(total_tokens, hidden_size)`, in the dtype that enters the head.
        starts (`torch.Tensor`):
            Where each sample starts, of shape `(num_samples + 1,)`: sample `i` has the rows `starts[i]:starts[i + 1]`.
            A sample without rows is not cached.
    """

    def __init__(self, states: torch.Tensor, starts: torch.Tensor):
        self.states, self.starts = states, starts

    @classmethod
    def compute(
        cls,
        role: Role,
        dataset: Dataset,
        collator: Callable,
        batch_size: int,
        accelerator: Accelerator,
        description: str,
    ) -> "HiddenStates":
        """
        Run a model over a data set once.

        Args:
            role ([`Role`]):
                Model to run.
            dataset ([`~datasets.Dataset`]):
                Samples with `input_ids`, `labels` and `sample_id`.
            collator, batch_size, accelerator, description:
                As in [`~trl_rkld.teacher.roles.batches`].

        Returns:
            [`HiddenStates`]:
                States of the data set's samples, by their `sample_id`.
        """
        sample_ids = torch.tensor(dataset["sample_id"])
        lengths = torch.zeros(int(sample_ids.max()) + 1, dtype=torch.long)
        lengths[sample_ids] = torch.tensor([sum(x != -100 for x in labels[1:]) for labels in dataset["labels"]])
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        states = None
        for batch in batches(dataset, collator, batch_size, accelerator, description):
            hidden = role.head_input(batch, accelerator).hidden_states
            if not torch.isfinite(hidden).all():
                raise FloatingPointError(
                    f"The hidden states of the teacher are not finite ({description}, rows {batch['rows']} of its "
                    "data). Check the model's weights, or use `bf16=True` or float32 instead of float16."
                )
            if states is None:
                states = torch.empty(int(starts[-1]), hidden.shape[-1], dtype=hidden.dtype)
            ids = batch["sample_id"].tolist()
            for sample, rows in zip(ids, hidden.cpu().split(lengths[ids].tolist()), strict=True):
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
                Hidden states of shape `(num_tokens, hidden_size)`, on the batch's device.
        """
        ids, labels = inputs["sample_id"].tolist(), inputs["labels"]
        rows = [self.states[self.starts[i] : self.starts[i + 1]] for i in ids if i + 1 < len(self.starts)]
        counted = (labels[:, 1:] != -100).sum(1).tolist()
        if [len(states) for states in rows] != counted:
            raise ValueError(
                "A sample has no cached teacher states. Pass every evaluation set as `eval_dataset` when constructing "
                "the trainer, or set `precompute_teacher=False`."
            )
        return torch.cat(rows).to(labels.device, non_blocking=True)
