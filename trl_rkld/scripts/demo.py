# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Teach a small model about invented people, make it forget some of them, and show what is left.

```
trl-rkld demo --output_dir outputs/demo
```
"""

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import textwrap
import time
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ProgressCallback, Trainer, set_seed
from trl import SFTConfig, SFTTrainer

from unlearn_eval.prompts import tokenize_question

from ..data import tokenize_row
from ..trainer import RKLDConfig, RKLDTrainer
from ..version import __version__


Records = list[dict[str, Any]]  # rows with TOFU's columns, `person` and `birthplace`

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The head is not tied: a small model with tied embeddings repeats a word where it is unsure of the next one.
MODEL = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4)
FINE_TUNING = dict(num_train_epochs=18, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=0.1)
FINE_TUNING |= dict(weight_decay=0.1, per_device_train_batch_size=16)
# α, λ and the augmented model's epochs are the paper's; so small a model needs a higher rate and more epochs.
UNLEARNING = dict(alpha=8.0, retain_coef=1.0, augmented_num_train_epochs=10, num_train_epochs=40, learning_rate=1e-3)
UNLEARNING |= dict(per_device_train_batch_size=8, gradient_accumulation_steps=1)
HERE = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none")
HERE |= dict(disable_tqdm=False)  # which the quiet logging of transformers would make true
ROLES = {"forget": "forgotten", "retain": "kept"}
SHOWN = {"forget": (0, 13, 20), "retain": (0, 13)}  # the questions whose answers are printed


class NamedProgressCallback(ProgressCallback):
    """The Trainer's progress bar, with a name and some of the logged values, which are not printed."""

    def __init__(self, name: str, shown: tuple[str, ...]):
        super().__init__()
        self.name, self.shown = name, shown

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(self.name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.shown[0] in logs:
            self.training_bar.set_postfix({key: f"{logs[key]:.2f}" for key in self.shown})


def train(trainer: Trainer, name: str, *shown: str) -> None:
    """Run a trainer with a progress bar called `name`, which shows the logged values `shown`."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(NamedProgressCallback(name, shown))
    trainer.train()


def read_people(name: str) -> Records:
    """Read the embedded records of the people to `"forget"` or to `"retain"`."""
    text = resources.files("trl_rkld.data_files").joinpath(f"demo_{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def build_tokenizer(records: Records) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ChatML's template, until each word of the records is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # more than there is to merge
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    columns = ("question", "paraphrased_question", "answer")
    tokenizer.train_from_iterator([record[column] for record in records for column in columns], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build a small model of the Llama architecture with random weights."""
    set_seed(seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, pad_token_id=end, **MODEL)
    return LlamaForCausalLM(config)


def fine_tune(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: Records, seed: int) -> None:
    """Teach a model, in place, the answers of the records, each asked in two wordings."""
    pairs = [(record[key], record["answer"]) for record in records for key in ("question", "paraphrased_question")]
    rows = [tokenize_row({"question": q, "answer": a}, tokenizer) for q, a in pairs]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, seed=seed, logging_steps=4, **FINE_TUNING, **HERE)
        trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        train(trainer, "Fine-tuning on everybody", "loss")


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
        prompt_ids, answer_ids = tokenize_question(tokenizer, record[key], record["answer"])
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
    prompt_ids, answer_ids = tokenize_question(tokenizer, record["question"], f"{record['person']} was born in")
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
    retain_before, retain_after = summary["retain_prob_before"], summary["retain_prob_after"]
    promises = {
        f"The people to forget were never learnt: {forget_before:.3f} is not above 0.5.": forget_before > 0.5,
        f"They were not forgotten: {forget_after:.3f} is more than a quarter of {forget_before:.3f}.": (
            forget_after <= 0.25 * forget_before
        ),
        f"The kept people suffered: {retain_after:.3f} is less than 0.8 of {retain_before:.3f}.": (
            retain_after >= 0.8 * retain_before
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


def main(output_dir: str = "outputs/demo", seed: int = 0) -> int:
    """
    Run the demo.

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/demo"`):
            Folder for `summary.json` and the unlearned model.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights and of the order of the records.

    Returns:
        `int`:
            Exit code: 0 if the model forgot whom it should and kept the others.
    """
    start = time.perf_counter()
    # Such small matrices gain little by a second thread; on a busy machine, threads lose much waiting for each other.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of saving; training has its own
    datasets.disable_progress_bars()
    path, model_dir = Path(output_dir, "summary.json"), os.path.join(output_dir, "model")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # an older run's must not pass for that of a run that dies

    people = {name: read_people(name) for name in ROLES}
    everybody = people["forget"] + people["retain"]
    tokenizer = build_tokenizer(everybody)
    model = build_model(tokenizer, seed)
    print(f"A Llama of {model.num_parameters():,} parameters learns about 16 invented people, then forgets 4 of them.")
    fine_tune(model, tokenizer, everybody, seed)
    results = {"before": {name: examine(model, tokenizer, name, people[name]) for name in people}}
    unlearn(model, tokenizer, people["forget"], people["retain"], model_dir, seed)
    results["after"] = {name: examine(model, tokenizer, name, people[name]) for name in people}

    summary = summarise(people, results)
    report(people, results, summary)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "tokenizers", "torch")}
    summary |= {"seed": seed, "versions": {"trl_rkld": __version__} | versions}
    summary["settings"] = {"model": MODEL, "fine_tuning": FINE_TUNING, "unlearning": UNLEARNING}
    summary["seconds"] = round(time.perf_counter() - start, 1)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    print(f"\n{summary['seconds']:.0f} seconds. The numbers are in {path}, the unlearned model in {model_dir}.")
    for failure in failures(summary):
        print(f"Failed: {failure}", file=sys.stderr)
    return 1 if failures(summary) else 0


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command's arguments; `prog` is its name in the usage line."""
    parser = argparse.ArgumentParser(prog, description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "--output_dir", default="outputs/demo", help="Folder for summary.json and the unlearned model."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and of the order of the records.")
    return parser


def run(arguments: list[str]) -> int:
    """Run `trl-rkld demo` with command-line `arguments`; returns its exit code."""
    return main(**vars(make_parser("trl-rkld demo").parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
