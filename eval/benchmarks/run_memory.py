# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Peak memory of a whole run, from loading the model to the end of `train()`: RKLD with the cached teacher against plain
fine-tuning with TRL's `SFTTrainer`.

    python eval/benchmarks/run_memory.py --model .cache/smollm2-135m-instruct

Same model, samples and settings for both, a process of its own for each run. RKLD's holds augmented training, caching and
distillation. On the CPU the peak is the high-water mark of the process's resident memory (VmHWM): Python and its imports
are in it, for both, and so are files mapped into memory. glibc is told to give freed blocks back to the system
(`MALLOC_ARENA_MAX`, `MALLOC_MMAP_THRESHOLD_`): left to itself it holds hundreds of megabytes of them, more or fewer by
chance, and that is not what a run needs. On CUDA the peak is `torch.cuda.max_memory_allocated`. float32 and no gradient
checkpointing unless asked for.

Keys of the JSON line:
    full_over_sft, lora_over_sft, qlora_over_sft   peak of RKLD over that of SFT
    peak_mb       of each run: `imports` before anything is loaded; `preparation` until the first step (for RKLD with the
                  augmented training), `training` from there on, `run` the larger of the two, which makes the ratio
    counted_tokens, total_tokens, positions_with_padding   of a step's batch, on average
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import (
    MODES,
    RETURN_FREED_MEMORY,
    add_training_arguments,
    finish,
    load_samples,
    machine_facts,
    make_trainer,
    output_of_own_process,
    peak_memory,
    print_table,
    print_targets,
    reset_peak_memory,
    training_facts,
)
from transformers import TrainerCallback
from trl import SFTTrainer

from trl_rkld import RKLDTrainer


METHODS = ("sft", "rkld")
TARGETS = {"full_over_sft": ("<=", 1.15), "qlora_over_sft": ("<=", 1.10)}


class PhasePeaks(TrainerCallback):
    """Notes the peak until training starts, and starts a new one."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.preparation = peak_memory()
        reset_peak_memory()


def measure(method: str, mode: str, args: argparse.Namespace) -> dict[str, int]:
    """Peak bytes of a run in this process, by phase."""
    samples = load_samples(args.model, args.tofu, args.rows)
    phases = PhasePeaks()
    imports = reset_peak_memory()
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        trainer_class, settings = SFTTrainer, {}
        if method == "rkld":
            trainer_class, settings = RKLDTrainer, {"augmented_num_train_epochs": args.epochs}
        trainer = make_trainer(trainer_class, mode, args, samples, Path(folder), epochs=args.epochs, **settings)
        trainer.add_callback(phases)
        trainer.train()
    training = peak_memory()
    return {
        "imports": imports,
        "preparation": phases.preparation,
        "training": training,
        "run": max(phases.preparation, training),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_training_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=2, help="of either training; the first steps reach the peak")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # method and mode, measured in this process
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.run is not None:
        print(json.dumps(measure(*args.run, args)))
        return
    facts = machine_facts()
    runs = [(method, mode) for mode in args.modes for method in METHODS]
    peaks = {}
    for method, mode in runs:
        print("measuring", mode, method, file=sys.stderr, flush=True)
        peaks[method, mode] = output_of_own_process([*sys.argv, "--run", method, mode])
    result = {
        f"{mode}_over_sft": round(peaks["rkld", mode]["run"] / peaks["sft", mode]["run"], 4) for mode in args.modes
    }
    megabytes = {
        f"{mode} {method}": {phase: round(size / 1e6, 1) for phase, size in peaks[method, mode].items()}
        for method, mode in runs
    }
    rows = [[mode, method, *megabytes[f"{mode} {method}"].values()] for method, mode in runs]
    print_table(["mode", "method", "MB after imports", "peak of preparation", "of training", "of the run"], rows)
    print_targets(result, TARGETS)
    settings = training_facts(args, load_samples(args.model, args.tofu, args.rows))
    settings |= {"rows": args.rows, "epochs": args.epochs}
    settings["malloc"] = None if torch.cuda.is_available() else RETURN_FREED_MEMORY
    quantities = [(name, f"{phase}_mb", size) for name, sizes in megabytes.items() for phase, size in sizes.items()]
    finish("run_memory", quantities, result | {"peak_mb": megabytes}, settings, facts, args.csv)


if __name__ == "__main__":
    main()
