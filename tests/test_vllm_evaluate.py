# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The whole way with vLLM: names in, result files out, an adapter of a 4-bit base among them."""

import json

import numpy as np
import pytest
import torch
from conftest import FORGET, RETAIN, SERVED_DTYPE
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn_eval import evaluate, evaluation
from unlearn_eval.results import item_values, read_log


pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, pairs in (("forget", FORGET), ("keep", RETAIN)):
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {"forget_dataset": str(folder / "forget.jsonl"), "retain_dataset": str(folder / "keep.jsonl")}


@pytest.fixture(scope="module")
def adapter(smollm2, tmp_path_factory):
    """An adapter that changes the model clearly, as one that was trained on the base in 4 bits."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    (folder / "unlearning.json").write_text(json.dumps({"quantization": NF4, "dtype": "float32"}))
    return str(folder)


def losses(log):
    return np.concatenate([item_values(log[f"{name}_Q_A_Prob"], "avg_loss", name) for name in ("forget", "retain")])


def test_a_4bit_base_is_served_dequantised(adapter, files, tmp_path):
    settings = files | {"max_new_tokens": 16}
    expected = evaluate(adapter, backend="transformers", output_dir=str(tmp_path / "transformers"), **settings)
    log = evaluate(adapter, backend="vllm", output_dir=str(tmp_path / "vllm"), **settings)
    assert log["metadata"]["quantization"] == expected["metadata"]["quantization"] == "nf4"
    assert (log["metadata"]["backend"], log["metadata"]["score_backend"]) == ("vllm", "vllm")
    differences = np.abs(losses(log) - losses(expected))
    print("4-bit: median", np.median(differences), "largest", differences.max())
    # The base's weights, dequantised, are rounded to bfloat16 once more.
    assert np.median(differences) <= 0.05 and differences.max() <= 0.15
    # In full precision the adapter stands on another base.
    other = evaluate(
        adapter, backend="transformers", output_dir=str(tmp_path / "full"), dtype=SERVED_DTYPE, **settings
    )
    assert other["metadata"]["quantization"] == "nf4"
    assert read_log(tmp_path / "vllm") == log
    assert log["mia_min_k_plus_plus"]["agg_value"] is None


@pytest.mark.parametrize(
    "kind, message",
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "vLLM would ignore part of the adapter"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "vLLM can't serve the adapter `adapter`"),
    ],
)
def test_what_vllm_cant_serve_is_refused_before_anything_is_computed(
    kind, message, smollm2, files, tmp_path, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    lora = LoraConfig(r=2, **kind)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(evaluation, "open_backends", None)
    settings = files | {"backend": "vllm", "score_backend": "transformers", "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=message):
        evaluate(str(tmp_path / "adapter"), **settings)


def test_base_and_adapter_share_an_engine_and_stay_apart(smollm2, adapter, files, tmp_path):
    (tmp_path / "adapter").symlink_to(adapter)
    settings = files | {"max_new_tokens": 0, "dtype": SERVED_DTYPE, "load_in_4bit": True}
    base, tuned = evaluate([smollm2, adapter], backend="vllm", output_dir=str(tmp_path / "out"), **settings)
    assert np.median(np.abs(losses(base) - losses(tuned))) > 0.05
    assert base["forget_Q_A_ROUGE"]["agg_value"] is None
    assert len(list((tmp_path / "out").glob("*/TOFU_EVAL.json"))) == 2
