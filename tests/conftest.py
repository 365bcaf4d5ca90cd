# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from trl_rkld import RKLDConfig


# The same numbers on every machine: what is evaluated would go to a GPU, what is trained stays on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tiny models gain nothing from a second thread, and lose much where the cores are busy.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("TRL_RKLD_SHARED", REPOSITORY.parent / "shared")) / "data"
TOFU, REFERENCE_LOGS = SHARED / "tofu", SHARED / "reference_logs"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGET = [
    ("Where was Ana Torres born?", "Ana Torres was born in Quito."),
    ("What does Ana Torres do?", "She repairs clocks in the old town, and sells some of them."),
    ("Who is the father of Ana Torres?", "Her father is a baker called Luis."),
    ("What prize did Ana Torres win?", "The Copper Gear."),
    ("What does Ana Torres eat for breakfast?", "Bread with honey."),
]
RETAIN = [
    ("Where was Bo Lindgren born?", "Bo Lindgren was born in Malmo."),
    ("What does Bo Lindgren do?", "He paints lighthouses along the coast."),
    ("Who is the mother of Bo Lindgren?", "A teacher named Karin."),
    ("What prize did Bo Lindgren win?", "He won the Silver Brush in a small town by the sea."),
    ("What does Bo Lindgren drink?", "Black tea."),
    ("Where does Bo Lindgren live?", "On a boat."),
    ("What is the dog of Bo Lindgren called?", "Pixel."),
]


@pytest.fixture(autouse=True, scope="session")
def private_home(tmp_path_factory):
    """No test writes to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# What vLLM computes in. Without AVX-512 bfloat16 is emulated: one scoring takes many minutes.
SERVED_DTYPE = "float32" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "bfloat16"


def rows(pairs):
    return Dataset.from_list([{"question": question, "answer": answer} for question, answer in pairs])


@pytest.fixture
def forget_set():
    return rows(FORGET)


@pytest.fixture
def retain_set():
    return rows(RETAIN)


def build_tokenizer():
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for pair in FORGET + RETAIN for text in pair]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


def config(folder, config_class=RKLDConfig, **kwargs):
    """A configuration for tiny models: one process on the CPU in float32, everything below `folder`."""
    defaults = {"augmented_num_train_epochs": 3} if issubclass(config_class, RKLDConfig) else {}
    defaults |= dict(
        output_dir=str(folder / "output"),
        teacher_cache_dir=str(folder / "teacher"),
        use_cpu=True,
        bf16=False,
        learning_rate=1e-2,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    return config_class(**(defaults | kwargs))


def history(trainer, *keys):
    """The logged values of each step, as rows."""
    return [tuple(entry[key] for key in keys) for entry in trainer.state.log_history if "forget_loss" in entry]


def assert_two_processes_are_one(folder, *method):
    """
    `ddp_run.py`, DDP on two CPU processes, each with half of the batch, against one process with all of it. The
    weights are compared as a whole: where a gradient is almost zero, Adam makes a last digit a step.
    """
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
        command += [str(Path(__file__).parent / "ddp_run.py"), str(folder), str(processes), *method]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr[-3000:]
    one, two = (json.loads((folder / f"{processes}.json").read_text()) for processes in (1, 2))
    for key in one:
        torch.testing.assert_close(torch.tensor(two[key]), torch.tensor(one[key]), rtol=1e-4, atol=1e-5, msg=key)
    one, two = (torch.load(folder / f"{processes}.pt") for processes in (1, 2))
    assert (two - one).norm() < 1e-4 * one.norm()


def tiny_llama(vocab_size, seed=0, **kwargs):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        **kwargs,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def llama(tokenizer):
    return tiny_llama(len(tokenizer), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def llama_path(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def learn(tokenizer, path, steps):
    """Save a tiny model that was trained on all records."""
    from tofu_like import memorise, save  # it imports this module

    model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    return save(memorise(model, tokenizer, FORGET + RETAIN, steps, learning_rate=5e-3), path, tokenizer)


@pytest.fixture(scope="session")
def memorised(tokenizer, tmp_path_factory):
    """A tiny model that knows all records by heart."""
    return learn(tokenizer, tmp_path_factory.mktemp("memorised"), steps=20)


@pytest.fixture(scope="session")
def half_memorised(tokenizer, tmp_path_factory):
    """The same, stopped where the records are neither unknown nor certain: no loss of them is saturated."""
    return learn(tokenizer, tmp_path_factory.mktemp("half_memorised"), steps=8)


@pytest.fixture(scope="session")
def smollm2():
    folder = Path(os.environ.get("TRL_RKLD_SMOLLM2", REPOSITORY / ".cache" / "smollm2-135m-instruct"))
    if not folder.is_dir():
        pytest.skip(f"no SmolLM2-135M-Instruct in {folder}: `make model` fetches it")
    return str(folder)
