# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The command line: recipes parse, misspelt keys are errors, and the commands do what they say, in their own process."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FORGET, REFERENCE_LOGS, REPOSITORY, RETAIN
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from trl import ModelConfig, SFTConfig

from trl_rkld.cli import main
from trl_rkld.compare.arguments import parse
from trl_rkld.compare.config import TRAINED_COMMANDS
from trl_rkld.compare.plan import make_plan
from trl_rkld.data import tokenize_row
from trl_rkld.methods import METHODS
from trl_rkld.recipes_index import list_recipes, recipe_path
from trl_rkld.run_record import base_record, read_record, write_record
from trl_rkld.scripts import compare, unlearn
from trl_rkld.scripts.dry_run import _print_sample
from trl_rkld.scripts.loading import trainer_model_arguments
from unlearn_eval import EvalConfig
from unlearn_eval.prompts import Template


RECIPES = list_recipes()


def trl_rkld(*arguments, folder, **environment):
    """Run the command in a process of its own, as a user does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "eval"), *sys.path])
    command = [sys.executable, "-m", "trl_rkld.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def data(tmp_path):
    for name, pairs in (("forget", FORGET), ("keep", RETAIN)):
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def settings(model, folder):
    return {
        "model_name_or_path": str(model),
        "dataset_name": "forget.jsonl",
        "retain_dataset_name": "keep.jsonl",
        "output_dir": "output",
        "teacher_cache_dir": str(folder / "teacher"),
        "use_cpu": True,
        "bf16": False,
        "num_train_epochs": 1,
        "augmented_num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "save_strategy": "no",
    }


def write_config(folder, values):
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def command_of(name):
    """`config_<command>_<full|lora|qlora>` or `config_<command>`; where no command is named, `rkld`."""
    words = [word for word in Path(name).name.split("_")[1:] if word not in ("full", "lora", "qlora")]
    return "-".join(words) or "rkld"


@pytest.mark.parametrize("name", [name for name in RECIPES if "/config_" in name])
def test_every_recipe_parses(name):
    """With the script's own parser: a stale or misspelt key raises."""
    command, path = command_of(name), recipe_path(name)
    if command in METHODS:
        parser = unlearn.make_parser(command)
    else:
        parser = importlib.import_module(f"trl_rkld.scripts.{command.replace('-', '_')}").make_parser()
    # The machine may have no GPU; nothing else is overridden.
    script_args, training_args, model_args = parser.parse_args_and_config(
        ["--config", str(path), "--use_cpu", "true"], fail_with_unknown_args=True
    )
    assert training_args.output_dir
    assert model_args.model_name_or_path
    assert script_args.dataset_name
    assert f"trl-rkld {command} --config" in path.read_text()


@pytest.mark.parametrize("name", [name for name in RECIPES if "/config_" not in name])
def test_every_comparison_parses(name, llama_path):
    """And the settings of each of its jobs, with the parsers of the commands that do them."""
    path = recipe_path(name)
    ours = {"model_name_or_path": llama_path, "use_cpu": True}
    command_line = [text for key, value in ours.items() for text in (f"--{key}", str(value))]
    (parsed,) = compare.make_parser().parse_args_and_config(
        ["--config", str(path), *command_line], fail_with_unknown_args=True
    )
    jobs = make_plan(parsed)
    assert {job.kind for job in jobs} >= {"evaluate", "unlearn"}
    for job in jobs:
        command = "finetune" if job.kind == "finetune" else job.settings.get("command")
        if command == "finetune" or command in TRAINED_COMMANDS:
            parse(command, name, job.settings["arguments"], **ours, output_dir="output")
        if job.kind != "finetune":
            EvalConfig(
                model_name_or_path=[llama_path],
                output_dir="output",
                **job.settings["evaluation"],
                **job.options["evaluation"],
            )
    assert f"trl-rkld compare --config {name}" in path.read_text()


def test_recipes_are_there():
    assert {
        "deletion_request/config_qlora",
        "llama-2-7b-chat/tofu/config_rkld_full",
        "llama-3.2-1b-instruct/tofu/config_rkld_full",
        "llama-3.2-1b-instruct/tofu/config_dpo",
        "llama-3.2-1b-instruct/tofu/config_idk",
        "smollm2-135m/tofu/config_dpo",
        "smollm2-135m/tofu/config_finetune",
        "smollm2-135m/tofu/config_idk",
        "smollm2-135m/tofu/config_rkld_full",
        "smollm2-135m/tofu/config_rkld_lora",
        "smollm2-135m/tofu/config_rkld_qlora",
    } <= set(RECIPES)


def test_recipes_are_listed_and_copied(tmp_path, capsys):
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out.split() == RECIPES
    assert main(["recipes", "deletion_request/config_qlora", "--output_dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"config_qlora.yaml", "forget.jsonl", "keep.jsonl"}
    assert main(["recipes", "deletion_request/config_qlora", "--output_dir", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err
    (tmp_path / "config_qlora.yaml").unlink()
    assert main(["recipes", "deletion_request/config_qlora", "--output_dir", str(tmp_path)]) == 2
    assert not (tmp_path / "config_qlora.yaml").exists()  # half a recipe would be in the way of the next try
    assert main(["recipes", "nonsense"]) == 2


def test_help_and_unknown_command(capsys):
    assert main([]) == 0
    assert "rkld" in capsys.readouterr().out
    assert main(["rkdl"]) == 2
    assert "there is no command `rkdl`" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["alhpa", "num_processes"])
def test_unknown_key(key, tmp_path, capsys):
    """`num_processes` is accelerate's, and belongs on the command line: in a recipe it would be dropped or misread."""
    path = write_config(tmp_path, {"output_dir": "x", "use_cpu": True, key: 4})
    assert main(["rkld", "--config", str(path)]) == 2
    assert f"unknown key in the config file: `{key}`" in capsys.readouterr().err


def test_missing_files(tmp_path, capsys, llama_path):
    assert main(["rkld", "--config", str(tmp_path / "nothing.yaml")]) == 2
    assert "neither a file nor a recipe" in capsys.readouterr().err
    path = write_config(tmp_path, settings(llama_path, tmp_path))
    finished = trl_rkld("rkld", "--config", path, folder=tmp_path)
    assert finished.returncode != 0
    assert "`forget.jsonl` does not exist" in finished.stderr


def test_rkld_and_merge(data, llama_path):
    values = settings(llama_path, data) | {"use_peft": True, "lora_target_modules": "all-linear", "load_in_4bit": True}
    config = write_config(data, values)
    finished = trl_rkld("rkld", "--config", config, "--num_processes", 1, "--learning_rate", 0.02, folder=data)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "Mean probability of the forgotten answers" in finished.stdout
    record = read_record(data / "output")
    assert record["finished"]
    assert record["quantization"]["load_in_4bit"]
    assert "`learning_rate` | 0.02" in (data / "output/README.md").read_text()
    for stream in (finished.stdout, finished.stderr):
        assert not any(question in stream or answer in stream for question, answer in FORGET)
    finished = trl_rkld(
        "merge", "--model_name_or_path", "output", "--output_dir", "merged", "--dtype", "bfloat16", folder=data
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert AutoModelForCausalLM.from_pretrained(data / "merged").dtype == torch.bfloat16


def test_adapter_as_model(data, llama_path, tokenizer):
    """An adapter folder is loaded on its base and trained on; a second adapter on top is refused."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_path), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(data / "adapter")
    config = write_config(data, settings(data / "adapter", data))
    finished = trl_rkld("rkld", "--config", config, folder=data)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (data / "output/adapter_model.safetensors").is_file()
    finished = trl_rkld("rkld", "--config", config, "--use_peft", "true", folder=data)
    assert finished.returncode != 0
    assert "is an adapter, which is trained on" in finished.stderr


def test_dry_run(data, llama_path):
    values = settings(llama_path, data) | {"use_peft": True, "load_in_4bit": True, "lora_target_modules": "all-linear"}
    finished = trl_rkld("rkld", "--config", write_config(data, values), "--dry_run", "true", folder=data)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "Updates:   3, of 2 samples each" in finished.stdout
    assert "in all (rough)" in finished.stdout
    assert "shown on a terminal only" in finished.stdout
    assert not any(question in finished.stdout for question, _ in FORGET)
    assert not any((data / "output").iterdir())  # the Trainer makes the folder, and nothing goes into it


def test_the_sample_on_a_terminal(tokenizer, monkeypatch, capsys):
    """In brackets stand the tokens that are counted, and no others."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample = tokenize_row({"question": FORGET[0][0], "answer": FORGET[0][1]}, tokenizer, Template())
    _print_sample(sample, tokenizer)
    shown = capsys.readouterr().out
    counted = "".join(re.findall(r"\033\[1m\[(.*?)\]\033\[0m", shown, re.DOTALL))
    assert counted == FORGET[0][1] + tokenizer.eos_token
    assert FORGET[0][0] in shown


def test_dry_run_counts_the_memory(data, tokenizer):
    """Heads of the teacher where a method keeps some: two for RKLD, none for GradDiff, one for its KL."""
    sizes = {"vocab_size": 100_000, "hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaConfig(**sizes, num_attention_heads=8).save_pretrained(data / "big")  # without weights
    tokenizer.save_pretrained(data / "big")
    for command, change, heads in (
        ("rkld", {}, 2),
        ("grad-diff", {}, 0),
        ("grad-diff", {"retain_loss_type": "kl"}, 1),
    ):
        values = settings(data / "big", data) | change
        if command != "rkld":
            del values["augmented_num_train_epochs"]
        finished = trl_rkld(command, "--config", write_config(data, values), "--dry_run", "true", folder=data)
        assert finished.returncode == 0, finished.stderr[-3000:]
        (shown,) = re.findall(r"frozen heads of the teacher +(\S+) GB", finished.stdout)
        assert float(shown) == pytest.approx(heads * 0.4096, abs=0.0051)


def test_dry_run_of_an_adapter_counts_its_base_as_that_was_held(data, tokenizer):
    sizes = {"vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 1}
    LlamaConfig(**sizes, num_attention_heads=8).save_pretrained(data / "big")  # 29.4 million in its layers, 2 outside
    tokenizer.save_pretrained(data / "adapter")
    lora = LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(data / "big"), task_type="CAUSAL_LM")
    config = write_config(data, settings(data / "adapter", data))
    for initialised, quantization, expected in ((True, None, 0.126), ("olora", {"load_in_4bit": True}, 0.025)):
        lora.init_lora_weights = initialised  # of no matter: the weights are there
        lora.save_pretrained(data / "adapter")
        write_record(data / "adapter", {"quantization": quantization})
        finished = trl_rkld("rkld", "--config", config, "--dry_run", "true", folder=data)
        assert finished.returncode == 0, finished.stderr[-3000:]
        (shown,) = re.findall(r"weights +(\S+) GB", finished.stdout)
        assert float(shown) == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"load_in_8bit": True}, "`load_in_8bit` is not supported"), ({"load_in_4bit": True}, "Set `use_peft`")],
)
def test_dry_run_checks_the_model_arguments(change, message, data, llama_path):
    config = write_config(data, settings(llama_path, data) | change)
    finished = trl_rkld("rkld", "--config", config, "--dry_run", "true", folder=data)
    assert finished.returncode != 0
    assert message in finished.stderr


def test_dry_run_looks_for_the_augmented_model(data, llama_path):
    config = write_config(data, settings(llama_path, data) | {"augmented_model_name_or_path": str(data / "misspelt")})
    finished = trl_rkld("rkld", "--config", config, "--dry_run", "true", folder=data)
    assert finished.returncode != 0
    assert "misspelt" in finished.stderr


def test_an_adapter_goes_on_with_its_base(llama_path, tokenizer, tmp_path):
    """Revision and quantisation of the base are those that the adapter was made for, and stand in the next one."""
    config = LoraConfig(target_modules=["q_proj"], revision="v1")
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama_path), config).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    record = {"dtype": "bfloat16", "quantization": quantization.to_dict()}
    write_record(tmp_path, record)
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    model = trainer_model_arguments(ModelConfig(model_name_or_path=str(tmp_path)), args)["model"]
    saved = base_record(model)
    assert (model.active_peft_config.revision, saved["dtype"]) == ("v1", "bfloat16")
    assert saved["quantization"]["bnb_4bit_use_double_quant"]


def test_dry_run_checks_the_data(data, llama_path):
    config = write_config(data, settings(llama_path, data) | {"max_length": 8})
    finished = trl_rkld("rkld", "--config", config, "--dry_run", "true", folder=data)
    assert finished.returncode != 0
    assert "`max_length=8` would cut" in finished.stderr


@pytest.mark.parametrize("adapter", [{}, {"use_peft": True, "load_in_4bit": True, "dtype": "float32"}])
def test_finetune(adapter, data, llama_path):
    values = settings(llama_path, data) | {"max_retain_samples": 2} | adapter
    del values["augmented_num_train_epochs"], values["teacher_cache_dir"]
    finished = trl_rkld("finetune", "--config", write_config(data, values), folder=data)
    assert finished.returncode == 0, finished.stderr[-3000:]
    record = read_record(data / "output")
    if adapter:  # it is merged and evaluated on the base as it was held
        assert (data / "output/adapter_model.safetensors").is_file()
        assert (record["quantization"]["bnb_4bit_quant_type"], record["dtype"]) == ("nf4", "float32")
    else:
        assert (data / "output/model.safetensors").is_file()
        assert record["quantization"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_name": "texts.jsonl"}, "forget dataset holds texts or tokens"),
        ({"dataset_name": "other.jsonl"}, r"forget dataset has the columns ['foo']"),
        ({"eval_dataset_name": "keep.jsonl"}, "unknown key in the config file: `eval_dataset_name`"),
        ({"max_retain_samples": 0}, "`max_retain_samples=0` must be positive"),
        ({"dataset_streaming": True}, "`dataset_streaming` is for Python only"),
        ({"chat_template_path": "x.jinja"}, "`chat_template_path` is not supported here"),
        (
            {"retain_dataset_name": None, "max_retain_samples": 2},
            "`max_retain_samples` is set, and no `retain_dataset_name`",
        ),
    ],
)
def test_finetune_refuses(change, message, data, llama_path):
    (data / "texts.jsonl").write_text('{"text": "a b c"}\n')
    (data / "other.jsonl").write_text('{"foo": "a b c"}\n')
    values = settings(llama_path, data) | change
    del values["augmented_num_train_epochs"], values["teacher_cache_dir"]
    finished = trl_rkld("finetune", "--config", write_config(data, values), folder=data)
    assert finished.returncode != 0
    assert message in finished.stderr + finished.stdout


@pytest.mark.parametrize("command", ["idk", "dpo"])
def test_refusals(command, data, llama_path):
    (data / "refusals.txt").write_text("I don't know.\nI'm not sure.\n")
    values = settings(llama_path, data) | {"refusals_path": "refusals.txt"}
    del values["augmented_num_train_epochs"], values["teacher_cache_dir"]
    if command == "dpo":
        del values["retain_dataset_name"]
    finished = trl_rkld(command, "--config", write_config(data, values), folder=data)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (data / "output/model.safetensors").is_file()
    for stream in (finished.stdout, finished.stderr):
        assert not any(question in stream or answer in stream for question, answer in FORGET)


def test_import_is_light():
    code = (
        "import sys, trl_rkld, unlearn_eval, trl_rkld.cli\n"
        "heavy = {'vllm', 'bitsandbytes', 'matplotlib', 'rouge_score', 'torch', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "eval"), *sys.path])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, check=True)


def test_the_harness_never_imports_the_plugin():
    for path in (REPOSITORY / "eval" / "unlearn_eval").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) trl_rkld", path.read_text(), re.MULTILINE), path


def test_rescore(tmp_path, capsys):
    if not REFERENCE_LOGS.is_dir():
        pytest.skip(f"no published logs in {REFERENCE_LOGS}")
    names = [REFERENCE_LOGS / f"Llama-3.2-1B-Instruct_{kind}_TOFU_EVAL.json" for kind in ("full_forget01", "retain99")]
    arguments = ["--eval_logs", str(names[0]), "--retain_logs", str(names[1]), "--output_dir", str(tmp_path)]
    assert main(["rescore", *arguments]) == 0
    assert "forget_quality" in capsys.readouterr().out
    rescored = json.loads((tmp_path / "RESCORED.json").read_text())
    assert rescored["max_deviation"] < 1e-9
    assert rescored["forget_quality"]["p"] == pytest.approx(0.006760732303569208, abs=1e-12)
    assert main(["rescore", "--eval_logs", str(tmp_path / "nothing.json")]) == 2
    assert "nothing.json" in capsys.readouterr().err


def test_misspelt_flag(data, llama_path):
    """Not completed to `--learning_rate`, as argparse would by itself."""
    config = write_config(data, settings(llama_path, data))
    finished = trl_rkld("rkld", "--config", config, "--learning_rat", "3", folder=data)
    assert finished.returncode != 0
    assert "learning_rat" in finished.stderr
    assert not (data / "output").exists()
