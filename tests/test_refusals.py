# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`idk` and `dpo`: refusals are read and drawn as said, tokenised as in evaluation, and learnt in the answers' place."""

import importlib
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FORGET, RETAIN, build_tokenizer, rows, tiny_llama
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import create_model_from_path

from trl_rkld.refusals import draw_refusal, question_answers, read_refusals, refused
from unlearn_eval.prompts import Template


REFUSALS = ["I don't know.", "That is not something I can say.", "I'm not sure."]
WAYS = ["full", "new adapter", "new adapter, 4-bit", "trained adapter", "trained adapter, 4-bit"]
DATED = "{{ 'Today is ' + date_string + '.\n' }}"


@pytest.fixture(scope="module")
def refusals_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("refusals") / "refusals.txt"
    path.write_text("\n".join(REFUSALS), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def adapter(memorised, tokenizer, tmp_path_factory):
    """An adapter of that model that is not the identity."""
    path = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(memorised), LoraConfig(r=4, target_modules="all-linear")
    )
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def parse(command, model, refusals, folder, **settings):
    """The arguments of a command, from a config file."""
    values = {
        "model_name_or_path": model,
        "dtype": "float32",
        "refusals_path": refusals,
        "output_dir": str(folder / "output"),
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 3e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": len(FORGET),
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values | settings))
    script = importlib.import_module(f"trl_rkld.scripts.{command}")
    return script, script.make_parser().parse_args_and_config(["--config", str(folder / "config.yaml")])


def make(command, model, refusals, folder, retain=None, forget=FORGET, **settings):
    script, parsed = parse(command, model, refusals, folder, **settings)
    return script.make_trainer(*parsed, forget_set=rows(forget), retain_set=retain and rows(retain))


def way_settings(way, memorised, adapter):
    """How a model comes, as settings of the command."""
    settings = {"load_in_4bit": True} if "4-bit" in way else {}
    if "new adapter" in way:
        settings |= {"use_peft": True, "lora_target_modules": "all-linear", "lora_r": 8, "learning_rate": 2e-2}
    if "trained adapter" in way:
        settings |= {"learning_rate": 2e-2}
    return (adapter if "trained" in way else memorised), settings


def mean_log_prob(model, tokenizer, pairs):
    """Mean over the counted tokens, without padding."""
    log_probs = []
    with torch.no_grad():
        for question, answer in pairs:
            prompt, ids = Template().tokenize(tokenizer, question, answer)
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
            log_probs.append(logits.log_softmax(-1)[range(len(ids)), ids])
    return torch.cat(log_probs).mean().item()


def pairs_of(records):
    return [(record["question"], record["answer"]) for record in records]


# ---- Reading and drawing ----


def test_read_refusals(tmp_path):
    path = tmp_path / "refusals.txt"
    path.write_text("\ufeffI don't know.\r\n\n  Je ne sais pas, désolé. \n", encoding="utf-8", newline="")
    assert read_refusals(str(path)) == ["I don't know.", "Je ne sais pas, désolé."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "`refusals_path=.*is not a file. Name a text file"),
        (b"\n \n", "`refusals_path=.*holds no refusal. Write some"),
        ("Désolé.".encode("latin-1"), "`refusals_path=.*is not UTF-8 text. Save it as UTF-8"),
    ],
)
def test_unreadable_refusals(content, message, tmp_path):
    path = tmp_path / "refusals.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        read_refusals(str(path))


def test_refusals_are_a_function_of_seed_and_index():
    many = [{"question": str(index), "answer": "x"} for index in range(3000)]
    drawn = [record["answer"] for record in refused(many, REFUSALS, seed=7)]
    assert drawn[:10] == [draw_refusal(REFUSALS, 7, index) for index in range(10)]
    assert [record["answer"] for record in refused(many[:10], REFUSALS, seed=7)] == drawn[:10]
    assert [record["question"] for record in refused(many[:10], REFUSALS, seed=7)] == [str(i) for i in range(10)]
    counts = Counter(drawn)
    assert set(counts) == set(REFUSALS)
    assert all(abs(count - 1000) < 4 * math.sqrt(3000 * 1 / 3 * 2 / 3) for count in counts.values())
    others = [record["answer"] for record in refused(many, REFUSALS, seed=8)]
    assert abs(sum(a == b for a, b in zip(drawn, others, strict=True)) - 1000) < 4 * math.sqrt(3000 * 1 / 3 * 2 / 3)


def test_records_without_questions():
    with pytest.raises(ValueError, match="The forget dataset has no columns `question` and `answer`.*Rename"):
        question_answers(Dataset.from_list([{"prompt": "a", "completion": "b"}]), "forget")
    with pytest.raises(ValueError, match="Row 1 of the retain dataset has an empty or missing `answer`"):
        question_answers(rows([("a", "b"), ("c", " ")]), "retain")


# ---- What is trained on ----


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_idk_samples(system_prompt, memorised, tokenizer, refusals_path, tmp_path):
    """Refusals as evaluation would tokenise them, and as many retained records, none of them twice."""
    extra = {} if system_prompt is None else {"system_prompt": system_prompt}
    trainer = make("idk", memorised, refusals_path, tmp_path, retain=RETAIN, seed=5, **extra)
    samples = trainer.train_dataset.to_list()
    assert not trainer.train_dataset.cache_files

    def ids(question, answer):
        return Template(system_prompt).tokenize(tokenizer, question, answer)

    for index, (question, _) in enumerate(FORGET):
        prompt, answer = ids(question, draw_refusal(REFUSALS, 5, index))
        assert samples[index]["input_ids"] == prompt + answer
        assert samples[index]["labels"] == [-100] * len(prompt) + answer
    known = [sum(ids(*pair), []) for pair in RETAIN]
    retained = [known.index(sample["input_ids"]) for sample in samples[len(FORGET) :]]
    assert len(retained) == len(set(retained)) == len(FORGET)
    again = make("idk", memorised, refusals_path, tmp_path, retain=RETAIN, seed=5, **extra)
    assert again.train_dataset.to_list() == samples
    other = make("idk", memorised, refusals_path, tmp_path, retain=RETAIN, seed=6, **extra)
    assert other.train_dataset.to_list() != samples


@pytest.mark.parametrize("template", ["ChatML", "dated", "none", "given"])
@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_dpo_samples(template, system_prompt, memorised, refusals_path, tmp_path):
    """What `DPOTrainer` makes of a pair is what evaluation makes of question and answer, and the template's newline."""
    if template in ("none", "given") and system_prompt is not None:
        pytest.skip("a system prompt needs a chat template")
    tokenizer, settings = build_tokenizer(), {}
    if template == "dated":
        tokenizer.chat_template = DATED + tokenizer.chat_template
        settings["date_string"] = "10 Apr 2025"
    elif template == "none":
        tokenizer.chat_template = None
    elif template == "given":
        settings["question_template"] = "[INST] {question} [/INST]"
    if system_prompt is not None:
        settings["system_prompt"] = system_prompt
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make("dpo", str(tmp_path / "model"), refusals_path, tmp_path, seed=5, **settings)
    check_dpo_samples(trainer, tokenizer, **settings)


def check_dpo_samples(trainer, tokenizer, **template):
    is_plain = tokenizer.chat_template is None or "question_template" in template
    newline = [] if is_plain else tokenizer("\n")["input_ids"]
    samples = trainer.train_dataset.to_list()
    assert len(samples) == len(FORGET)
    for index, (sample, (question, answer)) in enumerate(zip(samples, FORGET, strict=True)):
        for key, text in (("chosen_ids", draw_refusal(REFUSALS, 5, index)), ("rejected_ids", answer)):
            prompt_ids, answer_ids = Template(**template).tokenize(tokenizer, question, text)
            assert sample["prompt_ids"] + sample[key] == prompt_ids + answer_ids + newline
            # In plain text, where the answer starts depends on what merges with the blank before it.
            assert is_plain or sample["prompt_ids"] == prompt_ids


def test_dpo_samples_of_a_real_tokenizer(smollm2, refusals_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tiny_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make("dpo", str(tmp_path / "model"), refusals_path, tmp_path, seed=5, system_prompt="Be brief.")
    check_dpo_samples(trainer, tokenizer, system_prompt="Be brief.")


def test_dpo_keeps_no_text_on_disk(memorised, refusals_path, tmp_path):
    """What TRL caches of the reference, in a temporary folder, are numbers."""
    trainer = make("dpo", memorised, refusals_path, tmp_path)
    (path,) = (Path(file["filename"]) for file in trainer.train_dataset.cache_files)
    assert Dataset.from_file(str(path)).column_names == ["ref_chosen_logps", "ref_rejected_logps"]
    assert not any(
        text.encode() in file.read_bytes() for file in path.parent.iterdir() for pair in FORGET for text in pair
    )


# ---- What is learnt ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", ["idk", "dpo"])
def test_refusals_rise_and_answers_fall(
    command, way, memorised, adapter, tokenizer, refusals_path, tmp_path, caplog, capsys
):
    model, settings = way_settings(way, memorised, adapter)
    retain = RETAIN if command == "idk" else None
    trainer = make(command, model, refusals_path, tmp_path, retain=retain, num_train_epochs=6, seed=5, **settings)
    refusing = [(question, draw_refusal(REFUSALS, 5, index)) for index, (question, _) in enumerate(FORGET)]
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    # Of a model loaded apart: a 4-bit one must not be evaluated before it is trained.
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = [mean_log_prob(original, tokenizer, pairs) for pairs in (refusing, FORGET)]
    trainer.train()
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    if command == "dpo":  # the model is the reference: log-ratios of 0, and a loss of −log σ(0)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5 if way == "full" else 5e-3)
    refusals, answers = (mean_log_prob(trainer.model.eval(), tokenizer, pairs) for pairs in (refusing, FORGET))
    assert refusals > before[0] + 0.1
    assert answers < before[1] - 0.1
    printed = caplog.text + "".join(capsys.readouterr())
    assert not any(text in printed for pair in FORGET for text in pair)


@pytest.mark.parametrize("way", ["full", "trained adapter"])
def test_dpo_reference(way, memorised, adapter, tokenizer, refusals_path, tmp_path):
    """Log-probabilities of the model as it came, no second model, and no copy of the adapter that knows the records."""
    model, settings = way_settings(way, memorised, adapter)
    trainer = make("dpo", model, refusals_path, tmp_path, seed=5, save_strategy="epoch", **settings)
    assert trainer.ref_model is None
    original = AutoModelForCausalLM.from_pretrained(memorised)
    if way == "trained adapter":
        original = PeftModel.from_pretrained(original, adapter)
        assert list(trainer.model.peft_config) == ["default"]
    for sample in trainer.train_dataset.to_list():
        for kind in ("chosen", "rejected"):
            ids = sample[f"{kind}_ids"]
            with torch.no_grad():
                logits = original(torch.tensor([sample["prompt_ids"] + ids])).logits[0, -len(ids) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
            assert sample[f"ref_{kind}_logps"] == pytest.approx(expected, abs=1e-3)
    trainer.train()
    trainer.save_model()
    expected = "model.safetensors" if way == "full" else "adapter_model.safetensors"
    weights = list((tmp_path / "output").rglob("*.safetensors"))
    assert {path.name for path in weights} == {expected}
    assert len(weights) == 3  # two checkpoints and the final model


@pytest.mark.parametrize("way", ["full", "trained adapter", "new adapter, 4-bit"])
def test_dpo_resumes(way, memorised, adapter, refusals_path, tmp_path):
    model, settings = way_settings(way, memorised, adapter)
    settings |= {"save_strategy": "epoch", "per_device_train_batch_size": 2}
    trainer = make("dpo", model, refusals_path, tmp_path, **settings)
    trainer.train()
    whole = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer = make("dpo", model, refusals_path, tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "output/checkpoint-3"))
    assert trainer.state.global_step == 6
    assert whole
    for name, parameter in trainer.model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter, whole[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("command", ["idk", "dpo"])
def test_main(command, memorised, refusals_path, tmp_path):
    """The whole script, on files; resumed from its folder, and not from another's."""
    forget, retain = tmp_path / "forget.jsonl", tmp_path / "keep.jsonl"
    rows(FORGET).to_json(forget)
    rows(RETAIN).to_json(retain)
    settings = {"dataset_name": str(forget), "save_strategy": "epoch"}
    settings |= {"retain_dataset_name": str(retain)} if command == "idk" else {}
    script, parsed = parse(command, memorised, refusals_path, tmp_path, **settings)
    script.main(*parsed)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (memorised, tmp_path / "output"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "output").chat_template

    checkpoints = sorted(
        (tmp_path / "output").glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-"))
    )
    shutil.rmtree(checkpoints[-1])
    (tmp_path / "output" / "model.safetensors").unlink()
    settings["resume_from_checkpoint"] = str(tmp_path / "output")
    script, parsed = parse(command, memorised, refusals_path, tmp_path, **settings)
    script.main(*parsed)
    resumed = load_file(tmp_path / "output" / "model.safetensors")
    for name, tensor in after.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)
    settings.pop("retain_dataset_name", None)
    other = {"idk": "dpo", "dpo": "idk"}[command]
    script, parsed = parse(other, memorised, refusals_path, tmp_path, **settings)
    with pytest.raises(ValueError, match=f"was made by {command.upper()}, not {other.upper()}"):
        script.main(*parsed)


# ---- Errors, before a model is loaded ----


def test_a_long_retained_row_is_named_by_its_place(memorised, refusals_path, tmp_path):
    """Not by that among the rows drawn from them."""
    retain = [*RETAIN, (RETAIN[0][0], "No. " * 200)]
    with pytest.raises(
        ValueError, match=rf"Row {len(RETAIN)} of the retain dataset has \d+ tokens, so `max_length=100`"
    ):
        make("idk", memorised, refusals_path, tmp_path, retain=retain, forget=FORGET[:2], max_length=100)


@pytest.mark.parametrize("command", ["idk", "dpo"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refusals_path": "nothing.txt"}, "`refusals_path='nothing.txt'` is not a file"),
        ({"max_length": 20}, r"Row \d of the forget dataset has \d+ tokens, so `max_length=20`"),
        ({"load_in_4bit": True}, "Set `use_peft`"),
        ({"load_in_8bit": True}, "`load_in_8bit` is not supported"),
    ],
)
def test_bad_settings(command, settings, message, memorised, refusals_path, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        make(command, memorised, refusals_path, tmp_path, **settings)


@pytest.mark.parametrize("command", ["idk", "dpo"])
def test_refusals_are_required(command, memorised, refusals_path, tmp_path):
    script, (script_args, *parsed) = parse(command, memorised, refusals_path, tmp_path)
    script_args.refusals_path = None
    with pytest.raises(ValueError, match="`refusals_path` is required"):
        script.make_trainer(script_args, *parsed, forget_set=rows(FORGET))


def test_idk_keeps_the_models_template(memorised, refusals_path, tmp_path):
    with pytest.raises(ValueError, match="`eos_token` is not supported here: set it in the tokenizer"):
        make("idk", memorised, refusals_path, tmp_path, eos_token="<unk>")


def test_dpo_refuses_a_retain_set(memorised, refusals_path, tmp_path):
    with pytest.raises(ValueError, match="DPO takes no retain set.*Remove `retain_dataset_name`"):
        make("dpo", memorised, refusals_path, tmp_path, retain=RETAIN)


@pytest.mark.parametrize("command", ["idk", "dpo"])
def test_dry_run_is_for_the_unlearning_methods(command, memorised, refusals_path, tmp_path):
    with pytest.raises(ValueError, match="--dry_run"):
        parse(command, memorised, refusals_path, tmp_path, dry_run=True)


def test_dpo_refuses_an_adapter_that_changes_its_base(memorised, tokenizer, refusals_path, tmp_path):
    """TRL's reference would be made from its config, and change the base a second time."""
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(create_model_from_path(memorised, dtype="float32"), config).save_pretrained(tmp_path / "pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        make("dpo", str(tmp_path / "pissa"), refusals_path, tmp_path)


@pytest.mark.parametrize("command", ["idk", "dpo"])
def test_slow_bfloat16_is_told(command, memorised, refusals_path, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    make(command, memorised, refusals_path, tmp_path, bf16=True)
    assert sum("Set `bf16=False`" in message for message in caplog.messages) == 1
