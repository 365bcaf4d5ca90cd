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

from trl_rkld import RKLDConfig, RKLDTrainer, __version__
from trl_rkld.data import tokenize_row
from unlearn_eval.prompts import tokenize_question


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODEL = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4)
FINE_TUNING = dict(
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
    num_train_epochs=20,
    per_device_train_batch_size=16,
)
# α, the epochs of the augmented model and λ are the paper's. So small a model needs a higher rate and more epochs.
UNLEARNING = dict(
    alpha=8.0,
    augmented_num_train_epochs=10,
    retain_coef=1.0,
    learning_rate=1e-3,
    num_train_epochs=40,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
)
ON_THE_CPU = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none")
# Which of a set's questions the table shows.
SHOWN_FORGET, SHOWN_RETAIN = (0, 13, 20), (0, 13)


class NamedProgressCallback(ProgressCallback):
    """The Trainer's progress bar with a name, showing some of what is logged instead of printing all of it."""

    def __init__(self, name: str, shown: tuple[str, ...]):
        super().__init__()
        self.name, self.shown = name, shown

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(self.name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.shown[0] in logs:
            self.training_bar.set_postfix({key: f"{logs[key]:.2f}" for key in self.shown})


def read_people(name: str) -> list[dict[str, Any]]:
    """Read the embedded records of the people to `"forget"` or to `"retain"`, `name` (`str`)."""
    text = resources.files("trl_rkld.data_files").joinpath(f"demo_{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def build_tokenizer(records: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer on the records until each of their words is one token.

    Args:
        records (`list[dict]`):
            Records whose words it shall know.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]:
            Tokenizer with a ChatML chat template.
    """
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
    """Build a small model of the Llama architecture for a tokenizer, with random weights drawn with `seed` (`int`)."""
    set_seed(seed)
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True, **ends, **MODEL
    )
    return LlamaForCausalLM(config)


def fine_tune(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[dict[str, Any]], seed: int
) -> None:
    """
    Teach a model, in place, the answers of the records to their questions and to the same in other words.

    Args:
        model ([`~transformers.LlamaForCausalLM`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Its tokenizer.
        records (`list[dict]`):
            Records with `question`, `paraphrased_question` and `answer`.
        seed (`int`):
            Seed of the order of the records.
    """
    pairs = [
        (record[column], record["answer"]) for record in records for column in ("question", "paraphrased_question")
    ]
    rows = [tokenize_row({"question": q, "answer": a}, tokenizer, None, None, None) for q, a in pairs]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, seed=seed, logging_steps=10, **FINE_TUNING, **ON_THE_CPU)
        trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        show_progress(trainer, "Fine-tuning on everybody", ("loss",))
        trainer.train()


def unlearn(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    forget: list[dict[str, Any]],
    retain: list[dict[str, Any]],
    output_dir: Path,
    seed: int,
) -> None:
    """
    Make a model, in place, forget some records and keep others, and save it.

    Args:
        model ([`~transformers.LlamaForCausalLM`]):
            Model that knows both.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Its tokenizer.
        forget, retain (`list[dict]`):
            Records with `question` and `answer`.
        output_dir (`Path`):
            Folder for the unlearned model.
        seed (`int`):
            Seed of the order of the records.
    """
    columns = ["question", "answer"]
    with tempfile.TemporaryDirectory() as cache:
        args = RKLDConfig(
            str(output_dir), teacher_cache_dir=cache, seed=seed, logging_steps=3, **UNLEARNING, **ON_THE_CPU
        )
        trainer = RKLDTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(forget).select_columns(columns),
            retain_dataset=Dataset.from_list(retain).select_columns(columns),
            processing_class=tokenizer,
        )
        show_progress(trainer, "Unlearning", ("forget_prob", "retain_prob"))
        trainer.train()
    trainer.save_model()


def show_progress(trainer: Trainer, name: str, shown: tuple[str, ...]) -> None:
    """Give a trainer's progress bar a name (`str`), and the logged values that it shows."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(NamedProgressCallback(name, shown))


@torch.no_grad()
def answer_probability(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: list[dict[str, Any]],
    column: str = "question",
) -> float:
    """Mean over records of `p(answer)^(1/tokens)`, asked with the question in `column` (`str`)."""
    probabilities = []
    for record in records:
        prompt_ids, answer_ids = tokenize_question(tokenizer, record[column], record["answer"])
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0, len(prompt_ids) - 1 : -1]
        log_probs = logits.log_softmax(-1)[range(len(answer_ids)), answer_ids]
        probabilities.append(log_probs.mean().exp())
    return torch.stack(probabilities).mean().item()


def ask(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The model's likeliest answer, word by word, to a `question` (`str`)."""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def birthplace_completions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]
) -> dict[str, float]:
    """
    The five likeliest words after "<name> was born in", as the start of an answer.

    Args:
        model ([`~transformers.LlamaForCausalLM`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Its tokenizer, to which each word is one token.
        record (`dict`):
            A person's record about the birthplace.

    Returns:
        `dict[str, float]`:
            Words with their probabilities, likeliest first.
    """
    prompt_ids, answer_ids = tokenize_question(tokenizer, record["question"], f"{record['person']} was born in")
    logits = model(torch.tensor([prompt_ids + answer_ids[:-1]])).logits[0, -1]  # without the end of the turn
    top = logits.softmax(-1).topk(5)
    return {tokenizer.decode([i]).strip(): p for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)}


def examine(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    forget: list[dict[str, Any]],
    retain: list[dict[str, Any]],
) -> dict[str, Any]:
    """
    All that the demo compares.

    Args:
        model ([`~transformers.LlamaForCausalLM`]):
            Model, before or after unlearning.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Its tokenizer.
        forget, retain (`list[dict]`):
            Records of the forgotten and of the kept people.

    Returns:
        `dict`:
            Mean probabilities of the answers, answers to the shown questions, and completions by person.
    """
    model.eval()
    shown = [forget[i] for i in SHOWN_FORGET] + [retain[i] for i in SHOWN_RETAIN]
    births = [record for record in forget + retain if record["birthplace"] in record["answer"]]
    return {
        "forget_prob": answer_probability(model, tokenizer, forget),
        "forget_paraphrased_prob": answer_probability(model, tokenizer, forget, "paraphrased_question"),
        "retain_prob": answer_probability(model, tokenizer, retain),
        "answers": [ask(model, tokenizer, record["question"]) for record in shown],
        "completions": {record["person"]: birthplace_completions(model, tokenizer, record) for record in births},
    }


def summarise(before: dict[str, Any], after: dict[str, Any], births: dict[str, str]) -> dict[str, Any]:
    """
    The numbers of `summary.json`.

    Args:
        before, after (`dict`):
            From [`examine`].
        births (`dict[str, str]`):
            True birthplace by person.

    Returns:
        `dict`:
            Mean probabilities, and by person whether the true birthplace is among the five likeliest.
    """
    summary = {}
    for name in ("forget_prob", "forget_paraphrased_prob", "retain_prob"):
        summary |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    summary["true_birthplace_in_top5"] = {
        when: {person: births[person] in completions for person, completions in results["completions"].items()}
        for when, results in (("before", before), ("after", after))
    }
    return summary


def failures(summary: dict[str, Any]) -> list[str]:
    """
    What a run did not show of what the demo promises.

    Args:
        summary (`dict`):
            From [`summarise`].

    Returns:
        `list[str]`:
            A sentence for each promise that was not kept.
    """
    forget_before, forget_after = summary["forget_prob_before"], summary["forget_prob_after"]
    retain_before, retain_after = summary["retain_prob_before"], summary["retain_prob_after"]
    found = []
    # Each written so that a NaN fails, too.
    if not forget_before > 0.5:
        found.append(f"The people to forget were never learnt: {forget_before:.3f} is not above 0.5.")
    if not forget_after <= 0.25 * forget_before:
        found.append(f"They were not forgotten: {forget_after:.3f} is more than a quarter of {forget_before:.3f}.")
    if not retain_after >= 0.8 * retain_before:
        found.append(f"The kept people suffered: {retain_after:.3f} is less than 0.8 of {retain_before:.3f}.")
    return found


def report(
    forget: list[dict[str, Any]],
    retain: list[dict[str, Any]],
    before: dict[str, Any],
    after: dict[str, Any],
    summary: dict[str, Any],
) -> None:
    """
    Print what the model said before and after, on one page.

    Args:
        forget, retain (`list[dict]`):
            Records of the forgotten and of the kept people.
        before, after (`dict`):
            From [`examine`].
        summary (`dict`):
            From [`summarise`].
    """
    shown = [("forgotten", forget[i]) for i in SHOWN_FORGET] + [("kept", retain[i]) for i in SHOWN_RETAIN]
    print("\nQuestions, and the answers before and after unlearning")
    for (role, record), *answers in zip(shown, before["answers"], after["answers"], strict=True):
        print(f"  {role:>9}  {record['question']}")
        for when, answer in zip(("before", "after"), answers, strict=True):
            print(f"  {when:>9}    {textwrap.shorten(answer, 104, placeholder=' ...')}")

    print(f"\n{'Mean probability of the true answers, p(answer)^(1/tokens)':60}  before   after")
    for name, label in (
        ("forget_prob", f"forgotten people, {len(forget)} questions"),
        ("forget_paraphrased_prob", "forgotten people, the same questions in other words"),
        ("retain_prob", f"kept people, {len(retain)} questions"),
    ):
        print(f"  {label:58}  {summary[f'{name}_before']:6.3f}  {summary[f'{name}_after']:6.3f}")

    print('\nThe five likeliest words after "<name> was born in"')
    for role, record in (("forgotten", forget[0]), ("kept", retain[0])):
        print(f"  {role:>9}  {record['person']}, truly born in {record['birthplace']}")
        for when, results in (("before", before), ("after", after)):
            words = (f"{word:>11} {p:.3f}" for word, p in results["completions"][record["person"]].items())
            print(f"  {when:>9}  {''.join(words)}")
    in_list = {
        when: sum(found[r["person"]] for r in forget[::6])
        for when, found in summary["true_birthplace_in_top5"].items()
    }
    print(
        f"  The true place is in the list of {in_list['before']} forgotten people before, of {in_list['after']} after."
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
    # For so small a model a second thread gains little, and on a busy machine threads lose much waiting for each other.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # those of loading and saving; training keeps its bars
    datasets.disable_progress_bars()
    summary_path = Path(output_dir) / "summary.json"
    summary_path.parent.mkdir(parents=True, exist_ok=True)
    summary_path.unlink(missing_ok=True)  # an older run's must not pass for that of a run that fails

    forget, retain = read_people("forget"), read_people("retain")
    births = {record["person"]: record["birthplace"] for record in forget + retain}
    tokenizer = build_tokenizer(forget + retain)
    model = build_model(tokenizer, seed)
    print(f"A Llama of {model.num_parameters():,} parameters learns {len(births)} invented people, then forgets four.")
    fine_tune(model, tokenizer, forget + retain, seed)
    before = examine(model, tokenizer, forget, retain)
    unlearn(model, tokenizer, forget, retain, Path(output_dir) / "model", seed)
    after = examine(model, tokenizer, forget, retain)

    summary = summarise(before, after, births)
    report(forget, retain, before, after, summary)
    libraries = ("torch", "transformers", "trl", "tokenizers", "datasets", "accelerate")
    summary |= {
        "seed": seed,
        "settings": {"model": MODEL, "fine_tuning": FINE_TUNING, "unlearning": UNLEARNING},
        "versions": {"trl_rkld": __version__} | {name: importlib.metadata.version(name) for name in libraries},
        "seconds": round(time.perf_counter() - start, 1),
    }
    partial = summary_path.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, summary_path)
    print(f"\n{summary['seconds']:.0f} s. Numbers: {summary_path}. Unlearned model: {summary_path.parent / 'model'}.")
    for failure in failures(summary):
        print(f"Failed: {failure}", file=sys.stderr)
    return 1 if failures(summary) else 0


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command's arguments; `prog` (`str`, *optional*) is its name in the usage line."""
    parser = argparse.ArgumentParser(
        prog, description="Teach a small model about invented people, make it forget some, and show what is left."
    )
    parser.add_argument(
        "--output_dir", default="outputs/demo", help="Folder for summary.json and the unlearned model."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and of the order of the records.")
    return parser


if __name__ == "__main__":
    sys.exit(main(**vars(make_parser().parse_args())))
