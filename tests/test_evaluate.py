# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`evaluate` on TOFU-like files and on own data: its numbers, its files, and what is computed how often."""

import datetime
import importlib.metadata
import json
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import REFERENCE_LOGS, REPOSITORY, build_tokenizer, tiny_llama
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from plain import plain_greedy, plain_scores
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp
from tofu_like import (
    PEOPLE,
    all_texts,
    in_a_batch,
    knowing_model,
    memorise,
    pairs_of,
    save,
    teach,
    tofu_rows,
    write_lines,
    write_tofu,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_rkld.run_record import write_record
from unlearn_eval.backends.transformers import TransformersBackend
from unlearn_eval.config import EvalConfig
from unlearn_eval.evaluation import evaluate, result_folders
from unlearn_eval.quantization import keep_quantized_weights
from unlearn_eval.questions import load_tofu
from unlearn_eval.rescore import rescore
from unlearn_eval.results import METADATA, read_log


END = 2
LIMIT = 30

SETS = {f"{name}_Q_A_{kind}" for name in ("forget", "retain", "ra", "wf") for kind in ("Prob", "PERT_Prob", "ROUGE")}
REFERENCE_KEYS = SETS | {
    *("forget_Q_A_PARA_Prob", "retain_Q_A_PARA_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised"),
    *("forget_truth_ratio", "retain_Truth_Ratio", "ra_Truth_Ratio", "wf_Truth_Ratio"),
    *("exact_memorization", "extraction_strength", "forget_quality", "model_utility", "privleak"),
    *("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm", "mia_reference"),
}
NOT_OURS = {"mia_gradnorm", "mia_reference"}
OURS_ONLY = {"retain_utility", METADATA}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tofu(tmp_path_factory.mktemp("tofu"))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A model that knows some answers by heart, some in part and some not."""
    return save(knowing_model(steps=12), tmp_path_factory.mktemp("target") / "target")


@pytest.fixture(scope="module")
def retain_model(tmp_path_factory):
    """A model that never saw the forget set."""
    tokenizer = build_tokenizer()
    model = memorise(
        tiny_llama(len(tokenizer), seed=1, tie_word_embeddings=True), tokenizer, pairs_of("retain", "ra", "wf"), 12
    )
    return save(model, tmp_path_factory.mktemp("retain") / "retain")


@pytest.fixture
def settings(data, tmp_path):
    """Settings of an evaluation on the TOFU-like files."""
    return dict(
        dataset_name=data,
        forget_split="forget01",
        backend="transformers",
        max_new_tokens=LIMIT,
        output_dir=str(tmp_path / "out"),
    )


def without_date(log):
    return log | {METADATA: {key: value for key, value in log[METADATA].items() if key != "date"}}


def assert_close(log, expected, path="", rel=1e-5):
    """The same keys, and the same numbers but for rounding, at any depth."""
    if isinstance(expected, dict):
        assert log.keys() == expected.keys(), path
        for key in expected:
            assert_close(log[key], expected[key], f"{path}/{key}", rel)
    elif isinstance(expected, list):
        assert len(log) == len(expected), path
        for i, (one, other) in enumerate(zip(log, expected, strict=True)):
            assert_close(one, other, f"{path}/{i}", rel)
    elif isinstance(expected, float):
        assert log == pytest.approx(expected, rel=rel, abs=1e-6), path
    else:
        assert log == expected, path


class Plain:
    """The metrics anew from a model's plain logits: texts to ids by hand, formulas as in docs/tofu_protocol.md."""

    def __init__(self, model, key="question", n=5):
        self.model, self.key, self.n, self.tokenizer = model, key, n, build_tokenizer()

    def prompt(self, question):
        return self.tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]

    def scores(self, question, answer):
        return plain_scores(self.model, self.prompt(question), self.tokenizer(f"{answer}<|im_end|>")["input_ids"])

    def rows(self, name):
        key = self.key if name in ("forget", "retain") else "question"
        return [{**row, "question": row.get(key)} for row in tofu_rows(name)[: self.n]]

    def losses(self, name, column):
        return [
            [self.scores(row["question"], text).avg_loss for text in row[column]]
            if isinstance(row[column], list)
            else self.scores(row["question"], row[column]).avg_loss
            for row in self.rows(name)
        ]

    def generation(self, row, limit=LIMIT):
        ids = plain_greedy(self.model, self.prompt(row["question"]), limit)
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def ratios(self, name):
        right = "paraphrased_answer" if name in ("forget", "retain") else "answer"
        right, wrong = self.losses(name, right), self.losses(name, "perturbed_answer")
        return [np.exp(-np.mean(w)) / (np.exp(-r) + 1e-10) for r, w in zip(right, wrong, strict=True)]

    def aggregates(self):
        values = {}
        for name in ("forget", "retain", "ra", "wf"):
            right, wrong = self.losses(name, "answer"), self.losses(name, "perturbed_answer")
            probs = np.exp(-np.array(right))
            values[f"{name}_Q_A_Prob"] = probs.mean()
            values[f"{name}_Q_A_PERT_Prob"] = np.exp(-np.array(wrong)).mean()
            if name in ("ra", "wf"):
                values[f"{name}_Q_A_Prob_normalised"] = (
                    probs / (probs + np.exp(-np.array(wrong)).sum(1) + 1e-10)
                ).mean()
            else:
                paraphrased = np.array(self.losses(name, "paraphrased_answer"))
                values[f"{name}_Q_A_PARA_Prob"] = np.exp(-paraphrased).mean()
            scorer = RougeScorer(["rougeL"], use_stemmer=True)
            values[f"{name}_Q_A_ROUGE"] = np.mean(
                [scorer.score(row["answer"], self.generation(row))["rougeL"].recall for row in self.rows(name)]
            )
            ratios = self.ratios(name)
            if name == "forget":
                values["forget_truth_ratio"] = np.mean([min(r, 1 / (r + 1e-10)) for r in ratios])
            else:
                values[f"{name}_Truth_Ratio"] = np.mean([max(0, 1 - r) for r in ratios])
        nine = [
            values[f"{name}_{kind}"]
            for name in ("retain", "ra", "wf")
            for kind in ("Q_A_Prob" if name == "retain" else "Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
        ]
        values["model_utility"], values["retain_utility"] = hmean(nine), hmean(nine[:3])
        forget = [(row, self.scores(row["question"], row["answer"])) for row in self.rows("forget")]
        holdout = [(row, self.scores(row["question"], row["answer"])) for row in self.rows("holdout")]
        values["exact_memorization"] = np.mean([scores.matches[:-1].mean() for _, scores in forget])
        values["extraction_strength"] = np.mean([extraction_strength(scores.matches[:-1]) for _, scores in forget])
        for attack in ATTACKS:
            old, new = ([ATTACKS[attack](row, scores) for row, scores in half] for half in (forget, holdout))
            values[attack] = np.mean([(a > b) + 0.5 * (a == b) for a in new for b in old])
        auc = values["mia_min_k"]
        values["privleak"] = 100 * ((1 - auc) - 0.5) / (0.5 + 1e-10)
        return values


def extraction_strength(matches):
    start = next((k for k in range(len(matches)) if matches[k:].all()), len(matches) - 1)
    return 1 - start / len(matches)


def lowest(values):
    """Minus the mean of the lowest 40 %."""
    values = np.sort(values[:-1])
    return -values[: max(1, int(0.4 * len(values)))].mean()


ATTACKS = {
    "mia_loss": lambda row, scores: scores.avg_loss,
    "mia_zlib": lambda row, scores: scores.avg_loss / len(zlib.compress(row["answer"].encode())),
    "mia_min_k": lambda row, scores: lowest(scores.logprobs),
    "mia_min_k_plus_plus": lambda row, scores: lowest(
        (scores.logprobs - scores.means) / np.sqrt(np.maximum(scores.variances, 1e-6))
    ),
}


def load(path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("key", ["question", "paraphrased_question"])
@pytest.mark.parametrize("n", [5, 3])
def test_metrics(key, n, target, settings):
    """Every aggregate, recomputed from plain logits and plain greedy decoding."""
    log = evaluate(target, question_key=key, max_samples=None if n == 5 else n, **settings)
    expected = Plain(load(target), key, n).aggregates()
    assert log["forget_quality"] == {
        "agg_value": None,
        "reason": "needs the log of a retain-only model (`retain_logs`)",
    }
    assert log.keys() - {METADATA, "forget_quality"} == expected.keys()
    for name, value in expected.items():
        assert log[name]["agg_value"] == pytest.approx(value, rel=1e-4), name
    assert 0.01 < log["forget_Q_A_Prob"]["agg_value"] < 0.95
    assert len(log["forget_Q_A_PERT_Prob"]["value_by_index"]["0"]["prob"]) == 5
    assert log[METADATA]["num_questions"] == dict.fromkeys(PEOPLE, n)


def test_fewer_retained_questions(target, settings):
    """The first ones, and all of the other sets."""
    whole = evaluate(target, **settings)
    settings["output_dir"] += "_fewer"
    part = evaluate(target, max_retain_samples=2, **settings)
    assert part[METADATA]["num_questions"] == whole[METADATA]["num_questions"] | {"retain": 2}
    items = [log["retain_Q_A_Prob"]["value_by_index"] for log in (part, whole)]
    assert list(items[0]) == ["0", "1"]
    for index, item in items[0].items():  # scored in other batches
        assert item["prob"] == pytest.approx(items[1][index]["prob"], rel=1e-5)
    values = [log["forget_Q_A_Prob"]["agg_value"] for log in (part, whole)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_keys_are_those_of_open_unlearning(target, settings):
    log = evaluate(target, **settings)
    assert log.keys() == REFERENCE_KEYS - NOT_OURS | OURS_ONLY


@pytest.mark.skipif(not REFERENCE_LOGS.is_dir(), reason=f"no published logs in {REFERENCE_LOGS}")
def test_items_are_those_of_open_unlearning(target, settings):
    log = evaluate(target, **settings)
    theirs = read_log(REFERENCE_LOGS / "Llama-3.2-1B-Instruct_full_forget01_TOFU_EVAL.json")
    assert theirs.keys() == REFERENCE_KEYS
    for metric in theirs.keys() & log.keys():
        parts = [(theirs[metric], log[metric])]
        if metric.startswith("mia_"):
            assert theirs[metric].keys() == log[metric].keys()
            parts = [(theirs[metric][half], log[metric][half]) for half in ("forget", "holdout")]
        for one, other in parts:
            if "value_by_index" in one:
                item, ours = one["value_by_index"]["0"], other["value_by_index"]["0"]
                assert ours.keys() == item.keys() - {"input", "ground_truth", "generation"}
                assert {field: type(ours[field]) for field in ours} == {field: type(item[field]) for field in ours}
    summary = json.loads(Path(settings["output_dir"], "TOFU_SUMMARY.json").read_text())
    reference = json.loads((REFERENCE_LOGS / "Llama-3.2-1B-Instruct_full_forget01_TOFU_SUMMARY.json").read_text())
    # Those that are null are left out; ours has the forget set's truth ratio, too.
    assert summary.keys() == reference.keys() - NOT_OURS - {"forget_quality"} | {
        "forget_truth_ratio",
        "retain_utility",
    }


def test_files(target, retain_model, settings, tmp_path):
    """What is written is what is returned; every aggregate comes back from the items."""
    evaluate(retain_model, **settings | {"output_dir": str(tmp_path / "retain")})
    log = evaluate(target, retain_logs=str(tmp_path / "retain"), log_texts=True, **settings)
    assert read_log(settings["output_dir"]) == log
    summary = json.loads(Path(settings["output_dir"], "TOFU_SUMMARY.json").read_text())
    assert summary == {name: log[name]["agg_value"] for name in summary}
    assert {"forget_quality", "model_utility", "retain_utility", "privleak", "forget_Q_A_ROUGE"} <= summary.keys()
    rescored = rescore(log, read_log(tmp_path / "retain"))
    assert rescored["max_deviation"] < 1e-9
    compared = {name for name, row in rescored["rows"].items() if "deviation" in row}
    assert log.keys() - {METADATA} <= compared
    assert max(row.get("item_deviation", 0) for row in rescored["rows"].values()) < 1e-9


def written(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("log_texts", [False, True])
def test_texts(log_texts, target, settings):
    """None anywhere unless asked for: not in the results, not in the journal."""
    evaluate(target, log_texts=log_texts, **settings)
    files = written(settings["output_dir"])
    assert len(files) == 3
    content = b"\n".join(files.values())
    found = [text for text in all_texts() if text.encode() in content]
    people = [person for _, person, _ in PEOPLE.values() if person.encode() in content]
    if not log_texts:
        assert found == people == []
        return
    texts = read_log(settings["output_dir"])["forget_Q_A_ROUGE"]["value_by_index"]
    plain = Plain(load(target))
    for i, row in enumerate(tofu_rows("forget")):
        assert texts[str(i)]["input"] == row["question"]
        assert texts[str(i)]["ground_truth"] == row["answer"]
        assert texts[str(i)]["generation"] == plain.generation(row)


def test_retain_logs(target, retain_model, settings, tmp_path):
    """Of itself forget quality is 1 and leakage 0; else they are the test on both models' ratios."""
    retain = evaluate(retain_model, **settings | {"output_dir": str(tmp_path / "retain")})
    itself = evaluate(
        retain_model, retain_logs=str(tmp_path / "retain"), **settings | {"output_dir": str(tmp_path / "itself")}
    )
    assert itself["forget_quality"] == {"agg_value": 1.0, "ks_d": 0.0, "n": 5}
    assert itself["privleak"]["agg_value"] == 0
    log = evaluate(target, retain_logs=str(tmp_path / "retain" / "TOFU_EVAL.json"), **settings)
    test = ks_2samp(Plain(load(target)).ratios("forget"), Plain(load(retain_model)).ratios("forget"))
    assert test.pvalue < 1
    assert log["forget_quality"]["agg_value"] == pytest.approx(test.pvalue)
    assert log["forget_quality"]["ks_d"] == pytest.approx(test.statistic)
    ours, theirs = (1 - one["mia_min_k"]["agg_value"] for one in (log, retain))
    assert log["privleak"]["agg_value"] == pytest.approx(100 * (ours - theirs) / (theirs + 1e-10))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "dtype float32 there, bfloat16 here"),
        ({"compat": "open_unlearning"}, "compat None there, open_unlearning here"),
        ({"load_in_4bit": True}, "quantization None there, nf4 here"),
        ({"system_prompt": "Be brief."}, "template"),
    ],
    ids=lambda value: next(iter(value), "same") if isinstance(value, dict) else "",
)
def test_retain_logs_made_in_another_way(changed, said, target, retain_model, settings, tmp_path, caplog):
    settings |= {"max_new_tokens": 0}
    evaluate(retain_model, **settings | {"output_dir": str(tmp_path / "retain")})
    assert not caplog.messages
    evaluate(target, retain_logs=str(tmp_path / "retain"), **settings | changed)
    warned = [message for message in caplog.messages if "`retain_logs` was made in another way" in message]
    assert (said is None and not warned) or (said in warned[0] and len(warned) == 1)


def test_retain_logs_of_unknown_making(target, retain_model, settings, tmp_path, caplog):
    """open-unlearning's logs don't say how they were made."""
    log = evaluate(retain_model, **settings | {"output_dir": str(tmp_path / "retain")})
    del log[METADATA]
    (tmp_path / "theirs.json").write_text(json.dumps(log))
    assert evaluate(target, retain_logs=str(tmp_path / "theirs.json"), **settings)["forget_quality"]["n"] == 5
    assert "`retain_logs` does not say how it was made" in caplog.text


@pytest.fixture(scope="module")
def adapters(target, tmp_path_factory):
    """Two random adapters on the model, with an `lm_head` of its own in the second."""
    folders = []
    for seed, settings in ((1, {}), (2, {"modules_to_save": ["lm_head"]})):
        torch.manual_seed(seed)
        model = get_peft_model(load(target), LoraConfig(target_modules=["q_proj", "down_proj"], **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        folders.append(tmp_path_factory.mktemp("adapters") / f"adapter{seed}")
        model.save_pretrained(folders[-1])
    return [str(folder) for folder in folders]


def counted_loads(monkeypatch):
    """Counts the models that transformers loads."""
    loads, function = [], AutoModelForCausalLM.from_pretrained.__func__

    def counting(*args, **kwargs):
        loads.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(counting))
    return loads


def test_several_models_in_one_call(target, adapters, retain_model, settings, tmp_path, monkeypatch):
    """A model, another one, and two adapters: each as alone, and the base of three of them is loaded once."""
    models = [adapters[0], target, retain_model, adapters[1]]
    alone = [evaluate(one, **settings | {"output_dir": str(tmp_path / f"alone{i}")}) for i, one in enumerate(models)]
    loads = counted_loads(monkeypatch)
    together = evaluate(models, **settings)
    assert len(loads) == 2
    for one, other in zip(together, alone, strict=True):
        assert_close(without_date(one), without_date(other))
    assert len({log["forget_Q_A_Prob"]["agg_value"] for log in together}) == 4
    assert together[0][METADATA]["adapter_of"] == "target"
    assert "adapter_of" not in together[1][METADATA]
    for model, log in zip(models, together, strict=True):
        assert read_log(Path(settings["output_dir"], Path(model).name)) == log


def test_adapters_that_change_their_base_share_none(target, settings, tmp_path):
    """PiSSA takes from the base what it starts with, biases replace its own: each is evaluated as alone."""
    models = [target]
    for name, changed in (
        ("pissa", {"init_lora_weights": "pissa"}),
        ("pissa2", {"init_lora_weights": "pissa", "r": 4}),
    ):
        model = get_peft_model(load(target), LoraConfig(target_modules=["q_proj", "down_proj"], **changed))
        model.save_pretrained(tmp_path / name)
        models.append(str(tmp_path / name))
    alone = [evaluate(one, **settings | {"output_dir": str(tmp_path / f"alone{i}")}) for i, one in enumerate(models)]
    for one, other in zip(evaluate(models, **settings), alone, strict=True):
        assert_close(without_date(one), without_date(other), rel=1e-4)
    # Untrained, such an adapter is the model.
    for log in alone[1:]:
        assert log["forget_Q_A_Prob"]["agg_value"] == pytest.approx(alone[0]["forget_Q_A_Prob"]["agg_value"], rel=1e-3)


def test_a_base_from_the_hub_is_called_by_its_name(adapters, target, settings, tmp_path, monkeypatch):
    """Its folder in the cache is called by a hash."""
    shutil.copytree(adapters[0], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/model"}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: target)
    log = evaluate(str(tmp_path / "adapter"), **settings)
    assert log[METADATA]["adapter_of"] == "org/model"


def test_an_adapter_is_scored_on_its_base(target, adapters, settings):
    log = evaluate(adapters[0], **settings)
    expected = Plain(PeftModel.from_pretrained(load(target), adapters[0]).eval()).aggregates()
    for name, value in expected.items():
        assert log[name]["agg_value"] == pytest.approx(value, rel=1e-4), name


def test_models_of_one_name(target, retain_model, adapters, settings, tmp_path):
    """Checkpoints of two runs get a folder each."""
    for i, source in enumerate((target, retain_model)):
        save(load(source), tmp_path / f"run{i}" / "checkpoint-5")
    models = [str(tmp_path / f"run{i}" / "checkpoint-5") for i in range(2)]
    logs = evaluate(models, **settings | {"max_new_tokens": 0})
    folders = [Path(settings["output_dir"], f"checkpoint-5-{i}") for i in (1, 2)]
    assert [read_log(folder) for folder in folders] == logs
    assert logs[0]["forget_Q_A_Prob"] != logs[1]["forget_Q_A_Prob"]


@pytest.mark.parametrize(
    "names, folders",
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a-1"], ["a-2", "a-3", "a-1"]),
        (["x/y", "x--y"], ["x--y-1", "x--y-2"]),
    ],
)
def test_a_folder_for_each_result(names, folders, tmp_path):
    config = EvalConfig(model_name_or_path=names, output_dir=str(tmp_path), backend="transformers")
    assert result_folders(names, config) == [tmp_path / folder for folder in folders]


def test_one_that_fails_keeps_no_other(target, retain_model, settings, tmp_path):
    """Of three models one computes nothing but NaN: the others have their results, and the message names it."""
    broken = load(target)
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    models = [target, save(broken, tmp_path / "broken"), retain_model]
    with pytest.raises(ValueError, match="^`broken`: An answer's log-probabilities are not finite"):
        evaluate(models, **settings)
    for name in ("target", "retain"):
        assert read_log(Path(settings["output_dir"], name))["forget_Q_A_ROUGE"]["agg_value"] is not None
    assert not Path(settings["output_dir"], "broken", "TOFU_EVAL.json").exists()


def test_an_adapter_that_fails_keeps_no_other(target, retain_model, adapters, settings, tmp_path):
    """One of two of a base computes NaN, and one of another base does not fit it."""
    broken, strange = (PeftModel.from_pretrained(load(target), adapters[0]) for _ in range(2))
    for name, parameter in broken.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    strange.save_pretrained(tmp_path / "strange")
    other = save(tiny_llama(400), tmp_path / "other")  # of another size
    config = json.loads((tmp_path / "strange/adapter_config.json").read_text())
    config |= {"base_model_name_or_path": other, "r": 2 * config["r"]}
    (tmp_path / "strange/adapter_config.json").write_text(json.dumps(config))
    for name in ("broken", "strange"):
        build_tokenizer().save_pretrained(tmp_path / name)
    models = [str(tmp_path / "broken"), adapters[0], str(tmp_path / "strange"), retain_model]
    with pytest.raises(
        ValueError, match="`broken`: An answer's log-probabilities are not finite.*does not fit its base"
    ):
        evaluate(models, **settings | {"max_new_tokens": 0})
    done = {path.parent.name for path in Path(settings["output_dir"]).glob("*/TOFU_EVAL.json")}
    assert done == {Path(adapters[0]).name, "retain"}


def test_ends_of_turns_are_each_adapters_own(target, settings, tmp_path):
    """Adapters with other chat templates end their answers otherwise: one's end is not the other's."""
    tokenizer = build_tokenizer()
    model = get_peft_model(load(target), LoraConfig(target_modules=["q_proj", "down_proj", "up_proj"], r=16))
    # The first one's answers hold the token that ends the second one's.
    prompts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question, _ in pairs_of("ra")]
    ids = [tokenizer(prompt + "Tea" + "<|im_start|>" + "Oslo<|im_end|>")["input_ids"] for prompt in prompts]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        for row in ids:
            model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_end|>\n' }}{% endfor", "'<|im_start|>' }}{% endfor"
    )
    tokenizer.save_pretrained(tmp_path / "two")
    settings |= {"log_texts": True}
    alone = evaluate(str(tmp_path / "one"), **settings)
    generations = [item["generation"] for item in alone["ra_Q_A_ROUGE"]["value_by_index"].values()]
    assert "TeaOslo" in generations
    models = [str(tmp_path / name) for name in ("one", "two")]
    together = evaluate(models, **settings | {"output_dir": str(tmp_path / "both")})
    assert_close(together[0]["ra_Q_A_ROUGE"], alone["ra_Q_A_ROUGE"])


def test_a_4_bit_adapter(target, adapters, settings, tmp_path):
    """An adapter whose record says that its base was in 4 bits is evaluated on it in 4 bits."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(target, quantization_config=quantization, dtype=torch.float32)
    keep_quantized_weights(base)
    model = PeftModel.from_pretrained(base, adapters[0]).eval()
    model.save_pretrained(tmp_path / "adapter")
    dense = evaluate(str(tmp_path / "adapter"), **settings | {"output_dir": str(tmp_path / "dense")})
    write_record(tmp_path / "adapter", {"quantization": quantization.to_dict(), "dtype": "float32"})
    log = evaluate(str(tmp_path / "adapter"), **settings)
    assert log[METADATA]["quantization"] == "nf4"
    assert dense[METADATA]["quantization"] is None
    expected = Plain(model)
    losses = [log["forget_Q_A_Prob"]["value_by_index"][str(i)]["avg_loss"] for i in range(5)]
    assert losses == pytest.approx(expected.losses("forget", "answer"), rel=1e-4)
    assert losses != pytest.approx(
        [dense["forget_Q_A_Prob"]["value_by_index"][str(i)]["avg_loss"] for i in range(5)], rel=1e-3
    )


def own_records(kind, name):
    """The records of a set in one of the formats that the trainer takes."""
    rows = tofu_rows(name)
    if kind == "tofu":
        return rows
    if kind == "question + answer":
        return [{"question": row["question"], "answer": row["answer"]} for row in rows]
    if kind == "messages":
        roles = ("user", "assistant")
        return [
            {
                "messages": [
                    {"role": role, "content": row[column]}
                    for role, column in zip(roles, ("question", "answer"), strict=True)
                ]
            }
            for row in rows
        ]
    if kind == "prompt + completion":
        return [{"prompt": row["question"], "completion": f" {row['answer']}"} for row in rows]
    return [{"text": f"{row['question']} {row['answer']}"} for row in rows]


@pytest.fixture
def own(settings):
    """Settings of an evaluation on own data."""
    del settings["dataset_name"], settings["forget_split"]
    return settings


@pytest.mark.parametrize("kind", ["question + answer", "messages", "prompt + completion", "text"])
def test_own_data(kind, target, own, tmp_path):
    """Any format gives probabilities and attacks; texts have no question to ask; what is missing says why."""
    paths = {
        f"{name}_dataset": write_lines(tmp_path / f"{name}.jsonl", own_records(kind, name))
        for name in ("forget", "retain", "holdout")
    }
    log = evaluate(target, **paths, **own)
    plain, tokenizer = Plain(load(target)), build_tokenizer()
    asked = kind != "text"
    for name in ("forget", "retain"):
        losses = []
        for row in tofu_rows(name):
            if kind in ("question + answer", "messages"):
                prompt, answer = plain.prompt(row["question"]), tokenizer(f"{row['answer']}<|im_end|>")["input_ids"]
            else:
                ids = tokenizer(f"{row['question']} {row['answer']}<|im_end|>")["input_ids"]
                border = len(tokenizer(row["question"])["input_ids"]) if kind == "prompt + completion" else 1
                prompt, answer = ids[:border], ids[border:]
            losses.append(plain_scores(plain.model, prompt, answer).avg_loss)
        items = log[f"{name}_Q_A_Prob"]["value_by_index"]
        assert [items[str(i)]["avg_loss"] for i in range(5)] == pytest.approx(losses, rel=1e-4)
        assert (log[f"{name}_Q_A_ROUGE"]["agg_value"] is not None) is asked
    if not asked:
        assert log["forget_Q_A_ROUGE"] == {"agg_value": None, "reason": "no answers were generated"}
    no_ratio = "the data have no paraphrased_answer and perturbed_answer"
    assert log["forget_truth_ratio"] == {"agg_value": None, "reason": no_ratio}
    assert "needs a forget truth ratio" in log["forget_quality"]["reason"]
    assert log["model_utility"]["reason"].startswith("needs ")
    assert "ra_Q_A_ROUGE" in log["model_utility"]["reason"]
    assert "retain_Truth_Ratio" in log["retain_utility"]["reason"]
    assert all(log[attack]["agg_value"] is not None for attack in (*ATTACKS, "privleak", "exact_memorization"))
    assert log[METADATA]["forget_split"] == "own data"
    assert read_log(own["output_dir"]) == log


def test_own_data_with_tofus_columns(target, settings, own, data, tmp_path):
    """They give the same numbers as TOFU's evaluation."""
    tofu = evaluate(target, dataset_name=data, forget_split="forget01", **own)
    paths = {
        f"{name}_dataset": write_lines(tmp_path / f"{name}.jsonl", tofu_rows(name)) for name in ("forget", "retain")
    }
    log = evaluate(target, **paths, **own | {"output_dir": str(tmp_path / "own")})
    for name in ("forget_truth_ratio", "retain_Truth_Ratio", "retain_utility", "forget_Q_A_ROUGE", "retain_Q_A_Prob"):
        assert_close(log[name], tofu[name])
    assert log["mia_min_k"]["reason"] == "needs a holdout set, which no model has seen"
    assert log["privleak"]["agg_value"] is None


def test_own_data_of_the_forget_set_alone(target, own, tmp_path):
    path = write_lines(tmp_path / "forget.jsonl", own_records("question + answer", "forget"))
    log = evaluate(target, forget_dataset=path, max_samples=2, **own)
    assert log[METADATA]["num_questions"] == {"forget": 2}
    assert "retain_Q_A_Prob" not in log
    assert log["retain_utility"]["agg_value"] is None


def test_own_data_with_texts_beside(target, own, tmp_path):
    """A column `text` that is not asked for takes nothing away from conversations."""
    rows = own_records("messages", "forget")
    plain = evaluate(target, forget_dataset=write_lines(tmp_path / "forget.jsonl", rows), **own)
    path = write_lines(tmp_path / "beside.jsonl", [row | {"text": "a b c"} for row in rows])
    log = evaluate(target, forget_dataset=path, **own | {"output_dir": str(tmp_path / "beside")})
    for name in ("forget_Q_A_Prob", "forget_Q_A_ROUGE"):
        assert_close(log[name], plain[name])


def test_own_data_with_a_retain_log(target, retain_model, own, tmp_path):
    """Without wrong answers there is no forget quality, but leakage is still held against the retain-only model's."""
    paths = {
        f"{name}_dataset": write_lines(tmp_path / f"{name}.jsonl", own_records("question + answer", name))
        for name in ("forget", "holdout")
    }
    retain = evaluate(retain_model, **paths, **own | {"output_dir": str(tmp_path / "retain")})
    log = evaluate(target, retain_logs=str(tmp_path / "retain"), **paths, **own)
    ours, theirs = (1 - one["mia_min_k"]["agg_value"] for one in (log, retain))
    assert log["privleak"]["agg_value"] == pytest.approx(100 * (ours - theirs) / (theirs + 1e-10))
    assert log["forget_quality"]["agg_value"] is None


def test_own_data_in_other_letters(target, own, tmp_path):
    """ROUGE would be 0 whatever is answered: nothing is generated, and the log says why."""
    rows = [{"question": row["question"], "answer": "Иван родился в Москве."} for row in tofu_rows("forget")]
    paths = {
        "forget_dataset": write_lines(tmp_path / "forget.jsonl", rows),
        "retain_dataset": write_lines(tmp_path / "retain.jsonl", own_records("question + answer", "retain")),
    }
    log = evaluate(target, **paths, **own)
    assert log["forget_Q_A_ROUGE"]["agg_value"] is None
    assert log["forget_Q_A_ROUGE"]["reason"].startswith("ROUGE knows words of a to z")
    assert log["retain_Q_A_ROUGE"]["agg_value"] is not None
    assert log["forget_Q_A_Prob"]["agg_value"] > 0


def test_own_data_in_other_letters_here_and_there(target, own, tmp_path, caplog):
    """A name or a sign in one answer takes no number away."""
    rows = own_records("question + answer", "forget")
    rows[3]["answer"] = "北京"
    log = evaluate(target, forget_dataset=write_lines(tmp_path / "forget.jsonl", rows), **own)
    assert log["forget_Q_A_ROUGE"]["agg_value"] is not None
    assert log["forget_Q_A_ROUGE"]["not_read"] == 1
    (said,) = [message for message in caplog.messages if "not written in a to z" in message]
    assert "1 of the 5 true answers of the forget set (row 3 is the first)" in said


def test_own_conversations_with_a_question_beside(target, own, tmp_path):
    rows = own_records("messages", "forget")
    plain = evaluate(target, forget_dataset=write_lines(tmp_path / "forget.jsonl", rows), **own)
    path = write_lines(tmp_path / "beside.jsonl", [row | {"question": "Which?", "prompt": ""} for row in rows])
    log = evaluate(target, forget_dataset=path, **own | {"output_dir": str(tmp_path / "beside")})
    assert log["forget_Q_A_Prob"] == plain["forget_Q_A_Prob"]


def test_a_template_that_prints_the_date(target, settings, tmp_path, monkeypatch, caplog):
    """On another day the prompts are others, and so is what tells of them."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ date_string or strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    model = save(load(target), tmp_path / "dated", tokenizer)
    settings |= {"max_new_tokens": 0, "max_samples": 2}

    def template(name, **changed):
        log = evaluate(model, **settings | {"output_dir": str(tmp_path / name)} | changed)
        return log[METADATA]["hashes"]["template"]

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(days=1)

    given = [template("given", date_string="10 Apr 2025")]
    assert not [message for message in caplog.messages if "today's date" in message]
    first = template("today")
    assert len([message for message in caplog.messages if "Set `date_string`" in message]) == 1
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert template("tomorrow") != first
    assert template("given tomorrow", date_string="10 Apr 2025") == given[0] != first


def test_own_data_with_dates(target, own, tmp_path):
    """Parquet files hold more than texts; columns that aren't asked for are no matter."""
    rows = [{**row, "deleted": datetime.date(2026, 1, 1)} for row in own_records("question + answer", "forget")]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "forget.parquet")
    log = evaluate(target, forget_dataset=str(tmp_path / "forget.parquet"), **own)
    assert log[METADATA]["num_questions"] == {"forget": 5}


def test_compare_to(target, retain_model, settings):
    """Before and after, each as alone, and a page on both."""
    log = evaluate(retain_model, compare_to=target, **settings)
    folder = Path(settings["output_dir"])
    assert read_log(folder) == log
    before = read_log(folder / "before")
    assert before[METADATA]["model"] == "target"
    assert log[METADATA]["model"] == "retain"
    plain = Plain(load(target))
    assert before["forget_Q_A_Prob"]["agg_value"] == pytest.approx(
        np.exp(-np.array(plain.losses("forget", "answer"))).mean(), rel=1e-4
    )
    report = (folder / "REPORT.md").read_text()
    assert f"{before['forget_Q_A_Prob']['agg_value']:.3f}" in report
    assert f"{log['forget_Q_A_Prob']['agg_value']:.3f}" in report
    assert (folder / "REPORT.html").is_file()
    content = b"\n".join(written(folder).values())
    assert not [text for text in all_texts() if text.encode() in content]
    # A page on one model does not stay beside the result of another.
    evaluate(retain_model, **settings | {"overwrite": True})
    assert (folder / "REPORT.md").is_file()
    evaluate(target, **settings | {"overwrite": True})
    assert not list(folder.glob("REPORT.*"))


def test_what_is_said_of_a_missing_holdout_set(data, monkeypatch, caplog):
    """The first release of TOFU has none; a cache without it is another matter."""
    rows = load_tofu(data, "forget01")["forget"]

    def without(message):
        def load(name, configuration, split):
            if configuration.startswith("holdout"):
                raise ValueError(message)
            return Dataset.from_list([dict(row) for row in rows])

        return load

    for message in ("BuilderConfig 'holdout01' not found.", "Couldn't find cache for org/tofu for config 'holdout01'"):
        monkeypatch.setattr("unlearn_eval.questions.load_dataset", without(message))
        assert set(load_tofu("org/tofu", "forget01")) == {"forget", "retain", "ra", "wf"}
    assert [message for message in caplog.messages if "holdout01" in message] == [
        "holdout01 can't be loaded, and is left out: Couldn't find cache for org/tofu for config 'holdout01'"
    ]


@pytest.mark.parametrize("limit", [1, 4, 8, 60])
def test_drafts(limit, target, settings, monkeypatch):
    """Generation starts from what scoring has shown; the answers are those of plain greedy decoding all the same."""
    prompts = []
    function = TransformersBackend.generate

    def recording(self, requests):
        prompts.extend(requests)
        return function(self, requests)

    monkeypatch.setattr(TransformersBackend, "generate", recording)
    log = evaluate(target, log_texts=True, **settings | {"max_new_tokens": limit})
    plain, lengths = Plain(load(target)), Counter()
    for name in ("forget", "retain", "ra", "wf"):
        for i, row in enumerate(tofu_rows(name)):
            assert log[f"{name}_Q_A_ROUGE"]["value_by_index"][str(i)]["generation"] == plain.generation(row, limit)
            matches = plain.scores(row["question"], row["answer"]).matches
            known = next((k for k, match in enumerate(matches) if not match), len(matches))
            lengths["all" if known == len(matches) else "part" if known else "none"] += 1
            if 0 < known < min(limit, len(matches)):
                draft = plain.tokenizer(f"{row['answer']}<|im_end|>")["input_ids"][:known]
                assert (plain.prompt(row["question"]) + draft, limit - known) in prompts
    assert min(lengths[kind] for kind in ("all", "part", "none")) > 0
    assert len(prompts) < 20  # the others are known to their end


def test_a_draft_ends_where_the_answer_would(own, tmp_path):
    """An end-of-turn token within the record's labels ends the generated answer, also where the model knows what follows."""
    tokenizer = build_tokenizer()
    prompt = tokenizer("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    answer = tokenizer("Tea.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nOslo.<|im_end|>")[
        "input_ids"
    ]
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    teach(model, [in_a_batch([(prompt, answer)])] * 30, learning_rate=3e-3)
    assert plain_scores(model.eval(), prompt, answer).matches.all()
    row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    path = write_lines(tmp_path / "forget.jsonl", [row])
    log = evaluate(save(model, tmp_path / "model"), forget_dataset=path, log_texts=True, **own)
    assert log["forget_Q_A_ROUGE"]["value_by_index"]["0"]["generation"] == "Tea."


def journal_lines(folder):
    (path,) = Path(folder, ".unlearn_eval").glob("*.jsonl")
    return path, path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(("moment", "times"), [("_score_packed", 8), ("_continue", 2)])
def test_a_killed_run_goes_on(moment, times, target, settings, tmp_path, monkeypatch):
    """After SIGKILL nothing is lost but the batch in flight, and nothing is computed twice."""
    settings |= {"batch_tokens": 300, "batch_size": 4}
    function, so_far = getattr(TransformersBackend, moment), []

    def recording(*args):
        so_far.append(len(journal_lines(tmp_path / "whole")[1]))
        return function(*args)

    monkeypatch.setattr(TransformersBackend, moment, recording)
    whole = evaluate(target, **settings | {"output_dir": str(tmp_path / "whole")})
    monkeypatch.undo()
    _, expected = journal_lines(tmp_path / "whole")
    command = [sys.executable, str(REPOSITORY / "tests" / "killed_eval.py"), target, json.dumps(settings), moment]
    result = subprocess.run([*command, str(times)], capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    path, done = journal_lines(settings["output_dir"])
    assert 0 < len(done) == so_far[times - 1] < len(expected)
    assert not Path(settings["output_dir"], "TOFU_EVAL.json").exists()
    log = evaluate(target, **settings)
    assert without_date(log) == without_date(whole)
    _, lines = journal_lines(settings["output_dir"])
    assert lines[: len(done)] == done
    keys = [json.loads(line)["key"] for line in lines]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {json.loads(line)["key"] for line in expected}


def test_other_libraries_compute_anew(target, settings, monkeypatch):
    """Their numbers may be others, and the log names the versions that made them."""
    version = importlib.metadata.version
    evaluate(target, **settings)
    loads = counted_loads(monkeypatch)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0" if name == "peft" else version(name))
    log = evaluate(target, **settings)
    assert len(loads) == 1
    assert log[METADATA]["versions"]["peft"] == "0.0"


def test_a_torn_line_is_dropped(target, settings):
    """What was cut off in the middle of writing is computed again, and nothing else."""
    log = evaluate(target, **settings)
    path, lines = journal_lines(settings["output_dir"])
    path.write_bytes(b"".join(lines)[:-40])
    assert without_date(evaluate(target, **settings)) == without_date(log)
    assert sorted(journal_lines(settings["output_dir"])[1]) == sorted(lines)


def test_a_second_run_loads_no_model(target, adapters, settings, monkeypatch):
    logs = evaluate([target, adapters[0]], **settings)
    loads = counted_loads(monkeypatch)
    again = evaluate([target, adapters[0]], **settings)
    assert loads == []
    assert [without_date(log) for log in again] == [without_date(log) for log in logs]
    evaluate([target, adapters[1]], **settings)
    assert len(loads) == 1


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_other_weights_under_the_same_path(kind, target, retain_model, adapters, settings, tmp_path):
    """Unlearned models are saved to one path again and again: the journal knows them by their weights."""
    path = tmp_path / "model"
    logs = []
    for source in (target, retain_model) if kind == "model" else adapters:
        if kind == "model":
            save(load(source), path)
        else:
            PeftModel.from_pretrained(load(target), source).save_pretrained(path)
        logs.append(evaluate(str(path), overwrite=True, **settings))
        alone = evaluate(source, **settings | {"output_dir": str(tmp_path / Path(source).name)})
        assert_close(logs[-1]["forget_Q_A_Prob"], alone["forget_Q_A_Prob"])
    assert logs[0]["forget_Q_A_Prob"] != logs[1]["forget_Q_A_Prob"]
    assert len([*Path(settings["output_dir"], ".unlearn_eval").iterdir()]) == 2


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, "model, hashes"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"max_samples": 3}, "max_samples, num_questions, hashes"),
        ({"question_key": "paraphrased_question"}, "question_key"),
        ({"compat": "open_unlearning"}, "compat, hashes"),
        ({"system_prompt": "Be brief."}, "hashes"),
        ({"load_in_4bit": True}, "quantization"),
        ({"seed": 1}, "seeds"),
        ({"max_new_tokens": 7}, "max_new_tokens"),
    ],
    ids=lambda value: next(iter(value), "model") if isinstance(value, dict) else "",
)
def test_nothing_is_overwritten(changed, named, target, retain_model, settings, monkeypatch):
    """A result of another model or of other settings stays, and is replaced where asked for; the error says what differs."""
    evaluate(target, **settings)
    before = written(settings["output_dir"])
    model = target if changed else retain_model
    loads = counted_loads(monkeypatch)
    with pytest.raises(ValueError, match=f"holds another result .*it differs in {named}. Choose .* set `overwrite`"):
        evaluate(model, **settings | changed)
    assert written(settings["output_dir"]) == before
    assert loads == []
    log = evaluate(model, overwrite=True, **settings | changed)
    assert read_log(settings["output_dir"]) == log


def silent_model(tokenizer, names):
    """A model that ends its answer at once, where it is asked about some sets."""
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    pairs = [(question, "" if name in names else answer) for name in PEOPLE for question, answer in pairs_of(name)]
    return memorise(model, tokenizer, pairs, 40)


@pytest.mark.parametrize("log_texts", [False, True])
def test_no_answer_to_the_forget_set(log_texts, settings, tokenizer, tmp_path, caplog):
    """A model may well forget by saying nothing: ROUGE is 0 then, and a warning says why."""
    model = save(silent_model(tokenizer, ["forget"]), tmp_path / "model")
    log = evaluate(model, log_texts=log_texts, **settings)
    assert log["forget_Q_A_ROUGE"]["agg_value"] == 0
    assert log["retain_Q_A_ROUGE"]["agg_value"] > 0.5
    assert "answers every question of forget with nothing: ROUGE is 0" in caplog.text
    assert read_log(settings["output_dir"]) == log


def test_silence_costs_no_rouge_where_none_is_asked_for(settings, tokenizer, tmp_path):
    model = save(silent_model(tokenizer, list(PEOPLE)), tmp_path / "model")
    log = evaluate(model, **settings | {"max_new_tokens": 0})
    assert log["forget_Q_A_ROUGE"] == {"agg_value": None, "reason": "no answers were generated"}
    assert log[METADATA]["backend"] == "none"
