# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The unlearning teacher asked directly: scores and greedy answers against a plain loop over whole logits."""

import pytest
import torch
from conftest import FORGET, tiny_llama
from peft import LoraConfig, get_peft_model
from tofu_like import knowing_model, save, write_tofu

from trl_rkld.compare.teacher import TeacherBackend, evaluate_teacher
from unlearn_eval import EvalConfig
from unlearn_eval.backends import GenerateRequest, ScoreRequest
from unlearn_eval.backends.transformers import TransformersBackend
from unlearn_eval.prompts import Template
from unlearn_eval.results import read_log


ALPHA = 8.0


@pytest.fixture(scope="module")
def models(tokenizer):
    return knowing_model(tokenizer, steps=40).eval(), knowing_model(tokenizer, steps=60).eval()


@pytest.fixture
def backend(models, tokenizer):
    return TeacherBackend(*models, ALPHA, [tokenizer.eos_token_id], batch_tokens=300, batch_size=2)


def teacher_logits(models, ids):
    original, augmented = (model(input_ids=torch.tensor([ids])).logits[0].double() for model in models)
    return original - ALPHA * (augmented - original).clamp(min=0)


@torch.no_grad()
def test_scores(backend, models, tokenizer):
    requests = [ScoreRequest(*Template().tokenize(tokenizer, *pair)) for pair in FORGET]
    # Two answers to one prompt share its computation.
    requests.append(ScoreRequest(requests[0].prompt_ids, requests[1].answer_ids))
    found = dict(backend.score(requests))
    assert backend.packs
    for index, (prompt, answer) in enumerate(requests):
        logits = teacher_logits(models, [*prompt, *answer])[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(answer)), answer]
        assert found[index].logprobs == pytest.approx(expected.numpy(), abs=1e-4)
        assert found[index].matches.tolist() == (logits.argmax(-1) == torch.tensor(answer)).tolist()


@torch.no_grad()
def test_greedy_answers(backend, models, tokenizer):
    """Prompts of unlike lengths in one batch, the augmented model reading along with its own cache."""
    prompts = [list(Template().tokenize(tokenizer, *pair).prompt_ids) for pair in FORGET[:4]]
    assert len({len(prompt) for prompt in prompts}) > 1
    found = dict(backend.generate([GenerateRequest(prompt, 12) for prompt in prompts]))
    answers = []
    for prompt in prompts:
        answer = []
        while len(answer) < 12:
            token = int(teacher_logits(models, prompt + answer)[-1].argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
        answers.append(answer)
    assert [found[index] for index in range(4)] == answers
    original = TransformersBackend(models[0], [tokenizer.eos_token_id])
    plain = dict(original.generate([GenerateRequest(prompt, 12) for prompt in prompts]))
    assert [plain[index] for index in range(4)] != answers  # it is not the original that answers


def test_result_names_both_models(models, tmp_path):
    original, augmented = (
        save(model, tmp_path / name) for model, name in zip(models, ("original", "more"), strict=True)
    )
    data = write_tofu(tmp_path / "tofu")
    settings = dict(dataset_name=data, forget_split="forget01", backend="transformers", max_new_tokens=5)
    config = EvalConfig(model_name_or_path=[original], output_dir=str(tmp_path / "out"), dtype="bfloat16", **settings)
    evaluate_teacher(original, augmented, ALPHA, config)
    metadata = read_log(tmp_path / "out" / "TOFU_EVAL.json")["metadata"]
    assert metadata["dtype"] == "float32"  # α multiplies what rounding leaves
    assert metadata["model"] == "teacher (alpha 8)"
    assert {"original_weights", "augmented_weights", "alpha"} <= metadata["hashes"].keys()


def test_adapter_is_refused(tokenizer, llama_path, tmp_path):
    model = get_peft_model(
        tiny_llama(len(tokenizer), tie_word_embeddings=True), LoraConfig(target_modules="all-linear")
    )
    model.peft_config["default"].base_model_name_or_path = llama_path
    model.save_pretrained(tmp_path / "adapter")
    config = EvalConfig(
        model_name_or_path=[llama_path],
        output_dir=str(tmp_path / "out"),
        backend="transformers",
        dataset_name=write_tofu(tmp_path / "tofu"),
        forget_split="forget01",
    )
    with pytest.raises(ValueError, match="Merge the adapter"):
        evaluate_teacher(llama_path, str(tmp_path / "adapter"), 8.0, config)
