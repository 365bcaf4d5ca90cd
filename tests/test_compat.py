# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`compat="open_unlearning"` against the reference's way, as the benchmark of speed writes it out, in float32."""

import os
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TOFU, build_tokenizer, tiny_llama
from tofu_like import knowing_model, save, write_tofu
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from unlearn_eval.backends import GenerateRequest
from unlearn_eval.checkpoints import resolve_checkpoint
from unlearn_eval.config import EvalConfig
from unlearn_eval.evaluation import load_rows, open_backends
from unlearn_eval.job import Job
from unlearn_eval.prompts import OpenUnlearningTemplate, Template


@pytest.fixture
def eval_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "eval" / "benchmarks"))
    import eval_speed

    yield eval_speed
    for name in ("eval_speed", "common"):
        sys.modules.pop(name, None)


# Of Llama 3.2, but for tools.
LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}"
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system_message = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' "
    "+ (date_string or '26 Jul 2024') + '\n\n' + system_message + '<|eot_id|>' }}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture
def llama_3_tokenizer():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer().backend_tokenizer, eos_token="<|eot_id|>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]}
    )
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = LLAMA_3
    return tokenizer


def test_chatml_token_ids(tokenizer):
    """The answer ends its turn, has ChatML's newline and then ends again, all of it counted."""
    prompt, answer = OpenUnlearningTemplate(system_prompt="Be brief.").tokenize(tokenizer, "Who?", "Ana Torres.")
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    (newline,) = tokenizer("\n")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answer == [*tokenizer("Ana Torres.")["input_ids"], end, newline, end]
    ours = Template(system_prompt="Be brief.").tokenize(tokenizer, "Who?", "Ana Torres.")
    assert ours == (prompt, answer[:-2])


def test_llama_3_token_ids(llama_3_tokenizer):
    """System prompt and date stand before the question; the end of the turn is there once, the answer trimmed."""
    prompt, answer = OpenUnlearningTemplate("You are a helpful assistant.", "10 Apr 2025").tokenize(
        llama_3_tokenizer, "Who?", " Ana Torres. "
    )
    assert llama_3_tokenizer.decode(prompt) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Who?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert answer == llama_3_tokenizer("Ana Torres.<|eot_id|>")["input_ids"]
    assert answer[-1] == llama_3_tokenizer.eos_token_id
    assert prompt.count(llama_3_tokenizer.eos_token_id) == 2
    dateless = OpenUnlearningTemplate("You are a helpful assistant.").tokenize(
        llama_3_tokenizer, "Who?", "Ana Torres."
    )
    assert "26 Jul 2024" in llama_3_tokenizer.decode(dateless.prompt_ids)


def test_plain_template_token_ids(tokenizer):
    """The border is where the prompt alone is long, though the space there goes with the answer's first word."""
    prompt, answer = OpenUnlearningTemplate(question_template="Q: {question} A: ").tokenize(
        tokenizer, "Who?", "Ana Torres."
    )
    whole = tokenizer("Q: Who? A: Ana Torres.")["input_ids"]
    border = len(tokenizer("Q: Who? A: ")["input_ids"])
    assert prompt == whole[:border]
    assert answer == [*whole[border:], tokenizer.eos_token_id]
    assert prompt != tokenizer("Q: Who? A: ")["input_ids"]  # else this test shows nothing


def new_job(model, data, folder, **settings):
    config = EvalConfig(
        model_name_or_path=model,
        dataset_name=data,
        forget_split="forget01",
        output_dir=str(folder),
        dtype="float32",
        backend="transformers",
        log_texts=True,
        **({"compat": "open_unlearning", "max_new_tokens": 40, "batch_size": 7} | settings),
    )
    return Job(resolve_checkpoint(model, config), load_rows(config), config)


def test_plain_template_asks_the_bare_prompt(tokenizer, llama_path, tmp_path):
    """What is generated starts at the prompt rendered alone, not after the first word of the answer."""
    job = new_job(llama_path, write_tofu(tmp_path / "tofu"), tmp_path / "out", question_template="Q: {question} A: ")
    one = job.sets["forget"]
    assert one.prompts == [tokenizer(f"Q: {question} A: ")["input_ids"] for question in one.questions]
    assert one.prompts[0] != one.answers[0].prompt_ids


def assert_agreement(eval_speed, job, tolerance):
    """Every per-item number and every token generated is the reference's."""
    with open_backends("transformers", [job], job.config) as activate:
        backend = activate(job.checkpoint)
        for task in ("score", "generate"):
            job.run(task, backend)
        tokens = {
            name: dict(
                backend.generate([GenerateRequest(prompt, job.config.max_new_tokens) for prompt in one.prompts])
            )
            for name, one in job.sets.items()
            if name != "holdout"
        }
        reference = eval_speed.Reference(backend.model, job.masked_token_id)
        with torch.no_grad():
            values = reference.score(job.sets)
            generations = {
                name: reference.generations([(prompt, []) for prompt in job.sets[name].prompts]) for name in tokens
            }
    expected = eval_speed.compat_values(job)
    job.close()
    assert values.keys() == expected.keys()
    for key in values:
        np.testing.assert_allclose(expected[key], values[key], atol=tolerance, rtol=0, err_msg=key)
    for name, some in generations.items():
        for i, ids in enumerate(some):
            ends = [position for position, token in enumerate(ids) if token in job.end_ids]
            assert tokens[name][i] == ids[: ends[0] if ends else len(ids)]
    match = eval_speed.matches(values, generations, job)
    assert match["equal_generations"] == 1.0
    assert match["largest_avg_loss"] <= tolerance
    assert match["largest_extraction_strength"] == 0
    return values, generations


PROMPTS = {
    None: {},
    "system_prompt": {"system_prompt": "Be brief."},
    "question_template": {"question_template": "Q: {question} A: "},
}


@pytest.mark.parametrize("kind", ["random", "trained", "gpt2"])
@pytest.mark.parametrize("prompt", ["system_prompt", "question_template", None])
def test_agreement(kind, prompt, tokenizer, eval_speed, monkeypatch, tmp_path):
    if kind == "random":
        model = tiny_llama(len(tokenizer))
    elif kind == "trained":
        model = knowing_model(tokenizer, steps=14)
    else:
        torch.manual_seed(0)
        settings = dict(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        model = GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    path = save(model, tmp_path / "model", tokenizer)
    monkeypatch.setattr(eval_speed, "MAX_NEW_TOKENS", 40)
    monkeypatch.setattr(eval_speed, "BATCH_SIZE", 4)  # so that padding differs from ours
    job = new_job(path, write_tofu(tmp_path / "tofu"), tmp_path / "out", **PROMPTS[prompt])
    hides = prompt != "question_template"
    assert all((job.masked_token_id in ids) is hides for one in job.sets.values() for ids in one.prompts)
    values, generations = assert_agreement(eval_speed, job, tolerance=1e-5)
    assert np.ptp(values["forget_Prob"]) > 0.01
    assert len({tuple(ids) for some in generations.values() for ids in some}) > 10


def test_the_mask_matters(tokenizer, tmp_path):
    """With it the numbers are others than without: the agreement above is not for nothing."""
    path = save(knowing_model(tokenizer, steps=14), tmp_path / "model", tokenizer)
    data = write_tofu(tmp_path / "tofu")
    losses = []
    for compat in ("open_unlearning", None):
        job = new_job(path, data, tmp_path / str(compat), compat=compat)
        with open_backends("transformers", [job], job.config) as activate:
            job.run("score", activate(job.checkpoint))
            job.run("generate", activate(job.checkpoint))
        log = job.log(None)
        losses.append([log["forget_Q_A_Prob"]["value_by_index"][str(i)]["avg_loss"] for i in range(5)])
        job.close()
    assert np.abs(np.subtract(*losses)).max() > 0.01


@pytest.fixture
def all_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.mark.real_model
def test_agreement_on_a_real_model(smollm2, eval_speed, all_cores, monkeypatch, tmp_path):
    if not TOFU.is_dir():
        pytest.skip(f"no TOFU in {TOFU}")
    monkeypatch.setattr(eval_speed, "MAX_NEW_TOKENS", 12)
    job = new_job(smollm2, str(TOFU), tmp_path / "out", max_samples=4, max_new_tokens=12)
    assert AutoTokenizer.from_pretrained(smollm2).pad_token_id == job.masked_token_id
    assert_agreement(eval_speed, job, tolerance=1e-3)
