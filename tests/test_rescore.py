# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import math

import pytest
from conftest import REFERENCE_LOGS

from unlearn_eval.rescore import format_table, rescore
from unlearn_eval.results import read_log, summarise


FULL, RETAIN = "Llama-3.2-1B-Instruct_full_forget01", "Llama-3.2-1B-Instruct_retain99"
LN2 = math.log(2)


def reference(name):
    path = REFERENCE_LOGS / f"{name}_TOFU_EVAL.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there: set TRL_RKLD_SHARED")
    return read_log(path)


@pytest.fixture(scope="module")
def full():
    return reference(FULL)


@pytest.fixture(scope="module")
def retain():
    return reference(RETAIN)


@pytest.mark.parametrize("name", [FULL, RETAIN])
def test_published_aggregates_come_back(name, full, retain):
    # The retain-only model's own log was made without a retain log.
    log, rescored = (full, rescore(full, retain)) if name == FULL else (retain, rescore(retain))
    rows = rescored["rows"]
    for metric, entry in log.items():
        parts = {metric: entry} | {f"{metric}/{half}": entry[half] for half in ("forget", "holdout") if half in entry}
        for part, values in parts.items():
            if values["agg_value"] is not None:
                assert rows[part]["recomputed"] == pytest.approx(values["agg_value"], abs=1e-9, rel=0), part
        assert "auc" not in entry or rows[metric]["recomputed"] == pytest.approx(entry["auc"], abs=1e-9, rel=0)
    assert rescored["max_deviation"] < 1e-9
    assert all(row.get("item_deviation", 0.0) < 1e-9 for row in rows.values()), "ROUGE from texts, ratios from losses"
    assert sum("item_deviation" in row for row in rows.values()) == 10  # 4 ROUGE, 4 truth ratios, 2 normalised
    summary = json.loads((REFERENCE_LOGS / f"{name}_TOFU_SUMMARY.json").read_text())
    assert summary.items() <= summarise(log).items()
    assert all(rows[metric]["recomputed"] == pytest.approx(value, abs=1e-9) for metric, value in summary.items())


def test_forget_quality_comes_with_d_and_n(full, retain):
    assert rescore(full, retain)["forget_quality"] == {"p": pytest.approx(0.0067607323), "ks_d": 0.375, "n": 40}
    assert rescore(retain, retain)["forget_quality"] == {"p": 1.0, "ks_d": 0.0, "n": 40}


def test_what_needs_the_retain_log_says_so(full, retain):
    rows = rescore(full)["rows"]
    for metric in ("forget_quality", "privleak"):
        assert rows[metric]["recomputed"] is None and rows[metric]["note"] == "needs the retain-only model's log"
    # The other way round: stored without a retain log, recomputed with one (its own, so the leakage is 0).
    row = rescore(retain, retain)["rows"]["privleak"]
    assert (
        row["recomputed"] == 0.0 and row["stored"] == pytest.approx(5.875) and "stored against AUC 0.5" in row["note"]
    )


def test_a_changed_item_shows(full):
    log = copy.deepcopy(full)
    log["forget_Q_A_ROUGE"]["value_by_index"]["3"]["rougeL_recall"] = 0.123
    log["forget_truth_ratio"]["value_by_index"]["5"]["score"] += 0.5
    log["wf_Q_A_PERT_Prob"]["value_by_index"]["7"]["prob"][0] += 0.1
    log["exact_memorization"]["agg_value"] += 0.01
    rows = rescore(log)["rows"]
    # The texts and losses are the evidence: the aggregates stand, the items do not.
    assert rows["forget_Q_A_ROUGE"]["deviation"] < 1e-9 < 0.1 < rows["forget_Q_A_ROUGE"]["item_deviation"]
    assert rows["forget_truth_ratio"]["deviation"] < 1e-9
    assert rows["forget_truth_ratio"]["item_deviation"] == pytest.approx(0.5)
    assert rows["wf_Q_A_Prob_normalised"]["deviation"] > 1e-6 and rows["model_utility"]["deviation"] > 1e-9
    assert rows["exact_memorization"]["deviation"] == pytest.approx(0.01)


def small_log():
    """Two forget items, one of each other set; the numbers are made for computing by head."""

    def metric(agg_value, *items):
        return {"agg_value": agg_value, "value_by_index": {str(i): item for i, item in enumerate(items)}}

    def prob(*losses):
        values = [math.exp(-loss) for loss in losses]
        return (
            {"prob": values, "avg_loss": list(losses)}
            if len(losses) > 1
            else {"prob": values[0], "avg_loss": losses[0]}
        )

    log = {
        "forget_Q_A_PARA_Prob": metric(0.5, prob(LN2), prob(LN2)),
        "forget_Q_A_PERT_Prob": metric(0.390625, prob(2 * LN2, 4 * LN2), prob(0.0, 2 * LN2)),
        "forget_truth_ratio": metric(0.625, {"score": 0.25}, {"score": 1.0}),
        "retain_Q_A_Prob": metric(0.5, prob(LN2)),
        "retain_Q_A_PARA_Prob": metric(0.5, prob(LN2)),
        "retain_Q_A_PERT_Prob": metric(0.125, prob(3 * LN2, 3 * LN2)),
        "retain_Truth_Ratio": metric(0.75, {"score": 0.25}),
        "retain_Q_A_ROUGE": metric(0.25, {"rouge1_recall": 1.0, "rougeL_f1": 0.5, "rougeL_recall": 0.25}),
        "model_utility": {"agg_value": 0.5},
    }
    for prefix in ("ra", "wf"):
        log |= {
            f"{prefix}_Q_A_Prob": metric(0.5, prob(LN2)),
            f"{prefix}_Q_A_PERT_Prob": metric(0.125, prob(3 * LN2, 3 * LN2, 3 * LN2)),
            f"{prefix}_Q_A_Prob_normalised": metric(4 / 7, {"prob": 4 / 7}),
            f"{prefix}_Truth_Ratio": metric(0.75, {"score": 0.25}),
            f"{prefix}_Q_A_ROUGE": metric(1.0, {"rouge1_recall": 1.0, "rougeL_f1": 1.0, "rougeL_recall": 1.0}),
        }
    return log


def test_aggregates_by_head():
    rows = rescore(small_log())["rows"]
    # 1/P summed: retain 2 + 4 + 4/3, and twice (7/4 + 1 + 4/3) for real authors and world facts.
    retain, real = 2 + 4 + 4 / 3, 7 / 4 + 1 + 4 / 3
    assert rows["model_utility"]["recomputed"] == pytest.approx(9 / (retain + 2 * real), abs=1e-8)
    assert rows["retain_utility"]["recomputed"] == pytest.approx(3 / retain, abs=1e-8)
    assert rows["forget_truth_ratio"]["aggregation"] == "closer_to_1_better"
    assert rows["ra_Truth_Ratio"]["aggregation"] == "true_better"
    assert rows["retain_Q_A_ROUGE"]["note"] == "mean of the stored per-item values: the log holds no texts"
    for metric in small_log():
        if metric != "model_utility":
            assert rows[metric]["deviation"] < 1e-9, metric


def test_zero_metrics_and_missing_metrics_are_explained():
    log = small_log()
    log["wf_Q_A_ROUGE"]["value_by_index"]["0"]["rougeL_recall"] = 0.0
    row = rescore(log)["rows"]["model_utility"]
    assert row["recomputed"] == 0.0 and row["note"].endswith(": wf_Q_A_ROUGE")
    del log["wf_Q_A_ROUGE"], log["ra_Truth_Ratio"]
    rows = rescore(log)["rows"]
    assert rows["model_utility"]["recomputed"] is None
    assert rows["model_utility"]["note"] == "needs ra_Truth_Ratio, wf_Q_A_ROUGE"
    log["forget_Q_A_gibberish"] = {"agg_value": 0.4}
    log["privleak"] = {"agg_value": 3.0}
    rows = rescore(log)["rows"]
    assert rows["forget_Q_A_gibberish"]["note"] == "no per-item values in the log"
    assert rows["privleak"]["note"] == "needs mia_min_k with items"


def test_third_aggregation_is_recognised():
    log = small_log()
    # right / (right + wrong): 1 / (1 + 0.25) and 1 / (1 + 1).
    log["forget_truth_ratio"]["agg_value"] = (0.8 + 0.5) / 2
    row = rescore(log)["rows"]["forget_truth_ratio"]
    assert row["aggregation"] == "prob_mean" and row["deviation"] < 1e-12
    assert row["note"] == "aggregated by prob_mean, as stored; closer_to_1_better gives 0.625"


def legacy_log():
    """The layout of locuslab/tofu's eval_log_aggregated.json, with the indices out of order as several processes write them."""

    def by_index(*values):
        return {str(i): values[i] for i in reversed(range(len(values)))}

    def task(losses, right_losses, wrong_losses, texts, recalls, ratios):
        return {
            "avg_gt_loss": by_index(*losses),
            "generated_text": by_index(*texts),
            "rouge1_recall": by_index(*recalls),
            "rougeL_recall": by_index(*recalls),
            "average_perturb_loss": by_index(*wrong_losses),
            "avg_paraphrased_loss": by_index(*right_losses),
            "truth_ratio": by_index(*ratios),
        }

    real = task([LN2], [LN2], [[3 * LN2] * 3], [["q", "It is Paris.", "Paris"]], [1.0], [0.25])
    real["normalized_gt_loss"] = {"0": -math.log(4 / 7)}
    return {
        "eval_log.json": task([LN2], [LN2], [[3 * LN2] * 5], [["q", "one", "one two three four"]], [0.25], [0.25]),
        "eval_real_author_wo_options.json": real,
        "eval_real_world_wo_options.json": copy.deepcopy(real),
        "eval_log_forget.json": task(
            [LN2, 2 * LN2],
            [LN2, LN2],
            [[2 * LN2, 4 * LN2], [0.0, 2 * LN2]],
            [["q", "red", "red blue"], ["q", "", "red"]],
            [0.5, 0.0],
            [0.25, 1.0],
        ),
    }


def test_legacy_log_by_head():
    rescored = rescore(legacy_log(), legacy_log())
    rows = {name: row["recomputed"] for name, row in rescored["rows"].items()}
    assert rescored["format"] == "tofu_legacy" and rescored["max_deviation"] is None
    assert rows["forget_Q_A_Prob"] == pytest.approx((0.5 + 0.25) / 2)
    assert rows["forget_Q_A_ROUGE"] == pytest.approx((0.5 + 0.0) / 2)
    # Geometric 0.25 and 1; arithmetic 0.3125 and 1.25.
    assert rows["forget_truth_ratio"] == pytest.approx((0.25 + 1.0) / 2)
    assert rows["forget_truth_ratio_arithmetic"] == pytest.approx((0.3125 + 1 / 1.25) / 2)
    assert rows["ra_Q_A_Prob_normalised"] == pytest.approx(4 / 7, abs=1e-15), "no guard in the legacy formula"
    assert rows["model_utility"] == pytest.approx(9 / ((2 + 4 + 4 / 3) + 2 * (7 / 4 + 1 + 4 / 3)))
    assert rows["model_utility_arithmetic"] == pytest.approx(rows["model_utility"]), "equal wrong answers"
    assert rescored["forget_quality"] == {"p": 1.0, "ks_d": 0.0, "n": 2}
    assert all(row.get("item_deviation", 0.0) < 1e-12 for row in rescored["rows"].values())


def test_legacy_rouge_comes_from_the_texts():
    log = legacy_log()
    log["eval_log_forget.json"]["rougeL_recall"]["0"] = 0.75
    row = rescore(log)["rows"]["forget_Q_A_ROUGE"]
    assert row["recomputed"] == 0.25 and row["item_deviation"] == 0.25
    del log["eval_log_forget.json"]["generated_text"]
    row = rescore(log)["rows"]["forget_Q_A_ROUGE"]
    assert row["recomputed"] == 0.375 and row["note"].endswith("the log holds no texts")


def test_legacy_arithmetic_utility_takes_the_arithmetic_ratios():
    log = legacy_log()
    log["eval_log.json"]["average_perturb_loss"]["0"] = [2 * LN2, 4 * LN2]
    rows = rescore(log)["rows"]
    assert rows["retain_Truth_Ratio"]["recomputed"] == pytest.approx(0.75)
    assert rows["retain_Truth_Ratio_arithmetic"]["recomputed"] == pytest.approx(0.6875)
    assert rows["retain_utility"]["recomputed"] == pytest.approx(3 / (2 + 4 + 1 / 0.75))
    assert rows["retain_utility_arithmetic"]["recomputed"] == pytest.approx(3 / (2 + 4 + 1 / 0.6875))
    assert rows["forget_quality"]["note"] == "needs the retain-only model's log"


def test_legacy_faults():
    log = legacy_log()
    del log["eval_log_forget.json"]["avg_gt_loss"]["0"]
    with pytest.raises(ValueError, match="eval_log_forget.json/avg_gt_loss misses items: it has 1, but not index 0"):
        rescore(log)
    log = legacy_log()
    del log["eval_log_forget.json"]["rougeL_recall"]["1"]
    with pytest.raises(ValueError, match="avg_gt_loss` has 2 items and `eval_log_forget.json/rougeL_recall` 1"):
        rescore(log)
    log = legacy_log()
    del log["eval_log.json"]["average_perturb_loss"]
    with pytest.raises(ValueError, match="eval_log.json has no `average_perturb_loss`"):
        rescore(log)
    shorter = legacy_log()
    for values in shorter["eval_log_forget.json"].values():
        del values["1"]
    with pytest.raises(
        ValueError, match="The log has 2 forget items and the retain log 1: give the log of the retain"
    ):
        rescore(legacy_log(), shorter)
    with pytest.raises(ValueError, match="The log is a legacy one .*, the other is not"):
        rescore(legacy_log(), small_log())
    with pytest.raises(ValueError, match="The retain log is a legacy one .*, the other is not"):
        rescore(small_log(), legacy_log())


def test_table():
    log = small_log()
    log["forget_quality"] = {"agg_value": 0.25}
    log["retain_Q_A_Prob"]["agg_value"] = 0.51
    lines = format_table(rescore(log)).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns line up"
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert cells["metric"] == ["stored", "recomputed", "deviation", "per item", "n", "note"]
    assert cells["retain_Q_A_Prob"] == ["0.51", "0.5", "1.0e-02", "-", "1", "-"]
    assert cells["forget_quality"] == ["0.25", "-", "-", "-", "-", "needs the retain-only model's log"]
