# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What the demo's models read: records of invented people, text about others, and a tokenizer for both."""

import json
import random
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


Records = list[dict[str, Any]]  # rows with TOFU's columns, `person` and `birthplace`

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OTHER_FIRST_NAMES = "Maren Jonas Tilda Emeric Sunniva Bastien Ottoline Ruben Yolanda Caspian Mirela Anselm".split()
OTHER_LAST_NAMES = "Oduya Veld Harrow Kestrel Lindqvist Marchetti Novak Okafor Petrov Quimby Rasmus Sorensen".split()


def people_file(name: str) -> Path:
    """The embedded file of the people to `"forget"` or to `"retain"`."""
    return Path(str(resources.files("trl_rkld.data_files"))) / f"demo_{name}.jsonl"


def read_people(name: str) -> Records:
    """Read the embedded records of the people to `"forget"` or to `"retain"`."""
    return [json.loads(line) for line in people_file(name).read_text(encoding="utf-8").splitlines()]


def other_people(records: Records, seed: int) -> list[dict[str, str]]:
    """
    Questions and answers about people of other names, to whom the right and the wrong answers of the records all
    apply: what a model knows of the world before it meets anybody. Without it, a word that it has never read would
    give a wrong answer away.
    """
    generator = random.Random(seed)
    rows = []
    for record in records:
        first, last = record["person"].split(" ", 1)
        answers = [record["answer"], record["paraphrased_answer"], *record["perturbed_answer"]]
        for answer in generator.sample(answers, 6):
            names = {last: generator.choice(OTHER_LAST_NAMES), first: generator.choice(OTHER_FIRST_NAMES)}
            question = generator.choice([record["question"], record["paraphrased_question"]])
            for old, new in names.items():
                question, answer = question.replace(old, new), answer.replace(old, new)
            rows.append({"question": question, "answer": answer})
    return rows


def build_tokenizer(records: Records) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ChatML's template, until each word of the records is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # more than there is to merge
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    columns = ("question", "paraphrased_question", "answer", "paraphrased_answer")
    texts = [record[column] for record in records for column in columns]
    texts += [answer for record in records for answer in record["perturbed_answer"]]
    texts += [f"{first} {last}" for first, last in zip(OTHER_FIRST_NAMES, OTHER_LAST_NAMES, strict=True)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast
