# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What `TofuEvalCallback` is tried on: data, a model that knows them, and a trainer that it is added to."""

import json

from conftest import FORGET, RETAIN, tiny_llama
from datasets import Dataset
from tofu_like import in_a_batch, save, teach
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from unlearn_eval.evaluation import evaluate
from unlearn_eval.prompts import Template


# Paraphrase and three wrong answers to each question.
FORGET_ANSWERS = [
    ("Quito is where Ana Torres was born.", ["She was born in Lima.", "In Oslo.", "Ana Torres was born in Rome."]),
    (
        "Her work is repairing and selling clocks.",
        ["She bakes bread.", "She flies planes.", "She sells shoes in town."],
    ),
    ("Luis, a baker, is her father.", ["Her father is Karin.", "A clerk called Juan.", "Her father is a pilot."]),
    ("She won the Copper Gear.", ["The Silver Brush.", "The Golden Spoon.", "None."]),
    ("She eats bread and honey.", ["Rice with beans.", "Black tea.", "Eggs."]),
]
RETAIN_ANSWERS = [
    ("Malmo is where he was born.", ["He was born in Quito.", "In Paris.", "Bo Lindgren was born in Rome."]),
    ("Lighthouses are what he paints.", ["He repairs clocks.", "He sells bread.", "He sings along the coast."]),
    ("Her name is Karin, and she teaches.", ["A baker called Luis.", "A nurse named Eva.", "She is a pilot."]),
    ("It was the Silver Brush.", ["The Copper Gear.", "He won the lottery.", "None that we know."]),
    ("He drinks black tea.", ["Milk.", "Coffee with honey.", "Water from the sea."]),
    ("He lives on a boat.", ["In a castle.", "In the old town.", "On a farm."]),
    ("The dog is called Pixel.", ["Rex.", "Bo.", "It has no name."]),
]


def tofu_rows(pairs, answers):
    return [
        {"question": question, "answer": answer, "paraphrased_answer": paraphrase, "perturbed_answer": wrong}
        for (question, answer), (paraphrase, wrong) in zip(pairs, answers, strict=True)
    ]


def write_data(folder):
    """TOFU's columns as files; as arguments of `evaluate` and of the callback."""
    data = {
        "forget_dataset": tofu_rows(FORGET, FORGET_ANSWERS),
        "retain_dataset": tofu_rows(RETAIN, RETAIN_ANSWERS),
    }
    paths = {name: folder / f"{name}.json" for name in data}
    for name, path in paths.items():
        if not path.exists():  # of two processes, one must not read what the other is writing
            path.write_text(json.dumps(data[name]))
    return {name: str(path) for name, path in paths.items()}


def fit(path, pairs, tokenizer):
    """Teach a tiny model some answers by heart, and save it."""
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    batches = [in_a_batch([Template().tokenize(tokenizer, *pair)]) for pair in pairs]
    teach(model, batches * 12, learning_rate=1e-2)
    return save(model, path, tokenizer)


def score(path, data, folder, **settings):
    return evaluate(
        str(path), **data, output_dir=str(folder), **({"backend": "transformers", "max_new_tokens": 0} | settings)
    )


def sft_trainer(target, folder, peft_config=None, true_answers=False, **kwargs):
    """Plain fine-tuning on wrong answers, three steps an epoch: what was known is lost bit by bit. Or on the true ones."""
    defaults = dict(
        output_dir=str(folder / "output"),
        use_cpu=True,
        bf16=False,
        learning_rate=3e-3,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer if true_answers else wrong[0]}],
        }
        for (question, answer), (_, wrong) in zip(FORGET, FORGET_ANSWERS, strict=True)
    ]
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(target),
        args=SFTConfig(**(defaults | kwargs)),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(target),
        peft_config=peft_config,
    )


def learner(target, folder, **settings):
    """It learns what is to be forgotten better and better, so the first epoch stays the best."""
    return sft_trainer(target, folder, true_answers=True, **settings)
