# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Every format becomes the same counted tokens, and training and evaluation tokenise alike."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import trl
from conftest import FORGET, RETAIN, build_tokenizer, config, history, rows, tiny_llama
from datasets import Dataset, Features, List, Value, load_dataset

from trl_rkld import GradDiffConfig, GradDiffTrainer, RKLDTrainer
from trl_rkld.data import DataCollatorForUnlearning, RetainSampler, load_records
from unlearn_eval.prompts import Template, tokenize_conversation
from unlearn_eval.questions import own_questions


QUESTION, ANSWER = FORGET[0]
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}


def prepared(tokenizer, llama, folder, data, **kwargs):
    trainer = RKLDTrainer(
        llama, args=config(folder, **kwargs), train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    return trainer.train_dataset[0]


def counted(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize(
    "row",
    [
        {"question": QUESTION, "answer": ANSWER},
        {"question": QUESTION, "answer": ANSWER, "paraphrased_answer": "x", "perturbed_answer": ["y"]},
        {"messages": [USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"conversations": [{"from": "user", "value": QUESTION}, {"from": "assistant", "value": ANSWER}]},
    ],
    ids=["question", "TOFU", "messages", "conversational prompt", "ShareGPT"],
)
def test_conversational_formats_agree(row, tokenizer, llama, tmp_path):
    sample = prepared(tokenizer, llama, tmp_path, [row])
    text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>"
    assert tokenizer.decode(sample["input_ids"]) == text
    assert counted(tokenizer, sample) == f"{ANSWER}<|im_end|>"


def test_only_the_last_turn_counts(tokenizer, llama, tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "One."},
        USER,
        ASSISTANT,
    ]
    sample = prepared(tokenizer, llama, tmp_path, [{"messages": messages}])
    assert counted(tokenizer, sample) == f"{ANSWER}<|im_end|>"
    assert tokenizer.decode(sample["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_plain_strings(tokenizer, llama, tmp_path):
    sample = prepared(tokenizer, llama, tmp_path, [{"prompt": "Q: who? A:", "completion": " Ana."}])
    assert counted(tokenizer, sample) == " Ana.<|im_end|>"
    sample = prepared(tokenizer, llama, tmp_path, [{"text": "Ana lives in Quito."}])
    assert sample["labels"] == sample["input_ids"]
    assert counted(tokenizer, sample) == "Ana lives in Quito.<|im_end|>"
    sample = prepared(tokenizer, llama, tmp_path, [{"body": "Ana."}], dataset_text_field="body")
    assert counted(tokenizer, sample) == "Ana.<|im_end|>"


@pytest.mark.parametrize("column", ["question", "answer", "prompt", "completion"])
def test_a_text_beside_a_conversation(column, tokenizer, llama, tmp_path):
    row = {column: "another one?", "messages": [USER, ASSISTANT]}
    assert counted(tokenizer, prepared(tokenizer, llama, tmp_path, [row])) == f"{ANSWER}<|im_end|>"


def test_columns_that_the_first_record_lacks(tmp_path):
    path = tmp_path / "forget.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "chat_template_kwargs": {"x": 1}, "prompt": "stray"}\n')
    assert load_records(str(path)).to_list() == [
        {"text": "a", "chat_template_kwargs": None},
        {"text": "b", "chat_template_kwargs": {"x": 1}},
    ]


def test_tokenised_data(tokenizer, llama, tmp_path):
    sample = prepared(tokenizer, llama, tmp_path, [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}])
    assert sample["labels"] == [-100, -100, 7, 8]
    sample = prepared(tokenizer, llama, tmp_path, [{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 0, 0, 1]}])
    assert sample["labels"] == [-100, -100, -100, 8]
    sample = prepared(tokenizer, llama, tmp_path, [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}])
    assert sample["labels"] == [-100, -100, 7, 8]


def test_columns_of_mixed_kinds_are_never_quoted(tokenizer, llama, tmp_path):
    """As `datasets` reads them; with types inferred anew Arrow would show a value that does not fit."""
    lines = [{"question": q, "answer": a, "meta": m} for (q, a), m in zip(FORGET, [1, "SECRET", 2, 3, 4], strict=True)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load_dataset(
        "json", data_files=str(tmp_path / "mixed.jsonl"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    trainer = RKLDTrainer(llama, args=config(tmp_path), train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(FORGET)


def test_sets_of_other_integers(tokenizer, llama, tmp_path):
    """Data frames have wide ones, tokenizers narrow ones; a column of the user's own is none of ours."""
    ids = [tokenizer(answer)["input_ids"] for _, answer in RETAIN]
    wide = Dataset.from_dict(
        {"input_ids": ids, "labels": ids}, Features({name: List(Value("int64")) for name in ("input_ids", "labels")})
    )
    trainer = RKLDTrainer(
        llama,
        args=config(tmp_path, retain_loss_type="kl", eval_strategy="epoch", num_train_epochs=1),
        train_dataset=rows(FORGET),
        retain_dataset=wide,
        eval_dataset=wide,
        processing_class=tokenizer,
    )
    trainer.train()
    args = config(tmp_path, GradDiffConfig)
    trainer = GradDiffTrainer(llama, args=args, train_dataset=rows(FORGET), processing_class=tokenizer)
    own = rows(FORGET).add_column("sample_id", [9] * len(FORGET))
    assert trainer.evaluate(own)["eval_loss"] == pytest.approx(trainer.evaluate(trainer.train_dataset)["eval_loss"])


def test_system_prompt_and_question_template(tokenizer, llama, tmp_path):
    row = {"question": QUESTION, "answer": ANSWER}
    sample = prepared(tokenizer, llama, tmp_path, [row], system_prompt="Be kind.")
    assert tokenizer.decode(sample["input_ids"]).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user")
    sample = prepared(tokenizer, llama, tmp_path, [row], question_template="[INST] {question} [/INST]")
    assert tokenizer.decode(sample["input_ids"]) == f"[INST] {QUESTION} [/INST]{ANSWER}<|im_end|>"
    sample = prepared(tokenizer, llama, tmp_path, [row], question_template='{question} {"tools": []} ')
    assert tokenizer.decode(sample["input_ids"]) == f'{QUESTION} {{"tools": []}} {ANSWER}<|im_end|>'


@pytest.mark.parametrize(
    "row",
    [
        {"question": QUESTION, "answer": ANSWER},
        {"messages": [USER, ASSISTANT]},
        {"prompt": "Q: who? A:", "completion": " Ana."},
        {"text": "Ana lives in Quito."},
        {"text": "Ana lives in Quito.<|im_end|>"},
        {"input_ids": [5, 6, 7, 8]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]},
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 1, 1]},
    ],
    ids=lambda row: " + ".join(row),
)
@pytest.mark.parametrize("system_prompt", [None, "You are a helpful assistant."])
def test_training_and_evaluation_tokenise_alike(row, system_prompt, tokenizer, llama, tmp_path):
    sample = prepared(tokenizer, llama, tmp_path, [row], system_prompt=system_prompt)
    (tokens,) = own_questions("forget", [row], tokenizer, Template(system_prompt=system_prompt)).answers
    assert sample["input_ids"] == tokens.prompt_ids + tokens.answer_ids
    # A sequence's first token is predicted by nothing, whatever its label.
    assert sample["labels"][1:] == ([-100] * len(tokens.prompt_ids) + tokens.answer_ids)[1:]


TEMPLATES = {
    # What the template puts behind the answer, and how often an end token stands there.
    "newline": "{{ m['content'] }}<|im_end|>\n",
    "bare": "{{ m['content'] }}<|im_end|>",
    "two ends": "{{ m['content'] }}<|im_end|><|im_start|>",
    "two ends and text": "{{ m['content'] }}<|im_end|>\nnext<|im_end|>\n",
    "no end": "{{ m['content'] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answer_ends_in_one_end_of_turn_token(name, tokenizer, monkeypatch):
    prompt = "{% if m['role'] == 'user' %}Q{{ m['content'] }}A{% else %}"
    template = "{% for m in messages %}" + prompt + TEMPLATES[name] + "{% endif %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    tokens = tokenize_conversation(tokenizer, [USER], [ASSISTANT])
    assert tokens.answer_ids[-1] == tokenizer.eos_token_id
    assert tokens.answer_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens.answer_ids) == f"{ANSWER}<|im_end|>"


def templates_of_trl():
    """The chat templates of current models, as TRL ships them; those for images need a processor."""
    paths = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    kinds = ("_training", "_vl", "smolvlm", "idefics3", "llava_next")
    return {path.stem: path.read_text() for path in paths if not any(kind in path.stem for kind in kinds)}


@pytest.mark.parametrize("name", templates_of_trl())
def test_templates_of_current_models(name):
    """Counted are the answer and one end token; channels and empty blocks of thinking are part of the prompt."""
    template = templates_of_trl()[name]
    special = set(re.findall(r"<[|｜]\w+[|｜]>|<\w+_of_turn>|<turn\|>|<｜end▁of▁sentence｜>", template))
    tokenizer = build_tokenizer()
    others = sorted(special - set(tokenizer.all_special_tokens))
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": others})
    tokenizer.chat_template = template
    tokens = Template(date_string="10 Apr 2025").tokenize(tokenizer, QUESTION, ANSWER)
    assert tokenizer.decode(tokens.answer_ids[:-1]) == ANSWER
    assert tokens.answer_ids[-1] in tokenizer.added_tokens_decoder
    assert QUESTION in tokenizer.decode(tokens.prompt_ids)


def test_thinking_of_the_records_own(tokenizer, monkeypatch):
    """It counts, unless the template closes it before the answer begins."""
    thinking = "{% if m['thinking'] %}" + "<think>{{ m['thinking'] }}END{% endif %}"
    template = "{% for m in messages %}{{ m['role'] }}:" + thinking + "{{ m['content'] }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    answer = ASSISTANT | {"thinking": "Where was it?"}
    monkeypatch.setattr(tokenizer, "chat_template", template.replace("END", "</think>"))
    tokens = tokenize_conversation(tokenizer, [USER], [answer])
    assert tokenizer.decode(tokens.answer_ids) == f"<think>Where was it?</think>{ANSWER}<|im_end|>"
    monkeypatch.setattr(tokenizer, "chat_template", template.replace("END", "<|im_end|>"))
    with pytest.raises(ValueError, match="closes what stands beside `content`.*Leave it out"):
        tokenize_conversation(tokenizer, [USER], [answer])


@pytest.mark.parametrize("beside", [{"weight": 1}, {"name": "bot"}, {"tool_calls": None}])
def test_what_the_template_ignores_moves_no_border(beside, tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
    template += "{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    for answer in (ANSWER, "x is the answer.", "y is"):
        message = {"role": "assistant", "content": answer}
        tokens = tokenize_conversation(tokenizer, [USER], [message | beside])
        assert tokenizer.decode(tokens.answer_ids) == f"{answer}<|im_end|>"
        assert tokens == tokenize_conversation(tokenizer, [USER], [message])
    parts = [{"type": "text", "text": ANSWER}]
    template = template.replace("m['content']", "m['content'] if m['content'] is string else m['content'][0]['text']")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    tokens = tokenize_conversation(tokenizer, [USER], [{"role": "assistant", "content": parts}])
    assert tokenizer.decode(tokens.answer_ids) == f"{ANSWER}<|im_end|>"


def test_a_text_that_the_template_leaves_out(tokenizer, monkeypatch):
    """A call of a tool is printed instead, and counted."""
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['call'] or m['content'] }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    for content in ("Let me check.", None):
        tokens = tokenize_conversation(
            tokenizer, [USER], [{"role": "assistant", "content": content, "call": "look(1)"}]
        )
        assert tokenizer.decode(tokens.answer_ids) == "look(1)<|im_end|>"


def test_date_string_reaches_the_template(tokenizer, monkeypatch):
    template = "{{ date_string }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    tokens = Template(date_string="10 Apr 2025").tokenize(tokenizer, QUESTION, ANSWER)
    assert tokenizer.decode(tokens.prompt_ids).startswith("10 Apr 2025")


def test_plain_format_without_a_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    tokens = Template().tokenize(tokenizer, QUESTION, ANSWER)
    whole = tokenizer.decode(tokens.prompt_ids + tokens.answer_ids)
    assert whole == f"Question: {QUESTION}\nAnswer: {ANSWER}<|im_end|>"


@pytest.mark.parametrize("suffix", ["json", "lines.json", "jsonl", "csv", "parquet"])
def test_local_files(suffix, tmp_path):
    data = [{"question": "Wer, „du“?", "answer": "Ja,\nich\u2028."}, {"question": "b", "answer": "c"}]
    path = tmp_path / f"forget.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(data, ensure_ascii=False))
    elif suffix in ("jsonl", "lines.json"):  # TOFU's own files are called .json
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in data) + "\n\n")
    elif suffix == "csv":
        path.write_text('question,answer\n"Wer, „du“?","Ja,\nich\u2028."\nb,c\n')
    else:
        Dataset.from_list(data).to_parquet(path)
    loaded = load_records(str(path))
    assert loaded.to_list() == data
    assert not loaded.cache_files


def test_a_list_after_a_blank_line(tmp_path):
    path = tmp_path / "forget.json"
    path.write_text('\n [{"question": "a", "answer": "b"}]\n')
    assert load_records(str(path)).to_list() == [{"question": "a", "answer": "b"}]


def test_shuffled_data(tokenizer, llama, tmp_path):
    """They are shuffled after they have been checked: errors name the row that the user sees."""
    data = [{"question": f"{number}?", "answer": str(number)} for number in range(50)]
    plain, shuffled = (
        RKLDTrainer(
            llama,
            args=config(tmp_path, shuffle_dataset=shuffle),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        ).train_dataset
        for shuffle in (False, True)
    )
    assert list(shuffled["input_ids"]) != list(plain["input_ids"])
    assert sorted(shuffled["input_ids"]) == sorted(plain["input_ids"])
    assert list(shuffled["sample_id"]) == list(range(50))
    data[3]["answer"] = "long " * 400
    with pytest.raises(ValueError, match="Row 3 .* would cut"):
        prepared(tokenizer, llama, tmp_path, data, shuffle_dataset=True)


def test_own_sample_ids_are_replaced(tokenizer, llama, tmp_path):
    """They may be any, and the same in two sets."""
    data = [
        {"question": QUESTION, "answer": ANSWER, "sample_id": "a"},
        {"question": ANSWER, "answer": QUESTION, "sample_id": "a"},
    ]
    first = RKLDTrainer(
        llama, args=config(tmp_path), train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    tokenized = first.train_dataset  # has the ids 0 and 1
    sets = {"train_dataset": tokenized, "eval_dataset": Dataset.from_list(data)}
    second = RKLDTrainer(llama, args=config(tmp_path), processing_class=tokenizer, **sets)
    for trainer, name, ids in ((first, "train", [0, 1]), (second, "train", [0, 1]), (second, "eval", [2, 3])):
        dataset = getattr(trainer, f"{name}_dataset")
        assert dataset["sample_id"] == ids
        assert dataset["input_ids"] == tokenized["input_ids"]


def test_forget_texts_are_cached_nowhere(tokenizer, llama, tmp_path, monkeypatch):
    """Not even where the user's own data set lies in the shared cache."""
    cached = Dataset.from_list([{"question": QUESTION, "answer": ANSWER}] * 3)
    cached.save_to_disk(tmp_path / "hub")
    data = Dataset.load_from_disk(str(tmp_path / "hub"))
    before = sorted(tmp_path.rglob("*.arrow"))
    trainer = RKLDTrainer(llama, args=config(tmp_path), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    assert sorted(tmp_path.rglob("*.arrow")) == before
    assert trainer.train_dataset.column_names == ["input_ids", "labels", "sample_id"]
    for path in (tmp_path / "output").rglob("*"):
        if path.is_file() and path.name != "tokenizer.json":
            assert b"Ana" not in path.read_bytes(), path
    assert all("Ana" not in str(entry) for entry in trainer.state.log_history)


def test_retain_sampler_draws_each_before_any_again():
    sampler = RetainSampler(seed=0, num_forget=5, num_retain=7)
    draws = [sampler(epoch, index) for epoch in range(7) for index in range(5)]
    for start in range(0, 35, 7):
        assert sorted(draws[start : start + 7]) == list(range(7))
    assert len({tuple(draws[start : start + 7]) for start in range(0, 35, 7)}) > 1
    fresh = RetainSampler(seed=0, num_forget=5, num_retain=7)
    assert [fresh(6, 4), fresh(0, 0), fresh(3, 2)] == [sampler(6, 4), sampler(0, 0), sampler(3, 2)]
    assert draws != [RetainSampler(1, 5, 7)(epoch, index) for epoch in range(7) for index in range(5)]


def test_collator(tokenizer):
    collator = DataCollatorForUnlearning(pad_token_id=2)
    batch = collator(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "sample_id": 4},
            {"input_ids": [8], "labels": [8], "sample_id": 1},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["sample_id"].tolist() == [4, 1]


def test_streaming_with_a_live_teacher(tokenizer, llama, tmp_path):
    losses = []
    for data in (rows(FORGET), rows(FORGET).to_iterable_dataset()):
        settings = {"precompute_teacher": False, "max_steps": 3, "per_device_train_batch_size": len(FORGET)}
        trainer = RKLDTrainer(
            copy.deepcopy(llama),
            augmented_model=tiny_llama(len(tokenizer), seed=1, tie_word_embeddings=True),
            args=config(tmp_path, **settings),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append(torch.tensor(history(trainer, "loss")))
    assert len(losses[1]) == 3
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    trainer.save_model()
    card = (tmp_path / "output" / "README.md").read_text()
    assert "forget streamed records with RKLD" in card and "SHA-256" not in card and "`None`" not in card


def test_several_evaluation_sets(tokenizer, llama, tmp_path):
    trainer = RKLDTrainer(
        llama,
        args=config(tmp_path, eval_strategy="epoch"),
        train_dataset=rows(FORGET),
        eval_dataset={"own": rows(FORGET), "other": rows(RETAIN)},
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    forgotten = trainer.evaluate(trainer.train_dataset)["eval_loss"]  # the same records, with states of their own
    assert metrics["eval_own_loss"] == pytest.approx(forgotten, rel=1e-5)
    assert metrics["eval_other_loss"] != pytest.approx(forgotten, rel=1e-2)
