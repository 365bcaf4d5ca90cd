# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Every method from outside: its command, its settings, its names, its documentation and its card."""

import dataclasses
import inspect
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FORGET, RETAIN, config, tiny_llama
from methods_setup import BASELINES, make
from safetensors.torch import load_file

import trl_rkld
from trl_rkld.cli import main
from trl_rkld.methods import METHODS, method_class
from trl_rkld.run_record import read_record


# ---- The command line ----


@pytest.fixture
def command(half_memorised, tmp_path, monkeypatch):
    """Runs `trl-rkld <method> --config` in a folder with data, as a user does: accelerate starts another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for name, pairs in (("forget", FORGET), ("keep", RETAIN)):
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    settings = {
        "model_name_or_path": half_memorised,
        "dataset_name": "forget.jsonl",
        "retain_dataset_name": "keep.jsonl",
        "output_dir": "output",
        "teacher_cache_dir": "teacher",
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.002,
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def run(method, *arguments, **change):
        Path("config.yaml").write_text(yaml.safe_dump(settings | change))
        return main([method, "--config", "config.yaml", *map(str, arguments)])

    return run


def test_npo_on_the_command_line(command, capfd):
    """Trains and saves; resumed from a checkpoint, ends in the same weights; the card names the method."""
    assert command("npo", beta=0.2) == 0
    record = read_record("output")
    assert (record["method"], record["finished"], record["settings"]["beta"]) == ("NPO", True, 0.2)
    card = Path("output/README.md").read_text()
    for part in ("2404.05868", "with NPO", "`beta` | 0.2", "zhang2024negative"):
        assert part in card, part
    weights = load_file("output/model.safetensors")
    for number in (4, 6):
        shutil.rmtree(f"output/checkpoint-{number}")
    Path("output/model.safetensors").unlink()
    assert command("npo", "--resume_from_checkpoint", "output", beta=0.2) == 0  # the whole one in it
    again = load_file("output/model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    output = "".join(capfd.readouterr())
    assert not any(question in output or answer in output for question, answer in FORGET)


@pytest.mark.parametrize("method", ["npo", "whp"])
def test_dry_run(method, command, capfd):
    assert command(method, "--dry_run", "true") == 0
    output = capfd.readouterr().out
    assert "Updates:   6, of 2 samples each" in output
    assert not any(Path("output").iterdir())


@pytest.mark.parametrize(
    ("method", "argument"),
    [("npo", "augmented_model_name_or_path"), ("undial", "alpha"), ("grad-diff", "beta"), ("simnpo", "label_penalty")],
)
def test_arguments_of_other_methods_are_unknown(method, argument, command, capfd):
    """In the config file, and on the command line, where accelerate must not take them either."""
    assert command(method, **{argument: 1}) == 2
    assert f"unknown key in the config file: `{argument}`" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        command(method, f"--{argument}", "x")
    assert argument in capfd.readouterr().err
    assert not Path("output").exists()


def test_an_augmented_model_may_be_given_to_whp(command, memorised, capfd):
    assert command("whp", "--augmented_model_name_or_path", memorised, max_steps=1) == 0
    assert read_record("output")["method"] == "WHP"


# ---- Bad input ----


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("npo", {"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ("npo", {"beta": -0.1}, "`beta` must be positive, got -0.1"),
        ("simnpo", {"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ("simnpo", {"beta": -1.0}, "`beta` must be positive, got -1.0"),
        ("undial", {"label_penalty": 0.0}, "`label_penalty` must be positive, got 0.0"),
        ("undial", {"label_penalty": -3.0}, "`label_penalty` must be positive, got -3.0"),
        ("whp", {"beta": 0.0}, "`beta` has no meaning for hard labels"),
        ("whp", {"alpha": -1.0}, "`alpha` must not be negative"),
        *((method, {"retain_coef": -1.0}, "`retain_coef` must not be negative") for method in BASELINES),
    ],
)
def test_settings(method, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, method_class(method, "Config"), **settings)


@pytest.mark.parametrize("method", ["grad-diff", "npo", "simnpo", "undial"])
def test_no_augmented_model_where_none_is_used(method, llama, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="augmented_model"):
        make(method, "full", llama, tokenizer, tmp_path, augmented_model=llama)
    with pytest.raises(TypeError, match="augmented_num_train_epochs"):
        config(tmp_path, method_class(method, "Config"), augmented_num_train_epochs=3)


def test_non_finite_reference(tokenizer, tmp_path):
    """Found while the reference is computed, before the first step, and not blamed on the training."""
    model = tiny_llama(len(tokenizer))
    trainer = make("npo", "full", model, tokenizer, tmp_path)

    def poison(module, inputs, output):
        return output * float("nan") if len(output) > 1 else output  # not in the check of the first sample

    model.model.norm.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match=r"teacher gives is not finite \(Original model's answers, rows"):
        trainer.train()
    assert not list((tmp_path / "teacher").rglob("*.safetensors"))


# ---- Names, documentation, cards ----


def test_every_method_is_exported():
    for method, (prefix, description) in METHODS.items():
        config_class, trainer_class = getattr(trl_rkld, f"{prefix}Config"), getattr(trl_rkld, f"{prefix}Trainer")
        assert trainer_class.config_class is config_class
        assert issubclass(trainer_class, trl_rkld.UnlearningTrainer)
        assert issubclass(config_class, trl_rkld.UnlearningConfig)
        assert trainer_class.__module__ == f"trl_rkld.trainer.{method.replace('-', '_')}_trainer"
        assert (trainer_class._name, trainer_class._tag_names) == (prefix, ["trl", method])
        assert description.startswith("unlearn by ")
        assert re.fullmatch(r"\d{4}\.\d{5}", trainer_class._paper["id"])
        for text in (trainer_class._paper["title"], f"arXiv:{trainer_class._paper['id']}"):
            assert text in trainer_class._paper["citation"]
        assert f"https://huggingface.co/papers/{trainer_class._paper['id']}" in trainer_class.__doc__
        assert "Configuration class for the" in config_class.__doc__
        assert {f"{prefix}Config", f"{prefix}Trainer"} <= set(trl_rkld.__all__)
    papers = [method_class(method, "Trainer")._paper["id"] for method in METHODS]
    assert len(set(papers)) == len(papers)


def test_all_is_complete():
    names = {"__version__"} | {
        f"{x}{kind}" for x in ("Unlearning", *(p for p, _ in METHODS.values())) for kind in KINDS
    }
    assert set(trl_rkld.__all__) == names
    assert len(trl_rkld.__all__) == len(names)
    assert all(getattr(trl_rkld, name) for name in trl_rkld.__all__)
    # What a type checker reads is what is loaded on demand
    checked = re.findall(r"from \.trainer\.\w+ import (\w+)", Path(trl_rkld.__file__).read_text())
    assert set(checked) == names - {"__version__"}
    with pytest.raises(AttributeError, match="NPO2Trainer"):
        trl_rkld.NPO2Trainer  # noqa: B018


KINDS = ("Config", "Trainer")


def plain(text):
    """Docstrings link classes and use double quotes; help texts can't, and need not."""
    text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\s+", " ", text.replace('"', "'")).strip()


@pytest.mark.parametrize("name", ["Unlearning", *(prefix for prefix, _ in METHODS.values())])
def test_help_is_the_docstring(name):
    config_class = getattr(trl_rkld, f"{name}Config")
    pattern = r"^ {8}(\w+) \((.*?)\):\n((?: {12}.*\n?)+)"
    documented = {field: (kind, text) for field, kind, text in re.findall(pattern, config_class.__doc__, re.MULTILINE)}
    own = vars(config_class).get("__annotations__", {})
    assert documented.keys() <= own.keys()
    assert bool(documented) == bool(own)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for field in own:
        if field not in documented:  # another default than TRL's, said in the note
            assert f"`{field}`: Defaults to" in config_class.__doc__, field
            continue
        kind, text = documented[field]
        assert plain(text) == plain(fields[field].metadata["help"]), field
        default = re.search(r"defaults to `(.*)`", kind)
        value = fields[field].default
        assert (default.group(1).strip('"') if default else "None") == str(value), field


@pytest.mark.parametrize("method", METHODS)
def test_the_card_names_the_method(method, llama, tokenizer, tmp_path):
    trainer = make(method, "full", llama, tokenizer, tmp_path, RETAIN, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "output" / "README.md").read_text()
    annotated = vars(method_class(method, "Config")).get("__annotations__", {})
    own = {"rkld": ["alpha", "beta"], "whp": ["alpha"]}.get(method, [*annotated])
    settings = {key: getattr(trainer.args, key) for key in [*own, "retain_coef", "retain_loss_type", "learning_rate"]}
    for part in (
        f"forget {len(FORGET)} records with {METHODS[method][0]} (",
        trainer._paper["title"],
        trainer._paper["id"],
        trainer._paper["citation"],
        *(f"| `{key}` | {value} |" for key, value in settings.items()),
    ):
        assert part in card, part
    assert ("| `beta`" in card) == ("beta" in own)
    assert re.search(rf"^- {method}$", card, re.MULTILINE)
    assert not any(question in card or answer in card for question, answer in FORGET + RETAIN)


def test_methods_differ_only_where_they_say():
    """A method overrides the loss, and what is counted and shown; never how data, saving or the retain loss work."""
    allowed = {"forget_losses", "count_forget_items", "method_settings"}
    for method in BASELINES:
        own = {name for name, _ in inspect.getmembers(method_class(method, "Trainer"), inspect.isfunction)}
        own &= vars(method_class(method, "Trainer")).keys()
        assert own <= allowed, method


def test_configuration_of_another_method(llama, tokenizer, forget_set, tmp_path):
    """Converted, an NPO configuration would give SimNPO a β of 0.1."""
    with pytest.raises(ValueError, match="`NPOConfig`.*Use `SimNPOConfig`"):
        method_class("simnpo", "Trainer")(
            llama,
            args=config(tmp_path, method_class("npo", "Config")),
            train_dataset=forget_set,
            processing_class=tokenizer,
        )
