# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Scoring and greedy generation with transformers: full models, adapters and 4-bit models, on any device."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from ..lm_head import check_head, head_logits
from ..models import evaluating, without_peft
from . import AnswerScores, GenerateRequest, ScoreRequest
from .shared_prompt import layout, shared_prompt_attention


# Numbers in one block of float32 logits: 2²⁷ are 512 MiB.
_LOGITS_BLOCK = 2**27
# On a CPU, what is computed from them is several times faster in blocks that fit its cache: 4 MiB.
_CACHE_BLOCK = 2**20

# Average losses of one answer computed in two ways may differ by rounding; another mask differs by far more.
_PACKING_TOLERANCE = 0.05


class Question(NamedTuple):
    """A prompt with answers to score after it, each with the index of its request."""

    prompt_ids: list[int]
    answers: list[tuple[int, list[int]]]

    @property
    def num_tokens(self) -> int:
        # The last token of an answer is not among the inputs: nothing follows it.
        return len(self.prompt_ids) + sum(len(ids) - 1 for _, ids in self.answers)


class TransformersBackend:
    """
    A model of transformers or PEFT.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, loaded and in place.
        end_ids (`Sequence[int]`):
            Tokens that end an answer.
        batch_tokens (`int`, *optional*):
            Tokens that go through the model at once when scoring, padding included. Defaults to 2048 on a CPU and 8192
            elsewhere.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts that are continued at once.
        masked_token_id (`int`, *optional*):
            Token that no token may attend to, as open-unlearning's padding mask has it: `--compat open_unlearning`.
            The model's own generation settings then hold but for sampling, as there.
    """

    def __init__(
        self,
        model: nn.Module,
        end_ids: Sequence[int],
        batch_tokens: int | None = None,
        batch_size: int = 32,
        masked_token_id: int | None = None,
    ):
        self.model, self.end_ids, self.masked_token_id = model, list(end_ids), masked_token_id
        self.causal_lm = without_peft(model)
        self.batch_tokens = batch_tokens or (2048 if self.device.type == "cpu" else 8192)
        self.batch_size = batch_size
        self.packs: bool | None = None  # whether questions can be packed, see `_can_pack`
        self.is_known = False  # whether its logits were seen to be those of its head

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.causal_lm.get_input_embeddings().weight.device

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, AnswerScores]]:
        """
        Score answers, the longest question first.

        The answers to one prompt share its computation, wherever the model can be made to attend so; logits
        and log-softmax are computed in float32, for counted tokens only.

        Args:
            requests (`Sequence[ScoreRequest]`):
                Prompts and answers, none of them empty.

        Yields:
            `tuple[int, AnswerScores]`:
                Index of a request and its scores.

        Raises:
            [`ValueError`]: If the model computes its logits in a way that is not known here.
        """
        answers: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (prompt_ids, answer_ids) in enumerate(requests):
            answers.setdefault(tuple(prompt_ids), []).append((index, answer_ids))
        with evaluating(self.model):
            if not self.is_known and requests:
                self._check_head(min(requests, key=lambda request: len(request.prompt_ids) + len(request.answer_ids)))
            questions = [
                piece
                for prompt_ids, group in answers.items()
                for piece in _pieces(Question(list(prompt_ids), group), self.batch_tokens)
            ]
            if self._can_pack(questions):
                score = self._score_packed
            else:
                questions = [Question(one.prompt_ids, [answer]) for one in questions for answer in one.answers]
                score = self._score_rows
            questions.sort(key=lambda question: question.num_tokens, reverse=True)
            for batch in _by_tokens(questions, self.batch_tokens):
                yield from score(batch)

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
        # What open-unlearning hides in a prompt is as good as absent: positions there count the visible tokens only.
        prompts = [[token for token in request.prompt_ids if token != self.masked_token_id] for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (requests[i].max_new_tokens, len(prompts[i])), reverse=True)
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                limits = [requests[i].max_new_tokens for i in batch]
                for i, limit, ids in zip(
                    batch, limits, self._continue([prompts[i] for i in batch], max(limits)), strict=True
                ):
                    yield i, self._until_end(ids[:limit])

    def _check_head(self, request: ScoreRequest) -> None:
        ids = torch.tensor([[*request.prompt_ids, *request.answer_ids]], device=self.device)
        ours = head_logits(self.causal_lm, last_hidden_states(self.causal_lm, input_ids=ids)[0])
        theirs = self.causal_lm(input_ids=ids, use_cache=False).logits[0].to(ours.device)
        if theirs.isfinite().all():  # else the scores will not be, and their error says so
            check_head(self.causal_lm, ours, theirs)
        self.is_known = True

    def _can_pack(self, questions: list[Question]) -> bool:
        """Whether a packed question scores as its answers do alone; else (sliding windows, recurrences) none is packed."""
        several = [question for question in questions if len(question.answers) > 1]
        if not several or self.packs is False:
            return False
        # What a window cuts off shows in the longest text; what runs on from answer to answer, in the last one.
        farthest, longest = max(several, key=_reach), max(questions, key=_reach)
        try:
            if _reach(longest) > _reach(farthest):
                list(self._score_packed([longest]))
            packed = dict(self._score_packed([farthest]))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError):  # the model does not know such attention
            self.packs = False
            return False
        alone: dict[int, AnswerScores] = {}
        for answer in (max(farthest.answers, key=lambda answer: len(answer[1])), farthest.answers[-1]):
            alone |= self._score_rows([Question(farthest.prompt_ids, [answer])])
        self.packs = all(abs(alone[i].avg_loss - packed[i].avg_loss) < _PACKING_TOLERANCE for i in alone)
        return self.packs

    def _score_packed(self, questions: list[Question]) -> Iterator[tuple[int, AnswerScores]]:
        """All questions in one row, the prompts once."""
        ids, positions, stretches, sources = [], [], [], []
        for prompt_ids, answers in questions:
            prompt = range(len(ids), len(ids) + len(prompt_ids))
            stretches.append((range(0), prompt))
            ids += prompt_ids
            positions += range(len(prompt_ids))
            for _, answer_ids in answers:
                own = range(len(ids), len(ids) + len(answer_ids) - 1)
                stretches.append((prompt, own))
                sources += [prompt[-1], *own]
                ids += answer_ids[:-1]
                positions += range(len(prompt_ids), len(prompt_ids) + len(own))
        row = torch.tensor(ids, device=self.device)
        hidden_states = self._hidden_states(
            input_ids=row[None],
            attention_mask=None,
            position_ids=torch.tensor([positions], device=self.device),
            shared_prompt=layout(stretches, self._visible(row), self.causal_lm.dtype, max(positions)),
        )
        yield from self._answers(questions, hidden_states[0], sources)

    def _score_rows(self, questions: list[Question]) -> Iterator[tuple[int, AnswerScores]]:
        """Questions of one answer each, padded to the right."""
        rows = [[*prompt_ids, *ids[:-1]] for prompt_ids, [(_, ids)] in questions]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.end_ids[0]] * (width - len(row)) for row in rows], device=self.device)
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        hidden_states = self._hidden_states(
            input_ids=ids,
            attention_mask=real * self._visible(ids),
            position_ids=torch.arange(width, device=self.device).expand(len(rows), -1),
        )
        sources = [
            row * width + column
            for row, (prompt_ids, [(_, ids)]) in enumerate(questions)
            for column in range(len(prompt_ids) - 1, len(prompt_ids) - 1 + len(ids))
        ]
        yield from self._answers(questions, hidden_states.flatten(0, 1), sources)

    def _hidden_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        """What enters the head."""
        return last_hidden_states(self.causal_lm, **inputs)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What leaves it, in float32."""
        return head_logits(self.causal_lm, hidden_states)

    def _logits_processors(self, attention_mask: torch.Tensor) -> list[LogitsProcessor]:
        """What else decides on the next token of a batch whose prompts have this mask."""
        return []

    def _answers(
        self, questions: list[Question], hidden_states: torch.Tensor, sources: list[int]
    ) -> Iterator[tuple[int, AnswerScores]]:
        """Scores of the answers from hidden states of shape `(tokens, hidden_size)`; `sources` predict their tokens."""
        answers = [answer for question in questions for answer in question.answers]
        labels = torch.tensor([token for _, ids in answers for token in ids], device=hidden_states.device)
        scores = self._token_scores(hidden_states[sources], labels)
        start = 0
        for index, ids in answers:
            yield index, AnswerScores(*(values[start : start + len(ids)] for values in scores))
            start += len(ids)

    def _token_scores(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> list[np.ndarray]:
        """Log-probability, first choice or not, mean and variance of the log-probabilities, for each counted token."""
        vocab_size = self.causal_lm.get_output_embeddings().weight.shape[0]
        parts = []
        for rows, row_labels in _split(_LOGITS_BLOCK // vocab_size, hidden_states, labels):
            logits = self._logits(rows)
            block = (_CACHE_BLOCK if logits.device.type == "cpu" else _LOGITS_BLOCK) // vocab_size
            parts += [_statistics(*part) for part in _split(block, logits, row_labels.to(logits.device))]
        return [torch.cat(values).cpu().numpy() for values in zip(*parts, strict=True)]

    def _visible(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens may be attended to."""
        return torch.ones_like(ids, dtype=torch.bool) if self.masked_token_id is None else ids != self.masked_token_id

    def _continue(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]
        ids = torch.tensor(
            [[self.end_ids[0]] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)], device=self.device
        )
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=self.device)
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
        )
        # What is unset in these is taken from the model's own settings (a repetition penalty, say), if it has any: in
        # open-unlearning it is meant to be.
        own = self.causal_lm.generation_config
        self.causal_lm.generation_config = GenerationConfig() if self.masked_token_id is None else own
        try:
            output = self.causal_lm.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=self._logits_processors(mask),
            )
        finally:
            self.causal_lm.generation_config = own
        return output[:, width:].tolist()

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        return ids[:end]


def last_hidden_states(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """
    Hidden states after the final norm.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        inputs (`dict`):
            Arguments of its forward pass, `shared_prompt` among them where the answers to a prompt share it.

    Returns:
        `torch.Tensor`:
            Hidden states of shape `(batch_size, length, hidden_size)`.
    """
    with shared_prompt_attention(model) if "shared_prompt" in inputs else nullcontext():
        return model.base_model(**inputs, use_cache=False).last_hidden_state


def _reach(question: Question) -> int:
    """Length of the longest text: the prompt and one answer."""
    return len(question.prompt_ids) + max(len(ids) for _, ids in question.answers)


def _pieces(question: Question, batch_tokens: int) -> Iterator[Question]:
    """A question of at most that many tokens, or several with some of its answers: many texts begin with the same token."""
    piece = Question(question.prompt_ids, [])
    for answer in question.answers:
        if piece.answers and piece.num_tokens + len(answer[1]) - 1 > batch_tokens:
            yield piece
            piece = Question(question.prompt_ids, [])
        piece.answers.append(answer)
    yield piece


def _by_tokens(questions: list[Question], batch_tokens: int) -> Iterator[list[Question]]:
    """Batches of questions, sorted by length, that have at most `batch_tokens` tokens when padded to the longest."""
    start = 0
    while start < len(questions):
        size = max(1, batch_tokens // questions[start].num_tokens)
        yield questions[start : start + size]
        start += size


def _split(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(max(1, size)) for tensor in tensors), strict=True)


def _statistics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    means = torch.linalg.vecdot(probs, log_probs)
    variances = torch.linalg.vecdot(probs.mul_(log_probs), log_probs) - means**2
    return (
        log_probs.gather(1, labels[:, None])[:, 0],
        logits.gather(1, labels[:, None])[:, 0] == logits.amax(-1),
        means,
        variances,
    )
