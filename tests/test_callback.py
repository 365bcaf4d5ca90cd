# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
`TofuEvalCallback`: its numbers are those of `evaluate`, and training does not notice it.

Run as a script under torchrun, this file is the training that `test_two_processes_are_one` compares.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
from callback_setup import FORGET_ANSWERS, fit, learner, score, sft_trainer, tofu_rows, write_data
from conftest import FORGET, RETAIN, config, rows, tiny_llama
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_rkld import RKLDTrainer
from unlearn_eval.backends.transformers import TransformersBackend
from unlearn_eval.callback import TofuEvalCallback, rounded_weights


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def target(tokenizer, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("target"), FORGET + RETAIN, tokenizer)


@pytest.fixture(scope="session")
def retain_logs(tokenizer, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retain_only")
    score(fit(folder, RETAIN, tokenizer), data, folder / "log")
    return str(folder / "log" / "TOFU_EVAL.json")


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3)


def rkld_trainer(target, folder, peft_config=None, **kwargs):
    return RKLDTrainer(
        AutoModelForCausalLM.from_pretrained(target),
        args=config(folder, **kwargs),
        train_dataset=rows(FORGET),
        retain_dataset=rows(RETAIN),
        processing_class=AutoTokenizer.from_pretrained(target),
        peft_config=peft_config,
    )


def with_callback(trainer, data, **settings):
    callback = TofuEvalCallback(trainer, **({"metric_for_best": "forget_prob", "min_utility": 0} | data | settings))
    trainer.add_callback(callback)
    return callback


class _AtEpochs(TrainerCallback):
    """Calls a function at each epoch's end."""

    def __init__(self, function):
        self.function = function

    def on_epoch_end(self, args, state, control, **kwargs):
        self.function(state)


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_entry_is_log(entry, log):
    names = {
        "forget_quality": "forget_quality",
        "forget_truth_ratio": "forget_truth_ratio",
        "forget_prob": "forget_Q_A_Prob",
        "extraction_strength": "extraction_strength",
        "retain_prob": "retain_Q_A_Prob",
        "retain_truth_ratio": "retain_Truth_Ratio",
        "forget_rouge": "forget_Q_A_ROUGE",
        "retain_rouge": "retain_Q_A_ROUGE",
    }
    expected = {ours: log[theirs]["agg_value"] for ours, theirs in names.items()}
    expected["ks_d"] = log["forget_quality"]["ks_d"]
    known = {name: value for name, value in expected.items() if value is not None}
    retain = [value for name, value in known.items() if name.startswith("retain_")]
    known["utility"] = len(retain) / sum(1 / value for value in retain)
    assert entry.keys() == {"epoch", "step", *known}
    for name, value in known.items():
        assert entry[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("make, peft", [(rkld_trainer, False), (rkld_trainer, True), (sft_trainer, True)])
def test_values_are_those_of_evaluate(make, peft, generate, target, data, retain_logs, tmp_path):
    trainer = make(target, tmp_path, peft_config=lora() if peft else None, learning_rate=3e-2 if peft else 1e-2)
    callback = with_callback(trainer, data, retain_logs=retain_logs, generate=generate)
    trainer.train()
    trainer.save_model(str(tmp_path / "last"))
    assert [entry["epoch"] for entry in callback.history] == [0, 1, 2]
    settings = {"retain_logs": retain_logs} | ({"max_new_tokens": 200} if generate else {})
    for entry, path in ((callback.history[0], target), (callback.history[-1], tmp_path / "last")):
        assert_entry_is_log(entry, score(path, data, tmp_path / f"log{entry['step']}", **settings))
    assert callback.history[0]["forget_prob"] != pytest.approx(callback.history[-1]["forget_prob"], rel=1e-2)
    logged = [logs for logs in trainer.state.log_history if "tofu_utility" in logs]
    assert [logs["tofu_ks_d"] for logs in logged] == [entry["ks_d"] for entry in callback.history]
    assert not any(name.startswith("eval_") for logs in logged for name in logs)


@pytest.mark.parametrize(
    "make, peft",
    [
        (rkld_trainer, False),
        (sft_trainer, False),
        (rkld_trainer, True),
        (sft_trainer, True),
    ],
)
def test_rounded_values_are_those_of_evaluate(make, peft, target, data, retain_logs, tmp_path):
    """`dtype="bfloat16"`: those of the model saved in float32 and loaded in bfloat16, before training and after."""
    trainer = make(target, tmp_path, peft_config=lora() if peft else None, learning_rate=3e-2 if peft else 1e-2)
    callback = with_callback(trainer, data, retain_logs=retain_logs, dtype="bfloat16")
    trainer.train()
    trainer.save_model(str(tmp_path / "last"))
    for entry, path in ((callback.history[0], target), (callback.history[-1], tmp_path / "last")):
        settings = {"retain_logs": retain_logs, "dtype": "bfloat16"}
        assert_entry_is_log(entry, score(path, data, tmp_path / f"log{entry['step']}", **settings))
    whole = score(tmp_path / "last", data, tmp_path / "float32", retain_logs=retain_logs, dtype="float32")
    # Else the test could not tell the two apart.
    assert callback.history[-1]["forget_prob"] != pytest.approx(whole["forget_Q_A_Prob"]["agg_value"], abs=1e-5)


@pytest.mark.parametrize("make, peft", [(rkld_trainer, False), (sft_trainer, False), (sft_trainer, True)])
def test_rounding_leaves_training_untouched(make, peft, target, data, tmp_path):
    """Weights, and the optimizer's moments, after epochs with and without; the best epoch is saved as it was trained."""
    trained, weights = [], {}
    for dtype in (None, "bfloat16"):
        trainer = make(target, tmp_path / str(dtype), peft_config=lora() if peft else None, num_train_epochs=3)
        if dtype is None:
            trainer.add_callback(
                _AtEpochs(lambda state, model=trainer.model: weights.update({state.global_step: parameters(model)}))
            )
        else:
            callback = with_callback(trainer, data, dtype=dtype)
        trainer.train()
        trained.append(trainer)
    one, other = trained
    before = parameters(AutoModelForCausalLM.from_pretrained(target))
    changed = 0
    for (name, weight), same in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert weight.dtype == same.dtype == torch.float32 and torch.equal(weight, same), name
        changed += name not in before or not torch.equal(weight, before[name])
    assert changed
    moments = [[state["exp_avg_sq"] for state in trainer.optimizer.state.values()] for trainer in trained]
    assert len(moments[0]) > 3 and all(map(torch.equal, *moments))
    folder = tmp_path / "bfloat16" / "output" / "best"
    model = AutoModelForCausalLM.from_pretrained(target if peft else folder)
    model = PeftModel.from_pretrained(model, folder) if peft else model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[callback.best["step"]][name]), name


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_come_back(dtype, fails, tokenizer):
    """Bit for bit and in the same memory, the tied ones tied, gradients with them, also after an error."""
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    inputs = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=inputs, labels=inputs).loss.backward()
    before, places = parameters(model), [parameter.data_ptr() for parameter in model.parameters()]
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    try:
        with rounded_weights(model, dtype):
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name].to(getattr(torch, dtype))), name
                assert parameter.dtype == getattr(torch, dtype)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            with torch.no_grad():
                assert model(input_ids=inputs).logits.dtype == getattr(torch, dtype)
            if fails:
                raise _Killed
    except _Killed:
        assert fails
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name
        assert torch.equal(parameter.grad, gradients[name])
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_auto_changes_nothing(tokenizer):
    """Nor does the dtype that the weights have; integers, such as 4-bit weights are, stay as they are."""
    model = tiny_llama(len(tokenizer))
    packed = torch.nn.Parameter(torch.tensor([1, 2, 3], dtype=torch.uint8), requires_grad=False)
    model.register_parameter("packed", packed)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    for dtype in ("auto", "float32"):
        with rounded_weights(model, dtype):
            assert [parameter.data_ptr() for parameter in model.parameters()] == places
    with rounded_weights(model, "bfloat16"):
        assert packed.dtype == torch.uint8 and packed.tolist() == [1, 2, 3]
        assert model.lm_head.weight.dtype == torch.bfloat16


def test_unknown_dtype(target, data, tmp_path):
    with pytest.raises(ValueError, match="`dtype='bf16'` is not one of auto, bfloat16, float16, float32"):
        with_callback(sft_trainer(target, tmp_path), data, dtype="bf16")


@pytest.mark.parametrize("make", [rkld_trainer, sft_trainer])
@pytest.mark.parametrize("logging", [{"logging_steps": 2}, {"logging_strategy": "epoch"}])
def test_training_is_untouched(logging, make, target, data, tmp_path):
    """Dropout draws random numbers in each step; means over two steps reach across an epoch's end of three."""

    def log_history(trainer):
        timed = ("runtime", "per_second")
        logs = [entry for entry in trainer.state.log_history if "tofu_utility" not in entry]
        return [
            {key: value for key, value in entry.items() if not any(word in key for word in timed)} for entry in logs
        ]

    trainers = []
    for name in ("without", "with"):
        trainer = make(target, tmp_path / name, peft_config=lora(), **logging)
        if name == "with":
            with_callback(trainer, data, generate=True)
        trainer.train()
        trainers.append(trainer)
    assert log_history(trainers[0]) == log_history(trainers[1])
    assert len(log_history(trainers[0])) >= 3
    for (name, one), other in zip(trainers[0].model.named_parameters(), trainers[1].model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_state_is_restored(target, data, tmp_path):
    """What a callback before ours sees at an epoch's end, one after it sees, too."""
    trainer = sft_trainer(target, tmp_path, peft_config=lora())
    seen = []

    def look(state):
        modes = [module.training for module in trainer.model.modules()]
        gradients = [parameter.grad is None for parameter in trainer.model.parameters()]
        seen.append((modes, gradients, torch.get_rng_state().tolist(), trainer.model.active_adapters))

    trainer.add_callback(_AtEpochs(look))
    with_callback(trainer, data, generate=True)
    trainer.add_callback(_AtEpochs(look))
    trainer.train()
    assert len(seen) == 4
    assert seen[0] == seen[1] and seen[2] == seen[3]
    assert all(seen[0][0]), "the model was not in training mode"


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("metric, sign", [("forget_prob", -1), ("ks_d", -1), ("forget_quality", 1)])
def test_best_epoch_is_kept(metric, sign, peft, target, data, retain_logs, tmp_path):
    trainer = sft_trainer(target, tmp_path, peft_config=lora() if peft else None, num_train_epochs=4)
    weights = {}
    trainer.add_callback(_AtEpochs(lambda state: weights.update({state.global_step: parameters(trainer.model)})))
    callback = with_callback(trainer, data, metric_for_best=metric, retain_logs=retain_logs)
    trainer.train()
    best = max(callback.history[1:], key=lambda entry: (sign * entry[metric], entry["utility"]))
    assert callback.best == best
    folder = tmp_path / "output" / "best"
    assert json.loads((folder / "tofu_eval.json").read_text()) == {"metric_for_best": metric, **best}
    if peft:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[best["step"]][name]), name
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_no_epoch_below_the_utility(target, data, tmp_path, caplog):
    trainer = sft_trainer(target, tmp_path, learning_rate=0.1)
    callback = with_callback(trainer, data, min_utility=0.9)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert all(entry["utility"] < 0.9 * callback.history[0]["utility"] for entry in callback.history[1:])
    assert callback.best is None
    assert not (tmp_path / "output" / "best").exists()
    assert "Lower `learning_rate`, or `min_utility`" in caplog.text


def test_best_epoch_has_the_utility(target, data, tmp_path):
    """The floor lies just above the utility of the epoch that would be the best without it."""

    def run(min_utility):
        trainer = sft_trainer(target, tmp_path, learning_rate=3e-2, num_train_epochs=3)
        callback = with_callback(trainer, data, min_utility=min_utility, keep_best=False)
        trainer.train()
        return callback

    free = run(0)
    before = free.history[0]["utility"]
    bound = run(free.best["utility"] / before + 1e-6)
    allowed = [entry for entry in bound.history[1:] if entry["utility"] > free.best["utility"]]
    assert bound.history == free.history and free.best not in allowed
    assert bound.best == min(allowed, key=lambda entry: entry["forget_prob"])


def test_keep_best_is_optional(target, data, tmp_path):
    trainer = sft_trainer(target, tmp_path)
    callback = with_callback(trainer, data, keep_best=False)
    trainer.train()
    assert callback.best is not None
    assert not (tmp_path / "output" / "best").exists()


def test_earlier_best_is_put_aside(target, data, tmp_path, caplog):
    trainer = sft_trainer(target, tmp_path)
    with_callback(trainer, data)
    trainer.train()
    first = (tmp_path / "output" / "best" / "tofu_eval.json").read_text()
    trainer = sft_trainer(target, tmp_path, learning_rate=0.1)
    with_callback(trainer, data, min_utility=1)
    trainer.train()
    assert (tmp_path / "output" / "best_previous" / "tofu_eval.json").read_text() == first
    assert not (tmp_path / "output" / "best").exists()
    assert "held the best epoch of another run" in caplog.text


# ---- Early stop and resume ----


class _Killed(Exception):
    pass


def _kill(step):
    def function(state):
        if state.global_step == step:
            raise _Killed

    return function


def test_early_stop(target, data, tmp_path):
    trainer = learner(target, tmp_path, num_train_epochs=6)
    callback = with_callback(trainer, data, patience=3)
    trainer.train()
    assert [entry["epoch"] for entry in callback.history] == [0, 1, 2, 3, 4]
    assert callback.best == callback.history[1]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("make", [learner, rkld_trainer])
def test_resume_keeps_best_and_patience(make, strategy, target, data, tmp_path):
    """Killed at the end of the third epoch, before its evaluation (`steps`), or of the fourth, after it (`epoch`)."""

    def run(folder, killed_at=None, resume=False):
        trainer = make(target, folder, save_strategy=strategy, save_steps=3, num_train_epochs=6)
        if killed_at == 9:
            trainer.add_callback(_AtEpochs(_kill(9)))
        callback = with_callback(trainer, data, patience=3)
        if killed_at == 12:
            trainer.add_callback(_AtEpochs(_kill(12)))
        trainer.train(resume_from_checkpoint=resume)
        return callback

    whole = run(tmp_path / "whole")
    with pytest.raises(_Killed):
        run(tmp_path / "cut", killed_at=9 if strategy == "steps" else 12)
    resumed = run(tmp_path / "cut", resume=True)
    assert resumed.history == whole.history
    assert resumed.best == whole.best
    assert len(whole.history) == (5 if make is learner else 7)
    weights = [(tmp_path / name / "output" / "best" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_lost_best_is_told(target, data, tmp_path, caplog):
    """The best epoch came after the last checkpoint, and its like does not come again."""
    trainer = sft_trainer(target, tmp_path, save_strategy="epoch")
    with_callback(trainer, data)
    trainer.add_callback(_AtEpochs(_kill(6)))
    with pytest.raises(_Killed):
        trainer.train()
    trainer = sft_trainer(target, tmp_path)
    callback = with_callback(trainer, data)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["epoch"] for entry in callback.history] == [0, 1, 2]
    assert "does not hold the best epoch until this checkpoint" in caplog.text


def test_checkpoint_without_history(target, data, tmp_path):
    sft_trainer(target, tmp_path, save_strategy="epoch", num_train_epochs=1).train()
    trainer = sft_trainer(target, tmp_path)
    with_callback(trainer, data)
    with pytest.raises(ValueError, match="`resume_from_checkpoint`: the checkpoint was made without this callback"):
        trainer.train(resume_from_checkpoint=True)


# ---- Two processes ----


def run_distributed(folder, processes):
    trainer = sft_trainer(
        str(folder / "target"),
        folder / f"run{processes}",
        num_train_epochs=3,
        per_device_train_batch_size=4 // processes,
        ddp_backend="gloo" if processes > 1 else None,
    )
    # An even number of samples: an odd one would be padded with a sample seen twice.
    trainer.train_dataset = trainer.train_dataset.select(range(4))
    callback = with_callback(
        trainer,
        write_data(folder),
        retain_logs=str(folder / "TOFU_EVAL.json"),
        max_retain_samples=6,
        generate=True,
        patience=1,
        metric_for_best="ks_d",
    )
    scored, score = [], TransformersBackend.score

    def counting(backend, requests):
        scored.append(len(requests))
        return score(backend, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersBackend, "score", counting)
        trainer.train()
    result = {"history": callback.history, "best": callback.best, "scored": scored[0]}
    (folder / f"{processes}_{trainer.args.process_index}.json").write_text(json.dumps(result))
    trainer.end()  # a process that exits with its group open may abort


def test_two_processes_are_one(tokenizer, target, retain_logs, tmp_path):
    """DDP on two CPU processes, which score six and five of the questions, against one."""
    (tmp_path / "target").symlink_to(target)
    (tmp_path / "TOFU_EVAL.json").symlink_to(retain_logs)
    run_distributed(tmp_path, 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        [*command, str(tmp_path), "2"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-12000:]
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    # Five answers to each question.
    assert [one.pop("scored"), first.pop("scored"), second.pop("scored")] == [55, 30, 25]
    assert first == second
    assert len(one["history"]) == len(first["history"])
    for ours, theirs in zip(one["history"], first["history"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
    assert first["best"]["step"] == one["best"]["step"]
    record = json.loads((tmp_path / "run2" / "output" / "best" / "tofu_eval.json").read_text())
    assert record == {"metric_for_best": "ks_d", **first["best"]}


# ---- Input and output ----


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"metric_for_best": "loss"}, "`metric_for_best='loss'` is not one of forget_quality, "),
        (
            {"metric_for_best": "forget_quality"},
            "give its log as `retain_logs`, or set `metric_for_best='forget_prob'`",
        ),
        ({"metric_for_best": "forget_rouge"}, "set `generate=True`"),
        ({"patience": 0}, "`patience=0` must be at least 1"),
        ({"max_samples": 0}, "`max_samples=0` must be at least 1"),
        ({"max_retain_samples": 0}, "`max_retain_samples=0` must be at least 1"),
        ({"min_utility": 90}, r"`min_utility=90` must be in \[0, 1\]"),
        ({"retain_dataset": None}, "`retain_dataset` is missing"),
        ({"forget_dataset": None}, "go with `forget_dataset`"),
    ],
)
def test_bad_settings(settings, message, target, data, tmp_path):
    trainer = sft_trainer(target, tmp_path)
    with pytest.raises(ValueError, match=message):
        with_callback(trainer, data | settings)


def test_missing_columns(target, data, tmp_path):
    path = tmp_path / "forget.json"
    path.write_text(json.dumps([{"question": question, "answer": answer} for question, answer in FORGET]))
    with pytest.raises(ValueError, match="The forget set has no column `paraphrased_answer`"):
        with_callback(sft_trainer(target, tmp_path), data | {"forget_dataset": str(path)})


def test_retain_log_of_other_questions(target, data, retain_logs, tmp_path):
    trainer = sft_trainer(target, tmp_path)
    with pytest.raises(ValueError, match="4 forget items and the retain log 5"):
        with_callback(trainer, data, retain_logs=retain_logs, max_samples=4)
    with pytest.raises(FileNotFoundError, match="TOFU_EVAL.json of a retain-only model"):
        with_callback(trainer, data, retain_logs=str(tmp_path / "nothing"))


def test_folder_of_the_best_is_taken(target, data, tmp_path):
    (tmp_path / "output" / "best").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds something else. Move it away"):
        with_callback(sft_trainer(target, tmp_path), data)


def test_tofu_by_name(target, tmp_path):
    """TOFU's own files, as far as they are here."""
    if not conftest.TOFU.is_dir():
        pytest.skip(f"no TOFU in {conftest.TOFU}")
    callback = TofuEvalCallback(
        sft_trainer(target, tmp_path),
        dataset_name=str(conftest.TOFU),
        forget_split="forget01",
        metric_for_best="forget_prob",
    )
    assert {name: len(one.answers) for name, one in callback.sets.items()} == {"forget": 40, "retain": 100}


def test_nothing_written_holds_a_text(target, data, retain_logs, tmp_path, capfd):
    trainer = sft_trainer(target, tmp_path, save_strategy="epoch")
    with_callback(trainer, data, retain_logs=retain_logs, generate=True)
    trainer.train()
    printed = capfd.readouterr()
    written = [printed.out, printed.err, json.dumps(trainer.state.log_history)]
    # Of the tokenizer's files, the merges hold words of any text.
    paths = [path for path in (tmp_path / "output").rglob("*") if path.suffix in (".json", ".md", ".txt")]
    written += [path.read_text() for path in paths if "tokenizer" not in path.name]
    assert len(written) > 5
    texts = [text for row in tofu_rows(FORGET, FORGET_ANSWERS) for text in list(row.values())[:3]]
    assert not [text for text in texts for one in written if text in one]


if __name__ == "__main__":
    run_distributed(Path(sys.argv[1]), int(sys.argv[2]))
