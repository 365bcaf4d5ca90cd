# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: one set of samples and settings for every trainer, memory readings, and the output."""

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "trl-rkld")
CSV_COLUMNS = ("date", "benchmark", "setting", "quantity", "value", "device", "threads", "versions", "settings")
MODES = ("full", "lora", "qlora")


# ---- Training runs ----


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmarks that train."""
    parser.add_argument("--model", required=True, help="folder or Hub id of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--tofu",
        type=Path,
        default=REPOSITORY.parent / "shared" / "data" / "tofu",
        help="folder with TOFU's forget05.jsonl; where it is absent, the embedded demo records serve",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and compute")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--csv", type=Path, help="CSV file to append to")


def load_samples(model: str, tofu: Path, num_rows: int):
    """The first rows of forget05 as ids and labels, tokenised once for every trainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from trl_rkld.data import load_records, tokenize_row
    from unlearn_eval.prompts import Template

    path = tofu / "forget05.jsonl"
    if not path.is_file():
        path = REPOSITORY / "trl_rkld" / "data_files" / "demo_forget.jsonl"
    records = load_records(str(path))
    if len(records) < num_rows:
        raise ValueError(f"`{path}` has {len(records)} records and {num_rows} are needed. Ask for fewer.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Dataset.from_list([tokenize_row(records[row], tokenizer, Template()) for row in range(num_rows)])


def training_facts(args: argparse.Namespace, samples) -> dict[str, Any]:
    """What the run trains on, and how. Tokens are means per optimizer step."""
    steps = len(samples) / args.batch_size
    lengths = [len(ids) for ids in samples["input_ids"]]
    batches = [lengths[start : start + args.batch_size] for start in range(0, len(lengths), args.batch_size)]
    return {
        "model": args.model,
        "dtype": args.dtype,
        "gradient_checkpointing": args.gradient_checkpointing,
        "batch_size": args.batch_size,
        "counted_tokens": round(sum(label != -100 for labels in samples["labels"] for label in labels) / steps, 1),
        "total_tokens": round(sum(lengths) / steps, 1),
        "positions_with_padding": round(sum(len(batch) * max(batch) for batch in batches) / steps, 1),
    }


def make_trainer(trainer_class, mode: str, args: argparse.Namespace, samples, folder: Path, epochs: float, **settings):
    """
    A trainer of any class, with the same settings for all: same order of the samples, nothing logged or saved.

    Args:
        trainer_class (`type`):
            [`~trl.SFTTrainer`], [`RKLDTrainer`] or a subclass.
        mode (`str`):
            `"full"`, `"lora"` or `"qlora"`.
        args (`argparse.Namespace`):
            Of [`add_training_arguments`].
        samples ([`~datasets.Dataset`]):
            Of [`load_samples`].
        folder (`Path`):
            Empty folder for what the trainer writes.
        epochs (`float`):
            Epochs of `train()`.
        settings:
            Further fields of the config; `augmented_model` goes to the trainer.

    Returns:
        [`~trl.SFTTrainer`]:
            The trainer.
    """
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PrinterCallback
    from trl import SFTConfig

    from trl_rkld import RKLDConfig, RKLDTrainer

    arguments = {}
    if "augmented_model" in settings:
        arguments["augmented_model"] = settings.pop("augmented_model")
    if mode != "full":
        arguments["peft_config"] = LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    if mode == "qlora":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, args.dtype)
        )
    config_class = SFTConfig
    if issubclass(trainer_class, RKLDTrainer):
        config_class = RKLDConfig
        settings["teacher_cache_dir"] = str(folder / "teacher")
    config = config_class(
        output_dir=str(folder / "output"),
        model_init_kwargs={"dtype": args.dtype},
        use_cpu=not torch.cuda.is_available(),
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=args.gradient_checkpointing,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        num_train_epochs=epochs,
        learning_rate=1e-5,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = trainer_class(model=args.model, args=config, train_dataset=samples, **arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- Memory ----

# glibc keeps freed blocks for later, and the resident memory with them. So it gives back each of 64 KiB and more.
RETURN_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def output_of_own_process(command: list[str]) -> Any:
    """Run a Python program whose freed memory returns to the system, and parse the JSON on the last line of its output."""
    environment = os.environ | RETURN_FREED_MEMORY
    output = subprocess.run([sys.executable, *command], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def reset_peak_memory() -> int:
    """Start a new peak, and return the bytes held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    return peak_memory()


def peak_memory() -> int:
    """Most bytes held since the start or the last reset: allocated on the GPU, or else resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


# ---- Output ----


def device_name() -> str:
    """Name of the GPU or the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def machine_facts() -> dict[str, Any]:
    """Hardware, versions and date; the load average tells whether something else was running."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """Print aligned columns: text to the left, numbers to the right."""
    cells = [header, *([f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    is_text = [isinstance(cell, str) for cell in rows[0]]
    for row in cells:
        columns = zip(row, widths, is_text, strict=True)
        print("  ".join(cell.ljust(width) if text else cell.rjust(width) for cell, width, text in columns).rstrip())
    print()


def print_targets(result: dict[str, Any], targets: dict[str, tuple[str, float]]) -> None:
    """Print the ratios that have to hold, those that were measured."""
    rows = []
    for key, (relation, target) in targets.items():
        if key in result:
            holds = result[key] <= target if relation == "<=" else result[key] >= target
            rows.append([key, f"{result[key]:.4f}", f"{relation} {target:.4g}", "holds" if holds else "DOES NOT HOLD"])
    if rows:
        print_table(["ratio", "measured", "target", ""], rows)


def finish(
    benchmark: str,
    measured: list[tuple[str, str, float]],
    result: dict[str, Any],
    settings: dict[str, Any],
    facts: dict[str, Any],
    path: Path | None,
) -> None:
    """
    Append to the CSV file and print the JSON line.

    Args:
        benchmark (`str`):
            Name of the benchmark.
        measured (`list[tuple[str, str, float]]`):
            Setting, quantity and value of each row of the CSV.
        result (`dict`):
            What the JSON line says beside settings and facts: the ratios first.
        settings (`dict`):
            What was run.
        facts (`dict`):
            Of [`machine_facts`].
        path (`Path`, *optional*):
            CSV file.
    """
    if path is not None:
        is_new = not path.exists()
        common = {key: facts[key] for key in ("date", "device", "threads")} | {"benchmark": benchmark}
        common |= {"versions": json.dumps(facts["versions"]), "settings": json.dumps(settings)}
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            if is_new:
                writer.writeheader()
            for setting, quantity, value in measured:
                writer.writerow(common | {"setting": setting, "quantity": quantity, "value": value})
    print(json.dumps({"benchmark": benchmark} | result | settings | facts), flush=True)
