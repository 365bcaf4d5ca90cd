# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Scoring and greedy generation with transformers: full models, adapters and 4-bit models, on any device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..lm_head import head_logits
from . import AnswerScores, GenerateRequest, ScoreRequest


# Numbers in one block of float32 logits: 2²⁶ are 256 MiB.
_LOGITS_BLOCK = 2**26
# On a CPU, what is computed from them is several times faster in blocks that fit its cache: 4 MiB.
_CACHE_BLOCK = 2**20

# Average losses of one answer computed in two ways may differ by rounding; another mask differs by far more.
_PACKING_TOLERANCE = 0.05


class Question:
    """
    A prompt with all the answers to score after it, laid out as one sequence.

    The prompt stands once, the answers after it one by one. Each token sees the prompt and its own answer, and has the
    position that it would have had alone. The last token of an answer is not among the inputs: nothing follows it.

    Args:
        prompt_ids (`list[int]`):
            The prompt.
        answers (`list[tuple[int, list[int]]]`):
            The answers, each with the index of its request.
    """

    def __init__(self, prompt_ids: list[int], answers: list[tuple[int, list[int]]]):
        start = len(prompt_ids)
        self.ids, self.segments, self.positions = list(prompt_ids), [0] * start, list(range(start))
        self.indices = [index for index, _ in answers]
        self.lengths = [len(ids) for _, ids in answers]
        self.labels: list[int] = []
        self.sources: list[int] = []  # where the hidden state lies that predicts each label
        for segment, (_, ids) in enumerate(answers, start=1):
            inputs = ids[:-1]
            self.sources += [start - 1, *range(len(self.ids), len(self.ids) + len(inputs))]
            self.labels += ids
            self.ids += inputs
            self.segments += [segment] * len(inputs)
            self.positions += range(start, start + len(inputs))


class TransformersBackend:
    """
    A model of transformers or PEFT.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, loaded and in place.
        end_ids (`Sequence[int]`):
            Tokens that end an answer.
        batch_tokens (`int`, *optional*, defaults to `4096`):
            Tokens that go through the model at once when scoring, padding included.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts that are continued at once.
        hidden_id (`int`, *optional*):
            Token that no token may attend to, as [OU]'s padding mask has it: `--compat open_unlearning`. The model's own
            generation settings then hold but for sampling, as there.
    """

    def __init__(
        self,
        model: nn.Module,
        end_ids: Sequence[int],
        batch_tokens: int = 4096,
        batch_size: int = 32,
        hidden_id: int | None = None,
    ):
        self.model, self.end_ids, self.hidden_id = model, list(end_ids), hidden_id
        self.batch_tokens, self.batch_size = batch_tokens, batch_size
        self.causal_lm = model if isinstance(model, PreTrainedModel) else model.get_base_model()
        self.packs: bool | None = None  # whether the model takes a mask of its own, see `_can_pack`

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, AnswerScores]]:
        """
        Score answers, the longest question first.

        The answers to one prompt share its computation (see [`Question`]), wherever the model takes such a mask; logits
        and log-softmax are computed in float32, for counted tokens only.

        Args:
            requests (`Sequence[ScoreRequest]`):
                Prompts and answers, none of them empty.

        Yields:
            `tuple[int, AnswerScores]`:
                Index of a request and its scores.
        """
        answers: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (prompt_ids, answer_ids) in enumerate(requests):
            answers.setdefault(tuple(prompt_ids), []).append((index, answer_ids))
        with evaluating(self.model):
            questions = self._questions(answers)
            for batch in _by_tokens(questions, self.batch_tokens):
                yield from self._score_batch(batch)

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[int]]]:
        """
        Continue prompts greedily, whatever the model's own generation settings say.

        Args:
            requests (`Sequence[GenerateRequest]`):
                Prompts.

        Yields:
            `tuple[int, list[int]]`:
                Index of a request and the new tokens, without the one that ends the turn.
        """
        # What [OU] hides in a prompt is as good as absent: positions there count the visible tokens only.
        prompts = [[token for token in request.prompt_ids if token != self.hidden_id] for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (requests[i].max_new_tokens, len(prompts[i])), reverse=True)
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                limits = [requests[i].max_new_tokens for i in batch]
                for i, limit, ids in zip(
                    batch, limits, self._continue([prompts[i] for i in batch], max(limits)), strict=True
                ):
                    yield i, self._until_end(ids[:limit])

    def _questions(self, answers: dict[tuple[int, ...], list[tuple[int, list[int]]]]) -> list[Question]:
        together = [Question(list(prompt_ids), group) for prompt_ids, group in answers.items()]
        several = [question for question in together if len(question.indices) > 1]
        if several and self._can_pack(several, answers):
            questions = together
        else:
            questions = [Question(list(ids), [answer]) for ids, group in answers.items() for answer in group]
        return sorted(questions, key=lambda question: len(question.ids), reverse=True)

    def _can_pack(self, several: list[Question], answers: dict) -> bool:
        """Whether a packed question scores as its answers do alone; else (sliding windows, recurrences) none is packed."""
        if self.packs is None:
            self.packs = self.causal_lm.config._attn_implementation in ("sdpa", "eager")
        if self.packs:
            # What a window cuts off shows in the longest text; what runs on from answer to answer, in the last one.
            farthest = max(several, key=lambda question: max(question.positions))
            prompt_ids = tuple(farthest.ids[: farthest.segments.count(0)])
            group = answers[prompt_ids]
            try:
                packed = dict(self._score_batch([farthest]))
            except (RuntimeError, ValueError):  # a mask of this shape is nothing to it
                self.packs = False
                return False
            for answer in (max(group, key=lambda answer: len(answer[1])), group[-1]):
                alone = dict(self._score_batch([Question(list(prompt_ids), [answer])]))[answer[0]]
                self.packs &= abs(alone.avg_loss - packed[answer[0]].avg_loss) < _PACKING_TOLERANCE
        return self.packs

    def _score_batch(self, questions: list[Question]) -> Iterator[tuple[int, AnswerScores]]:
        device = self.causal_lm.get_input_embeddings().weight.device
        width = max(len(question.ids) for question in questions)

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)

        ids = padded([question.ids for question in questions], self.end_ids[0])
        segments = padded([question.segments for question in questions], -1)
        outputs = self.causal_lm.base_model(
            input_ids=ids,
            attention_mask=self._mask(ids, segments),
            position_ids=padded([question.positions for question in questions], 0),
            use_cache=False,
        )
        rows = torch.tensor([row for row, question in enumerate(questions) for _ in question.sources])
        columns = torch.tensor([source for question in questions for source in question.sources])
        hidden_states = outputs.last_hidden_state
        hidden_states = hidden_states[rows.to(hidden_states.device), columns.to(hidden_states.device)]
        labels = torch.tensor([label for question in questions for label in question.labels])
        scores = _token_scores(self.causal_lm, hidden_states, labels.to(hidden_states.device))
        lengths = [length for question in questions for length in question.lengths]
        ends = np.cumsum(lengths)
        indices = [index for question in questions for index in question.indices]
        for index, start, end in zip(indices, ends - lengths, ends, strict=True):
            yield index, AnswerScores(*(values[start:end] for values in scores))

    def _mask(self, ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        """Of shape `(batch, length)`, or, where several answers share a prompt, `(batch, 1, length, length)`, additive."""
        visible = ids != self.hidden_id if self.hidden_id is not None else torch.ones_like(ids, dtype=torch.bool)
        if int(segments.max()) <= 1:
            return (visible & (segments >= 0)).long()
        query, key = segments[:, :, None], segments[:, None, :]
        allowed = ((key == 0) | (key == query)) & visible[:, None, :]
        allowed &= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        dtype = self.causal_lm.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=ids.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

    def _continue(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        device = self.causal_lm.get_input_embeddings().weight.device
        width = max(map(len, prompts))
        ids = torch.tensor([[self.end_ids[0]] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
        )
        # What is unset in these is taken from the model's own settings (a repetition penalty, say), if it has any: in [OU]
        # it is meant to be.
        own = self.causal_lm.generation_config
        self.causal_lm.generation_config = GenerationConfig() if self.hidden_id is None else own
        try:
            output = self.causal_lm.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        finally:
            self.causal_lm.generation_config = own
        return output[:, width:].tolist()

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        return ids[:end]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _by_tokens(questions: list[Question], batch_tokens: int) -> Iterator[list[Question]]:
    """Batches of questions, sorted by length, that have at most `batch_tokens` tokens when padded to the longest."""
    start = 0
    while start < len(questions):
        size = max(1, batch_tokens // len(questions[start].ids))
        yield questions[start : start + size]
        start += size


def _token_scores(causal_lm: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor) -> list[np.ndarray]:
    """Log-probability, first choice or not, mean and variance of the log-probabilities, for each counted token."""
    vocab_size = causal_lm.config.get_text_config().vocab_size
    parts = []
    for rows, row_labels in _split(_LOGITS_BLOCK // vocab_size, hidden_states, labels):
        logits = head_logits(causal_lm, rows)
        block = (_CACHE_BLOCK if logits.device.type == "cpu" else _LOGITS_BLOCK) // vocab_size
        parts += [_statistics(*part) for part in _split(block, logits, row_labels.to(logits.device))]
    return [torch.cat(values).cpu().numpy() for values in zip(*parts, strict=True)]


def _split(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(max(1, size)) for tensor in tensors), strict=True)


def _statistics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    means = torch.linalg.vecdot(probs, log_probs)
    variances = torch.linalg.vecdot(probs.mul_(log_probs), log_probs) - means**2
    return log_probs.gather(1, labels[:, None])[:, 0], logits.argmax(-1) == labels, means, variances
