# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Bad input is refused before anything is trained, with the field and the remedy named and no text shown."""

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import FORGET, RETAIN, config, rows, tiny_llama
from datasets import Dataset
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OPTConfig, ProcessorMixin

from trl_rkld import RKLDConfig, RKLDTrainer
from trl_rkld.data import load_records
from trl_rkld.trainer.checks import check_model


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def make(tokenizer, folder, data=None, model=None, args=None, **kwargs):
    return RKLDTrainer(
        model or tiny_llama(len(tokenizer), tie_word_embeddings=True),
        args=args or config(folder),
        train_dataset=rows(FORGET) if data is None else data,
        processing_class=tokenizer,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "The train dataset is empty"),
        ([{"foo": "a", "bar": "b"}], r"columns \['bar', 'foo'\]; expected question \+ answer"),
        (
            [{"question": "q", "answer": "a"}, {"question": "q", "answer": " "}],
            "Row 1 of the train .* empty or missing `answer`",
        ),
        ([{"question": "q", "answer": None}], "Row 0 of the train .* empty or missing `answer`"),
        ([{"prompt": "q", "completion": ""}], "empty or missing `completion`"),
        ([{"text": "a"}, {"text": None}], "Row 1 of the train .* empty or missing `text`"),
        ([{"messages": MESSAGES}, {"messages": None}], "Row 1 of the train .* empty or missing `messages`"),
        ([{"question": "q", "answer": 1984}], "Row 0 of the train .* a `answer` of type int. Write it as text"),
        ([{"question": "q", "answer": ["a"]}], "Row 0 of the train .* a `answer` of type list. Write it as text"),
        (
            [{"messages": [{"rol": "user", "content": "q"}]}],
            "Row 0 of the train .* message without `role` in `messages`",
        ),
        (
            [{"messages": [{"role": "user", "content": "q"}]}],
            "Row 0 of the train dataset: the last message is not one of the assistant",
        ),
        ([{"input_ids": [5, 6, 7], "labels": [5, -100, -100]}], "Row 0 of the train dataset has no counted token"),
        ([{"question": "q", "answer": "long " * 400}], "Row 0 .* has .* tokens, so `max_length=1024` would cut"),
    ],
)
def test_data(data, message, tokenizer, tmp_path):
    data = Dataset.from_list(data) if data else rows(FORGET).select([])
    with pytest.raises(ValueError, match=message):
        make(tokenizer, tmp_path, data)


def test_no_message_shows_a_text(tokenizer, tmp_path):
    secret = "Zaphod Beeblebrox"
    with pytest.raises(ValueError, match="max_length") as error:
        make(tokenizer, tmp_path, rows([(f"Who is {secret}?", f"{secret} " * 300)]))
    assert secret not in str(error.value)


@pytest.mark.parametrize("extra", [{}, {"images": []}], ids=["text", "images"])
def test_vision_language_models(extra, tokenizer, tmp_path):
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            super().__init__(tokenizer)

    data = Dataset.from_list([{"question": "q", "answer": "a"} | extra])
    with pytest.raises(ValueError, match="Vision-language models are not supported. Load a text model"):
        make(Processor(tokenizer), tmp_path, data, model=tiny_llama(len(tokenizer)))


def test_forget_set_is_required(tokenizer, tmp_path, llama):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        RKLDTrainer(llama, args=config(tmp_path), processing_class=tokenizer)


def test_an_empty_set_beside_an_evaluation_set_of_its_name(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="The retain dataset is empty"):
        make(tokenizer, tmp_path, retain_dataset=rows([]), eval_dataset={"retain": rows(RETAIN)})


def test_overlap(tokenizer, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"1 record\(s\) stand in the forget set and in `retain_dataset`, the first as row 2 and row 7",
    ):
        make(tokenizer, tmp_path, retain_dataset=rows([*RETAIN, FORGET[2]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True}, "`packing` and `padding_free` are not supported"),
        ({"padding_free": True}, "`packing` and `padding_free` are not supported"),
        ({"use_liger_kernel": True}, "`use_liger_kernel` is not supported"),
        ({"torch_compile": True}, "`torch_compile` is not supported"),
        ({"bf16_full_eval": True}, "`bf16_full_eval` and `fp16_full_eval` would round the weights"),
        ({"assistant_only_loss": True}, "`assistant_only_loss=True`"),
        ({"beta": 0.5}, "`beta` must be 1.0"),
        ({"alpha": -1.0}, "`alpha` must not be negative"),
        ({"retain_loss_type": "mse"}, "`retain_loss_type` must be"),
        ({"retain_coef": -0.1}, "`retain_coef` must not be negative"),
        ({"learning_rate": -1e-4}, "`learning_rate` must be positive, got -0.0001"),
        ({"stop_at_forget_prob": 1.5}, "`stop_at_forget_prob` must lie between"),
        ({"question_template": "no field"}, "`question_template` must contain"),
        ({"augmented_num_train_epochs": 0}, "`augmented_num_train_epochs` must be positive"),
        ({"augmented_learning_rate": 0.0}, "`augmented_learning_rate` must be positive"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "`skip_prepare_dataset`"),
        ({"loss_type": "dft"}, "`loss_type`"),
    ],
)
def test_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_unknown_setting(tmp_path):
    with pytest.raises(TypeError, match="alhpa"):
        RKLDConfig(str(tmp_path), alhpa=4.0)


def test_unwritable_teacher_cache(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    trainer = make(tokenizer, tmp_path, args=config(tmp_path, teacher_cache_dir=str(tmp_path / "file")))
    with pytest.raises(ValueError, match="`teacher_cache_dir=.* can't be written to"):
        trainer.train()


def test_full_disk(tokenizer, tmp_path, monkeypatch):
    trainer = make(tokenizer, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match="`teacher_cache_dir=.*has 0.0 GB free"):
        trainer.train()


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "virtual tokens"),
        (LoraConfig(init_lora_weights="pissa"), "With `init_lora_weights='pissa'`"),
        (LoraConfig(init_lora_weights=False), "With `init_lora_weights=False`"),
        (LoHaConfig(init_weights=False), "With `init_weights=False`"),
        (AdaLoraConfig(total_step=10), "AdaLoRA, and LoRA with `alora_invocation_tokens`, are not supported"),
        (
            LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5]),
            "AdaLoRA, and LoRA with `alora_invocation_tokens`",
        ),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "Leave the PEFT config's `bias` at 'none'"),
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "lm_head"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "Remove `lm_head`"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "`trainable_token_indices`"),
    ],
)
def test_adapters(peft_config, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, tmp_path, peft_config=peft_config)


def test_frozen_adapter(tokenizer, tmp_path, llama):
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters.*is_trainable=True"):
        make(tokenizer, tmp_path, model=model)


def test_adapter_names(tokenizer, tmp_path, llama):
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]), adapter_name="augmented")
    with pytest.raises(ValueError, match="called 'augmented'.*adapter_name='default'"):
        make(tokenizer, tmp_path, model=model)


def test_trainable_base_weights_beside_an_adapter(tokenizer, tmp_path, llama):
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="Beside the adapter, `.*norm.weight` is trainable"):
        make(tokenizer, tmp_path, model=model)


def test_adapter_path_as_model(tokenizer, tmp_path, llama):
    get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter. Load it with its base"):
        make(tokenizer, tmp_path, model=str(tmp_path / "adapter"))


def test_dropout_that_is_not_known(tokenizer, tmp_path):
    """OPT drops by `torch.nn.functional`, with rates that are attributes of its layers."""
    settings = dict(vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(OPTConfig(word_embed_proj_dim=32, dropout=0.3, **settings))
    trainer = make(tokenizer, tmp_path, model=model)
    with pytest.raises(ValueError, match="drops activations in a way that `disable_dropout` does not know"):
        trainer.train()


def test_8_bit(tokenizer, tmp_path, llama_path):
    with pytest.raises(ValueError, match="Only 4-bit quantisation is supported"):
        make(tokenizer, tmp_path, model=llama_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_repacked_4_bit_model(tokenizer, tmp_path, llama_path):
    model = AutoModelForCausalLM.from_pretrained(
        llama_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.float32
    )
    model.model.layers[0].self_attn.q_proj.weight.quant_state.packing_format_for_cpu = True
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="repacked the 4-bit model"):
        make(tokenizer, tmp_path, model=model)


def test_streaming(tokenizer, tmp_path):
    stream = rows(FORGET).to_iterable_dataset()
    given = {"augmented_model": tiny_llama(len(tokenizer), seed=1)}
    live = config(tmp_path, precompute_teacher=False, max_steps=1)
    with pytest.raises(ValueError, match="can't be made from a streaming `train_dataset`. Pass `augmented_model`"):
        make(tokenizer, tmp_path, stream, args=live)
    with pytest.raises(ValueError, match="streaming `train_dataset` can't be cached"):
        make(tokenizer, tmp_path, stream, **given)
    with pytest.raises(ValueError, match="can't be paired with a `retain_dataset`"):
        make(tokenizer, tmp_path, stream, args=live, retain_dataset=rows(RETAIN), **given)
    with pytest.raises(TypeError, match="`eval_dataset` can't be streamed"):
        make(tokenizer, tmp_path, eval_dataset=stream)
    stopping = config(tmp_path, precompute_teacher=False, max_steps=1, stop_at_forget_prob=0.1)
    with pytest.raises(ValueError, match="`stop_at_forget_prob` can't be measured on a streaming"):
        make(tokenizer, tmp_path, stream, args=stopping, **given)


def test_a_folder_that_is_taken(tokenizer, llama, tmp_path):
    """The augmented model replaces no other model, but one that an earlier start of the run has left."""
    taken = tmp_path / "target"
    llama.save_pretrained(taken)
    args = config(tmp_path, augmented_output_dir=str(taken))
    with pytest.raises(ValueError, match="`augmented_output_dir='.*target'` is not empty"):
        make(tokenizer, tmp_path, args=args)
    (taken / "unlearning.json").write_text('{"method": "augmented"}')
    make(tokenizer, tmp_path, args=args)


@pytest.mark.parametrize("parent", ["~", "."])
@pytest.mark.parametrize("name", ["teacher_cache_dir", "augmented_output_dir"])
def test_private_folders_lie_outside_the_output(name, parent, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    args = config(tmp_path, **{name: f"{parent}/output/inside"})
    with pytest.raises(ValueError, match=f"`{name}` must not lie in `output_dir`"):
        make(tokenizer, tmp_path, args=args)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_weights_in_parts(kind, llama):
    with pytest.raises(ValueError, match=f"{kind.value} is not supported: the teacher needs whole weights"):
        check_model(llama, kind)


def test_no_chat_template(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        make(tokenizer, tmp_path, Dataset.from_list([{"messages": messages}]))
    with pytest.raises(ValueError, match="`system_prompt` and `date_string` need a chat template"):
        make(tokenizer, tmp_path, args=config(tmp_path, system_prompt="Be brief."))


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.jsonl", None, FileNotFoundError, "does not exist"),
        ("broken.jsonl", '{"question": "a"}\n{"question": "Zaphod"', ValueError, "read as jsonl: line 2 is not JSON"),
        ("empty.jsonl", "", ValueError, "holds no records"),
        ("list.json", '["Zaphod"]', ValueError, "can't be read as json"),
        ("broken.json", '[{"question": "Zaphod"', ValueError, "can't be read as json"),
        ("lines.json", '{"question": "a"}\n{"question": "Zaphod"', ValueError, "read as json: line 2 is not JSON"),
        ("data.txt", "Zaphod", ValueError, "not a file of a known kind"),
        ("commas.csv", "question,answer\nwho,Zaphod, who else\n", ValueError, "line 2 has another number of cells"),
        ("mixed.jsonl", '{"question": "a"}\n{"question": 1}\n{"question": "Zaphod"}', ValueError, "mixes kinds"),
        ("long.csv", f"text\n{'Zaphod' * 30000}\n", ValueError, "can't be read as csv"),
        ("broken.parquet", "Zaphod", ValueError, "can't be read as parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_files(name, content, error, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message) as raised:
        load_records(str(path))
    assert "Zaphod" not in str(raised.value)


def test_a_first_record_in_place_of_a_header_is_not_shown(tokenizer, tmp_path):
    (tmp_path / "headless.csv").write_text("Who is Zaphod Beeblebrox?,He is the president.\nb,c\n")
    with pytest.raises(ValueError, match="not a name") as error:
        make(tokenizer, tmp_path, load_records(str(tmp_path / "headless.csv")))
    assert "Zaphod" not in str(error.value)


def test_long_streamed_row(tokenizer, tmp_path):
    trainer = make(
        tokenizer,
        tmp_path,
        rows([("q", "long " * 200)] * 4).to_iterable_dataset(),
        args=config(tmp_path, precompute_teacher=False, max_steps=1, max_length=64),
        augmented_model=tiny_llama(len(tokenizer), seed=1),
    )
    with pytest.raises(ValueError, match="Row 0 .* `max_length=64` would cut"):
        trainer.train()


def test_evaluation_without_a_teacher(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path, eval_dataset=rows(FORGET[:2]))
    with pytest.raises(ValueError, match="There is no teacher: it is made when `train"):
        trainer.evaluate()
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss > 0
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == loss
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == loss
    with pytest.raises(ValueError, match="Pass every evaluation set as `eval_dataset`"):
        trainer.evaluate(rows(RETAIN[:2]))


def test_non_finite_student(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path, args=config(tmp_path, save_strategy="steps", save_steps=1))

    def poison(*args, **kwargs):
        if trainer.state.global_step == 2:
            trainer.model.model.norm.weight.data.fill_(float("nan"))

    trainer.optimizer = None
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda *_: poison())
    trainer.model.model.norm.register_forward_pre_hook(poison)
    with pytest.raises(FloatingPointError, match="not finite at step 3: the student's logits"):
        trainer.train()
    saved = sorted(path.name for path in (tmp_path / "output").glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2"]
    from safetensors.torch import load_file

    assert all(torch.isfinite(x).all() for x in load_file(tmp_path / "output/checkpoint-2/model.safetensors").values())


@pytest.mark.parametrize("bad_step", [2, 3])
def test_non_finite_gradient(bad_step, tokenizer, tmp_path):
    """Found before the step is taken, also in the last one: no checkpoint, and not the model, ever holds a NaN."""
    trainer = make(tokenizer, tmp_path, args=config(tmp_path, save_strategy="steps", save_steps=1, max_steps=3))

    def poison(grad):
        return grad * float("nan") if trainer.state.global_step == bad_step - 1 and trainer.teacher else grad

    trainer.model.model.norm.weight.register_hook(poison)
    with pytest.raises(FloatingPointError, match=f"gradient is not finite at step {bad_step}; the step was not taken"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    saved = sorted(path.name for path in (tmp_path / "output").glob("checkpoint-*"))
    assert saved == [f"checkpoint-{step}" for step in range(1, bad_step)]


def test_non_finite_augmented_training(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path, args=config(tmp_path, augmented_learning_rate=1e30))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(FloatingPointError, match="augmented model's training loss is not finite"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_non_finite_teacher(tokenizer, tmp_path):
    augmented = tiny_llama(len(tokenizer), seed=1)
    augmented.model.norm.weight.data.fill_(float("inf"))
    trainer = make(tokenizer, tmp_path, augmented_model=augmented)
    with pytest.raises(FloatingPointError, match="What the teacher gives is not finite .Augmented model.s states"):
        trainer.train()
    assert not (tmp_path / "output").exists() or not list((tmp_path / "output").iterdir())


@pytest.mark.parametrize("bf16, capability, warned", [(True, "AVX2", 1), (True, "AVX512", 0), (False, "AVX2", 0)])
def test_slow_bfloat16_is_told(bf16, capability, warned, tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    make(tokenizer, tmp_path, args=config(tmp_path, bf16=bf16))
    assert [message.count("Set `bf16=False`") for message in caplog.messages if "bfloat16" in message] == [1] * warned
