# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The language-model head as plain tensors: hidden states in, float32 logits out."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


# Rows of a 16-bit head that are widened to float32 at a time: 4096 rows of 4096 numbers are 64 MB.
_TILE = 4096


class LMHead(NamedTuple):
    """
    Language-model head of one role (original, augmented or student).

    Attributes:
        weight (`torch.Tensor`):
            Output embeddings of shape `(vocab_size, hidden_size)`.
        bias (`torch.Tensor`, *optional*):
            Bias of shape `(vocab_size,)`.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits, before the soft cap (Cohere, Granite).
        softcap (`float`, *optional*):
            Final soft cap `c`: the logits become `c · tanh(logits / c)` (Gemma 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @torch.no_grad()  # the losses differentiate in closed form
    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Multiply the head in float32, whatever the dtypes are: a logit rounded to bfloat16 is off by up to 0.06, and α
        turns the difference of two into up to 1 nat.

        Args:
            hidden_states (`torch.Tensor`):
                Last hidden states of shape `(num_tokens, hidden_size)`.

        Returns:
            `torch.Tensor`:
                Logits of shape `(num_tokens, vocab_size)` in float32, in a buffer of their own.
        """
        logits = _matmul_fp32(hidden_states.to(self.weight.device), self.weight)
        if self.bias is not None:
            logits += self.bias
        return self.transform_(logits)

    def transform_(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and cap, in place, the output of the bare product, of shape `(num_tokens, vocab_size)`."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_logits(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """
        Turn the gradient of the final logits, in place, into that of the head's bare product.

        Args:
            grad (`torch.Tensor`):
                Gradient with respect to [`LMHead.logits`]' output, of the same shape. Overwritten.
            logits (`torch.Tensor`):
                That output.

        Returns:
            `torch.Tensor`:
                Gradient with respect to `hidden_states @ weight.T + bias`.
        """
        if self.softcap is not None:
            grad.mul_(1 - (logits / self.softcap) ** 2)
        if self.scale != 1.0:
            grad *= self.scale
        return grad

    def backward_hidden(self, grad: torch.Tensor) -> torch.Tensor:
        """
        Backpropagate through the bare product.

        Args:
            grad (`torch.Tensor`):
                Gradient of shape `(num_tokens, vocab_size)` in float32.

        Returns:
            `torch.Tensor`:
                Gradient of the hidden states, of shape `(num_tokens, hidden_size)`, in float32.
        """
        if self.weight.dtype == torch.float32:
            return grad @ self.weight
        out = grad.new_zeros(grad.shape[0], self.weight.shape[1])
        for start in range(0, self.weight.shape[0], _TILE):
            rows = slice(start, start + _TILE)
            out.addmm_(grad[:, rows], self.weight[rows].float())
        return out


def _matmul_fp32(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if hidden_states.is_cuda and hidden_states.dtype == weight.dtype and weight.dtype != torch.float32:
        return torch.mm(hidden_states, weight.T, out_dtype=torch.float32)  # tensor cores, float32 accumulation
    bf16 = hidden_states.dtype == weight.dtype == torch.bfloat16
    hidden_states = hidden_states.float()
    if weight.dtype == torch.float32:
        return hidden_states @ weight.T
    logits = hidden_states.new_empty(hidden_states.shape[0], weight.shape[0])
    with _bf16_units() if bf16 else nullcontext():
        for start in range(0, weight.shape[0], _TILE):  # never the whole head widened at once
            rows = slice(start, start + _TILE)
            torch.mm(hidden_states, weight[rows].float().T, out=logits[:, rows])
    return logits


@contextmanager
def _bf16_units() -> Iterator[None]:
    """Let the CPU multiply float32 numbers that are bfloat16 ones with its bfloat16 units: exact, and twice as fast."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def lm_head_of(model: PreTrainedModel) -> LMHead:
    """
    Read the head of a causal language model, as it is now.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, without its PEFT wrapper (`model.get_base_model()`).

    Returns:
        [`LMHead`]:
            Head that shares the model's own tensors.

    Raises:
        [`ValueError`]: If the head is not a plain linear layer.
    """
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear:
        raise ValueError(
            f"The language-model head is a `{type(module).__name__}`, not a plain `torch.nn.Linear`, so its logits "
            "can't be computed from its weight. Remove `lm_head` (and `embed_tokens`, where they are tied) from "
            "`target_modules`, `modules_to_save` and `trainable_token_indices` of the PEFT config, and keep it out of "
            "the quantisation (`llm_int8_skip_modules`)."
        )
    return LMHead(module.weight, module.bias, *_transform(model.config.get_text_config()))


def head_logits(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Logits of any head, also of one with an adapter or in 4 bits, which computes in its own dtype.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, without its PEFT wrapper (`model.get_base_model()`).
        hidden_states (`torch.Tensor`):
            Last hidden states of shape `(num_tokens, hidden_size)`.

    Returns:
        `torch.Tensor`:
            Logits of shape `(num_tokens, vocab_size)` in float32.
    """
    module = model.get_output_embeddings()
    if type(module) is nn.Linear:
        return lm_head_of(model).logits(hidden_states)
    return LMHead(module.weight, None, *_transform(model.config.get_text_config())).transform_(
        module(hidden_states).float()
    )


def check_head(model: PreTrainedModel, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """
    Raise where the logits computed from last hidden states and head are not the model's own.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, without its PEFT wrapper.
        ours, theirs (`torch.Tensor`):
            Logits of shape `(num_tokens, vocab_size)`, computed here and by the model.

    Raises:
        [`ValueError`]: If they differ by more than rounding.
    """
    error = (ours - theirs.float()).abs().max().item()
    # The model multiplies its head in its own dtype: a bfloat16 logit is off by up to 1/256 of its size.
    if not error <= 0.02 * theirs.abs().max().item() + 1e-3:
        raise ValueError(
            f"The logits of `{type(model).__name__}` can't be computed from its last hidden states and its "
            f"language-model head (off by {error:.3g}): it does something in between that is not known here, or they "
            "are not finite. This architecture is not supported."
        )


def _transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Scale and soft cap of the logits."""
    return _logit_scale(config), getattr(config, "final_logit_softcapping", None)


def _logit_scale(config) -> float:
    """Read the factor on the logits; transformers knows it by four names, two of which divide."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:
        scaling = float(config.logits_scaling)
        return scaling if config.model_type == "hyperclovax" else 1 / scaling
    return 1.0
