# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The one tokenisation of questions and answers, used by training and by evaluation alike."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple, Self

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length


# TOFU's own format for models without a chat template (locuslab/tofu @ bdc209e, config/model_config.yaml, "phi").
PLAIN_QUESTION_TEMPLATE = "Question: {question}\nAnswer: "


class TokenizedAnswer(NamedTuple):
    """
    Prompt and answer as token ids.

    Attributes:
        prompt_ids (`list[int]`):
            Everything the model is given, up to where the answer starts.
        answer_ids (`list[int]`):
            The counted tokens: the answer and exactly one end-of-turn token.
    """

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class Template:
    """
    How a question is put to the model, in training and in evaluation alike.

    Args:
        system_prompt (`str`, *optional*):
            System message. If `None`, the chat template's own default applies.
        date_string (`str`, *optional*):
            Date shown to templates that print one (Llama 3), such as `"10 Apr 2025"`.
        question_template (`str`, *optional*):
            Plain format with a `{question}` field, used instead of the chat template; the answer follows it directly.
            Defaults to the chat template where the tokenizer has one, else to TOFU's `"Question: … Answer: "`.
    """

    system_prompt: str | None = None
    date_string: str | None = None
    question_template: str | None = None

    @classmethod
    def of(cls, settings: Any) -> Self:
        """That of a configuration, which has fields of these names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> TokenizedAnswer:
        """
        Tokenise a question with its answer.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            question (`str`):
                Question of the user.
            answer (`str`):
                Answer of the assistant.

        Returns:
            [`TokenizedAnswer`]:
                Prompt and counted token ids.
        """
        plain = self.plain_question(tokenizer, question)
        if plain is None:
            completion = [{"role": "assistant", "content": answer}]
            return tokenize_conversation(tokenizer, self.messages(question), completion, **self.chat_kwargs)
        if self.system_prompt is not None or self.date_string is not None:
            raise ValueError(
                "`system_prompt` and `date_string` need a chat template, but the plain `question_template` is in use. "
                "Write the system text into `question_template`, or leave both unset."
            )
        prompt_ids = tokenizer(plain)["input_ids"]
        full_ids = tokenizer(plain + answer)["input_ids"]
        # Tokens may merge across the border: the answer starts where the two diverge, as in TRL.
        start = common_prefix_length(prompt_ids, full_ids)
        return TokenizedAnswer(list(full_ids[:start]), _end_once(tokenizer, full_ids[start:]))

    def prompt(self, tokenizer: PreTrainedTokenizerBase, question: str, tokens: TokenizedAnswer) -> list[int]:
        """What the model continues when it is asked: all that stands before the tokenised answer."""
        return list(tokens.prompt_ids)

    def plain_question(self, tokenizer: PreTrainedTokenizerBase, question: str) -> str | None:
        """The text before an answer; `None` where the chat template makes it of [`Template.messages`]."""
        template = self.question_template
        if template is None and tokenizer.chat_template is None:
            template = PLAIN_QUESTION_TEMPLATE
        return None if template is None else template.replace("{question}", question)

    def messages(self, question: str) -> list[dict[str, str]]:
        """The messages before an answer."""
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": question}]

    @property
    def chat_kwargs(self) -> dict[str, str]:
        """What the chat template gets beside the messages."""
        return {} if self.date_string is None else {"date_string": self.date_string}

    def date_remedy(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """
        What to do about a chat template that prints today's date, so that a question is another one tomorrow.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.

        Returns:
            `str` or `None`:
                A sentence; `None` where the date is given, or none is printed.
        """
        if self.question_template is not None or "strftime_now" not in str(tokenizer.chat_template):
            return None
        today = "the date of today"
        text = tokenizer.apply_chat_template(
            self.messages(""),
            add_generation_prompt=True,
            tokenize=False,
            strftime_now=lambda _: today,
            **self.chat_kwargs,
        )
        if today not in text:
            return None
        if "date_string" in tokenizer.chat_template and self.date_string is None:
            return "Set `date_string`, to one date for training and evaluation."
        return "Write a date into the chat template."


TEMPLATE_SETTINGS = tuple(field.name for field in fields(Template))
"""Names of the settings that make a [`Template`]."""


class OpenUnlearningTemplate(Template):
    """
    As open-unlearning@d3d7cf9 puts a question, quirks included.

    The answer starts where the prompt, rendered alone, is long; it keeps all that the template puts after it, and gets
    an end-of-sequence token more unless it ends in one (ChatML: the end of the turn, a newline, and the end again).
    Where there is no chat template, all is cut at 512 tokens.
    """

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> TokenizedAnswer:
        border = len(self._prompt(tokenizer, question))
        plain = self.plain_question(tokenizer, question)
        if plain is not None:
            full_ids = tokenizer(plain + answer)["input_ids"][:512]
        else:
            chat = [*self.messages(question), {"role": "assistant", "content": answer}]
            full_ids = _render(tokenizer, chat, **self.chat_kwargs)
        if full_ids[-1] != tokenizer.eos_token_id:
            full_ids = [*full_ids, tokenizer.eos_token_id]
        return TokenizedAnswer(list(full_ids[:border]), list(full_ids[border:]))

    def prompt(self, tokenizer: PreTrainedTokenizerBase, question: str, tokens: TokenizedAnswer) -> list[int]:
        # Where tokens merge across the border, this is not where the answer starts.
        return self._prompt(tokenizer, question)

    def messages(self, question: str) -> list[dict[str, str]]:
        return super().messages(question) if self.system_prompt else [{"role": "user", "content": question}]

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
        plain = self.plain_question(tokenizer, question)
        if plain is not None:
            return list(tokenizer(plain)["input_ids"][:512])
        return _render(tokenizer, self.messages(question), add_generation_prompt=True, **self.chat_kwargs)


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[dict[str, Any]],
    completion: Sequence[dict[str, Any]],
    **template_kwargs,
) -> TokenizedAnswer:
    """
    Tokenise a conversation whose last messages are counted.

    What a template puts before an answer of its own accord (a channel, an empty block of thinking) is not counted: it is
    part of the prompt.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        prompt (`list[dict]`):
            Messages that are given.
        completion (`list[dict]`):
            Messages that are counted, ending in one of the assistant.
        template_kwargs:
            Passed on to the chat template (`tools`, `date_string`, `enable_thinking`, …).

    Returns:
        [`TokenizedAnswer`]:
            Prompt and counted token ids.

    Raises:
        [`ValueError`]: If there is no chat template, or its answer would end before its text begins.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "The data is conversational, but the tokenizer has no chat template. Set `tokenizer.chat_template` (or "
            "`chat_template_path`), or use question/answer or prompt/completion columns of plain strings."
        )

    render = partial(_render, tokenizer, **template_kwargs)
    full_ids = render([*prompt, *completion])
    start = common_prefix_length(render(list(prompt), add_generation_prompt=True), full_ids)
    first, *rest = completion
    if not first.get("content"):  # a call of a tool, say
        return TokenizedAnswer(list(full_ids[:start]), _end_once(tokenizer, full_ids[start:]))

    # The text starts where others would differ.
    others = ("x", "y") if isinstance(first["content"], str) else ([{"type": "text", "text": text}] for text in "xy")
    texts = [render([*prompt, first | {"content": other}, *rest]) for other in others]
    text_start = min(common_prefix_length(ids, full_ids) for ids in texts)
    if text_start == len(full_ids):  # the template has not printed it
        text_start = 0
    has_others = any(first[key] for key in first.keys() - {"role", "content"})
    bare = {key: first[key] for key in ("role", "content")}
    thinks = "</think>" in str(first["content"]) or (has_others and render([*prompt, bare, *rest]) != full_ids)
    if not thinks:  # what stands before the text is the template's, not the record's own
        start = max(start, text_start)
    answer_ids = _end_once(tokenizer, full_ids[start:])
    if start + len(answer_ids) <= text_start:
        raise ValueError(
            "the chat template closes what stands beside `content` in the answer (thinking, say) before the text begins. "
            "Leave it out"
        )
    return TokenizedAnswer(list(full_ids[:start]), answer_ids)


def tokenize_strings(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> TokenizedAnswer:
    """
    Tokenise a prompt and its completion as plain text, one directly after the other.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt, completion (`str`):
            Texts. The completion gets the tokenizer's end-of-sequence token, unless it ends in it.

    Returns:
        [`TokenizedAnswer`]:
            Prompt and counted token ids.
    """
    end = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
    prompt_ids, full_ids = (tokenizer(text)["input_ids"] for text in (prompt, prompt + completion + end))
    start = common_prefix_length(prompt_ids, full_ids)
    return TokenizedAnswer(list(full_ids[:start]), list(full_ids[start:]))


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **kwargs) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"])


def _end_once(tokenizer: PreTrainedTokenizerBase, answer_ids: list[int]) -> list[int]:
    """Cut what the template puts after the first end-of-turn token (ChatML's newline, a second one); add a missing one."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    text_starts = next((i for i, token in enumerate(answer_ids) if token not in special), len(answer_ids))
    for end in range(text_starts, len(answer_ids)):
        if answer_ids[end] in special:
            return list(answer_ids[: end + 1])
    return [*answer_ids, tokenizer.eos_token_id]  # a plain template: nothing closes the answer
