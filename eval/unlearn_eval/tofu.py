# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""From token scores and generations to TOFU's metrics: one scoring pass feeds them all."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .backends import AnswerScores
from .metrics import (
    MODEL_UTILITY_METRICS,
    RETAIN_UTILITY_METRICS,
    answer_probability,
    auc,
    closer_to_1_better,
    exact_memorization,
    explain_zero,
    extraction_strength,
    forget_quality,
    loss_score,
    mean_over_items,
    min_k_plus_plus_score,
    min_k_score,
    model_utility,
    option_normalised_probability,
    privleak,
    retain_utility,
    true_better,
    truth_ratio,
    zlib_score,
)
from .questions import QuestionSet
from .results import EvalLog, Metric, MiaMetric, RougeItem, aggregate, has_items, item_values


ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
NO_GENERATION = "no answers were generated"
OTHER_LETTERS = "ROUGE knows words of a to z and 0 to 9 only, and true answers are written in other letters"


class SetScores(NamedTuple):
    """
    What a model made of a question set: scores in the order of its lists, and the items of its ROUGE metric (`None` if
    nothing was generated).
    """

    answers: list[AnswerScores]
    paraphrased: list[AnswerScores] | None
    perturbed: list[list[AnswerScores]] | None
    rouge: list[RougeItem] | None


def build_log(sets: dict[str, QuestionSet], scores: dict[str, SetScores], retain_log: EvalLog | None) -> EvalLog:
    """
    Compute every metric.

    Args:
        sets (`dict[str, QuestionSet]`):
            Question sets by name; `"forget"` is one of them.
        scores (`dict[str, SetScores]`):
            What the model made of each.
        retain_log (`EvalLog`, *optional*):
            Log of the retain-only model.

    Returns:
        `EvalLog`:
            Metrics by open-unlearning's names; where one can't be computed, `agg_value` is `None` and `reason` says
            why.
    """
    log: EvalLog = {}
    for name, one in scores.items():
        if name != "holdout":
            log |= _set_metrics(name, one, sets[name])
    forget = scores["forget"]
    log["exact_memorization"] = _score_metric([exact_memorization(_before_the_end(s.matches)) for s in forget.answers])
    log["extraction_strength"] = _score_metric(
        [extraction_strength(_before_the_end(s.matches)) for s in forget.answers]
    )
    log["forget_quality"] = _forget_quality(log, retain_log)
    log["model_utility"] = _utility(log, model_utility, MODEL_UTILITY_METRICS)
    log["retain_utility"] = _utility(log, retain_utility, RETAIN_UTILITY_METRICS)
    log |= {attack: _attack(attack, sets, scores) for attack in ATTACKS}
    log["privleak"] = _privleak(log, retain_log)
    return log


def _set_metrics(name: str, scores: SetScores, questions: QuestionSet) -> EvalLog:
    log: EvalLog = {f"{name}_Q_A_Prob": _prob_metric(scores.answers)}
    if scores.rouge is None:
        log[f"{name}_Q_A_ROUGE"] = _null(NO_GENERATION if questions.is_read_by_rouge else OTHER_LETTERS)
    else:
        log[f"{name}_Q_A_ROUGE"] = _rouge_metric(scores.rouge, len(questions.not_read_by_rouge))
    if scores.paraphrased is not None:
        log[f"{name}_Q_A_PARA_Prob"] = _prob_metric(scores.paraphrased)
    if scores.perturbed is not None:
        log[f"{name}_Q_A_PERT_Prob"] = _prob_metric(scores.perturbed)
    if name in ("ra", "wf"):
        right, wrong = (item_values(log[f"{name}_Q_A_{kind}"], "prob", name) for kind in ("Prob", "PERT_Prob"))
        values = option_normalised_probability(right, wrong)
        items = {str(i): {"prob": float(value)} for i, value in enumerate(values)}
        log[f"{name}_Q_A_Prob_normalised"] = Metric(agg_value=mean_over_items(values), value_by_index=items)
    metric = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"
    right = scores.answers if name in ("ra", "wf") else scores.paraphrased
    if right is None or scores.perturbed is None:
        log[metric] = _null("the data have no paraphrased_answer and perturbed_answer")
    else:
        ratios = truth_ratio([s.avg_loss for s in right], [[s.avg_loss for s in group] for group in scores.perturbed])
        aggregate = closer_to_1_better if name == "forget" else true_better
        log[metric] = _score_metric(ratios.tolist(), aggregate(ratios))
    return log


def _prob_metric(scores: Sequence[AnswerScores] | Sequence[list[AnswerScores]]) -> Metric:
    losses = [[s.avg_loss for s in one] if isinstance(one, list) else one.avg_loss for one in scores]
    probs = answer_probability(losses)
    items = {str(i): {"prob": prob, "avg_loss": losses[i]} for i, prob in enumerate(probs.tolist())}
    return Metric(agg_value=mean_over_items(probs), value_by_index=items)


def _rouge_metric(items: Sequence[RougeItem], num_unread: int) -> Metric:
    metric = Metric(
        agg_value=mean_over_items([item["rougeL_recall"] for item in items]),
        value_by_index={str(i): item for i, item in enumerate(items)},
    )
    return metric if num_unread == 0 else metric | {"not_read": num_unread}


def _score_metric(values: Sequence[float], agg_value: float | None = None) -> Metric:
    agg_value = mean_over_items(values) if agg_value is None else agg_value
    return Metric(agg_value=agg_value, value_by_index={str(i): {"score": value} for i, value in enumerate(values)})


def _null(reason: str) -> Metric:
    return Metric(agg_value=None, reason=reason)


def _before_the_end(values: np.ndarray) -> np.ndarray:
    """Without the token that ends the turn; a text of one token keeps it."""
    return values[:-1] if len(values) > 1 else values


def _forget_quality(log: EvalLog, retain_log: EvalLog | None) -> Metric:
    if not has_items(log, "forget_truth_ratio"):
        return _null("needs a forget truth ratio: the columns paraphrased_answer and perturbed_answer")
    if retain_log is None:
        return _null("needs the log of a retain-only model (`retain_logs`)")
    ratios = [item_values(one["forget_truth_ratio"], "score", "forget_truth_ratio") for one in (log, retain_log)]
    test = forget_quality(*ratios)
    return {"agg_value": test["p"], "ks_d": test["ks_d"], "n": test["n"]}


def _utility(log: EvalLog, utility: Callable[[dict[str, float]], float], metrics: tuple[str, ...]) -> Metric:
    values = {metric: aggregate(log, metric) for metric in metrics}
    missing = [metric for metric, value in values.items() if value is None]
    if missing:
        return _null(f"needs {', '.join(missing)}")
    value, why = utility(values), explain_zero(values)
    return Metric(agg_value=value) if why is None else Metric(agg_value=value, reason=why)


def _attack(attack: str, sets: dict[str, QuestionSet], scores: dict[str, SetScores]) -> MiaMetric | Metric:
    if "holdout" not in scores:
        return _null("needs a holdout set, which no model has seen")
    if attack == "mia_min_k_plus_plus" and any(
        s.means is None for name in ("forget", "holdout") for s in scores[name].answers
    ):
        return _null("vLLM can't give the moments of the vocabulary: use `score_backend=transformers`")
    halves = {
        name: [
            _attack_score(attack, one, reference)
            for one, reference in zip(scores[name].answers, sets[name].references, strict=True)
        ]
        for name in ("forget", "holdout")
    }
    value = auc(halves["forget"], halves["holdout"])
    return MiaMetric(**{name: _score_metric(half) for name, half in halves.items()}, auc=value, agg_value=value)


def _attack_score(attack: str, scores: AnswerScores, reference: str) -> float:
    if attack == "mia_loss":
        return loss_score(scores.avg_loss)
    if attack == "mia_zlib":
        return zlib_score(scores.avg_loss, reference)
    logprobs = _before_the_end(scores.logprobs)
    if attack == "mia_min_k":
        return min_k_score(logprobs)
    return min_k_plus_plus_score(logprobs, _before_the_end(scores.means), _before_the_end(scores.variances))


def _privleak(log: EvalLog, retain_log: EvalLog | None) -> Metric:
    if log["mia_min_k"]["agg_value"] is None:
        return _null(log["mia_min_k"]["reason"])
    retain_auc = aggregate(retain_log or {}, "mia_min_k")
    if retain_auc is None:
        missing = "without a retain log" if retain_log is None else "the retain log has no mia_min_k"
        return Metric(agg_value=privleak(log["mia_min_k"]["auc"]), reason=f"against AUC 0.5: {missing}")
    return Metric(agg_value=privleak(log["mia_min_k"]["auc"], retain_auc))
