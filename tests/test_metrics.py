# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import itertools
import math
import subprocess
import sys
import zlib

import numpy as np
import pytest

from unlearn_eval import metrics


LN2 = math.log(2)


def test_answer_probability_is_the_exponential_of_minus_the_loss():
    assert metrics.answer_probability([LN2, 0.0]) == pytest.approx([0.5, 1.0])
    assert metrics.answer_probability([[LN2, 2 * LN2]]) == pytest.approx(np.array([[0.5, 0.25]]))


def test_option_normalised_probability():
    assert metrics.option_normalised_probability([0.2], [[0.1, 0.05, 0.15]]) == pytest.approx([0.4], abs=1e-9)
    # The guard decides where all probabilities are tiny: 1e-10 / (1e-10 + 0 + 1e-10).
    assert metrics.option_normalised_probability([1e-10], [[0.0, 0.0]]) == pytest.approx([0.5])
    assert metrics.option_normalised_probability([1e-10], [[0.0, 0.0]], guard=0.0) == pytest.approx([1.0])
    with pytest.raises(ValueError, match="item 1: keep the default `guard`"):
        metrics.option_normalised_probability([0.5, 0.0], [[0.5], [0.0]], guard=0.0)
    with pytest.raises(ValueError, match="none of them negative"):
        metrics.option_normalised_probability([-0.5], [[0.5]])


def test_mean_over_items_takes_the_answers_of_an_item_first():
    assert metrics.mean_over_items([0.0, 1.0, 5.0]) == 2.0
    assert metrics.mean_over_items([[0.0, 1.0], [3.0, 6.0]]) == 2.5


def test_rouge_directions():
    short = metrics.rouge_scores(["the cat sat on the mat"], ["the cat"])[0]
    assert short == pytest.approx({"rouge1_recall": 2 / 6, "rougeL_f1": 0.5, "rougeL_recall": 2 / 6})
    # Recall is the share of the reference: an answer that holds all of it and more scores 1.
    assert metrics.rouge_scores(["the cat"], ["the cat sat on the mat"])[0]["rougeL_recall"] == 1.0
    # ROUGE-1 does not see the order, ROUGE-L does.
    backwards = metrics.rouge_scores(["red green blue pink"], ["pink blue green red"])[0]
    assert (backwards["rouge1_recall"], backwards["rougeL_recall"]) == (1.0, 0.25)
    assert metrics.rouge_scores(["she runs"], ["she running"])[0]["rougeL_recall"] == 1.0, "Porter stemmer"
    assert metrics.rouge_scores(["a word"], [""])[0] == {"rouge1_recall": 0, "rougeL_f1": 0, "rougeL_recall": 0}


@pytest.mark.parametrize(
    "text, known",
    [
        ("Ana was born in Quito.", True),
        ("José Ibáñez was born in Málaga.", True),
        ("1987", True),
        ("Иван родился в 1987 году.", False),
        ("他出生于北京。", False),
        ("Γεννήθηκε στην Αθήνα (Athens).", False),
        ("?", False),
    ],
)
def test_letters_that_rouge_knows(text, known):
    """Of other letters rouge-score leaves nothing, and the very same answer scores 0 or counts its few known words."""
    assert metrics.has_rouge_words(text) is known
    assert known <= (metrics.rouge_scores([text], [text])[0]["rougeL_recall"] == 1)


def test_truth_ratio_is_wrong_over_right_with_a_geometric_mean():
    # P(right) = 1/2; P(wrong) = 1/4 and 1/16: geometric mean 1/8, arithmetic mean 5/32.
    right, wrong = [LN2], [[2 * LN2, 4 * LN2]]
    assert metrics.truth_ratio(right, wrong) == pytest.approx([0.25])
    assert metrics.truth_ratio(right, wrong, wrong_mean="arithmetic") == pytest.approx([0.3125])
    # The guard matters where the right answer is next to impossible, and only there.
    assert metrics.truth_ratio([math.log(1e10)], [[0.0]]) == pytest.approx([5e9])
    assert metrics.truth_ratio([math.log(1e10)], [[0.0]], guard=0.0) == pytest.approx([1e10])
    # Without a guard nothing underflows.
    assert metrics.truth_ratio([800.0], [[801.0]], guard=0.0) == pytest.approx([math.exp(-1)])
    with pytest.raises(ValueError, match="`wrong_mean` must be 'geometric' or 'arithmetic', not 'median'"):
        metrics.truth_ratio(right, wrong, wrong_mean="median")
    with pytest.raises(ValueError, match="`right_loss - wrong_losses`.*infinite"):
        metrics.truth_ratio([1000.0], [[0.0]], guard=0.0)


def test_aggregations_of_the_truth_ratio_differ():
    ratios = [0.2, 4.0]
    assert metrics.closer_to_1_better(ratios) == pytest.approx((0.2 + 0.25) / 2)
    assert metrics.true_better(ratios) == pytest.approx((0.8 + 0.0) / 2)
    assert metrics.prob_mean(ratios) == pytest.approx((1 / 1.2 + 1 / 5) / 2)
    assert metrics.closer_to_1_better([0.0]) == 0.0
    with pytest.raises(ValueError, match="`truth_ratios` has a negative value: .* not their logarithms"):
        metrics.true_better([0.5, -0.1])


def test_forget_quality():
    # Fully apart: of the C(10, 5) = 252 ways to mix two groups of five, two are this extreme.
    apart = metrics.forget_quality([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
    assert apart == {"p": pytest.approx(2 / 252), "ks_d": 1.0, "n": 5}
    same = metrics.forget_quality([0.3, 0.1, 0.2], [0.1, 0.2, 0.3])
    assert same == {"p": 1.0, "ks_d": 0.0, "n": 3}
    assert metrics.forget_quality([1, 2, 3, 4], [3, 4, 5, 6])["ks_d"] == 0.5
    ratios, retain = np.array([0.1, 0.4, 2.0, 3.0]), np.array([0.5, 0.9, 1.0, 1.1])
    assert metrics.forget_quality(ratios, retain) == pytest.approx(metrics.forget_quality(1 / ratios, 1 / retain))
    with pytest.raises(ValueError, match="`truth_ratios` has 3 items and `retain_truth_ratios` 2"):
        metrics.forget_quality([1, 2, 3], [1, 2])


def test_memorization():
    matches = [False, True, False, True, True]
    assert metrics.exact_memorization(matches) == 0.6
    assert metrics.extraction_strength(matches) == pytest.approx(2 / 5)
    assert metrics.extraction_strength([True, True, True]) == 1.0
    # The reference's floor: a last token that is wrong counts as right.
    assert metrics.extraction_strength([True, True, True, False]) == 0.25
    assert metrics.extraction_strength([False]) == 1.0 and metrics.exact_memorization([False]) == 0.0
    for bad in ([], [1, 0], [[True]]):
        with pytest.raises(ValueError, match="`matches` must be a non-empty list of booleans"):
            metrics.extraction_strength(bad)


def test_attack_scores():
    assert metrics.loss_score(1.5) == 1.5
    assert metrics.zlib_score(3.0, "an answer") == 3.0 / len(zlib.compress(b"an answer"))
    assert metrics.zlib_score(3.0, "abcabcabcabcabcabc") > metrics.zlib_score(3.0, "abc fkw qzv mju xyp"), "repetition"
    assert metrics.min_k_score([-1.0, -5.0, -2.0, -4.0, -3.0]) == 4.5, "the two lowest of five"
    assert metrics.min_k_score([-1.0, -7.0]) == 7.0, "at least one token"
    assert metrics.min_k_score([-1.0, -7.0], k=1.0) == 4.0
    # Standardised: (-1 + 2) / 2 = 0.5 and (-4 + 2) / 1 = -2.
    assert metrics.min_k_plus_plus_score([-1.0, -4.0], [-2.0, -2.0], [4.0, 1.0]) == 2.0
    assert metrics.min_k_plus_plus_score([-1.0], [-1.5], [0.0]) == pytest.approx(-500), "variance clamped at 1e-6"
    for k in (0, 40):
        with pytest.raises(ValueError, match="`k` must be in"):
            metrics.min_k_score([-1.0], k=k)
    with pytest.raises(ValueError, match="`answer` is empty"):
        metrics.zlib_score(1.0, "")


def test_auc_against_counting_pairs():
    generator = np.random.default_rng(0)
    for n, m in ((1, 1), (7, 4), (40, 40)):
        forget, holdout = generator.integers(0, 6, n), generator.integers(1, 8, m)  # many ties
        pairs = [1.0 if h > f else 0.5 if h == f else 0.0 for f, h in itertools.product(forget, holdout)]
        assert metrics.auc(forget, holdout) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert metrics.auc([0.1, 0.2], [0.3, 0.9, 0.4]) == 1.0, "a remembered forget set has the lower scores"
    assert metrics.auc([0.3, 0.9], [0.1]) == 0.0
    assert metrics.auc([1.0, 1.0], [1.0]) == 0.5


def test_privleak():
    assert metrics.privleak(1.0) == pytest.approx(-100)
    assert metrics.privleak(0.5) == 0.0
    assert metrics.privleak(0.25) == pytest.approx(50)
    assert metrics.privleak(0.6, retain_auc=0.8) == pytest.approx(100)
    assert metrics.privleak(0.8, retain_auc=0.6) == pytest.approx(-50)
    with pytest.raises(ValueError, match=r"`retain_auc` must be in \[0, 1\], not 62"):
        metrics.privleak(0.5, retain_auc=62)


def test_model_utility():
    aggregates = dict.fromkeys(metrics.MODEL_UTILITY_METRICS, 1.0) | {"wf_Q_A_ROUGE": 0.1, "forget_Q_A_Prob": 0.0}
    assert metrics.model_utility(aggregates) == pytest.approx(9 / (8 + 10))
    aggregates["ra_Truth_Ratio"] = 0.0
    assert metrics.model_utility(aggregates) == 0.0
    nine = {name: aggregates[name] for name in metrics.MODEL_UTILITY_METRICS}
    assert metrics.explain_zero(nine).endswith(": ra_Truth_Ratio")
    assert metrics.explain_zero({"wf_Q_A_ROUGE": 0.1}) is None
    del aggregates["retain_Q_A_Prob"]
    with pytest.raises(ValueError, match="lacks retain_Q_A_Prob: all of .*wf_Truth_Ratio are needed"):
        metrics.model_utility(aggregates)


def test_retain_utility():
    aggregates = {"retain_Q_A_Prob": 0.5, "retain_Q_A_ROUGE": 0.25, "retain_Truth_Ratio": 1.0, "ra_Q_A_ROUGE": 0.0}
    assert metrics.retain_utility(aggregates) == pytest.approx(3 / 7)
    assert metrics.retain_utility(aggregates | {"retain_Q_A_ROUGE": 0.0}) == 0.0
    with pytest.raises(ValueError, match="`retain_Truth_Ratio` is negative"):
        metrics.retain_utility(aggregates | {"retain_Truth_Ratio": -0.1})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.answer_probability([]), "`avg_loss` is empty"),
        (
            lambda: metrics.answer_probability([1.0, None]),
            "`avg_loss` has 1 missing.* index 1: score these items again",
        ),
        (
            lambda: metrics.answer_probability([[1.0], [1.0, 2.0]]),
            "`avg_loss` must be numbers, equally many for every item",
        ),
        (lambda: metrics.option_normalised_probability([0.5], [0.5]), r"`wrong` must have 2 dimension\(s\), not 1"),
        (lambda: metrics.option_normalised_probability([0.5], [[0.5], [0.5]]), "`right` has 1 items and `wrong` 2"),
        (lambda: metrics.truth_ratio([1.0], [[1.0, math.inf]]), r"`wrong_losses` has 1 .*infinite.* index \(0, 1\)"),
        (lambda: metrics.truth_ratio([1.0, 2.0], [[1.0]]), "`right_loss` has 2 items and `wrong_losses` 1"),
        (lambda: metrics.rouge_scores([], []), "`references` is empty"),
        (lambda: metrics.rouge_scores(["a"], []), "`references` has 1 items and `generations` 0"),
        (lambda: metrics.rouge_scores(["a"], [None]), "`generations` has no string at index 0"),
        (lambda: metrics.min_k_score([]), "`logprobs` is empty"),
        (lambda: metrics.min_k_plus_plus_score([-1.0], [-1.0, -2.0], [1.0]), "`logprobs` has 1 items and `means` 2"),
        (lambda: metrics.min_k_plus_plus_score([-1.0], [-1.0], [math.nan]), "`variances` has 1 missing, NaN"),
        (lambda: metrics.loss_score(math.nan), "`avg_loss` has 1 missing, NaN"),
        (lambda: metrics.auc([1.0], []), "`holdout_scores` is empty"),
        (lambda: metrics.mean_over_items([math.nan, 1.0]), "the first at index 0"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_import_is_light():
    code = (
        "import sys, unlearn_eval.metrics, unlearn_eval.results, unlearn_eval.rescore, unlearn_eval.plots;"
        "print([m for m in ('torch', 'scipy', 'matplotlib', 'rouge_score', 'transformers') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
