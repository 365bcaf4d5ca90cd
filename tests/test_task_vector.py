# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`task-vector`: the result is `θ_o − scale · (θ_aug − θ_o)`, whether models or adapters are given."""

import json
import shutil

import pytest
import torch
from conftest import tiny_llama
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_rkld.cli import main
from trl_rkld.run_record import read_record, write_record
from trl_rkld.scripts.merge import merge
from trl_rkld.scripts.task_vector import subtract
from unlearn_eval.quantization import keep_quantized_weights


IDS = torch.arange(60).reshape(3, 20)
LORAS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "rsLoRA": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"down_proj": 3},
    },
    "embeddings": {"r": 3, "target_modules": ["v_proj", "embed_tokens"]},
}


def save_model(path, tokenizer, seed, dtype=torch.float32, **kwargs):
    tiny_llama(len(tokenizer), seed=seed, **kwargs).to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def base(tokenizer, tmp_path):
    # Untied, so that a changed embedding changes no head
    return save_model(tmp_path / "base", tokenizer, seed=0, tie_word_embeddings=False)


def save_adapter(path, base, tokenizer, seed, **kwargs):
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**kwargs))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def merged(base, adapter):
    """The weights of an adapter with its base, by PEFT's own merge."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()


def explicit(original, augmented, scale):
    """The formula, written out on whole models."""
    weights, other = original.state_dict(), augmented.state_dict()
    original.load_state_dict({name: w - scale * (other[name] - w) for name, w in weights.items()})
    return original


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


# ---- Two models ----


@pytest.mark.parametrize("tied", [True, False])
def test_models(tied, tokenizer, tmp_path):
    paths = [
        save_model(tmp_path / str(seed), tokenizer, seed, torch.bfloat16, tie_word_embeddings=tied) for seed in (0, 1)
    ]
    subtract(*paths, str(tmp_path / "runs/result"), scale=2.5)
    before, other, after = (load_file(f"{path}/model.safetensors") for path in (*paths, tmp_path / "runs/result"))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) != tied
    for name, tensor in after.items():
        expected = 3.5 * before[name].double() - 2.5 * other[name].double()
        assert tensor.dtype == torch.bfloat16
        # Rounded to bfloat16 once: 8 bits of mantissa.
        assert ((tensor.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all(), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/result")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "runs/result").chat_template == tokenizer.chat_template
    assert not list((tmp_path / "runs").glob("*.partial"))


def test_dtype(tokenizer, tmp_path):
    paths = [save_model(tmp_path / str(seed), tokenizer, seed, torch.bfloat16) for seed in (0, 1)]
    subtract(*paths, str(tmp_path / "result"), scale=1.0, dtype="float32")
    before, other, after = (load_file(f"{path}/model.safetensors") for path in (*paths, tmp_path / "result"))
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, 2 * before[name].float() - other[name].float())
    assert json.loads((tmp_path / "result/config.json").read_text())["dtype"] == "float32"


def test_scale_zero_is_the_original(tokenizer, tmp_path):
    paths = [save_model(tmp_path / str(seed), tokenizer, seed) for seed in (0, 1)]
    subtract(*paths, str(tmp_path / "result"), scale=0)
    before, after = (load_file(f"{path}/model.safetensors") for path in (paths[0], tmp_path / "result"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


# ---- Adapters ----


@pytest.mark.parametrize("kind", LORAS)
def test_adapter_of_the_original(kind, base, tokenizer, tmp_path):
    augmented = save_adapter(tmp_path / "augmented", base, tokenizer, seed=1, **LORAS[kind])
    subtract(base, augmented, str(tmp_path / "result"), scale=2.5)
    assert PeftConfig.from_pretrained(tmp_path / "result").base_model_name_or_path == base
    expected = logits(explicit(AutoModelForCausalLM.from_pretrained(base), merged(base, augmented), 2.5))
    result = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "result")
    torch.testing.assert_close(logits(result), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(tmp_path / "result").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("kind", LORAS)
def test_two_adapters(kind, base, tokenizer, tmp_path):
    original = save_adapter(tmp_path / "original", base, tokenizer, seed=1, **LORAS[kind])
    other = {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"]}
    if kind == "plain":
        other["target_modules"] = "all-linear"
    augmented = save_adapter(tmp_path / "augmented", base, tokenizer, seed=2, **other)
    subtract(original, augmented, str(tmp_path / "result"), scale=1.5)
    assert (tmp_path / "result/adapter_model.safetensors").is_file()
    expected = logits(explicit(merged(base, original), merged(base, augmented), 1.5))
    result = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "result")
    torch.testing.assert_close(logits(result), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("both", [False, True])
def test_adapters_of_a_4_bit_base(both, base, tokenizer, tmp_path):
    """The oracle is the same base dequantised, and the formula on its weights."""
    settings = LORAS["plain"]
    augmented = save_adapter(tmp_path / "augmented", base, tokenizer, seed=2, **settings)
    original = save_adapter(tmp_path / "original", base, tokenizer, seed=1, **settings) if both else base
    subtract(original, augmented, str(tmp_path / "result"), scale=1.5)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    result, *wholes = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantization)
        for _ in range(3)
    )
    adapters = [original if both else None, augmented]
    wholes = [
        model.dequantize() if adapter is None else PeftModel.from_pretrained(model.dequantize(), adapter)
        for model, adapter in zip(wholes, adapters, strict=True)
    ]
    wholes = [model.merge_and_unload() if isinstance(model, PeftModel) else model for model in wholes]
    expected = logits(explicit(*wholes, 1.5))
    keep_quantized_weights(result)
    result = PeftModel.from_pretrained(result, tmp_path / "result")
    torch.testing.assert_close(logits(result), expected, rtol=1e-3, atol=1e-3)


def test_adapter_keeps_its_dtype_unless_told(base, tokenizer, tmp_path):
    original, augmented = (
        save_adapter(tmp_path / f"adapter{seed}", base, tokenizer, seed, **LORAS["plain"]) for seed in (1, 2)
    )
    for number, (first, dtype) in enumerate(
        [(base, None), (base, "bfloat16"), (original, None), (original, "bfloat16")]
    ):
        subtract(first, augmented, str(tmp_path / f"result{number}"), dtype=dtype)
        dtypes = {t.dtype for t in load_file(tmp_path / f"result{number}/adapter_model.safetensors").values()}
        assert dtypes == {getattr(torch, dtype or "float32")}


def test_record_tells_how_the_base_was_held(base, tokenizer, tmp_path):
    """Merged, the combination goes into the base dequantised, as the original adapter would."""
    original, augmented = (
        save_adapter(tmp_path / f"adapter{seed}", base, tokenizer, seed, **LORAS["plain"]) for seed in (1, 2)
    )
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    record = {"method": "RKLD", "finished": True, "dtype": "float32", "adapter": "x"}
    record |= {"quantization": quantization, "settings": {"alpha": 8.0}}
    write_record(original, json.loads(json.dumps(record)))
    subtract(original, augmented, str(tmp_path / "result"), scale=1.5)
    assert read_record(tmp_path / "result")["method"] == "task-vector"
    assert read_record(tmp_path / "result")["settings"] == {"scale": 1.5}
    subtract(base, original, str(tmp_path / "negated"), scale=1.5)
    assert read_record(tmp_path / "negated") == read_record(tmp_path / "result")
    merge(str(tmp_path / "result"), str(tmp_path / "merged"))
    held = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=BitsAndBytesConfig.from_dict(quantization)
    ).dequantize()
    expected = PeftModel.from_pretrained(held.float(), tmp_path / "result")
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(result), logits(expected), rtol=1e-3, atol=1e-3)


# ---- The command, and what it refuses ----


def test_command(base, tokenizer, tmp_path, capsys):
    augmented = save_model(tmp_path / "augmented", tokenizer, seed=1, tie_word_embeddings=False)
    arguments = ["task-vector", "--model_name_or_path", base, "--augmented_model_name_or_path", augmented]
    assert main([*arguments, "--output_dir", str(tmp_path / "result")]) == 0
    assert "Model saved to" in capsys.readouterr().out
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (base, augmented)]
    torch.testing.assert_close(logits(result), logits(explicit(*models, 2.5)), rtol=1e-4, atol=1e-4)
    assert main([*arguments, "--output_dir", str(tmp_path / "result")]) == 2
    assert "is not empty. Choose a new folder" in capsys.readouterr().err
    arguments[-1] = save_adapter(tmp_path / "adapter", base, tokenizer, seed=1, **LORAS["plain"])
    assert main([*arguments, "--output_dir", str(tmp_path / "negated")]) == 0
    assert "Switched off, it brings all back" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": float("nan")}, "`scale=nan` is not a finite number"),
        ({"scale": float("inf")}, "`scale=inf` is not a finite number"),
        ({"dtype": "int8"}, "`dtype='int8'` is not one of bfloat16, float16, float32"),
    ],
)
def test_bad_settings(settings, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        subtract(base, base, str(tmp_path / "result"), **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"extra": 1}, r"`model.embed_tokens.weight` is \(\d+, 64\)"), ({"tied": True}, "`lm_head.weight` is None")],
)
def test_other_models_are_refused_unread(change, message, base, tokenizer, tmp_path):
    other = tiny_llama(len(tokenizer) + change.get("extra", 0), tie_word_embeddings=change.get("tied", False))
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        subtract(base, str(tmp_path / "other"), str(tmp_path / "result"))
    assert not (tmp_path / "result").exists()


def test_quantised_weights_are_refused(base, tmp_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization)
    model.save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match="holds quantised weights"):
        subtract(base, str(tmp_path / "quantised"), str(tmp_path / "result"))


def test_overflow_is_refused(tokenizer, tmp_path):
    paths = [save_model(tmp_path / str(seed), tokenizer, seed, torch.float16) for seed in (0, 1)]
    with pytest.raises(ValueError, match="is not finite any more. Lower `scale`"):
        subtract(*paths, str(tmp_path / "result"), scale=1e6)
    assert not (tmp_path / "result").exists()


def test_adapters_that_do_not_fit_are_refused(base, tokenizer, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base, tokenizer, seed=1, **LORAS["plain"])
    shutil.copytree(base, tmp_path / "elsewhere")
    for first, second, message in [
        (adapter, base, "is an adapter and .* a whole model"),
        (str(tmp_path / "elsewhere"), adapter, "is an adapter of `.*base`, not of `.*elsewhere`"),
    ]:
        with pytest.raises(ValueError, match=message):
            subtract(first, second, str(tmp_path / "result"))
    elsewhere = save_adapter(tmp_path / "other", str(tmp_path / "elsewhere"), tokenizer, seed=1, **LORAS["plain"])
    with pytest.raises(ValueError, match="is an adapter of `.*elsewhere`, not of `.*base`"):
        subtract(adapter, elsewhere, str(tmp_path / "result"))


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "has `use_dora`"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "has `modules_to_save`"),
        (LoraConfig(target_modules=["q_proj"], lora_bias=True), "has `lora_bias`"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), "has `trainable_token_indices`"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "is a IA3 adapter. Only LoRA's"),
    ],
)
def test_adapters_that_are_no_difference_are_refused(peft_config, message, base, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft_config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        subtract(base, str(tmp_path / "adapter"), str(tmp_path / "result"))
