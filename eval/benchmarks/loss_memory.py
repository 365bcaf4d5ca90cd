# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Peak memory of the RKLD loss alone, forward and backward, above its inputs: chunked against dense.

    python eval/benchmarks/loss_memory.py

Inputs (not counted): the student's hidden states and those of the original and the augmented model, `[N, H]` each, and
the heads, `[V, H]`. With a frozen head (LoRA) one head serves all three roles; with a trained head (full fine-tuning)
there are three, and the student's gets a gradient. Gradients are counted. Everything is float32.

Each setting runs in a process of its own. On the CPU the peak is the process's high-water mark of resident memory
(VmHWM, reset once the inputs are there and the libraries are warm); glibc is told by `MALLOC_ARENA_MAX` and
`MALLOC_MMAP_THRESHOLD_` to give every freed block of 64 KiB and more back to the system, or the mark would hold what
was freed long ago. On CUDA it is `torch.cuda.max_memory_allocated`.

Keys of the JSON line:
    chunked_over_dense_trained_head   peak of the chunked over the dense loss, the student's head being trained
    chunked_over_dense_frozen_head    the same, with one frozen head
    flatness_trained_head, flatness_frozen_head
                                      chunked peak at the largest of `--more_tokens` over that at `--num_tokens`, each
                                      less what must grow with them (the gradient of the hidden states and the four
                                      numbers that are reported of each token); 1 is flat
    raw_flatness_trained_head, raw_flatness_frozen_head
                                      the same with nothing taken off
    peak_mb, seconds, loss            of each setting
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch
from common import (
    RETURN_FREED_MEMORY,
    finish,
    machine_facts,
    output_of_own_process,
    peak_memory,
    print_table,
    print_targets,
    reset_peak_memory,
    synchronize,
)

from trl_rkld.losses import HeadInput, LMHead, chunked_divergence, unlearning_teacher_logits


ALPHA = 8.0
TARGETS = {
    "chunked_over_dense_trained_head": ("<=", 1 / 12),
    "chunked_over_dense_frozen_head": ("<=", 1 / 25),
    "flatness_trained_head": ("<=", 1.1),
    "flatness_frozen_head": ("<=", 1.1),
}


def dense_loss(student: HeadInput, original: HeadInput, augmented: HeadInput, labels: torch.Tensor) -> torch.Tensor:
    # Tensors of [N, V] in the order in which they come up; those marked * autograd keeps for the backward pass.
    #   forward:  original and augmented logits, their difference, its ReLU, α times that, teacher_logits;
    #             student logits, student_log_probs *, teacher_log_probs, their difference *, student_log_probs.exp() *,
    #             the product of the last two
    #   backward: gradients of both factors of the product, of student_log_probs (their sum) and of the student's logits
    # At most six at a time: nothing is named that one would not name anyway.
    with torch.no_grad():
        teacher_logits = unlearning_teacher_logits(_logits(original), _logits(augmented), ALPHA)
    student_log_probs = _logits(student).log_softmax(-1)
    teacher_log_probs = teacher_logits.log_softmax(-1)
    return (student_log_probs.exp() * (student_log_probs - teacher_log_probs)).sum()


def _logits(role: HeadInput) -> torch.Tensor:
    return role.hidden_states @ role.head.weight.T


def chunked_loss(student: HeadInput, original: HeadInput, augmented: HeadInput, labels: torch.Tensor) -> torch.Tensor:
    return chunked_divergence(student, original, labels, augmented, alpha=ALPHA).loss


def make_inputs(num_tokens: int, vocab_size: int, hidden_size: int, head: str) -> tuple:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weights = [
        torch.randn(vocab_size, hidden_size, device=device).mul_(hidden_size**-0.5)
        for _ in range(3 if head == "trained" else 1)
    ]
    heads = [LMHead(weight) for weight in weights] if head == "trained" else [LMHead(weights[0])] * 3
    heads[0].weight.requires_grad_(head == "trained")
    roles = [HeadInput(torch.randn(num_tokens, hidden_size, device=device), role_head) for role_head in heads]
    roles[0].hidden_states.requires_grad_()
    return *roles, torch.randint(vocab_size, (num_tokens,), device=device)


def measure(loss_name: str, head: str, num_tokens: int, vocab_size: int, hidden_size: int) -> dict[str, float]:
    """Peak bytes above the inputs, seconds and value of one loss, forward and backward, in this process."""
    loss_function = {"dense": dense_loss, "chunked": chunked_loss}[loss_name]
    loss_function(*make_inputs(8, 64, hidden_size, head)).backward()  # loads the libraries, starts the threads
    inputs = make_inputs(num_tokens, vocab_size, hidden_size, head)
    synchronize()
    before = reset_peak_memory()
    start = time.perf_counter()
    loss = loss_function(*inputs)
    loss.backward()
    synchronize()
    seconds = time.perf_counter() - start
    return {"bytes": peak_memory() - before, "seconds": seconds, "loss": loss.item()}


def measure_in_own_process(setting: tuple) -> dict[str, float]:
    return output_of_own_process([__file__, "--setting", json.dumps(setting)])


def check_free_memory(num_tokens: int, vocab_size: int) -> None:
    needed = 7 * 4 * num_tokens * vocab_size
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    print(f"The dense loss needs up to {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.\n", flush=True)
    if free < needed:
        raise SystemExit("Too little memory for the dense loss. Free some, or lower `--num_tokens`.")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--num_tokens", type=int, default=2048)
    parser.add_argument("--vocab_size", type=int, default=128256)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--more_tokens", type=int, nargs="+", default=[4096, 8192, 16384], help="to show flatness")
    parser.add_argument("--csv", type=Path, help="CSV file to append to")
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)  # measured in this process
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.setting is not None:
        print(json.dumps(measure(*args.setting)))
        return
    facts = machine_facts()
    check_free_memory(args.num_tokens, args.vocab_size)
    settings = [(loss, head, args.num_tokens) for head in ("trained", "frozen") for loss in ("dense", "chunked")]
    settings += [("chunked", head, tokens) for head in ("trained", "frozen") for tokens in args.more_tokens]
    measured = {}
    for setting in settings:
        print("measuring", *setting, file=sys.stderr, flush=True)
        measured[setting] = measure_in_own_process((*setting, args.vocab_size, args.hidden_size))
    rows = [[*setting, m["bytes"] / 1e6, m["seconds"], m["loss"] / setting[2]] for setting, m in measured.items()]
    print_table(["loss", "head", "tokens", "peak MB", "seconds", "loss per token"], rows)

    result = ratios(measured, args)
    print_targets(result, TARGETS)
    names = {setting: "_".join(map(str, setting)) for setting in measured}
    result |= {
        "peak_mb": {names[setting]: round(m["bytes"] / 1e6, 2) for setting, m in measured.items()},
        "seconds": {names[setting]: round(m["seconds"], 3) for setting, m in measured.items()},
        "loss": {names[setting]: m["loss"] for setting, m in measured.items()},
    }
    run = {
        "counted_tokens": args.num_tokens,
        "total_tokens": args.num_tokens,
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "malloc": None if torch.cuda.is_available() else RETURN_FREED_MEMORY,
    }
    quantities = [(names[setting], key, m[key]) for setting, m in measured.items() for key in ("bytes", "seconds")]
    finish("loss_memory", quantities, result, run, facts, args.csv)


def ratios(measured: dict[tuple, dict[str, float]], args: argparse.Namespace) -> dict[str, float]:
    result = {}
    most = max([args.num_tokens, *args.more_tokens])
    for head in ("trained", "frozen"):
        chunked = measured["chunked", head, args.num_tokens]["bytes"]
        largest = measured["chunked", head, most]["bytes"]
        per_token = 4 * (args.hidden_size + 4)
        flatness = (largest - per_token * most) / (chunked - per_token * args.num_tokens)
        result |= {
            f"chunked_over_dense_{head}_head": chunked / measured["dense", head, args.num_tokens]["bytes"],
            f"flatness_{head}_head": flatness,
            f"raw_flatness_{head}_head": largest / chunked,
        }
    return {key: round(value, 5) for key, value in result.items()}


if __name__ == "__main__":
    main()
