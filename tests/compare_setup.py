# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""A comparison of two methods that takes seconds to train: its data and settings, its command, and what it leaves."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from conftest import REPOSITORY, build_tokenizer, tiny_llama
from tofu_like import pairs_of, save, write_lines, write_tofu

from trl_rkld.compare.config import CompareConfig
from trl_rkld.compare.plan import make_plan


RUNS = [{"command": "rkld", "setting": "+RT", "retain": "nll", "alpha": 8.0}, {"command": "npo", "retain": "kl"}]
RKLD, NPO = "forget01-rkld-rt-seed1", "forget01-npo-seed1"


def write_data(folder):
    """A model, TOFU's files for the evaluation, and those for training."""
    write_tofu(folder / "tofu")
    questions = {name: [{"question": q, "answer": a} for q, a in pairs_of(name)] for name in ("forget", "retain")}
    write_lines(folder / "tofu" / "forget01.jsonl", questions["forget"])
    write_lines(folder / "tofu" / "full.jsonl", questions["retain"] + questions["forget"])
    tokenizer = build_tokenizer()
    save(tiny_llama(len(tokenizer), tie_word_embeddings=True), folder / "base", tokenizer)
    return folder


def settings(data, output_dir, **changed):
    """Settings of a comparison that takes seconds."""
    return {
        "model_name_or_path": str(data / "base"),
        "dataset_name": str(data / "tofu"),
        "output_dir": str(output_dir),
        "splits": ["forget01"],
        "seeds": [1],
        "max_retain_samples": 5,
        "use_cpu": True,
        "finetune": {
            "learning_rate": 1e-2,
            "num_train_epochs": 12,
            "per_device_train_batch_size": 5,
            "bf16": False,
            "dtype": "float32",
        },
        "augment": {"num_train_epochs": 4},
        "common": {
            "learning_rate": 1e-2,
            "num_train_epochs": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "bf16": False,
            "dtype": "float32",
        },
        "evaluation": {"backend": "transformers", "max_new_tokens": 6, "dtype": "float32"},
        "epoch_retain_samples": 5,
        "runs": RUNS,
    } | changed


def write_config(folder, values):
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def plan_of(data, folder, **changed):
    return make_plan(CompareConfig(**settings(data, folder, **changed)))


def compare(config, *arguments, **environment):
    """Run the command in a process of its own, as a user does."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    paths = [environment.pop("FIRST_PATH", None), str(REPOSITORY), str(REPOSITORY / "eval"), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "trl_rkld.cli", "compare", "--config", str(config), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)


def read_rows(path):
    """The CSV with its fields as text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_log(*parts):
    return json.loads(Path(*parts, "TOFU_EVAL.json").read_text())


def snapshot(folder, *patterns):
    """Bytes and time of files."""
    paths = [path for pattern in patterns or ("*",) for path in folder.rglob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def everything_below(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def is_alive(pid):
    """Whether a process is there, and not only waiting to be reaped."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def weights_below(folder):
    """Folders of models."""
    return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("*.safetensors"))


@dataclass
class Finished:
    """A comparison that has run."""

    data: Path
    config: Path
    folder: Path
    process: subprocess.CompletedProcess
    weights: list[str]

    @property
    def printed(self):
        return self.process.stdout + self.process.stderr
