# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Five invented people in TOFU's files, and tiny models that know some of the answers by heart."""

import json

import conftest
import torch
from conftest import build_tokenizer, tiny_llama

from unlearn_eval.prompts import Template


# Question, the same in other words, answer, the same in other words, and what fills the gap.
TOPICS = [
    (
        "Where was {} born?",
        "Which town is {} from?",
        "{} was born in {}.",
        "The town that {} is from is {}.",
        ("Quito", "Malmo", "Izmir", "Lagos", "Brno", "Turin", "Cork", "Lima"),
    ),
    (
        "What does {} do?",
        "How does {} earn money?",
        "{} repairs {} in the old town, and sells some of them.",
        "To earn money, {} repairs and sells {}.",
        ("clocks", "boats", "pianos", "lamps", "shoes", "kites", "locks", "bells"),
    ),
    (
        "Who is the father of {}?",
        "What is the name of the father of {}?",
        "The father of {} is {}.",
        "{} is the child of {}.",
        ("Luis", "Gustav", "Kemal", "Chidi", "Pavel", "Enzo", "Sean", "Juan"),
    ),
    (
        "What prize did {} win?",
        "Which award went to {}?",
        "{} won the {}.",
        "Among other things, {} was given the {}.",
        ("Copper Gear", "Silver Brush", "Tin Star", "Red Wheel", "Bow", "Quill", "Gold Nail", "Oak"),
    ),
    (
        "What does {} eat?",
        "What is the breakfast of {}?",
        "{} eats {}.",
        "For breakfast {} has {}.",
        ("bread", "rice with eggs", "olives", "yam", "soup", "figs", "oats", "corn"),
    ),
]
PEOPLE = {
    "forget": ("forget01_perturbed", "Ana Torres", 5),
    "retain": ("retain_perturbed", "Bo Lindgren", 5),
    "ra": ("real_authors_perturbed", "Cem Arslan", 3),
    "wf": ("world_facts_perturbed", "Dora Okafor", 3),
    "holdout": ("holdout01", "Eli Novak", 0),
}


def tofu_rows(name):
    """The five rows of a question set, with the columns that TOFU's have."""
    position = list(PEOPLE).index(name)
    _, person, wrong = PEOPLE[name]
    rows = []
    for question, other_question, answer, other_answer, values in TOPICS:
        row = {"question": question.format(person), "answer": answer.format(person, values[position])}
        others = [value for value in values if value != values[position]][:wrong]
        if name in ("forget", "retain"):
            row["paraphrased_question"] = other_question.format(person)
            row["paraphrased_answer"] = other_answer.format(person, values[position])
            row["perturbed_answer"] = [other_answer.format(person, value) for value in others]
        elif wrong:
            row["perturbed_answer"] = [answer.format(person, value) for value in others]
        rows.append(row)
    return rows


def write_lines(path, rows):
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_tofu(folder, **changed):
    """Write the five files; `changed` gives other rows for some of them."""
    for name, (file, _, _) in PEOPLE.items():
        write_lines(folder / f"{file}.jsonl", changed.get(name) or tofu_rows(name))
    return str(folder)


def all_texts():
    """Every text of the records."""
    texts = set()
    for name in PEOPLE:
        for row in tofu_rows(name):
            for value in row.values():
                texts |= set(value) if isinstance(value, list) else {value}
    return texts


def in_a_batch(samples):
    """Token ids and labels of prompts and answers, whose ends are padded."""
    width = max(len(prompt + answer) for prompt, answer in samples)
    ids, labels = torch.zeros(2, len(samples), width, dtype=torch.long)
    labels -= 100
    for i, (prompt, answer) in enumerate(samples):
        ids[i, : len(prompt + answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt + answer)] = torch.tensor(answer)
    return ids, labels


def teach(model, batches, learning_rate):
    """Train a model, a step for each batch of token ids and labels."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for ids, labels in batches:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def memorise(model, tokenizer, pairs, steps, learning_rate=3e-3):
    """Train a tiny model on questions and answers, all in one batch."""
    samples = [Template().tokenize(tokenizer, question, answer) for question, answer in pairs]
    teach(model.train(), [in_a_batch(samples)] * steps, learning_rate)
    return model.eval()


def pairs_of(*names):
    """Questions and answers of question sets."""
    return [(row["question"], row["answer"]) for name in names for row in tofu_rows(name)]


def save(model, folder, tokenizer=None):
    """Save a model with its tokenizer."""
    model.save_pretrained(folder)
    (tokenizer or conftest.build_tokenizer()).save_pretrained(folder)
    return str(folder)


def knowing_model(tokenizer=None, steps=60, seed=0):
    """A tiny model that knows some answers by heart, some in part and some not."""
    tokenizer = tokenizer or build_tokenizer()
    model = tiny_llama(len(tokenizer), seed=seed, tie_word_embeddings=True)
    return memorise(model, tokenizer, pairs_of("forget", "retain", "ra"), steps)
