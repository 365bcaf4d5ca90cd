# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Attention of many answers that share their prompts, as an attention implementation of transformers.

All questions of a batch stand in one row without any padding: a prompt, the answers to it one by one, the next prompt.
Each answer attends to its own prompt and to itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel


NAME = "shared_prompt"


class Group(NamedTuple):
    """
    Stretches of the row that are attended from at once.

    Attributes:
        queries (`torch.Tensor` of shape `[stretches, longest]`):
            Positions in the row of the tokens that attend, filled up with the last one.
        keys (`torch.Tensor` of shape `[stretches, longest]`):
            Positions in the row of the tokens that they may attend to, filled up likewise.
        mask (`torch.Tensor` of shape `[stretches, 1, queries, keys]`):
            0 where a query may attend to a key, else the least number there is.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor


class Layout(NamedTuple):
    """Where prompts and answers lie in a row, and the largest position that a token has in its own text."""

    groups: list[Group]
    last_position: int


def layout(
    stretches: Sequence[tuple[range, range]], visible: torch.Tensor, dtype: torch.dtype, last_position: int
) -> Layout:
    """
    Lay out a row.

    Args:
        stretches (`Sequence[tuple[range, range]]`):
            For each stretch what comes before it (a prompt's place in the row, or nothing) and its own place.
        visible (`torch.Tensor` of shape `[length]`):
            Which tokens may be attended to at all.
        dtype (`torch.dtype`):
            Of the model.
        last_position (`int`):
            Largest position that a token has in its own text.

    Returns:
        [`Layout`]:
            The layout; prompts and answers are two groups, since the ones have less to attend to.
    """
    prompts = [stretch for stretch in stretches if not stretch[0]]
    answers = [stretch for stretch in stretches if stretch[0] and stretch[1]]
    groups = [_group(some, visible, dtype) for some in (prompts, answers) if some]
    return Layout(groups, last_position)


def _group(stretches: Sequence[tuple[range, range]], visible: torch.Tensor, dtype: torch.dtype) -> Group:
    def filled(rows: list[list[int]]) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + row[-1:] * (width - len(row)) for row in rows], device=visible.device)

    queries = filled([list(own) for _, own in stretches])
    rows = [[*before, *own] for before, own in stretches]
    keys = filled(rows)
    # In the row a prompt stands before its answers, so nothing that comes later is attended to; nor is a filled-up key.
    lengths = torch.tensor([len(row) for row in rows], device=visible.device)
    real = torch.arange(keys.shape[1], device=visible.device) < lengths[:, None]
    allowed = (keys[:, None, :] <= queries[:, :, None]) & (real & visible[keys])[:, None, :]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=visible.device)
    return Group(queries, keys, mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None])


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    shared_prompt: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one row, in the signature that transformers asks for; refuses what it does not compute."""
    if shared_prompt is None or softcap is not None or s_aux is not None:
        raise ValueError("this attention can't be computed for shared prompts")
    if sliding_window is not None and shared_prompt.last_position >= sliding_window:
        raise ValueError("a sliding window would cut texts off")
    # One row: (length, heads, head_dim)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    output = torch.empty(*query.shape[:2], value.shape[-1], dtype=value.dtype, device=value.device)
    for queries, keys, mask in shared_prompt.groups:
        states = (query[queries], key[keys], value[keys])
        attended = scaled_dot_product_attention(
            *(one.transpose(1, 2) for one in states),
            attn_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output[queries] = attended.transpose(1, 2)  # a filled-up query is the last one again, with the same result
    return output[None], None


@contextmanager
def shared_prompt_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend in this way, which needs a `shared_prompt` argument in each call, while the context lasts."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(NAME, attend)
