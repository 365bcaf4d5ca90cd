# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Word overlap of generated answers with the reference answers."""

import string
from collections.abc import Sequence
from typing import TypedDict

from .checks import same_length


_ROUGE_SIGNS = frozenset(string.ascii_lowercase + string.digits)


class RougeScores(TypedDict):
    """The three numbers that open-unlearning stores for each generation."""

    rouge1_recall: float
    rougeL_f1: float
    rougeL_recall: float


def has_rouge_words(text: str) -> bool:
    """
    Whether rouge-score can read a text: it knows words of a to z and 0 to 9 only, and of a text in other letters nothing
    is left, so that any answer would score 0.

    Args:
        text (`str`):
            Reference answer.

    Returns:
        `bool`:
            Whether most of its letters and digits are among these.
    """
    signs = [sign for sign in text.lower() if sign.isalnum()]
    return sum(sign in _ROUGE_SIGNS for sign in signs) > len(signs) / 2


def rouge_scores(references: Sequence[str], generations: Sequence[str]) -> list[RougeScores]:
    """
    ROUGE-1 recall, ROUGE-L F1 and ROUGE-L recall of each generation (rouge-score 0.1.2, Porter stemmer).

    Recall asks how much of the reference the generation holds, so a long rambling answer scores high. TOFU reports
    `rougeL_recall`. Aggregation: mean over items ([`mean_over_items`]). Direction: on the forget set lower is better
    for the data subject; elsewhere higher is better for the user. Source: https://aclanthology.org/W04-1013, as in
    open-unlearning@d3d7cf9 (`eval_text_similarity`).

    Args:
        references (`Sequence[str]` of length n):
            Reference answers.
        generations (`Sequence[str]` of length n):
            Generated answers in the same order. An empty one scores 0.

    Returns:
        `list[RougeScores]` of length n:
            Scores in [0, 1].

    Raises:
        [`ValueError`]: If a list is empty, the lengths differ or an element is not a string.
    """
    same_length("references", references, "generations", generations)
    if not references:
        raise ValueError("`references` is empty: give at least one reference answer.")
    for name, texts in (("references", references), ("generations", generations)):
        wrong = [index for index, text in enumerate(texts) if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"`{name}` has no string at index {wrong[0]}: decode every answer.")

    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [
        scorer.score(reference, generation) for reference, generation in zip(references, generations, strict=True)
    ]
    return [
        RougeScores(
            rouge1_recall=score["rouge1"].recall,
            rougeL_f1=score["rougeL"].fmeasure,
            rougeL_recall=score["rougeL"].recall,
        )
        for score in scores
    ]
