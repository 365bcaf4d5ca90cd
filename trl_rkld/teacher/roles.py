# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""A role is a model in one of its states. How its hidden states and its head are had."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from unlearn_eval.lm_head import check_head
from unlearn_eval.models import evaluating, without_peft

from ..losses import HeadInput, LMHead, chunked_nll, lm_head_of


AUGMENTED = "augmented"  # name of the adapter, where the augmented model is one


@dataclass(frozen=True)
class Role:
    """
    The original, the augmented or the student model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model, not wrapped for distributed training.
        activate (`Callable`, *optional*):
            Returns a context manager in which the model is in this role: the one that switches its adapters.
    """

    model: nn.Module
    activate: Callable[[], AbstractContextManager] = nullcontext

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The causal language model below a PEFT wrapper."""
        return without_peft(self.model)

    def head(self) -> LMHead:
        """The role's head, sharing the model's tensors."""
        with self.activate():
            return lm_head_of(self.causal_lm)

    @torch.no_grad()
    def head_input(self, inputs: dict[str, torch.Tensor], accelerator: Accelerator) -> HeadInput:
        """
        Hidden states of the counted tokens and the head, in evaluation mode and without gradients.

        Args:
            inputs (`dict`):
                Batch with `input_ids`, `attention_mask` and `labels`, each of shape `(batch_size, length)`.
            accelerator ([`~accelerate.Accelerator`]):
                Gives the autocast under which the student's forward pass runs, too.

        Returns:
            [`~trl_rkld.losses.HeadInput`]:
                Hidden states of shape `(num_tokens, hidden_size)`, and the head.
        """
        with self.activate(), evaluating(self.model), accelerator.autocast():
            return HeadInput(counted_hidden_states(self.model, inputs), lm_head_of(self.causal_lm))

    def label_log_probs(self, inputs: dict[str, torch.Tensor], accelerator: Accelerator) -> torch.Tensor:
        """Log-probabilities of the counted tokens, of shape `(num_tokens,)`; arguments as in [`Role.head_input`]."""
        with torch.no_grad():
            return chunked_nll(self.head_input(inputs, accelerator), counted_labels(inputs)).label_log_probs


def is_counted(labels: torch.Tensor) -> torch.Tensor:
    """
    Which tokens of a batch count, of shape `(batch_size, length - 1)`: a sequence's first has nothing before it that could
    predict it.
    """
    return labels[:, 1:] != -100


def answer_lengths(labels: torch.Tensor) -> torch.Tensor:
    """Counted tokens of each sample, of shape `(batch_size,)`."""
    return is_counted(labels).sum(1)


def counted_hidden_states(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    What enters the head at the tokens before each counted one: the last hidden states after the final norm.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model, not wrapped for distributed training.
        inputs (`dict`):
            Batch with `input_ids`, `attention_mask` and `labels`, each of shape `(batch_size, length)`.

    Returns:
        `torch.Tensor`:
            Hidden states of shape `(num_tokens, hidden_size)`, row by row of the batch.
    """
    backbone = without_peft(model).base_model
    outputs = backbone(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    hidden_states = outputs.last_hidden_state  # of a model split over devices, on the last of them
    return hidden_states[:, :-1][is_counted(inputs["labels"]).to(hidden_states.device)]


def counted_labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The counted tokens of a batch, of shape `(num_tokens,)`, in the order of [`counted_hidden_states`]."""
    return inputs["labels"][:, 1:][is_counted(inputs["labels"])]


def answer_probabilities(label_log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Probability of each answer, `p(answer)^(1/tokens)`.

    Args:
        label_log_probs (`torch.Tensor`):
            Log-probabilities of the counted tokens, of shape `(num_tokens,)`.
        labels (`torch.Tensor`):
            Labels of the batch, of shape `(batch_size, length)`.

    Returns:
        `torch.Tensor`:
            Probabilities of shape `(batch_size,)`.
    """
    lengths = answer_lengths(labels).to(label_log_probs.device)
    return (sum_of_answers(label_log_probs, labels) / lengths).exp()


def sum_of_answers(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Sum up each answer's values.

    Args:
        values (`torch.Tensor`):
            A number for each counted token, of shape `(num_tokens,)`.
        labels (`torch.Tensor`):
            Labels of the batch, of shape `(batch_size, length)`.

    Returns:
        `torch.Tensor`:
            Sums of shape `(batch_size,)`.
    """
    answers = values.split(answer_lengths(labels).tolist())
    return torch.stack([answer.sum() for answer in answers])


def batches(
    dataset: Dataset, collator: Callable, batch_size: int, accelerator: Accelerator, description: str
) -> Iterator[dict[str, torch.Tensor]]:
    """
    Batches of a tokenised data set on the accelerator's device, longest samples first, with a progress bar.

    Args:
        dataset ([`~datasets.Dataset`]):
            Samples with `input_ids` and `labels`.
        collator (`Callable`):
            Makes a batch of a list of samples.
        batch_size (`int`):
            Samples in a batch.
        accelerator ([`~accelerate.Accelerator`]):
            Gives the device, and whether this process shows the bar.
        description (`str`):
            Text of the bar.

    Yields:
        `dict`:
            Batch, with `rows`: the indices of its samples in the data set.
    """
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=description, disable=not accelerator.is_local_main_process, leave=False):
        rows = order[start : start + batch_size]
        batch = collator([dataset[i] for i in rows])
        yield {key: tensor.to(accelerator.device) for key, tensor in batch.items()} | {"rows": rows}


def probabilities_of_answers(
    role: Role, dataset: Dataset, collator: Callable, batch_size: int, accelerator: Accelerator, description: str
) -> torch.Tensor:
    """
    Probability of each answer of a data set, [`answer_probabilities`].

    Args:
        role ([`Role`]):
            Model asked.
        dataset, collator, batch_size, accelerator, description:
            As in [`batches`].

    Returns:
        `torch.Tensor`:
            Probabilities of shape `(num_samples,)`, longest sample first.
    """
    probabilities = []
    for batch in batches(dataset, collator, batch_size, accelerator, description):
        probabilities.append(answer_probabilities(role.label_log_probs(batch, accelerator), batch["labels"]))
    return torch.cat(probabilities)


@torch.no_grad()
def check_no_dropout(role: Role, batch: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
    """
    Raise where two passes in training mode differ: dropout is on somewhere.

    Args:
        role ([`Role`]):
            Student.
        batch (`dict`):
            A small batch.
        accelerator ([`~accelerate.Accelerator`]):
            Gives the autocast.
    """
    was_training = role.model.training
    role.model.train()
    with accelerator.autocast():
        first, second = (counted_hidden_states(role.model, batch).float() for _ in range(2))
    role.model.train(was_training)
    if (first - second).abs().max() > 1e-2 * first.abs().max():
        raise ValueError(
            f"`{type(role.causal_lm).__name__}` drops activations in a way that `disable_dropout` does not know. Set "
            "its dropout rates to 0 in the model's config, or set `disable_dropout=False`."
        )


def check_logits(role: Role, batch: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
    """
    Raise where the logits computed from the hidden states and the head are not the model's own.

    Args:
        role ([`Role`]):
            Model asked.
        batch (`dict`):
            A small batch.
        accelerator ([`~accelerate.Accelerator`]):
            Gives the autocast.
    """
    ours = role.head_input(batch, accelerator)
    with torch.no_grad(), role.activate(), evaluating(role.model), accelerator.autocast():
        logits = role.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    theirs = logits[:, :-1][is_counted(batch["labels"])]
    check_head(role.causal_lm, ours.head.logits(ours.hidden_states).to(theirs.device), theirs)
