# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Seconds per optimizer step, and of whole runs: RKLD against plain fine-tuning with TRL's `SFTTrainer`.

    python eval/benchmarks/step.py --model .cache/smollm2-135m-instruct

Same model, samples, order and settings for all, one process, float32 and no gradient checkpointing unless asked for:
    sft           TRL's `SFTTrainer`. Its fused head scores every position on the CPU, only the counted ones on CUDA.
    sft_counted   the same with only the counted tokens scored, by this project's `chunked_nll`: what TRL's trainer
                  could take on the CPU, and the harder comparison there.
    cached, live  `RKLDTrainer` with `precompute_teacher` on and off.

They take turns: in each round a fresh trainer of each runs the same `--steps` batches, after one more that warms it up and
does not count, so a machine that slows down hits all alike. A step lasts from the batch being there to the
optimizer's step being done (forward, backward, clipping, update), synchronised on CUDA. Ratios are medians over rounds.

A whole run is a `train()` call of a fresh trainer, loading the model left out: RKLD's holds augmented training, caching,
distillation and the probabilities before and after; SFT's as many epochs as either training.

Keys of the JSON line (full fine-tuning where no mode is named; the others as `<key>_lora`, `<key>_qlora`, `<key>_full`):
    cached_over_sft, cached_over_sft_counted    step, cached teacher, over plain SFT
    live_over_cached                            step, live over cached teacher, with LoRA
    whole_run_over_sft                          whole run, cached teacher, over plain SFT
    step_seconds, whole_run_seconds             medians
    counted_tokens, total_tokens, positions_with_padding
                                                of a step that counts, on average; `whole_run`: of the whole runs' steps
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import (
    MODES,
    add_training_arguments,
    finish,
    load_samples,
    machine_facts,
    make_trainer,
    print_table,
    print_targets,
    synchronize,
    training_facts,
)
from transformers import TrainerCallback
from trl import SFTTrainer

from trl_rkld import RKLDTrainer
from trl_rkld.losses import HeadInput, chunked_nll, lm_head_of
from trl_rkld.teacher.roles import counted_hidden_states, counted_labels
from unlearn_eval.models import without_peft


METHODS = ("sft", "sft_counted", "cached", "live")
RATIOS = {
    "cached_over_sft": ("cached", "sft"),
    "cached_over_sft_counted": ("cached", "sft_counted"),
    "live_over_cached": ("live", "cached"),
}
HEADLINE_MODES = {"live_over_cached": "lora"}  # the other keys stand for full fine-tuning
TARGETS = {
    "cached_over_sft": ("<=", 1.05),
    "live_over_cached": (">=", 1.5),
    "whole_run_over_sft": ("<=", 2.3),
}


class CountedSFTTrainer(SFTTrainer):
    """Plain fine-tuning that multiplies the head on the counted tokens only."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        unwrapped = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            hidden_states = counted_hidden_states(unwrapped, inputs)
        student = HeadInput(hidden_states, lm_head_of(without_peft(unwrapped)))
        return chunked_nll(student, counted_labels(inputs)).loss / num_items_in_batch


class StepTimer(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def time_steps(mode: str, args: argparse.Namespace, samples) -> dict[str, list[float]]:
    """Seconds per step of each method, one mean for each round."""
    seconds = {method: [] for method in METHODS}
    with scratch_folder() as folder:
        # Trained once, and given to every RKLD trainer.
        augmented = {"augmented_model": str(folder / "augmented")}
        making = {
            "augmented_output_dir": augmented["augmented_model"],
            "augmented_num_train_epochs": 1,
            "max_steps": 1,
        }
        make_trainer(RKLDTrainer, mode, args, samples, folder, epochs=1, **making).train()
        kinds = {
            "sft": (SFTTrainer, {}),
            "sft_counted": (CountedSFTTrainer, {}),
            "cached": (RKLDTrainer, augmented),
            "live": (RKLDTrainer, augmented | {"precompute_teacher": False}),
        }
        for round_ in range(args.rounds):
            for method, (trainer_class, settings) in kinds.items():
                steps = time_steps_of_run(trainer_class, mode, args, samples, settings)
                report(f"{mode}, round {round_}, {method}: {[round(step, 3) for step in steps]} s")
                seconds[method].append(mean(steps[1:]))
    return seconds


def time_steps_of_run(
    trainer_class: type[SFTTrainer], mode: str, args: argparse.Namespace, samples, settings: dict[str, Any]
) -> list[float]:
    with scratch_folder() as folder:
        trainer = make_trainer(trainer_class, mode, args, samples, folder, epochs=1, **settings)
        timer = StepTimer()
        trainer.add_callback(timer)
        trainer.train()
        return timer.seconds


def time_whole_runs(mode: str, args: argparse.Namespace, samples) -> dict[str, list[float]]:
    """Seconds of whole `train()` calls of fresh trainers, one for each round."""
    kinds = {
        "sft": (SFTTrainer, {}),
        "cached": (RKLDTrainer, {"augmented_num_train_epochs": args.whole_run_epochs}),
    }
    seconds = {method: [] for method in kinds}
    for round_ in range(args.whole_run_rounds):
        for method, (trainer_class, settings) in kinds.items():
            seconds[method].append(time_whole_run(trainer_class, mode, args, samples, settings))
            report(f"{mode}, whole run {round_}, {method}: {seconds[method][-1]:.1f} s")
    return seconds


def time_whole_run(
    trainer_class: type[SFTTrainer], mode: str, args: argparse.Namespace, samples, settings: dict[str, Any]
) -> float:
    with scratch_folder() as folder:
        trainer = make_trainer(trainer_class, mode, args, samples, folder, epochs=args.whole_run_epochs, **settings)
        synchronize()
        start = time.perf_counter()
        trainer.train()
        synchronize()
        return time.perf_counter() - start


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for a while, during which the trainers talk to stderr. Frees first what earlier ones held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        yield Path(folder)


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_training_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each method")
    parser.add_argument("--steps", type=int, default=4, help="steps that count in a turn")
    parser.add_argument("--whole_run_rounds", type=int, default=1, help="0 leaves the whole runs out")
    parser.add_argument("--whole_run_rows", type=int, default=24)
    parser.add_argument("--whole_run_epochs", type=int, default=10)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    facts = machine_facts()
    samples = load_samples(args.model, args.tofu, (1 + args.steps) * args.batch_size)
    whole_samples = load_samples(args.model, args.tofu, args.whole_run_rows)
    steps, whole_runs = {}, {}
    for mode in args.modes:
        steps[mode] = time_steps(mode, args, samples)
        whole_runs[mode] = time_whole_runs(mode, args, whole_samples)

    print_table(
        ["mode", "method", "s/step", "fastest", "slowest", "over sft", "over sft_counted"],
        [
            [mode, method, median(rounds), min(rounds), max(rounds)]
            + [ratio(steps[mode], method, base) for base in ("sft", "sft_counted")]
            for mode in args.modes
            for method, rounds in steps[mode].items()
        ],
    )
    if args.whole_run_rounds:
        print_table(
            ["mode", "whole run", "seconds", "over sft"],
            [
                [mode, method, median(rounds), ratio(whole_runs[mode], method, "sft")]
                for mode in args.modes
                for method, rounds in whole_runs[mode].items()
            ],
        )
    result = ratios(steps, whole_runs)
    print_targets(result, TARGETS)
    result |= {"step_seconds": medians(steps), "whole_run_seconds": medians(whole_runs)}
    counted_samples = samples.select(range(args.batch_size, len(samples)))
    settings = training_facts(args, counted_samples) | {
        "rounds": args.rounds,
        "steps": args.steps,
        "whole_run": training_facts(args, whole_samples)
        | {"rows": args.whole_run_rows, "epochs": args.whole_run_epochs, "rounds": args.whole_run_rounds},
    }
    quantities = [
        (f"{mode} {method}", quantity, value)
        for quantity, seconds in (("step_seconds", steps), ("whole_run_seconds", whole_runs))
        for mode in args.modes
        for method, rounds in seconds[mode].items()
        for value in rounds
    ]
    finish("step", quantities, result, settings, facts, args.csv)


def ratio(seconds: dict[str, list[float]], method: str, base: str) -> float:
    return median(a / b for a, b in zip(seconds[method], seconds[base], strict=True))


def ratios(steps: dict[str, dict], whole_runs: dict[str, dict]) -> dict[str, float]:
    """Every ratio, first under its bare name in the mode that it stands for."""
    measured = {key: {mode: ratio(steps[mode], *pair) for mode in steps} for key, pair in RATIOS.items()}
    measured["whole_run_over_sft"] = {
        mode: ratio(seconds, "cached", "sft") for mode, seconds in whole_runs.items() if seconds["sft"]
    }
    result = {}
    for key, values in measured.items():
        headline = HEADLINE_MODES.get(key, "full")
        if headline in values:
            result[key] = values[headline]
        result |= {f"{key}_{mode}": value for mode, value in values.items()}
    return {key: round(value, 4) for key, value in result.items()}


def medians(seconds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    return {
        mode: {method: round(median(rounds), 4) for method, rounds in methods.items() if rounds}
        for mode, methods in seconds.items()
    }


if __name__ == "__main__":
    main()
