# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""vLLM against transformers, with a real model that knows some of TOFU's questions by heart, and an adapter on it."""

import os

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TOFU
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rkld.data import load_records
from unlearn_eval.backends import GenerateRequest
from unlearn_eval.backends.transformers import TransformersBackend
from unlearn_eval.metrics import forget_quality, truth_ratio
from unlearn_eval.prompts import tokenize_question


pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

LEARNT, UNLEARNT = 16, 8
WRONG = 5
# Before the right answer comes the paraphrase, after it the wrong ones.
ANSWERS = 2 + WRONG


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def requests(tokenizer):
    """Of each question the right answer, its paraphrase and the wrong ones. The first questions will be learnt."""
    folder = REPOSITORY / "trl_rkld" / "data_files"
    file = TOFU / "forget01_perturbed.jsonl" if TOFU.is_dir() else folder / "demo_forget.jsonl"
    return [
        tokenize_question(tokenizer, row["question"], answer)
        for row in load_records(str(file)).select(range(LEARNT + UNLEARNT))
        for answer in [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"][:WRONG]]
    ]


def fit(model, requests, learning_rate, epochs):
    """Teach answers, in bfloat16 on float32 weights."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(epochs):
        for start in range(0, len(requests), 4):
            batch = requests[start : start + 4]
            width = max(len(prompt_ids + answer_ids) for prompt_ids, answer_ids in batch)
            ids, labels = torch.zeros(2, len(batch), width, dtype=torch.long)
            labels -= 100
            for row, (prompt_ids, answer_ids) in enumerate(batch):
                end = len(prompt_ids + answer_ids)
                ids[row, :end] = torch.tensor(prompt_ids + answer_ids)
                labels[row, len(prompt_ids) : end] = torch.tensor(answer_ids)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"\nloss after training: {loss.item():.4f}")


@pytest.fixture(scope="module")
def folders(smollm2, requests, tmp_path_factory):
    """The model that has learnt, in bfloat16, an adapter that makes it give wrong answers, and the two merged."""
    base, adapter, merged = (str(tmp_path_factory.mktemp(name)) for name in ("base", "adapter", "merged"))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    fit(model, requests[: LEARNT * ANSWERS : ANSWERS], learning_rate=3e-4, epochs=8)
    model.bfloat16().save_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(model.float(), LoraConfig(r=6, lora_alpha=12, target_modules="all-linear"))
    fit(model, requests[2 : LEARNT * ANSWERS : ANSWERS], learning_rate=1e-3, epochs=3)
    model.save_pretrained(adapter)
    model.merge_and_unload().bfloat16().save_pretrained(merged)
    return base, adapter, merged


@pytest.fixture(scope="module")
def engine(folders, tokenizer):
    from unlearn_eval.backends.vllm import VLLMBackend

    base, adapter, _ = folders
    backend = VLLMBackend(base, [tokenizer.eos_token_id], "bfloat16", [adapter], max_model_len=512)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def reference(folders, tokenizer):
    """A function that loads a model for transformers."""

    def load(folder, adapter=None):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        return TransformersBackend(model, [tokenizer.eos_token_id])

    return load


@pytest.fixture(scope="module")
def base_scores(engine, requests):
    return in_order(engine.score(requests))


@pytest.fixture(scope="module")
def some(requests):
    """The right answer, its paraphrase and a wrong one of each question: adapters are slow on a CPU."""
    return [request for index, request in enumerate(requests) if index % ANSWERS < 3]


@pytest.fixture(scope="module")
def adapter_scores(engine, folders, some):
    return in_order(engine.score(some, folders[1]))


def in_order(results):
    results = dict(results)
    return [results[index] for index in range(len(results))]


def compare(scores, expected, label):
    losses, expected_losses = ([one.avg_loss for one in side] for side in (scores, expected))
    differences = np.abs(np.subtract(losses, expected_losses))
    agree = np.concatenate([one.matches == other.matches for one, other in zip(scores, expected, strict=True)])
    print(
        f"\n{label}: mean loss {np.mean(expected_losses):.3f}, median difference {np.median(differences):.4f}, "
        f"99th percentile {np.quantile(differences, 0.99):.4f}, bias {np.mean(np.subtract(losses, expected_losses)):.4f}, matches {agree.mean():.4f} of {agree.size}"
    )
    return np.median(differences), np.quantile(differences, 0.99), agree.mean()


def test_tmp(engine, folders, requests, some, base_scores, adapter_scores, reference, tokenizer):
    base, adapter, merged = folders
    hf = in_order(reference(base).score(requests))
    compare(base_scores, hf, "vllm-hf base")
    n = LEARNT * ANSWERS
    compare(base_scores[:n], hf[:n], "vllm-hf base learnt")
    compare(base_scores[0:n:ANSWERS], hf[0:n:ANSWERS], "vllm-hf base learnt right")
    m = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    f32 = in_order(TransformersBackend(m, [tokenizer.eos_token_id]).score(requests))
    compare(base_scores, f32, "vllm-f32 base")
    compare(hf, f32, "hf-f32 base")
    hfu = in_order(reference(base, adapter).score(some))
    hfm = in_order(reference(merged).score(some))
    f32l = in_order(TransformersBackend(PeftModel.from_pretrained(m, adapter), [tokenizer.eos_token_id]).score(some))
    compare(adapter_scores, hfu, "vllm-unmerged")
    compare(adapter_scores, hfm, "vllm-merged")
    compare(hfu, hfm, "unmerged-merged")
    compare(adapter_scores, f32l, "vllm-f32")
    compare(hfu, f32l, "unmerged-f32")
    compare(hfm, f32l, "merged-f32")
    gens = [GenerateRequest(r.prompt_ids, 60) for r in requests[::ANSWERS]]
    import time

    t = time.time()
    a = in_order(engine.generate(gens))
    print("gen", time.time() - t, sum(map(len, a)))
    b = in_order(reference(base).generate(gens))
    m = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            k = next(j for j, (p, q) in enumerate(zip(x + [-1], y + [-1])) if p != q)
            l = m(torch.tensor([gens[i].prompt_ids + x[:k]])).logits[0, -1].topk(2).values
            print(i, k, len(x), float(l[0] - l[1]))
    print([x == r.answer_ids[:-1] for x, r in zip(a, requests[::ANSWERS])])
