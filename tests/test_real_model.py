# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The main job on real input: SmolLM2-135M forgets TOFU questions it knows by heart, whole and as 4-bit QLoRA."""

import os

import pytest
import torch
from conftest import REPOSITORY, TOFU
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from trl_rkld import RKLDConfig, RKLDTrainer
from trl_rkld.data import load_records
from unlearn_eval.prompts import Template


pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sets():
    """Four questions to forget and four to keep: of TOFU where it is, else of the demo's invented people."""
    if TOFU.is_dir():
        files = TOFU / "forget01.jsonl", TOFU / "full.jsonl"
    else:
        folder = REPOSITORY / "trl_rkld" / "data_files"
        files = folder / "demo_forget.jsonl", folder / "demo_retain.jsonl"
    return tuple(load_records(str(file)).select(range(4)) for file in files)


@pytest.fixture(scope="module")
def target(smollm2, sets, tmp_path_factory):
    """SmolLM2, fine-tuned until it knows the four questions to forget and the four to keep."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    samples = []
    for row in (row for dataset in sets for row in dataset):
        prompt_ids, answer_ids = Template().tokenize(tokenizer, row["question"], row["answer"])
        samples.append({"input_ids": prompt_ids + answer_ids, "labels": [-100] * len(prompt_ids) + answer_ids})
    folder = tmp_path_factory.mktemp("target")
    args = SFTConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        num_train_epochs=10,
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(smollm2, args=args, train_dataset=Dataset.from_list(samples), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return str(folder)


@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_forgets_tofu(kind, target, sets, tmp_path):
    forget, retain = sets
    args = RKLDConfig(
        str(tmp_path / "output"),
        teacher_cache_dir=str(tmp_path / "teacher"),
        use_cpu=True,
        bf16=False,
        learning_rate=1e-4 if kind == "full" else 1e-3,
        augmented_learning_rate=1e-4 if kind == "full" else 5e-4,
        num_train_epochs=6,
        augmented_num_train_epochs=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    arguments = {}
    if kind == "qlora":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        arguments["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trainer = RKLDTrainer(target, args=args, train_dataset=forget, retain_dataset=retain, **arguments)
    metrics = trainer.train().metrics
    print({key: round(value, 3) for key, value in metrics.items() if "_prob_" in key})
    assert metrics["forget_prob_before"] > 0.5
    assert metrics["forget_prob_after"] < 0.5 * metrics["forget_prob_before"]
    assert metrics["retain_prob_after"] > 0.8 * metrics["retain_prob_before"]
