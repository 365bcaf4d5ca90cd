# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Tiny random models of many architectures: the trainer's loss is that of their own logits, in plain PyTorch."""

import pytest
import torch
from conftest import config, history
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from trl_rkld import RKLDTrainer


ALPHA = 8.0
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {"num_key_value_heads": 2}
# What each one is here for: bias, scale or soft cap of the head, tied or not, another backbone name.
ARCHITECTURES = {
    "llama": SMALL | GROUPED | {"tie_word_embeddings": False},
    "qwen2": SMALL | GROUPED | {"tie_word_embeddings": True},
    "qwen3": SMALL | GROUPED | {"head_dim": 8, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": SMALL | {"tie_word_embeddings": False},
    "phi": SMALL,  # head with a bias
    "gemma2": SMALL | GROUPED | {"head_dim": 8, "final_logit_softcapping": 2.0},  # soft cap that bites
    "cohere": SMALL | GROUPED | {"logit_scale": 0.25},
    "granite": SMALL | GROUPED | {"logits_scaling": 4.0, "tie_word_embeddings": True},
    "mistral": SMALL | GROUPED | {"tie_word_embeddings": False},
}


def build(name, vocab_size, seed):
    torch.manual_seed(seed)
    kind = CONFIG_MAPPING[name]
    settings = {"vocab_size": vocab_size, "initializer_range": 0.3, "pad_token_id": 2, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(kind(**settings, **ARCHITECTURES[name]))
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)  # zero by default: it would hide a lost bias
    return model


@torch.no_grad()
def dense_loss(student, original, augmented, dataset, beta):
    """Loss over a whole data set from the models' own logits, one sample at a time."""
    total = count = 0
    for sample in dataset:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])[1:]
        l_s, l_o, l_a = (
            model.eval()(ids).logits[0, :-1][labels != -100].float() for model in (student, original, augmented)
        )
        log_s = l_s.log_softmax(-1)
        log_t = (l_o - ALPHA * (l_a - l_o).clamp(min=0)).log_softmax(-1)
        first, second = (log_s, log_t) if beta == 1.0 else (log_t, log_s)
        total += (first.exp() * (first - second)).sum().item()
        count += len(l_s)
    return total / count


@pytest.mark.parametrize("beta", [1.0, 0.0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_is_the_oracle(name, beta, tokenizer, forget_set, tmp_path):
    model, augmented = build(name, len(tokenizer), seed=0), build(name, len(tokenizer), seed=1)
    trainer = RKLDTrainer(
        model,
        augmented_model=augmented,
        args=config(tmp_path, alpha=ALPHA, beta=beta, max_steps=2, per_device_train_batch_size=len(forget_set)),
        train_dataset=forget_set,
        processing_class=tokenizer,
    )
    original = build(name, len(tokenizer), seed=0)
    expected = dense_loss(original, original, augmented, trainer.train_dataset, beta)
    trainer.train()
    first, second = (row[0] for row in history(trainer, "forget_loss"))
    assert first == pytest.approx(expected, rel=1e-4)
    assert second == pytest.approx(first, rel=1e-4)  # the warm-up's first step has a rate of zero
    trainer.args.eval_strategy = "no"
    # After a step with a rate above zero, the student's head and body have moved, and the teacher's have not.
    expected = dense_loss(trainer.model, original, augmented, trainer.train_dataset, beta)
    trainer.model.eval()
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(first, rel=1e-3)


def test_unknown_head_is_refused(tokenizer, forget_set, tmp_path):
    """A model that does something to its logits that is not known here is caught by comparing with its own."""
    model = build("llama", len(tokenizer), seed=0)
    forward = model.forward

    def scaled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    model.forward = scaled
    trainer = RKLDTrainer(model, args=config(tmp_path), train_dataset=forget_set, processing_class=tokenizer)
    with pytest.raises(ValueError, match="This architecture is not supported"):
        trainer.train()
