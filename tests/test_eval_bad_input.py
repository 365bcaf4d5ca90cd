# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Bad input of an evaluation is refused before a model is loaded, with field and remedy named and no text shown."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import build_tokenizer, tiny_llama
from peft import IA3Config, LoraConfig, get_peft_model
from tofu_like import PEOPLE, all_texts, memorise, pairs_of, save, tofu_rows, write_lines, write_tofu
from transformers import AutoModelForCausalLM

from unlearn_eval.checkpoints import resolve_checkpoint
from unlearn_eval.config import EvalConfig
from unlearn_eval.evaluation import evaluate, run


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is loaded."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.fixture
def settings(tmp_path):
    """Settings that work, with an `output_dir` that holds a file of the user's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    return dict(
        dataset_name=write_tofu(tmp_path / "tofu"),
        forget_split="forget01",
        backend="transformers",
        max_new_tokens=8,
        output_dir=str(tmp_path / "out"),
    )


def refused(model, settings, message, error=ValueError):
    """The evaluation is refused with this message; no text is in it, and `output_dir` is as before."""
    folder = Path(settings["output_dir"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message) as raised:
        evaluate(model, **settings)
    assert not [text for text in all_texts() if text in str(raised.value)]
    assert not [person for _, person, _ in PEOPLE.values() if person in str(raised.value)]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(folder.iterdir()) == sorted({folder / path.relative_to(folder).parts[0] for path in before})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"forget_split": "forget02"}, "`forget_split='forget02'` is not one of forget01, forget05, forget10"),
        ({"max_samples": 0}, "`max_samples=0` must be at least 1"),
        ({"max_retain_samples": 0}, "`max_retain_samples=0` must be at least 1"),
        ({"max_new_tokens": -1}, "`max_new_tokens=-1` must be at least 0"),
        ({"batch_size": 0}, "`batch_size=0` must be at least 1"),
        ({"compat": "open-unlearning"}, "`compat='open-unlearning'` is unknown. Use `open_unlearning`"),
        ({"backend": "vlm"}, "`backend='vlm'` is not one of vllm, transformers"),
        ({"compat": "open_unlearning", "backend": "vllm"}, "`compat=open_unlearning` hides .* `backend=transformers`"),
        (
            {"compat": "open_unlearning", "score_backend": "vllm"},
            "`compat=open_unlearning` hides .* `score_backend=transformers`",
        ),
        ({"dtype": "fp32"}, "`dtype='fp32'` is not one of auto, bfloat16, float16, float32"),
        ({"question_template": "Question:"}, "`question_template` must contain `{question}`"),
        ({"retain_dataset": "x.jsonl"}, "`retain_dataset` and `holdout_dataset` go with `forget_dataset`"),
        ({"question_key": "qestion"}, "The forget set has no column `qestion`.* another `question_key`"),
        ({"output_dir": None}, "`output_dir` is required"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings(changed, message, llama_path, settings, no_model):
    if "output_dir" in changed:
        with pytest.raises(ValueError, match=message):
            evaluate(llama_path, **settings | changed)
    else:
        refused(llama_path, settings | changed, message)


@pytest.mark.parametrize("name", ["forget_dataset", "retain_dataset", "holdout_dataset"])
def test_missing_own_file(name, llama_path, settings, no_model):
    settings |= {"forget_dataset": __file__} | {name: "x.jsonl"}
    refused(llama_path, settings, f"`{name}='x.jsonl'` does not exist", FileNotFoundError)


def test_no_or_several_models(llama_path, settings, no_model):
    refused([], settings, "`model_name_or_path` is required")
    refused([llama_path] * 2, settings | {"compare_to": llama_path}, "`compare_to` is for one model")
    with pytest.raises(TypeError, match="forget_splt"):
        EvalConfig(["model"], forget_splt="forget01")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("name", ["backend", "score_backend"])
def test_vllm_is_not_installed(name, llama_path, settings, no_model):
    refused(llama_path, settings | {name: "vllm"}, f"`{name}=vllm`, but vLLM is not installed.*use `transformers`")


@pytest.mark.parametrize("file", ["forget01_perturbed", "retain_perturbed", "world_facts_perturbed"])
def test_missing_file(file, llama_path, settings, no_model):
    Path(settings["dataset_name"], f"{file}.jsonl").unlink()
    refused(llama_path, settings, f"`dataset_name=.*` has no {file}.jsonl.*`forget_dataset`", FileNotFoundError)


def test_no_folder(llama_path, settings, no_model):
    file = str(Path(settings["dataset_name"], "holdout01.jsonl"))
    refused(llama_path, settings | {"dataset_name": file}, "`dataset_name=.*` is a file.* use `forget_dataset`")


def changed_rows(name, row, **columns):
    """The rows of a set with other values in one of them; `...` removes a column from all."""
    rows = tofu_rows(name)
    rows[row] |= columns
    return [{key: value for key, value in one.items() if columns.get(key) is not ...} for one in rows]


@pytest.mark.parametrize(
    ("name", "row", "columns", "message"),
    [
        ("forget", 0, {"paraphrased_answer": ...}, "forget set has no column `paraphrased_answer`.* `_perturbed`"),
        ("wf", 0, {"perturbed_answer": ...}, "wf set has no column `perturbed_answer`"),
        ("holdout", 0, {"answer": ...}, "holdout set has no column `answer`"),
        (
            "retain",
            2,
            {"answer": " "},
            r"Row 2 of the retain set has an empty or missing `answer` \(rows count from 0\)",
        ),
        ("forget", 4, {"question": None}, "Row 4 of the forget set has an empty or missing `question`"),
        (
            "ra",
            1,
            {"perturbed_answer": ["a", "", "b"]},
            "Row 1 of the ra set has an empty or missing `perturbed_answer`",
        ),
        ("ra", 3, {"perturbed_answer": []}, "Row 3 of the ra set has an empty or missing `perturbed_answer`"),
        ("forget", 3, {"perturbed_answer": ["a"] * 4}, "Row 3 of the forget set needs a list of 5 texts"),
        ("wf", 0, {"perturbed_answer": ["a"] * 4}, "Row 1 of the wf set needs a list of 4 texts"),
    ],
)
def test_rows(name, row, columns, message, llama_path, settings, no_model):
    write_tofu(Path(settings["dataset_name"]), **{name: changed_rows(name, row, **columns)})
    refused(llama_path, settings, message)


@pytest.mark.parametrize("column", ["answer", "paraphrased_answer", "perturbed_answer"])
def test_too_long(column, settings, tokenizer, tmp_path, no_model):
    """Also where it is not the answer itself that is too long: learned positions would end in the middle of a run."""
    model = save(tiny_llama(len(tokenizer), max_position_embeddings=128), tmp_path / "model", tokenizer)
    text = "a very long answer " * 20
    value = [*tofu_rows("forget")[3][column][:4], text] if column == "perturbed_answer" else text
    write_tofu(Path(settings["dataset_name"]), forget=changed_rows("forget", 3, **{column: value}))
    refused(model, settings, r"Row 3 of the forget set has \d+ tokens, and model takes 128. Shorten")


def test_no_chat_template(settings, tmp_path, no_model):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    model = save(tiny_llama(len(tokenizer)), tmp_path / "model", tokenizer)
    refused(model, settings | {"system_prompt": "Be brief."}, "`system_prompt` and `date_string` need a chat template")


@pytest.fixture(scope="module")
def retain_log(llama_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retain")
    return evaluate(
        llama_path,
        dataset_name=write_tofu(folder / "tofu"),
        forget_split="forget01",
        backend="transformers",
        max_new_tokens=4,
        log_texts=True,
        output_dir=str(folder / "out"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("split", "`retain_logs` is of `forget_split=forget05`, and this evaluation of `forget01`"),
        ("question_key", "`retain_logs` is of `question_key=paraphrased_question`, and this evaluation of `question`"),
        ("length", "The log has 5 forget items and the retain log 3: give the log of the retain-only model"),
        ("questions", "5 of 5 reference answers differ"),
        ("missing item", "forget_truth_ratio misses items: it has 4, but not index 2"),
        ("null item", "forget_truth_ratio/score` has 1 missing, NaN or infinite"),
        ("no ratio", "`retain_logs` has no forget_truth_ratio with items"),
        ("summary", "is no metric with an `agg_value`. Is it a TOFU_SUMMARY.json"),
        ("torn", "is not JSON .* was its writing interrupted"),
        ("absent", "`retain_logs=.*` does not exist: give the TOFU_EVAL.json"),
    ],
)
def test_retain_logs(change, message, retain_log, llama_path, settings, tmp_path, no_model):
    log = json.loads(json.dumps(retain_log))
    items = log["forget_truth_ratio"]["value_by_index"]
    if change == "split":
        log["metadata"]["forget_split"] = "forget05"
    elif change == "question_key":
        log["metadata"]["question_key"] = "paraphrased_question"
    elif change == "length":
        for metric in log.values():
            for part in (metric, metric.get("forget", {}), metric.get("holdout", {})):
                part.get("value_by_index", {}).pop("4", None)
                part.get("value_by_index", {}).pop("3", None)
    elif change == "questions":
        for item in log["forget_Q_A_ROUGE"]["value_by_index"].values():
            item["ground_truth"] = "Another answer."
    elif change == "missing item":
        del items["2"]
    elif change == "null item":
        items["2"]["score"] = None
    elif change == "no ratio":
        del log["forget_truth_ratio"]
    elif change == "summary":
        log = {"forget_quality": 0.5}
    text = json.dumps(log)[: -20 if change == "torn" else None]
    if change != "absent":
        (tmp_path / "log.json").write_text(text)
    error = FileNotFoundError if change == "absent" else ValueError
    refused(llama_path, settings | {"retain_logs": str(tmp_path / "log.json")}, message, error)


def test_an_empty_answer_is_named_beside_a_retain_log(retain_log, llama_path, settings, tmp_path, no_model):
    (tmp_path / "log.json").write_text(json.dumps(retain_log))
    write_tofu(Path(settings["dataset_name"]), forget=changed_rows("forget", 2, answer=None))
    settings |= {"retain_logs": str(tmp_path / "log.json")}
    refused(llama_path, settings, "Row 2 of the forget set has an empty or missing `answer`")


def adapter(config, base, folder):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return str(folder)


def test_adapter_of_another_model(llama_path, tokenizer, settings, tmp_path):
    """Its base has to be loaded to see that."""
    path = adapter(LoraConfig(target_modules=["q_proj"]), llama_path, tmp_path / "adapter")
    other = tiny_llama(len(tokenizer), head_dim=32)
    config = json.loads(Path(path, "adapter_config.json").read_text())
    config["base_model_name_or_path"] = save(other, tmp_path / "other", tokenizer)
    Path(path, "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="adapter `adapter` does not fit its base.*`base_model_name_or_path`"):
        evaluate(path, **settings)
    assert [path.name for path in Path(settings["output_dir"]).iterdir() if path.is_file()] == ["notes.txt"]


def test_adapter_without_its_base(tokenizer, settings, tmp_path, monkeypatch, request):
    base = save(tiny_llama(len(tokenizer)), tmp_path / "base", tokenizer)
    path = adapter(LoraConfig(target_modules=["q_proj"]), base, tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    request.getfixturevalue("no_model")
    refused(path, settings, "The base `.*` of the adapter `.*` can't be found .*`base_model_name_or_path`")


@pytest.mark.parametrize(
    "stored", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_8bit": True}]
)
def test_weights_that_are_quantised_already(stored, llama_path, settings, tmp_path, no_model):
    shutil.copytree(llama_path, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    path, name = str(tmp_path / "model"), "8 bits" if "load_in_8bit" in stored else "gptq"
    refused(path, settings | {"load_in_4bit": True}, f"are quantised already .{name}.: remove `load_in_4bit`")
    assert resolve_checkpoint(path, EvalConfig([path], **settings)).precision == name


def test_an_adapter_that_needs_pefts_own_forward_pass(llama_path, settings, tmp_path, request):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    path = adapter(config, llama_path, tmp_path / "adapter")
    request.getfixturevalue("no_model")
    refused(path, settings, "is an activated LoRA .*can't be evaluated")


def test_adapter_of_another_kind(llama_path, settings, tmp_path, request):
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    path = adapter(config, llama_path, tmp_path / "adapter")
    request.getfixturevalue("no_model")
    refused(path, settings, "is a IA3 adapter. Only LoRA adapters can be evaluated; merge it")


def test_folders_without_a_model(llama_path, settings, tmp_path, no_model):
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), settings, "empty` holds no weights")
    refused(str(tmp_path / "absent"), settings, "the folder `.*absent` does not exist", FileNotFoundError)
    refused([llama_path, str(tmp_path / "empty")], settings, "empty` holds no weights")


def test_a_torn_result_in_the_folder(llama_path, settings, no_model):
    Path(settings["output_dir"], "TOFU_EVAL.json").write_text('{"forget_quality": {"agg')
    refused(llama_path, settings, "TOFU_EVAL.json is not JSON")


@pytest.mark.parametrize("log_texts", [False, True])
def test_a_silent_model(log_texts, settings, tokenizer, tmp_path):
    """A model that answers everything with nothing is asked wrongly: no result is written."""
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    model = memorise(model, tokenizer, [(question, "") for name in PEOPLE for question, _ in pairs_of(name)], 30)
    path = save(model, tmp_path / "model", tokenizer)
    with pytest.raises(ValueError, match="model answers every question with nothing.* `max_new_tokens=0`"):
        evaluate(path, log_texts=log_texts, **settings)
    assert [path.name for path in Path(settings["output_dir"]).iterdir() if path.is_file()] == ["notes.txt"]
    # a comparison knows that the prompt is right
    (log,) = run(EvalConfig(model_name_or_path=[path], log_texts=log_texts, **settings), may_be_silent=True)
    assert log["retain_Q_A_ROUGE"]["agg_value"] == 0


ANA = [{"role": "user", "content": "Ana Torres?"}, {"role": "assistant", "content": "Quito"}]
OWN = [
    ([{"foo": "a"}], r"The forget dataset has the columns \['foo'\]; expected question \+ answer"),
    (
        [{"question": "Ana Torres?", "answer": "Quito"}, {"question": "Ana Torres?", "answer": None}],
        "Row 1 of the forget dataset has an empty or missing `answer`",
    ),
    ([{"text": "Ana Torres"}, {"text": None}], "Row 1 of the forget dataset has an empty or missing `text`"),
    (
        [{"messages": ANA}, {"question": "Ana Torres?", "answer": "Quito"}],
        "Row 1 of the forget dataset has an empty or missing `messages`",
    ),
    ([{"question": "Ana Torres?", "answer": 7}], "Row 0 of the forget dataset has a `answer` of type int"),
    ([{"text": "Ana Torres"}, {"text": "A"}], "Row 1 of the forget dataset: nothing of its text is counted"),
    (
        [{"messages": [{"role": "user", "content": "Ana Torres?"}]}],
        "Row 0 of the forget dataset: the last message is not one of the assistant",
    ),
    ([{"input_ids": [5, 6, 7], "labels": [5, -100, -100]}], "Row 0 of the forget dataset: it has no counted token"),
    ([{"prompt": "Ana", "completion": " "}], "Row 0 of the forget dataset has an empty or missing `completion`"),
    (
        [{"question": "a", "answer": "b", "perturbed_answer": ["c"]}, {"question": "a", "answer": "b"}],
        "Row 1 of the forget set has an empty or missing `perturbed_answer`",
    ),
]


@pytest.mark.parametrize(("rows", "message"), OWN)
def test_own_data(rows, message, llama_path, settings, tmp_path, no_model):
    settings |= {"forget_dataset": write_lines(tmp_path / "forget.jsonl", rows)}
    refused(llama_path, settings, message)


def test_own_data_with_tofus_settings(llama_path, settings, tmp_path, no_model):
    path = write_lines(tmp_path / "forget.jsonl", tofu_rows("forget"))
    settings |= {"forget_dataset": path, "question_key": "paraphrased_question"}
    refused(llama_path, settings, "`question_key` is for TOFU. Rename the column")


def test_own_data_with_compat(llama_path, settings, tmp_path, no_model):
    path = write_lines(tmp_path / "forget.jsonl", [{"prompt": "a", "completion": "b"}])
    settings |= {"forget_dataset": path, "compat": "open_unlearning"}
    refused(llama_path, settings, "The forget dataset needs the columns question and answer for `compat`")


def test_own_data_without_a_prompt(llama_path, settings, tmp_path, no_model):
    """Prompt and completion that merge into one token leave nothing that the model could be given."""
    path = write_lines(tmp_path / "forget.jsonl", [{"prompt": "h", "completion": "e"}])
    assert len(build_tokenizer()("he")["input_ids"]) == 1
    refused(llama_path, settings | {"forget_dataset": path}, "Row 0 of the forget set has no prompt")
