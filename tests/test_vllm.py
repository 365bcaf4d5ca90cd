# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""vLLM against transformers, with a real model that knows some of TOFU's questions by heart, and an adapter on it."""

import os

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SERVED_DTYPE, TOFU
from peft import LoraConfig, PeftModel, get_peft_model
from tofu_like import in_a_batch, teach
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rkld.data import load_records
from unlearn_eval.backends import GenerateRequest, ScoreRequest
from unlearn_eval.backends.transformers import TransformersBackend
from unlearn_eval.metrics import forget_quality, truth_ratio
from unlearn_eval.prompts import Template


pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

LEARNT, UNLEARNT = 16, 8
# Of each question: the right answer, its paraphrase and wrong ones.
RIGHT, PARAPHRASE, WRONG = 0, 1, slice(2, 7)
ANSWERS = 7
MAX_NEW_TOKENS = 60
# Nats per token: the median of the differences and their 99th percentile. The demo's answers are half as long as TOFU's,
# so that rounding averages out less: there, transformers in bfloat16 is 0.011 from itself in float32, here 0.008.
MEDIAN, EXTREME = (0.01, 0.05) if TOFU.is_dir() else (0.015, 0.075)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def requests(tokenizer):
    """All answers to the first question, to the second, …; the first `LEARNT` questions will be learnt."""
    folder = REPOSITORY / "trl_rkld" / "data_files"
    file = TOFU / "forget01_perturbed.jsonl" if TOFU.is_dir() else folder / "demo_forget.jsonl"
    return [
        Template().tokenize(tokenizer, row["question"], answer)
        for row in load_records(str(file)).select(range(LEARNT + UNLEARNT))
        for answer in [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
    ]


def fit(model, requests, learning_rate, epochs):
    """Teach answers, in float32: CPUs without AVX-512 emulate bfloat16, which takes twenty times as long."""
    batches = [in_a_batch(requests[start : start + 4]) for start in range(0, len(requests), 4)]
    teach(model.train(), batches * epochs, learning_rate)


@pytest.fixture(scope="module")
def folders(smollm2, requests, tmp_path_factory):
    """The model that has learnt, an adapter for wrong answers, and the two merged, in float32."""
    base, adapter, merged = (str(tmp_path_factory.mktemp(name)) for name in ("base", "adapter", "merged"))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    fit(model, requests[RIGHT : LEARNT * ANSWERS : ANSWERS], learning_rate=3e-4, epochs=6)
    model.to(getattr(torch, SERVED_DTYPE)).save_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(model.float(), LoraConfig(r=6, lora_alpha=12, target_modules="all-linear"))
    fit(model, requests[WRONG.start : LEARNT * ANSWERS : ANSWERS], learning_rate=2e-3, epochs=2)
    model.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(merged)
    return base, adapter, merged


@pytest.fixture(scope="module")
def engine(folders, tokenizer):
    from unlearn_eval.backends.vllm import VLLMBackend

    base, adapter, _ = folders
    backend = VLLMBackend(base, [tokenizer.eos_token_id], SERVED_DTYPE, [adapter], max_model_len=512)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def reference(tokenizer):
    """A function that loads a model for transformers."""

    def load(folder, adapter=None, dtype=SERVED_DTYPE):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        return TransformersBackend(model, [tokenizer.eos_token_id])

    return load


@pytest.fixture(scope="module")
def scores(engine, requests):
    return in_order(engine.score(requests))


@pytest.fixture(scope="module")
def reference_scores(reference, folders, requests):
    return in_order(reference(folders[0]).score(requests))


@pytest.fixture(scope="module")
def some(requests):
    """Two answers to each question: adapters are slow on a CPU."""
    return [request for index, request in enumerate(requests) if index % ANSWERS in (RIGHT, WRONG.start)]


@pytest.fixture(scope="module")
def adapter_scores(engine, folders, some):
    return in_order(engine.score(some, folders[1]))


def in_order(results):
    results = dict(results)
    return [results[index] for index in range(len(results))]


def losses(scores):
    return np.array([one.avg_loss for one in scores])


def assert_agree(scores, expected):
    differences = np.abs(losses(scores) - losses(expected))
    matches, expected_matches = (np.concatenate([one.matches for one in side]) for side in (scores, expected))
    median, extreme, agreement = (
        np.median(differences),
        np.quantile(differences, 0.99),
        (matches == expected_matches).mean(),
    )
    print(f"median {median:.4f}, 99th percentile {extreme:.4f}, same first choice {agreement:.4f} of {matches.size}")
    assert median <= MEDIAN
    assert extreme <= EXTREME
    assert agreement >= 0.99


def test_scores(scores, reference_scores):
    learnt = slice(RIGHT, LEARNT * ANSWERS, ANSWERS)
    assert losses(reference_scores[learnt]).mean() < 0.1 < losses(reference_scores).mean()
    assert_agree(scores, reference_scores)


def test_adapter_scores(adapter_scores, scores, reference, folders, some):
    base, adapter, merged = folders
    assert_agree(adapter_scores, in_order(reference(base, adapter).score(some)))
    # In float32: a merged weight rounded to bfloat16 is another weight, and moves losses by as much as is allowed here.
    assert_agree(adapter_scores, in_order(reference(merged, dtype="float32").score(some)))
    changes = losses(adapter_scores).reshape(-1, 2) - losses(scores).reshape(-1, ANSWERS)[:, [RIGHT, WRONG.start]]
    print(f"the adapter moves losses by {np.median(np.abs(changes)):.2f}")
    assert np.median(np.abs(changes)) > 0.2


def test_forget_quality(scores, reference_scores, smollm2, reference, requests):
    """The same distance to a model that never saw the questions."""

    def truth_ratios(scores):
        by_question = losses(scores).reshape(-1, ANSWERS)
        return truth_ratio(by_question[:, PARAPHRASE], by_question[:, WRONG])

    never_learnt = truth_ratios(in_order(reference(smollm2).score(requests)))
    distances = [forget_quality(truth_ratios(side), never_learnt)["ks_d"] for side in (scores, reference_scores)]
    print(f"D {distances[0]:.4f}, with transformers {distances[1]:.4f}")
    assert abs(distances[0] - distances[1]) <= 1 / len(never_learnt) + 1e-9


def test_generations(engine, reference, folders, requests, tokenizer):
    """The same tokens, but where the model itself can't tell which of two comes next."""
    prompts = [GenerateRequest(prompt_ids, MAX_NEW_TOKENS) for prompt_ids, _ in requests[RIGHT::ANSWERS]]
    backends = engine, reference(folders[0])
    found, expected = (in_order(backend.generate(prompts)) for backend in backends)
    same = [one == other for one, other in zip(found, expected, strict=True)]
    assert np.mean(same[:LEARNT]) >= 0.95
    # Known by heart means that the answer came to its end, and the token that ended it is not part of it.
    answers = [request.answer_ids[:-1][:MAX_NEW_TOKENS] for request in requests[RIGHT : LEARNT * ANSWERS : ANSWERS]]
    assert np.mean([ids == answer for ids, answer in zip(found[:LEARNT], answers, strict=True)]) >= 0.8
    margins = []
    for index in np.flatnonzero(~np.array(same)):
        common = os.path.commonprefix([found[index], expected[index]])
        tokens = [[*ids, tokenizer.eos_token_id][len(common)] for ids in (found[index], expected[index])]
        continuations = [ScoreRequest(prompts[index].prompt_ids + common, [token]) for token in tokens]
        # In the precision that the tokens were chosen in: bfloat16 moves either log-probability by 0.1 and more from float32's.
        margins.append(min(abs(np.subtract(*losses(in_order(one.score(continuations))))) for one in backends))
    print(f"same {sum(same)} of {len(same)}, margins elsewhere {np.round(margins, 3)}")
    assert max(margins, default=0) < 0.1


def test_adapter_generations(engine, folders, requests):
    prompts = [GenerateRequest(prompt_ids, 8) for prompt_ids, _ in requests[RIGHT::ANSWERS]]
    base, adapter = (in_order(engine.generate(prompts, name)) for name in (None, folders[1]))
    assert base[:4] == [answer_ids[:8] for _, answer_ids in requests[RIGHT : 4 * ANSWERS : ANSWERS]]
    assert sum(one != other for one, other in zip(base, adapter, strict=True)) > 4


def test_any_order(engine, scores, requests):
    """
    The same scores, whatever stands beside a request, and whether or not a caller has left before all was computed.

    The same to what bfloat16 rounds: with others in its batch, an answer's loss moves by up to 0.03 nats per token. The
    scores of another request are nats away.
    """
    results = engine.score(requests)
    next(results)
    results.close()
    few = range(0, len(requests), 4)  # of every kind of answer
    backwards = in_order(engine.score([requests[index] for index in reversed(few)]))[::-1]
    assert_agree(backwards, [scores[index] for index in few])


@pytest.mark.parametrize(
    "arguments",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}],
    ids=["lm_head", "modules_to_save"],
)
def test_refuses_adapters_that_it_would_ignore(arguments, llama, tmp_path):
    from unlearn_eval.backends.vllm import VLLMBackend

    get_peft_model(llama, LoraConfig(r=4, **arguments)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trl-rkld merge .* or use `--backend transformers`"):
        VLLMBackend("unused", [0], "bfloat16", [str(tmp_path)])
