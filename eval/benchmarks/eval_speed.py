# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Time of the TOFU evaluation of forget10, against the reference's way of doing it, in one run.

    python eval/benchmarks/eval_speed.py --model path/to/model --tofu path/to/TOFU

The reference's way is written out below: open-unlearning's default suite (commit d3d7cf9), one metric after another, 32
items a batch, padded, each answer a sequence of its own with all its logits, in the same dtype and with the same attention.
Its per-item numbers are held against compat mode's, or the comparison would mean nothing: in bfloat16 they agree but for
rounding, which also turns some generations at words that the model is undecided about; in float32 tests/test_compat.py finds
them equal. A random tenth of each question set by default, `--full` for all.

Keys of the JSON line:
    scoring_speedup          seconds of the reference's scoring over ours, with the faster backend
    generation_speedup       the same of generation
    total_speedup            the same of both together, with the faster backend for each part
    seconds                  of each part and backend; loading the model and starting vLLM are apart (`start_...`)
    tokens_per_second        tokens of all answers with their prompts over the seconds of scoring; new tokens of generation
    share_of_matmul_peak     of scoring: useful arithmetic over the seconds, as a share of this machine's matmul in this dtype
    match                    median and largest difference of average losses between the reference and compat mode, in nats
                             per token, and of the other per-item numbers; share of equal generations
"""

import argparse
import random
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import REPOSITORY, finish, machine_facts, print_table, print_targets, synchronize

from unlearn_eval.checkpoints import load_base, resolve_checkpoint
from unlearn_eval.config import EvalConfig
from unlearn_eval.evaluation import open_backends
from unlearn_eval.job import Job
from unlearn_eval.questions import load_tofu


TARGETS = {"total_speedup": (">=", 3.0), "scoring_speedup": (">=", 2.5)}
BATCH_SIZE = 32
MAX_NEW_TOKENS = 200
TOLERANCE = 0.01
"""Median difference of average losses, in nats per token: the reference rounds its logits to the model's dtype."""


class Reference:
    """
    The reference's way: every metric has its own pass over its own padded batches.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        pad_id (`int`):
            Padding token, which is also the end of a turn and hidden wherever it stands.
    """

    def __init__(self, model, pad_id: int):
        self.model, self.pad_id = model, pad_id

    def batches(self, items: list, left: bool = False):
        """Padded batches of `(prompt_ids, answer_ids)`: ids, mask and labels; of the prompts alone, to the left."""
        for start in range(0, len(items), BATCH_SIZE):
            batch = items[start : start + BATCH_SIZE]
            rows = [list(prompt) if left else [*prompt, *answer] for prompt, answer in batch]
            width = max(map(len, rows))
            pads = [[self.pad_id] * (width - len(row)) for row in rows]
            ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
            labels = ids.clone()
            for label, (prompt, _), row in zip(labels, batch, rows, strict=True):
                label[: len(prompt)] = -100
                label[len(row) :] = -100
            device = self.model.device
            yield ids.to(device), (ids != self.pad_id).long().to(device), labels.to(device)

    def losses(self, items: list) -> list[float]:
        """`probability`: cross-entropy of all positions on logits in the model's dtype, then the mean of each answer."""
        result = []
        for ids, mask, labels in self.batches(items):
            logits = self.model(input_ids=ids, attention_mask=mask, labels=labels).logits[:, :-1].contiguous()
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels[:, 1:].contiguous(), ignore_index=-100, reduction="none"
            )
            result += (losses.sum(1) / (labels != -100).sum(1)).tolist()
        return result

    def token_log_probs(self, items: list):
        """Log-softmax of all positions, then of each answer without its last token: its rows and its labels."""
        for ids, mask, labels in self.batches(items):
            log_probs = self.model(input_ids=ids, attention_mask=mask, labels=labels).logits.log_softmax(-1)
            for row, label in zip(log_probs, labels, strict=True):
                counted = (label != -100).nonzero()[:-1, 0]
                yield row[counted - 1], label[counted]

    def min_k(self, items: list) -> list[float]:
        """`mia_min_k` with k = 0.4."""
        scores = []
        for rows, labels in self.token_log_probs(items):
            values = rows.gather(1, labels[:, None])[:, 0].float().sort().values
            scores.append(-values[: max(1, int(0.4 * len(values)))].mean().item())
        return scores

    def extraction_strength(self, items: list) -> list[float]:
        """`extraction_strength`: the first position after which every token is the first choice."""
        scores = []
        for rows, labels in self.token_log_probs(items):
            matches = (rows.argmax(-1) == labels).tolist()
            start = next((k for k in range(len(matches)) if all(matches[k:])), len(matches) - 1)
            scores.append(1 - start / len(matches))
        return scores

    def generations(self, items: list) -> list[list[int]]:
        """`rouge`: greedy answers of a left-padded batch, which goes on until its last one has ended."""
        result = []
        for ids, mask, _ in self.batches(items, left=True):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=self.pad_id,
            )
            result += output[:, ids.shape[1] :].tolist()
        return result

    def score(self, sets: dict) -> dict[str, list]:
        """The scoring metrics of the default suite, in its order; what one of them has computed is not computed again."""
        values = {}
        for name in ("forget", "retain"):
            values[f"{name}_PARA"] = self.losses(sets[name].paraphrased)
            values[f"{name}_PERT"] = self.wrong_losses(sets[name])
            values[f"{name}_Prob"] = self.losses(sets[name].answers)
        for name in ("ra", "wf"):
            values[f"{name}_Prob"] = self.losses(sets[name].answers)
            values[f"{name}_PERT"] = self.wrong_losses(sets[name])
        values["min_k_forget"] = self.min_k(sets["forget"].answers)
        values["min_k_holdout"] = self.min_k(sets["holdout"].answers)
        values["extraction_strength"] = self.extraction_strength(sets["forget"].answers)
        return values

    def wrong_losses(self, one) -> list[list[float]]:
        """Losses of the wrong answers: one pass for the first of each question, one for the second, …"""
        return np.transpose([self.losses(list(answers)) for answers in zip(*one.perturbed, strict=True)]).tolist()


def compat_values(job: Job) -> dict[str, list]:
    """What [`Reference.score`] gives, from compat mode's log."""
    log = job.log(None)

    def items(metric: dict, field: str) -> list:
        return [metric["value_by_index"][str(i)][field] for i in range(len(metric["value_by_index"]))]

    values = {}
    for name in ("forget", "retain", "ra", "wf"):
        for kind, metric in (("PARA", "Q_A_PARA_Prob"), ("PERT", "Q_A_PERT_Prob"), ("Prob", "Q_A_Prob")):
            if f"{name}_{metric}" in log:
                values[f"{name}_{kind}"] = items(log[f"{name}_{metric}"], "avg_loss")
    for half in ("forget", "holdout"):
        values[f"min_k_{half}"] = items(log["mia_min_k"][half], "score")
    values["extraction_strength"] = items(log["extraction_strength"], "score")
    return values


def matches(values: dict[str, list], generations: dict[str, list[list[int]]], compat: Job) -> dict[str, float]:
    """How far the reference's per-item numbers are from compat mode's."""
    expected = compat_values(compat)
    differences = {key: np.abs(np.subtract(values[key], expected[key])).ravel() for key in values}
    losses = np.concatenate([diff for key, diff in differences.items() if key.endswith(("PARA", "PERT", "Prob"))])
    log = compat.log(None)
    equal = [
        compat.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True).strip()
        == log[f"{name}_Q_A_ROUGE"]["value_by_index"][str(i)]["generation"]
        for name, some in generations.items()
        for i, ids in enumerate(some)
    ]
    return {
        "median_avg_loss": float(np.median(losses)),
        "largest_avg_loss": float(losses.max()),
        "largest_min_k": float(max(differences[f"min_k_{half}"].max() for half in ("forget", "holdout"))),
        "largest_extraction_strength": float(differences["extraction_strength"].max()),
        "equal_generations": float(np.mean(equal)),
    }


def timed(function, *arguments) -> tuple[Any, float]:
    """Result and seconds of a call."""
    synchronize()
    start = time.perf_counter()
    result = function(*arguments)
    synchronize()
    return result, time.perf_counter() - start


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large square product: the best of ten."""
    size = 4096 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return max(2 * size**3 / timed(torch.matmul, a, b)[1] for _ in range(10))


def useful_flops(model, job: Job) -> float:
    """Arithmetic of the matrix products that scoring can't do without: each prompt once, the head on counted tokens."""
    head = model.get_output_embeddings().weight.numel()
    # Of tied embeddings one matrix serves as both; looking a row up costs nothing.
    body = model.num_parameters() - model.get_input_embeddings().weight.numel()
    body -= 0 if model.config.tie_word_embeddings else head
    requests = {(tuple(prompt), tuple(answer)) for prompt, answer in job.requests()}
    counted = sum(len(answer) for _, answer in requests)
    tokens = counted + sum(map(len, {prompt for prompt, _ in requests}))
    return 2.0 * (body * tokens + head * counted)


def run_reference(job: Job, seconds: dict[str, float]) -> tuple[dict, dict, float, float]:
    """Run and time the reference; also this machine's matmul peak, and the arithmetic that scoring can't do without."""
    model = load_base(job.checkpoint, job.config)
    reference = Reference(model, job.masked_token_id)
    asked = {name: [(prompt, []) for prompt in one.prompts] for name, one in job.sets.items() if name != "holdout"}
    with torch.no_grad():
        reference.losses(job.sets["ra"].answers[:2])  # a warm-up
        values, seconds["scoring_reference"] = timed(reference.score, job.sets)
        generations, seconds["generation_reference"] = timed(
            lambda: {name: reference.generations(items) for name, items in asked.items()}
        )
    return values, generations, matmul_peak(model.dtype, model.device), useful_flops(model, job)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--model", required=True, help="folder of a model fine-tuned on part of TOFU")
    parser.add_argument(
        "--tofu", default=str(REPOSITORY.parent / "shared" / "data" / "tofu"), help="folder of TOFU's files"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--full", action="store_true", help="all questions instead of a random tenth")
    parser.add_argument("--seed", type=int, default=0, help="of the random tenth")
    parser.add_argument("--csv", type=Path, help="CSV file to append to")
    args = parser.parse_args()

    rows = load_tofu(args.tofu, "forget10")
    if not args.full:
        generator = random.Random(args.seed)
        rows = {name: generator.sample(some, round(len(some) / 10)) for name, some in rows.items()}

    with tempfile.TemporaryDirectory() as folder:
        common = dict(dataset_name=args.tofu, dtype=args.dtype, max_new_tokens=MAX_NEW_TOKENS)

        def new_job(name: str, **settings) -> Job:
            config = EvalConfig(
                model_name_or_path=args.model,
                output_dir=f"{folder}/{name}",
                backend=settings.pop("backend"),
                **common,
                **settings,
            )
            return Job(resolve_checkpoint(args.model, config), rows, config)

        compat = new_job("compat", backend="transformers", compat="open_unlearning", log_texts=True)
        seconds: dict[str, float] = {}

        values, generations, peak, flops = run_reference(compat, seconds)
        jobs = {"compat": compat, "transformers": new_job("transformers", backend="transformers")}
        if find_spec("vllm") is not None:
            jobs["vllm"] = new_job("vllm", backend="vllm")
        for name, job in jobs.items():
            start = time.perf_counter()
            with open_backends(job.config.backend, [job], job.config) as activate:
                backend = activate(job.checkpoint)
                list(backend.score(job.sets["ra"].answers[:2]))  # the same warm-up
                seconds[f"start_{name}"] = time.perf_counter() - start
                _, seconds[f"scoring_{name}"] = timed(job.run, "score", backend)
                _, seconds[f"generation_{name}"] = timed(job.run, "generate", backend)
        match = matches(values, generations, compat)
        for job in jobs.values():
            job.close()

    backends = [name for name in ("transformers", "vllm") if name in jobs]
    best = {part: min(seconds[f"{part}_{name}"] for name in backends) for part in ("scoring", "generation")}
    result = {f"{part}_speedup": seconds[f"{part}_reference"] / best[part] for part in best}
    result["total_speedup"] = sum(seconds[f"{part}_reference"] for part in best) / sum(best.values())
    tokens = {
        "scoring": sum(len(prompt) + len(answer) for prompt, answer in compat.requests()),
        "generation": sum(
            token not in compat.end_ids for some in generations.values() for ids in some for token in ids
        ),
    }
    names = ["reference", *jobs]
    speed = {f"{part}_{name}": tokens[part] / seconds[f"{part}_{name}"] for part in tokens for name in names}
    share = {name: flops / seconds[f"scoring_{name}"] / peak for name in names}
    print_table(
        ["", "start s", "scoring s", "tokens/s", "of matmul peak", "generation s", "tokens/s"],
        [
            [
                name,
                seconds.get(f"start_{name}", 0.0),
                seconds[f"scoring_{name}"],
                speed[f"scoring_{name}"],
                share[name],
                seconds[f"generation_{name}"],
                speed[f"generation_{name}"],
            ]
            for name in names
        ],
    )
    print_targets(result, TARGETS)
    result |= {"seconds": seconds, "tokens_per_second": speed, "share_of_matmul_peak": share, "match": match}
    settings = {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "full": args.full,
        "questions": {name: len(some) for name, some in rows.items()},
        **{f"{part}_tokens": count for part, count in tokens.items()},
    }
    measured = [(name, "seconds", value) for name, value in seconds.items()]
    measured += [(key, "ratio", result[key]) for key in (*TARGETS, "generation_speedup")]
    measured += [("match", key, value) for key, value in match.items()]
    finish("eval_speed", measured, result, settings, machine_facts(), args.csv)
    if match["median_avg_loss"] > TOLERANCE or match["largest_extraction_strength"] > 0:
        print("The reference as written here and compat mode disagree: the comparison means nothing.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
