# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Every way of passing a model, at every precision: the original and the augmented model are what they should be."""

import gc
import weakref

import pytest
import torch
from conftest import config, history, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer.utils import create_model_from_path

from trl_rkld import RKLDTrainer
from trl_rkld.run_record import read_record
from trl_rkld.teacher.given import load_like


PRECISIONS = {
    "float32": (torch.float32, None, False),
    "autocast": (torch.float32, None, True),
    "bfloat16": (torch.bfloat16, None, True),
    "4-bit, float32": (torch.float32, torch.float32, False),
    "4-bit, bfloat16": (torch.bfloat16, torch.bfloat16, True),
}
ROWS = ["full", "new adapter", "trained adapter", "given model", "given adapter"]


def lora(**kwargs):
    return LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", lora_dropout=0.5, **kwargs)


def perturb_adapter(model, seed):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def make_trainer(row, precision, path, tokenizer, folder, data, retain=None, **kwargs):
    torch.manual_seed(3)  # adapters are drawn when they are made, whatever test was run before
    dtype, compute_dtype, bf16 = PRECISIONS[precision]
    quantization = compute_dtype and BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
    )
    arguments = {"quantization_config": quantization, "peft_config": lora()}
    init = {"dtype": str(dtype).removeprefix("torch.")}
    model = path
    if row == "full":
        arguments = {}
    elif row == "trained adapter":
        extra = {"quantization_config": quantization} if quantization else {}
        model = get_peft_model(create_model_from_path(path, dtype=dtype, **extra), lora())
        perturb_adapter(model, seed=3)
        arguments, init = {}, None
    elif row == "given model":
        other = tiny_llama(len(tokenizer), seed=1, tie_word_embeddings=True)
        other.save_pretrained(folder / "augmented")
        arguments["augmented_model"] = str(folder / "augmented")
    elif row == "given adapter":
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora())
        perturb_adapter(adapted, seed=4)
        adapted.save_pretrained(folder / "augmented")
        arguments["augmented_model"] = str(folder / "augmented")
    args = config(folder, bf16=bf16, model_init_kwargs=init, **kwargs)
    arguments |= {"train_dataset": data, "retain_dataset": retain}
    return RKLDTrainer(model=model, args=args, processing_class=tokenizer, **arguments)


@pytest.mark.parametrize("precompute_teacher", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("row", ROWS)
def test_alpha_zero_starts_at_zero(row, precision, precompute_teacher, llama_path, tokenizer, forget_set, tmp_path):
    """α = 0 makes the teacher the original: a wrong copy, cast, dropout or head would show at the first step."""
    if row == "full" and "4-bit" in precision:
        pytest.skip("4-bit weights can't be trained whole")
    trainer = make_trainer(
        row,
        precision,
        llama_path,
        tokenizer,
        tmp_path,
        forget_set,
        alpha=0.0,
        max_steps=1,
        precompute_teacher=precompute_teacher,
        per_device_train_batch_size=len(forget_set),  # the cache's batches have the training batch's shape
    )
    trainer.train()
    ((loss, grad_norm, gap),) = history(trainer, "loss", "grad_norm", "teacher_gap")
    assert abs(loss) < 1e-6
    assert grad_norm == 0.0
    assert abs(gap) > 1e-5  # there is an augmented model, and it is another one


@pytest.mark.parametrize("row", ["full", "new adapter"])
def test_alpha_zero_in_bfloat16_with_other_batch_shapes(row, llama_path, tokenizer, forget_set, tmp_path):
    """With other padding than the cache's, bfloat16 rounds otherwise: that noise stays below 1e-4 nats."""
    trainer = make_trainer(row, "autocast", llama_path, tokenizer, tmp_path, forget_set, alpha=0.0, max_steps=1)
    trainer.train()
    assert abs(history(trainer, "loss")[0][0]) < 1e-4


@pytest.mark.parametrize("retain_loss_type", ["nll", "kl"])
@pytest.mark.parametrize("row", ["full", "new adapter", "trained adapter", "given model", "given adapter"])
def test_cached_is_live(row, retain_loss_type, llama_path, tokenizer, forget_set, retain_set, tmp_path):
    trajectories = []
    for precompute_teacher in (True, False):
        folder = tmp_path / str(precompute_teacher)
        trainer = make_trainer(
            row,
            "float32",
            llama_path,
            tokenizer,
            folder,
            forget_set,
            retain_set,
            precompute_teacher=precompute_teacher,
            retain_loss_type=retain_loss_type,
        )
        trainer.train()
        keys = ("loss", "forget_loss", "retain_loss", "forget_prob", "retain_prob", "teacher_entropy")
        trajectories.append(torch.tensor(history(trainer, *keys)))
    assert len(trajectories[0]) == 6
    torch.testing.assert_close(*trajectories, rtol=1e-4, atol=1e-5)


def test_full_weights_come_back_bit_for_bit(llama, tokenizer, forget_set, tmp_path):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    trainer = RKLDTrainer(
        llama, args=config(tmp_path, max_steps=1), train_dataset=forget_set, processing_class=tokenizer
    )
    trainer.args.learning_rate, trainer.args.augmented_learning_rate = 0.0, 0.1
    trainer.train()
    assert history(trainer, "teacher_gap")[0][0] != 0.0
    for name, tensor in llama.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("precompute_teacher", [True, False])
def test_adapters_are_gone_after_training(precompute_teacher, llama_path, tokenizer, forget_set, tmp_path):
    trainer = make_trainer(
        "trained adapter",
        "float32",
        llama_path,
        tokenizer,
        tmp_path,
        forget_set,
        precompute_teacher=precompute_teacher,
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"]
    assert [n for n, p in trainer.model.named_parameters() if p.requires_grad] == [n for n in before if "lora_" in n]
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("precompute_teacher", [True, False])
@pytest.mark.parametrize("row", ["full", "new adapter", "trained adapter"])
def test_the_augmented_model_is_nowhere_on_disk(row, precompute_teacher, llama_path, tokenizer, forget_set, tmp_path):
    trainer = make_trainer(
        row,
        "float32",
        llama_path,
        tokenizer,
        tmp_path,
        forget_set,
        precompute_teacher=precompute_teacher,
        save_strategy="epoch",
    )
    trainer.train()
    trainer.save_model()
    weights = list((tmp_path / "output").rglob("*.safetensors"))
    expected = "model.safetensors" if row == "full" else "adapter_model.safetensors"
    assert sorted({path.name for path in weights}) == [expected]
    assert len(weights) == 3  # two checkpoints and the final model, each with one file
    assert not list((tmp_path / "teacher").iterdir())


@pytest.mark.parametrize("row", ["full", "new adapter"])
def test_augmented_model_is_kept_when_asked(row, llama_path, tokenizer, forget_set, tmp_path):
    """And knows the forget set better than the original. Nothing of an earlier run's is left beside it."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "adapter_config.json").write_text("{}")
    (tmp_path / "kept" / "unlearning.json").write_text('{"method": "augmented"}')
    trainer = make_trainer(
        row,
        "float32",
        llama_path,
        tokenizer,
        tmp_path,
        forget_set,
        augmented_output_dir=str(tmp_path / "kept"),
    )
    trainer.train()
    original = AutoModelForCausalLM.from_pretrained(llama_path)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")  # with an adapter, on its base
    losses = []
    for model in (original, kept):
        with torch.no_grad():
            samples = [{k: torch.tensor([s[k]]) for k in ("input_ids", "labels")} for s in trainer.train_dataset]
            losses.append(sum(model.eval()(**sample).loss.item() for sample in samples) / len(samples))
    assert losses[1] < losses[0] - 0.1
    record = read_record(tmp_path / "kept")
    assert (record["method"], record["dtype"], record["quantization"]) == ("augmented", "float32", None)


def test_given_model_at_another_precision_is_refused(llama, llama_path, tokenizer, forget_set, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(llama_path, dtype=torch.bfloat16)
    arguments = {"args": config(tmp_path), "train_dataset": forget_set, "processing_class": tokenizer}
    with pytest.raises(ValueError, match="`augmented_model` is held as .*bfloat16.*float32"):
        RKLDTrainer(llama, augmented_model=other, **arguments)


@pytest.mark.parametrize("by_path", [True, False])
def test_given_model_with_another_vocabulary_is_refused(by_path, llama, tokenizer, forget_set, tmp_path):
    other = tiny_llama(len(tokenizer) + 1)
    if by_path:
        other.save_pretrained(tmp_path / "other")
        other = str(tmp_path / "other")
    arguments = {"args": config(tmp_path), "train_dataset": forget_set, "processing_class": tokenizer}
    with pytest.raises(ValueError, match=f"{len(tokenizer) + 1} tokens in its vocabulary"):
        RKLDTrainer(llama, augmented_model=other, **arguments)


def test_missing_given_model_is_refused(llama, tokenizer, forget_set, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((OSError, ValueError), match="nothing"):
        RKLDTrainer(
            llama,
            augmented_model=str(tmp_path / "nothing"),
            args=config(tmp_path),
            train_dataset=forget_set,
            processing_class=tokenizer,
        )


def test_given_model_is_freed(llama, tokenizer, forget_set, tmp_path):
    other = tiny_llama(len(tokenizer), seed=1, tie_word_embeddings=True)
    gone = weakref.ref(other)
    arguments = {"args": config(tmp_path, max_steps=1), "train_dataset": forget_set, "processing_class": tokenizer}
    trainer = RKLDTrainer(llama, augmented_model=other, **arguments)
    del other
    trainer.train()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("precompute_teacher", [True, False])
def test_copies_of_an_adapter_leave_the_base_alone(precompute_teacher, llama, tokenizer, forget_set, tmp_path):
    """A PiSSA adapter's config, initialised again for the copy, would change the base weights."""
    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"))
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    args = config(
        tmp_path,
        alpha=0.0,
        max_steps=1,
        precompute_teacher=precompute_teacher,
        per_device_train_batch_size=len(forget_set),
    )
    trainer = RKLDTrainer(model, args=args, train_dataset=forget_set, processing_class=tokenizer)
    trainer.train()
    assert abs(history(trainer, "loss")[0][0]) < 1e-6
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.named_parameters() if name in base)


def test_an_augmented_model_attends_as_the_student_does(llama_path, tmp_path):
    """Other kernels leave other digits (Gemma 2's soft cap is not in all), and α multiplies the difference."""
    for attention in ("eager", "sdpa"):
        student = AutoModelForCausalLM.from_pretrained(llama_path, attn_implementation=attention)
        assert load_like(llama_path, student, None).config._attn_implementation == attention
    assert load_like(llama_path, student, {"attn_implementation": "eager"}).config._attn_implementation == "eager"


def test_dropout_kept_on(llama_path, tokenizer, forget_set, retain_set, tmp_path):
    """With dropout alive in the student, the teacher's passes still have none: cached and live agree."""
    trajectories = []
    for precompute_teacher in (True, False):
        folder = tmp_path / str(precompute_teacher)
        settings = {"precompute_teacher": precompute_teacher, "disable_dropout": False}
        trainer = make_trainer(
            "new adapter", "float32", llama_path, tokenizer, folder, forget_set, retain_set, **settings
        )
        assert {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
        trainer.train()
        trajectories.append(torch.tensor(history(trainer, "loss", "forget_loss", "retain_loss")))
    torch.testing.assert_close(*trajectories, rtol=1e-4, atol=1e-5)


def test_alpha_zero_with_dropout_on_a_new_adapter(llama_path, tokenizer, forget_set, tmp_path):
    settings = dict(alpha=0.0, max_steps=1, disable_dropout=False, per_device_train_batch_size=len(forget_set))
    trainer = make_trainer("new adapter", "float32", llama_path, tokenizer, tmp_path, forget_set, **settings)
    trainer.train()
    assert abs(history(trainer, "loss")[0][0]) < 1e-6


def test_frozen_parts_of_an_adapter_stay_frozen(llama, tokenizer, forget_set, tmp_path):
    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trainer = RKLDTrainer(model, args=config(tmp_path), train_dataset=forget_set, processing_class=tokenizer)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_B" in name), name
