# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Teach a small model about invented people, make it forget some of them, and show what is left.

```
trl-rkld demo --output_dir outputs/demo
```
"""

import argparse
import copy
import importlib.metadata
import json
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ProgressCallback, Trainer, set_seed
from trl import SFTConfig, SFTTrainer

from unlearn_eval.evaluation import check_packages, evaluate
from unlearn_eval.files import write_atomically
from unlearn_eval.plots import RETAIN_ONLY, TARGET, write_plots
from unlearn_eval.prompts import Template
from unlearn_eval.results import EvalLog
from unlearn_eval.rows import row_from_log

from ..data import tokenize_row
from ..progress import NamedProgressCallback
from ..trainer.rkld_config import RKLDConfig
from ..trainer.rkld_trainer import RKLDTrainer
from ..version import __version__
from .demo_data import Records, build_tokenizer, other_people, people_file, read_people


# The head is not tied: a small model with tied embeddings repeats a word where it is unsure of the next one.
MODEL = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4)
FINE_TUNING = dict(learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=0.1)
FINE_TUNING |= dict(weight_decay=0.1, per_device_train_batch_size=16)
EPOCHS = {"others": 10, "people": 8}
# α, λ and the epochs are the paper's; so small a model needs a higher rate.
UNLEARNING = dict(alpha=8.0, retain_coef=1.0, augmented_num_train_epochs=10, num_train_epochs=10, learning_rate=2e-3)
UNLEARNING |= dict(per_device_train_batch_size=8, gradient_accumulation_steps=1)
HERE = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none")
HERE |= dict(disable_tqdm=False)  # which the quiet logging of transformers would make true
ROLES = {"forget": "forgotten", "retain": "kept"}
SHOWN = {"forget": (0, 13, 20), "retain": (0, 13)}  # the questions whose answers are printed


def train(trainer: Trainer, name: str, *shown: str) -> None:
    """Run a trainer with a progress bar called `name`, which shows the logged values `shown`."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(NamedProgressCallback(name, shown))
    trainer.train()


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build a small model of the Llama architecture with random weights."""
    set_seed(seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, pad_token_id=end, **MODEL)
    return LlamaForCausalLM(config)


def two_wordings(records: Records) -> list[dict[str, str]]:
    """The answers of the records, each asked in two wordings."""
    keys = ("question", "paraphrased_question")
    return [{"question": record[key], "answer": record["answer"]} for record in records for key in keys]


def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, str]],
    seed: int,
    name: str,
    epochs: int,
) -> None:
    """Teach a model, in place, questions and answers, with a progress bar called `name`."""
    dataset = Dataset.from_list([tokenize_row(row, tokenizer, Template()) for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, seed=seed, num_train_epochs=epochs, logging_steps=4, **FINE_TUNING, **HERE)
        train(SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer), name, "loss")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a model with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unlearn(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    forget: Records,
    retain: Records,
    output_dir: str,
    seed: int,
) -> None:
    """Make a model, in place, forget some records and keep others, and save it in `output_dir`."""
    columns = ["question", "answer"]
    with tempfile.TemporaryDirectory() as folder:
        args = RKLDConfig(output_dir, teacher_cache_dir=folder, seed=seed, logging_steps=3, **UNLEARNING, **HERE)
        trainer = RKLDTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(forget).select_columns(columns),
            retain_dataset=Dataset.from_list(retain).select_columns(columns),
            processing_class=tokenizer,
        )
        train(trainer, "Unlearning", "forget_prob", "retain_prob")
        trainer.save_model()


@torch.no_grad()
def mean_probability(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: Records, key: str) -> float:
    """Mean over records of p(answer)^(1/tokens), given the question in column `key`."""
    probabilities = []
    for record in records:
        prompt_ids, answer_ids = Template().tokenize(tokenizer, record[key], record["answer"])
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0, len(prompt_ids) - 1 : -1]
        probabilities.append(logits.log_softmax(-1)[range(len(answer_ids)), answer_ids].mean().exp())
    return torch.stack(probabilities).mean().item()


def ask(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The answer to a question, always with the likeliest next word."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def birthplace_completions(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict) -> dict:
    """The five likeliest words after "<name> was born in" as the start of an answer, with their probabilities."""
    prompt_ids, answer_ids = Template().tokenize(tokenizer, record["question"], f"{record['person']} was born in")
    logits = model(torch.tensor([prompt_ids + answer_ids[:-1]])).logits[0, -1]  # without the end of the turn
    top = logits.softmax(-1).topk(5)
    return {tokenizer.decode([i]).strip(): p for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)}


def examine(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, records: Records) -> dict:
    """What the demo compares of the set `name`: mean probabilities, some answers, completions by person."""
    births = [record for record in records if record["birthplace"] in record["answer"]]
    return {
        "prob": mean_probability(model, tokenizer, records, "question"),
        "paraphrased_prob": mean_probability(model, tokenizer, records, "paraphrased_question"),
        "answers": {records[i]["question"]: ask(model, tokenizer, records[i]["question"]) for i in SHOWN[name]},
        "births": {record["person"]: birthplace_completions(model, tokenizer, record) for record in births},
    }


def evaluate_all(output_dir: Path, seed: int) -> dict[str, EvalLog]:
    """Logs of the models in `output_dir`: `"retain"`, `"target"` and `"rkld"`, the last two against the first."""
    settings = dict(forget_dataset=str(people_file("forget")), retain_dataset=str(people_file("retain")), seed=seed)
    settings |= dict(backend="transformers", max_new_tokens=40, overwrite=True)
    evaluation = output_dir / "evaluation"
    retain = evaluate(str(output_dir / "retain_only"), output_dir=str(evaluation / "retain_only"), **settings)
    models = [str(output_dir / name) for name in ("target", "model")]
    retain_logs = str(evaluation / "retain_only")
    target, unlearned = evaluate(models, output_dir=str(evaluation), retain_logs=retain_logs, **settings)
    return {RETAIN_ONLY: retain, TARGET: target, "rkld": unlearned}


def summarise(people: dict[str, Records], results: dict[str, dict[str, dict]]) -> dict[str, Any]:
    """The numbers of `summary.json`, from what [`examine`] found `"before"` and `"after"` by set."""
    summary = {}
    for name, records in people.items():
        places = {record["person"]: record["birthplace"] for record in records}
        for when in results:
            found = results[when][name]
            listed = {person: places[person] in words for person, words in found["births"].items()}
            summary |= {f"{name}_{key}_{when}": found[key] for key in ("prob", "paraphrased_prob")}
            summary[f"{name}_true_birthplace_in_top5_{when}"] = listed
    return summary


def failures(summary: dict[str, Any]) -> list[str]:
    """What the demo promises and a run did not show, a sentence each. Not-a-number fails, too."""
    forget_before, forget_after = summary["forget_prob_before"], summary["forget_prob_after"]
    distance_before, distance_after = summary["ks_d_target"], summary["ks_d_rkld"]
    retain_before, retain_after = summary["retain_prob_before"], summary["retain_prob_after"]
    promises = {
        f"The people to forget were never learnt: {forget_before:.3f} is not above 0.5.": forget_before > 0.5,
        f"They were not forgotten: {forget_after:.3f} is more than a quarter of {forget_before:.3f}.": (
            forget_after <= 0.25 * forget_before
        ),
        f"The kept people suffered: {retain_after:.3f} is less than 0.8 of {retain_before:.3f}.": (
            retain_after >= 0.8 * retain_before
        ),
        f"Forget quality did not improve: D is {distance_after:.2f}, and was {distance_before:.2f}.": (
            distance_after < distance_before
        ),
    }
    return [sentence for sentence, is_kept in promises.items() if not is_kept]


def report(people: dict[str, Records], results: dict[str, dict[str, dict]], summary: dict[str, Any]) -> None:
    """Print one page: answers, mean probabilities and completions before and after."""
    print("\nAnswers before and after unlearning")
    for name in people:
        for question in results["before"][name]["answers"]:
            print(f"  {ROLES[name]:>9}  {question}")
            for when in results:
                answer = results[when][name]["answers"][question]
                print(f"  {when:>9}    {textwrap.shorten(answer, 105, placeholder=' ...')}")

    print(f"\n{'Mean probability of the true answers, p(answer)^(1/tokens)':60}  before   after")
    for name, records in people.items():
        label = f"{ROLES[name]} people, {len(records)} questions"
        for key, wording in (("prob", label), ("paraphrased_prob", f"{label} in other words")):
            print(f"  {wording:58}  {summary[f'{name}_{key}_before']:6.3f}  {summary[f'{name}_{key}_after']:6.3f}")

    print('\nThe likeliest words after "<name> was born in"')
    for name, (first, *_) in people.items():
        print(f"  {ROLES[name]:>9}  {first['person']}, truly born in {first['birthplace']}")
        for when in results:
            words = results[when][name]["births"][first["person"]]
            print(f"  {when:>9}   {' '.join(f'{word:>10} {p:.3f}' for word, p in words.items())}")
    for name in people:
        before, after = (summary[f"{name}_true_birthplace_in_top5_{when}"].values() for when in results)
        print(
            f"  True place among the five: {ROLES[name]} people {sum(before)} of {len(before)} before, {sum(after)} after"
        )


def report_evaluation(logs: dict[str, EvalLog], output_dir: str) -> dict[str, Any]:
    """Print forget quality and utility, draw them, and return their numbers."""
    rows = [row_from_log(log, method) for method, log in logs.items()]
    write_plots(rows, output_dir, utility="retain_utility")
    print("\nAgainst a model that never met the forgotten people    forget quality (p)  distance D  retain utility")
    names = {RETAIN_ONLY: "that model itself", TARGET: "before unlearning", "rkld": "after unlearning"}
    for row in rows:
        quality, distance = (1.0, 0.0) if row["method"] == RETAIN_ONLY else (row["forget_quality"], row["ks_d"])
        print(f"  {names[row['method']]:50}  {quality:18.2g}  {distance:10.2f}  {row['retain_utility']:14.2f}")
    print("  (p above 0.05: the two can't be told apart by their answers about the forgotten people)")
    keys = ("forget_quality", "ks_d", "retain_utility")
    return {f"{key}_{row['method']}": row[key] for row in rows for key in keys if row[key] is not None}


def main(output_dir: str, seed: int) -> int:
    """
    Run the demo.

    Args:
        output_dir (`str`):
            Folder for `summary.json`, the picture and the models.
        seed (`int`):
            Seed of the weights and of the order of the records.

    Returns:
        `int`:
            Exit code: 0 if the model forgot whom it should and kept the others.
    """
    start = time.perf_counter()
    check_packages("rouge_score", "scipy", "matplotlib")
    # Such small matrices gain little by a second thread; on a busy machine, threads lose much waiting for each other.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of saving; training has its own
    datasets.disable_progress_bars()
    folder = Path(output_dir)
    path = folder / "summary.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # an older run's must not pass for that of a run that dies

    people = {name: read_people(name) for name in ROLES}
    everybody = people["forget"] + people["retain"]
    tokenizer = build_tokenizer(everybody)
    base = build_model(tokenizer, seed)
    print(f"A Llama of {base.num_parameters():,} parameters learns about 16 invented people, then forgets 4 of them.")
    fine_tune(base, tokenizer, other_people(everybody, seed), seed, "Reading about others", EPOCHS["others"])
    retain_only, model = copy.deepcopy(base), base
    for one, known, name in (
        (retain_only, people["retain"], "Never meets the four"),
        (model, everybody, "Meets everybody"),
    ):
        fine_tune(one, tokenizer, two_wordings(known), seed, name, EPOCHS["people"])
    save(retain_only, tokenizer, folder / "retain_only")
    save(model, tokenizer, folder / "target")
    results = {"before": {name: examine(model, tokenizer, name, people[name]) for name in people}}
    unlearn(model, tokenizer, people["forget"], people["retain"], str(folder / "model"), seed)
    results["after"] = {name: examine(model, tokenizer, name, people[name]) for name in people}
    logs = evaluate_all(folder, seed)

    summary = summarise(people, results)
    report(people, results, summary)
    summary |= report_evaluation(logs, output_dir)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "tokenizers", "torch")}
    summary |= {"seed": seed, "versions": {"trl_rkld": __version__} | versions}
    summary["settings"] = {"model": MODEL, "fine_tuning": FINE_TUNING, "epochs": EPOCHS, "unlearning": UNLEARNING}
    summary["seconds"] = round(time.perf_counter() - start, 1)
    write_atomically(path, f"{json.dumps(summary, indent=2)}\n".encode())
    print(
        f"\n{summary['seconds']:.0f} seconds. The numbers are in {path}, the picture in {folder / 'forget_quality.png'}, the "
        f"unlearned model in {folder / 'model'}."
    )
    for failure in failures(summary):
        print(f"Failed: {failure}", file=sys.stderr)
    return 1 if failures(summary) else 0


def run(arguments: list[str]) -> int:
    """Run `trl-rkld demo` with command-line `arguments`; returns its exit code."""
    parser = argparse.ArgumentParser("trl-rkld demo", description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "--output_dir", default="outputs/demo", help="Folder for summary.json, the picture and the models."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and of the order of the records.")
    return main(**vars(parser.parse_args(arguments)))
