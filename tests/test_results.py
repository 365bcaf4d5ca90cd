# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import math
import os

import pytest

from unlearn_eval import files, results
from unlearn_eval.documents import markdown_table


SECRET = "Zorblax"


def rouge_item(recall, generation):
    return {
        "rouge1_recall": recall,
        "rougeL_f1": recall,
        "rougeL_recall": recall,
        "input": f"Who is {SECRET}?",
        "ground_truth": f"{SECRET} is a poet.",
        "generation": generation,
    }


@pytest.fixture
def log():
    """A small log with every kind of item."""
    return {
        "metadata": {"forget_split": "forget01"},
        "forget_Q_A_Prob": {
            "agg_value": 0.5,
            "value_by_index": {str(i): {"prob": 0.5, "avg_loss": math.log(2)} for i in range(3)},
        },
        "forget_Q_A_PERT_Prob": {
            "agg_value": 0.25,
            "value_by_index": {str(i): {"prob": [0.25, 0.25], "avg_loss": [1.4, 1.4]} for i in range(3)},
        },
        "forget_Q_A_ROUGE": {
            "agg_value": 0.5,
            "value_by_index": {
                "0": rouge_item(1.0, f"{SECRET} is a poet."),
                "1": rouge_item(0.5, f"{SECRET} is here"),
                "2": rouge_item(0.0, ""),
            },
        },
        "forget_truth_ratio": {
            "agg_value": 0.5,
            "value_by_index": {"2": {"score": 0.75}, "0": {"score": 0.5}, "1": {"score": 0.25}},
        },
        "mia_loss": {
            "forget": {"agg_value": 0.1, "value_by_index": {str(i): {"score": 0.1} for i in range(3)}},
            "holdout": {"agg_value": 0.2, "value_by_index": {str(i): {"score": 0.2} for i in range(2)}},
            "auc": 1.0,
            "agg_value": 1.0,
        },
        "retain_Q_A_Prob": {"agg_value": 0.9, "value_by_index": {"0": {"prob": 0.9, "avg_loss": 0.105}}},
        "model_utility": {"agg_value": None, "reason": "needs real authors and world facts"},
    }


def test_round_trip(log, tmp_path):
    eval_path, summary_path = results.write_results(tmp_path / "new" / "folder", log)
    assert (eval_path.name, summary_path.name) == ("TOFU_EVAL.json", "TOFU_SUMMARY.json")
    assert results.read_log(eval_path) == results.read_log(eval_path.parent) == log
    # Nulls, inputs of model utility and wrong answers stay out of the summary, as in the reference's.
    assert json.loads(summary_path.read_text()) == {
        "forget_Q_A_Prob": 0.5,
        "forget_Q_A_ROUGE": 0.5,
        "forget_truth_ratio": 0.5,
        "mia_loss": 1.0,
    }
    assert sorted(path.name for path in eval_path.parent.iterdir()) == ["TOFU_EVAL.json", "TOFU_SUMMARY.json"]


def test_items_come_in_the_order_of_their_indices(log):
    assert list(results.item_values(log["forget_truth_ratio"], "score", "x")) == [0.5, 0.25, 0.75]
    assert results.item_values(log["forget_Q_A_PERT_Prob"], "prob", "x").shape == (3, 2)


def test_a_log_without_texts_is_whole(log):
    for item in log["forget_Q_A_ROUGE"]["value_by_index"].values():
        for field in ("input", "ground_truth", "generation"):
            del item[field]
    results.validate_log(log)
    assert results.item_texts(log["forget_Q_A_ROUGE"], "generation", "x") is None


def edit(path, value):
    """A fault: put `value` where `path` leads, or delete what is there."""

    def apply(log):
        *parents, last = path
        for key in parents:
            log = log[key]
        if value is None:
            del log[last]
        else:
            log[last] = value

    return apply


PROB, ROUGE = ("forget_Q_A_Prob", "value_by_index"), ("forget_Q_A_ROUGE", "value_by_index")
FAULTS = {
    "item": (edit((*PROB, "1"), None), "forget_Q_A_Prob misses items: it has 2, but not index 1"),
    "last item": (edit((*PROB, "2"), None), "has 3 items but forget_Q_A_Prob has 2, both on the forget set"),
    "all items": (edit(PROB, {}), "forget_Q_A_Prob has no items"),
    "index": (edit((*PROB, "x"), {"prob": 1.0}), "an index that is not a whole number"),
    "value": (edit((*PROB, "1", "prob"), None), "forget_Q_A_Prob has no `prob` at index 1"),
    "null": (edit((*PROB, "1"), {"prob": 0.5, "avg_loss": None}), "avg_loss` has 1 missing.*index 1"),
    "NaN": (edit((*PROB, "2", "prob"), math.nan), "forget_Q_A_Prob/prob` has 1 missing, NaN.*index 2"),
    "ragged": (
        edit(("forget_Q_A_PERT_Prob", "value_by_index", "1", "prob"), [0.2]),
        "must be numbers, equally many for every item",
    ),
    "other item": (edit(PROB, {"0": {"loss": 1.0}}), "no known value at index 0"),
    "aggregate": (edit(("forget_Q_A_Prob", "agg_value"), math.inf), "forget_Q_A_Prob/agg_value` has 1"),
    "half": (edit(("mia_loss", "forget", "value_by_index", "2"), None), "mia_loss/forget has 2 items but"),
    "summary": (edit(("forget_Q_A_Prob",), 0.5), "forget_Q_A_Prob is no metric.*Give the TOFU_EVAL.json beside it"),
    "emptied": (
        edit((*ROUGE, "1", "generation"), " "),
        r"1 empty generation\(s\) with a ROUGE above 0, the first at index 1",
    ),
    "text": (edit((*ROUGE, "1", "generation"), None), "no text in `generation` at index 1, but at others"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_overwrite_nothing(log, tmp_path, fault):
    results.write_results(tmp_path, log)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = copy.deepcopy(log)
    apply, message = FAULTS[fault]
    apply(broken)
    with pytest.raises(ValueError, match=message) as error:
        results.write_results(tmp_path, broken)
    assert SECRET not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_all_generations_empty(log):
    """A collapsed model has nothing to say; its ROUGE is 0, and a text that was lost has another."""
    for item in log["forget_Q_A_ROUGE"]["value_by_index"].values():
        item.update(rouge1_recall=0.0, rougeL_f1=0.0, rougeL_recall=0.0, generation="")
    results.validate_log(log)
    item["rougeL_recall"] = 0.5
    with pytest.raises(ValueError, match=r"1 empty generation\(s\) with a ROUGE above 0.*remove the texts"):
        results.validate_log(log)


def test_unreadable_files(log, tmp_path):
    with pytest.raises(FileNotFoundError, match="TOFU_EVAL.json does not exist: give a TOFU_EVAL.json, or a folder"):
        results.read_log(tmp_path)
    path = tmp_path / "TOFU_EVAL.json"
    for content, message in (
        (json.dumps(log).encode()[:-20], "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b"{}", "has no metrics"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            results.read_log(path)
        assert str(path) in str(error.value) and SECRET not in str(error.value)


def test_a_write_replaces_the_file_whole(tmp_path):
    path, old = tmp_path / "a.json", tmp_path / "old.json"
    files.write_json(path, {"a": 1})
    os.link(path, old)  # a second name of the old content: writing in place would change it
    files.write_json(path, {"a": 2})
    assert (json.loads(path.read_text()), json.loads(old.read_text())) == ({"a": 2}, {"a": 1})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": math.nan})
    with pytest.raises(TypeError):
        files.write_atomically(path, "not bytes")
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def forget_log(n, split=None, texts=True):
    log = {"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {str(i): {"score": 0.5} for i in range(n)}}}
    if texts:
        items = {str(i): rouge_item(0.5, "poet") | {"ground_truth": f"{SECRET} {i}"} for i in range(n)}
        log["forget_Q_A_ROUGE"] = {"agg_value": 0.5, "value_by_index": items}
    return log | ({"metadata": {"forget_split": split}} if split else {})


def test_retain_log_of_another_forget_set():
    results.validate_retain_log(forget_log(40), forget_log(40))
    results.validate_retain_log(forget_log(40), forget_log(40, texts=False))
    with pytest.raises(
        ValueError, match=r"has 40 \(forget01\) forget items and the retain log 200 \(forget05\): give"
    ):
        results.validate_retain_log(forget_log(40), forget_log(200))
    with pytest.raises(ValueError, match="The log is of mine and the retain log of yours: give the log of the retain"):
        results.validate_retain_log(forget_log(7, "mine"), forget_log(7, "yours"))
    with pytest.raises(ValueError, match="The retain log has no forget_truth_ratio with items"):
        results.validate_retain_log(forget_log(40), {"model_utility": {"agg_value": 0.5}})

    # A tokenizer may change a reference answer here or there; other questions are another set.
    other = forget_log(40)
    items = other["forget_Q_A_ROUGE"]["value_by_index"]
    for index in range(20):
        items[str(index)]["ground_truth"] += " ."
    results.validate_retain_log(forget_log(40), other)
    items["20"]["ground_truth"] += " ."
    with pytest.raises(ValueError, match="21 of 40 reference answers differ") as error:
        results.validate_retain_log(forget_log(40), other)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "ours, theirs, message",
    [
        ({"question_key": "question"}, {"question_key": "paraphrased_question"}, "of question and .* paraphrased_q"),
        ({"hashes": {"forget_set": "a"}}, {"hashes": {"forget_set": "b"}}, "another forget set"),
        ({"hashes": {"holdout_set": "a"}}, {"hashes": {"holdout_set": "b"}}, "another holdout set"),
        ({"hashes": {"forget_set": "a"}}, {"hashes": {"forget_set": "a", "holdout_set": "b"}}, None),
        ({"hashes": {"forget_set": "a"}}, {}, None),
    ],
)
def test_retain_log_of_other_questions(ours, theirs, message):
    """By what the logs say of themselves, where they hold no texts."""
    log, retain_log = ({**forget_log(40, texts=False), "metadata": one} for one in (ours, theirs))
    if message is None:
        results.validate_retain_log(log, retain_log)
        return
    with pytest.raises(ValueError, match=message):
        results.validate_retain_log(log, retain_log)


def test_markdown_table():
    table = markdown_table([("name", "n"), ("forget", "40")], ["<", ">"])
    assert table == "| name   |  n |\n| ------ | -: |\n| forget | 40 |\n"
