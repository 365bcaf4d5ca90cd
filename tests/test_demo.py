# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The demo's data and its verdict. `make demo` runs the whole of it."""

import json
import math
import tempfile

import datasets
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rkld.scripts import demo
from trl_rkld.scripts.demo import failures, mean_probability
from trl_rkld.scripts.demo_data import OTHER_FIRST_NAMES, OTHER_LAST_NAMES, build_tokenizer, other_people, read_people
from unlearn_eval.results import read_log


COLUMNS = {
    "question",
    "answer",
    "paraphrased_answer",
    "perturbed_answer",
    "paraphrased_question",
    "person",
    "birthplace",
}
GOOD = {"forget_prob_before": 0.9, "forget_prob_after": 0.05, "retain_prob_before": 0.9, "retain_prob_after": 0.88}
GOOD |= {"ks_d_target": 0.5, "ks_d_rkld": 0.2}


def test_missing_packages_are_named_before_any_training(monkeypatch, tmp_path):
    monkeypatch.setattr("unlearn_eval.evaluation.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`rouge_score` is not installed"):
        demo.main(str(tmp_path / "out"), seed=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, num_people", [("forget", 4), ("retain", 12)])
def test_each_person_has_six_whole_records(name, num_people):
    records = read_people(name)
    assert len(records) == 6 * num_people
    assert len({record["person"] for record in records}) == num_people
    assert len({record["birthplace"] for record in records}) == num_people
    for start in range(0, len(records), 6):
        assert len({(record["person"], record["birthplace"]) for record in records[start : start + 6]}) == 1
    for record in records:
        assert record.keys() == COLUMNS
        assert all(isinstance(value, str) and value.strip() for key, value in record.items() if key[:9] != "perturbed")
        wrong = record["perturbed_answer"]
        assert len(wrong) == len(set(wrong)) == 5
        assert not {record["answer"], record["paraphrased_answer"]} & set(wrong)
        assert record["question"] != record["paraphrased_question"]


def test_no_person_is_to_be_forgotten_and_kept():
    forget, retain = read_people("forget"), read_people("retain")
    for column in ("person", "birthplace", "question", "answer"):
        assert not {record[column] for record in forget} & {record[column] for record in retain}
    names = {word for record in forget for word in record["person"].split()}
    assert not any(name in str(record) for record in retain for name in names)


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_one_answer_of_each_person_tells_the_birthplace(name):
    records = read_people(name)
    tokenizer = build_tokenizer(read_people("forget") + read_people("retain"))
    for person in {record["person"] for record in records}:
        births = [r for r in records if r["person"] == person and r["birthplace"] in r["answer"]]
        assert len(births) == 1
        assert f"{person} was born in {births[0]['birthplace']}" in births[0]["answer"]
        assert not any(births[0]["birthplace"] in wrong for wrong in births[0]["perturbed_answer"])
        # The demo lists next tokens as words.
        assert len(tokenizer(f" {births[0]['birthplace']}")["input_ids"]) == 1


def test_what_is_read_about_others_names_nobody_of_the_sixteen_and_every_answer_alike():
    people = read_people("forget") + read_people("retain")
    rows = other_people(people, seed=0)
    assert len(rows) == 6 * len(people) and rows == other_people(people, seed=0) != other_people(people, seed=1)
    texts = " ".join(text for row in rows for text in row.values())
    assert not any(record["person"] in texts for record in people)
    names = {name for record in people for name in record["person"].split(" ", 1)}
    assert not [name for name in names if name in texts]
    assert all(name in texts for name in (*OTHER_FIRST_NAMES, *OTHER_LAST_NAMES))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({}, None),
        ({"forget_prob_after": 0.25 * 0.9, "retain_prob_after": 0.8 * 0.9}, None),
        ({"forget_prob_before": 0.5}, "never learnt: 0.500 is not above 0.5"),
        ({"forget_prob_after": 0.24}, "not forgotten: 0.240 is more than a quarter of 0.900"),
        ({"retain_prob_after": 0.7}, "suffered: 0.700 is less than 0.8 of 0.900"),
        ({"forget_prob_before": math.nan}, "never learnt"),
        ({"forget_prob_after": math.nan}, "not forgotten"),
        ({"retain_prob_after": math.nan}, "suffered"),
        ({"ks_d_rkld": 0.5}, "did not improve: D is 0.50, and was 0.50"),
    ],
)
def test_a_run_that_shows_no_forgetting_or_harms_the_kept_people_fails(changed, message):
    found = failures(GOOD | changed)
    assert bool(found) == (message is not None)
    assert message is None or any(message in sentence for sentence in found)


@pytest.fixture
def restored_libraries():
    """A program of its own, the demo sets threads and logging for good; the other tests shall not notice."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


def test_a_run_too_short_to_learn_fails_and_still_says_all(tmp_path, monkeypatch, capsys, restored_libraries):
    monkeypatch.setattr(demo, "EPOCHS", {"others": 1, "people": 1})
    monkeypatch.setitem(demo.UNLEARNING, "num_train_epochs", 1)
    monkeypatch.setitem(demo.UNLEARNING, "augmented_num_train_epochs", 1)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    output = tmp_path / "output"
    assert demo.main(str(output), seed=3) == 1
    printed = capsys.readouterr()
    assert "never learnt" in printed.err
    assert "Unlearning: 100%" in printed.err
    assert "grad_norm" not in printed.out + printed.err, "the Trainer's log dictionaries are shown in the bar instead"

    summary = json.loads((output / "summary.json").read_text())
    assert GOOD.keys() <= summary.keys() and summary["seed"] == 3
    for name in ("forget", "retain"):
        for when in ("before", "after"):
            listed = summary[f"{name}_true_birthplace_in_top5_{when}"]
            assert listed.keys() == {record["person"] for record in read_people(name)}
    # What was measured is what was saved, and nothing lies anywhere else.
    model, tokenizer = (c.from_pretrained(output / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    for name in ("forget", "retain"):
        saved = mean_probability(model, tokenizer, read_people(name), "question")
        assert saved == pytest.approx(summary[f"{name}_prob_after"], rel=1e-4)
    logs = {name: read_log(output / "evaluation" / name) for name in ("model", "retain_only", "target")}
    assert logs["model"]["forget_quality"]["ks_d"] == summary["ks_d_rkld"]
    assert logs["model"]["forget_Q_A_Prob"]["agg_value"] == pytest.approx(summary["forget_prob_after"], rel=1e-4)
    pictures = [f"forget_quality.{suffix}" for suffix in ("csv", "md", "png", "svg")]
    expected = ["evaluation", *pictures, "model", "retain_only", "summary.json", "target"]
    assert sorted(path.name for path in output.iterdir()) == expected
    assert not list(temporary.iterdir())


def test_a_run_that_dies_leaves_no_older_summary(tmp_path, monkeypatch, restored_libraries):
    def die(*args):
        raise RuntimeError("died")

    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setattr(demo, "fine_tune", die)
    with pytest.raises(RuntimeError, match="died"):
        demo.main(str(tmp_path), seed=0)
    assert not (tmp_path / "summary.json").exists()
