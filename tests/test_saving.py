# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What is saved, what the card says, what is refused and what is cleaned up."""

import json
import stat
import subprocess
import sys

import pytest
import torch
from conftest import FORGET, RETAIN, config, history, rows, tiny_llama
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig

from trl_rkld import RKLDConfig, RKLDTrainer
from trl_rkld.run_record import mark_finished, read_record, write_record
from trl_rkld.scripts.merge import merge
from trl_rkld.teacher.augmented import restored_weights
from trl_rkld.teacher.private_folder import PrivateFolder
from trl_rkld.trainer.model_card import ADAPTER_WARNING


def lora_trainer(path, tokenizer, folder, quantization=None, **kwargs):
    return RKLDTrainer(
        path,
        args=config(folder, **kwargs),
        train_dataset=rows(FORGET),
        processing_class=tokenizer,
        quantization_config=quantization,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


def test_an_adapter_names_the_revision_of_its_base(llama_path, tokenizer, tmp_path):
    """Where PEFT looks for it: whoever loads the adapter gets the weights that it was trained on."""
    shared = LoraConfig(r=4, target_modules="all-linear")
    for name, revision in (("one", "v1"), ("two", "v2"), ("three", None)):
        settings = {"dtype": "float32"} | ({} if revision is None else {"revision": revision})
        trainer = RKLDTrainer(
            llama_path,
            args=config(tmp_path / name, model_init_kwargs=settings),
            train_dataset=rows(FORGET),
            processing_class=tokenizer,
            peft_config=shared,
        )
        trainer.save_model()
        assert PeftConfig.from_pretrained(tmp_path / name / "output").revision == revision
    assert shared.revision is None


def test_card_and_record(llama, tokenizer, tmp_path):
    trainer = RKLDTrainer(
        llama,
        args=config(tmp_path, save_strategy="epoch"),
        train_dataset=rows(FORGET),
        retain_dataset=rows(RETAIN),
        processing_class=tokenizer,
    )
    output = trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "output/README.md").read_text()
    for part in ("2406.01983", "NAACL 2025", "forget 5 records", trainer.forget_set_hash, "`alpha` | 8.0", "rkld"):
        assert part in card, part
    assert "What else must be deleted" in card
    assert "This is an adapter" not in card
    assert "fine-tuned version of a local model" in card and 'model="output"' in card
    for question, answer in FORGET + RETAIN:
        assert question not in card
        assert answer not in card
    record = read_record(tmp_path / "output")
    assert record["finished"]
    assert record["num_forget"] == len(FORGET)
    assert record["settings"]["alpha"] == 8.0
    assert record["quantization"] is None
    assert {
        "forget_prob_before",
        "forget_prob_after",
        "retain_prob_before",
        "retain_prob_after",
    } <= output.metrics.keys()


def test_tags(llama, tokenizer, tmp_path):
    trainer = RKLDTrainer(llama, args=config(tmp_path), train_dataset=rows(FORGET), processing_class=tokenizer)
    trainer.train()
    assert set(trainer.model.model_tags) == {"trl", "rkld"}


def test_adapter_card_warns(llama_path, tokenizer, tmp_path):
    """By `save_model` alone, though PEFT writes a card of its own with each adapter."""
    trainer = lora_trainer(llama_path, tokenizer, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "Switching it off brings the forgotten knowledge back" in (tmp_path / "output/README.md").read_text()


@pytest.mark.parametrize("precompute_teacher", [True, False])
def test_saved_student_is_the_student(precompute_teacher, llama_path, tokenizer, tmp_path):
    trainer = lora_trainer(llama_path, tokenizer, tmp_path, precompute_teacher=precompute_teacher)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_path), tmp_path / "output")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["float32", "4-bit", "4-bit nested", "4-bit of bfloat16"])
def test_merge(kind, llama_path, tokenizer, tmp_path):
    """Merged into the (dequantised) base, the model computes what base and adapter computed."""
    quantization = None
    if kind != "float32":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=kind == "4-bit nested",
            bnb_4bit_compute_dtype=torch.float32,
        )
    # 4-bit codes made from bfloat16 weights are others than those made from the checkpoint's float32
    dtype = "bfloat16" if kind == "4-bit of bfloat16" else "float32"
    trainer = lora_trainer(llama_path, tokenizer, tmp_path, quantization, model_init_kwargs={"dtype": dtype})
    trainer.train()
    trainer.save_model()
    merge(str(tmp_path / "output"), str(tmp_path / "merged"), torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    assert getattr(merged, "hf_quantizer", None) is None
    ids = torch.arange(5, 25)[None]
    trainer.model.train()  # in evaluation mode bitsandbytes would repack the weights
    with torch.no_grad():
        expected, base = trainer.model(ids).logits, AutoModelForCausalLM.from_pretrained(llama_path)(ids).logits
        error = (merged(ids).logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    # What is left is rounding: of the adapter, which is trained in bfloat16 on a 4-bit base, or of all. Merged into
    # another base, by codes made from float32, the last kind would be off by 0.13.
    assert error < {"float32": 1e-4, "4-bit": 2e-3, "4-bit nested": 2e-3, "4-bit of bfloat16": 0.05}[kind]
    assert (expected - base).abs().max() > 0.01 * expected.abs().max()
    assert read_record(tmp_path / "merged")["merged"]
    cards = [(tmp_path / name / "README.md").read_text() for name in ("output", "merged")]
    assert cards[1] == cards[0].replace(ADAPTER_WARNING, "") != cards[0]
    with pytest.raises(ValueError, match="is not empty"):
        merge(str(tmp_path / "output"), str(tmp_path / "merged"))
    with pytest.raises(ValueError, match="is not an adapter"):
        merge(llama_path, str(tmp_path / "other"))


def unfinished(tokenizer, folder, monkeypatch, **kwargs):
    """A run that dies in its third step and leaves a checkpoint of the second."""
    step = RKLDTrainer.training_step

    def dying(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RKLDTrainer, "training_step", dying)
        trainer = RKLDTrainer(
            tiny_llama(len(tokenizer), tie_word_embeddings=True),
            args=config(folder, save_strategy="steps", save_steps=2, **kwargs),
            train_dataset=rows(FORGET),
            processing_class=tokenizer,
        )
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    del trainer
    return folder / "output" / "checkpoint-2"


def test_unfinished_checkpoint_is_no_original(tokenizer, tmp_path, monkeypatch):
    checkpoint = unfinished(tokenizer, tmp_path, monkeypatch)
    args = config(tmp_path / "next")
    with pytest.raises(ValueError, match="checkpoint of an unfinished run on this very forget set"):
        RKLDTrainer(str(checkpoint), args=args, train_dataset=rows(FORGET), processing_class=tokenizer)
    with pytest.raises(ValueError, match="checkpoint of an unfinished run"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        RKLDTrainer(model, args=args, train_dataset=rows(FORGET), processing_class=tokenizer)
    # Another forget set is another request: whoever starts from there knows what they do.
    RKLDTrainer(str(checkpoint), args=args, train_dataset=rows(FORGET[:2]), processing_class=tokenizer)


def test_unfinished_adapter_checkpoint_is_no_original(llama_path, tokenizer, tmp_path):
    """PEFT does not say where an adapter came from: it is known again by its weights."""
    trainer = lora_trainer(llama_path, tokenizer, tmp_path, save_strategy="steps", save_steps=1)
    trainer.add_callback(_FailOnce(at_step=2))
    with pytest.raises(RuntimeError, match="once"):
        trainer.train()
    checkpoint = tmp_path / "output" / "checkpoint-1"
    base = AutoModelForCausalLM.from_pretrained(llama_path)
    model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    with pytest.raises(ValueError, match="checkpoint-1` is a checkpoint of an unfinished run"):
        RKLDTrainer(model, args=config(tmp_path), train_dataset=rows(FORGET), processing_class=tokenizer)


def test_checkpoints_of_a_finished_run_are_models(llama, tokenizer, tmp_path):
    args = config(tmp_path, save_strategy="epoch")
    trainer = RKLDTrainer(llama, args=args, train_dataset=rows(FORGET), processing_class=tokenizer)
    trainer.train()
    checkpoint = tmp_path / "output" / "checkpoint-3"
    assert read_record(checkpoint)["finished"]
    RKLDTrainer(
        str(checkpoint), args=config(tmp_path / "next"), train_dataset=rows(FORGET), processing_class=tokenizer
    ).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 4.0}, "`alpha` changed"),
        ({"beta": 0.0}, "`beta` changed"),
        ({"augmented_num_train_epochs": 5}, "the settings changed"),
        ({"seed": 1}, "the settings changed"),
        ({"model": 1}, "the model changed"),
        ({"retain_dataset": RETAIN}, "`retain_coef`.*the retain set changed"),
        ({"data": FORGET[:4]}, "the data changed"),
    ],
)
def test_resuming_with_another_teacher_is_refused(change, message, tokenizer, tmp_path, monkeypatch):
    unfinished(tokenizer, tmp_path, monkeypatch)
    change = dict(change)
    model = tiny_llama(len(tokenizer), seed=change.pop("model", 0), tie_word_embeddings=True)
    data = rows(change.pop("data", FORGET))
    retain = rows(change.pop("retain_dataset")) if "retain_dataset" in change else None
    args = config(tmp_path, save_strategy="steps", save_steps=2, **change)
    trainer = RKLDTrainer(model, args=args, train_dataset=data, retain_dataset=retain, processing_class=tokenizer)
    with pytest.raises(ValueError, match=f"can't be resumed: .*{message}"):
        trainer.train(resume_from_checkpoint=True)


def test_the_same_trainer_can_start_again(tokenizer, tmp_path):
    """After a failure nothing stays locked or half taken away."""
    for precompute_teacher in (True, False):
        args = config(tmp_path, precompute_teacher=precompute_teacher)
        model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
        trainer = RKLDTrainer(model, args=args, train_dataset=rows(FORGET), processing_class=tokenizer)
        trainer.add_callback(_FailOnce())
        with pytest.raises(RuntimeError, match="once"):
            trainer.train()
        if precompute_teacher:
            output = trainer.train()
            assert len(history(trainer, "loss")) == trainer.state.max_steps
            assert not list((tmp_path / "teacher").iterdir())
            before = {name: value for name, value in output.metrics.items() if name.endswith("_before")}
            # Not those after the one step that the first start took
            fresh = RKLDTrainer(
                tiny_llama(len(tokenizer), tie_word_embeddings=True),
                args=args,
                train_dataset=rows(FORGET),
                processing_class=tokenizer,
            )
            metrics = fresh.train().metrics
            assert before and before == {name: metrics[name] for name in before}
        else:
            with pytest.raises(ValueError, match="lasts for one `train"):
                trainer.train()
        RKLDTrainer(model, args=args, train_dataset=rows(FORGET), processing_class=tokenizer).train()


class _FailOnce(TrainerCallback):
    def __init__(self, at_step=1):
        self.at_step, self.failed = at_step, False

    def on_step_end(self, args, state, control, **kwargs):
        if not self.failed and state.global_step == self.at_step:
            self.failed = True
            raise RuntimeError("once")


def test_incomplete_checkpoint_is_passed_over(tokenizer, tmp_path, monkeypatch):
    checkpoint = unfinished(tokenizer, tmp_path, monkeypatch)
    for name in (
        "checkpoint-4",
        "checkpoint-6",
    ):  # killed while they were written, one before its last file, one in it
        (tmp_path / "output" / name).mkdir()
    (tmp_path / "output" / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": ')
    args = config(tmp_path, save_strategy="no")
    trainer = RKLDTrainer(
        tiny_llama(len(tokenizer), tie_word_embeddings=True),
        args=args,
        train_dataset=rows(FORGET),
        processing_class=tokenizer,
    )
    steps, step = [], trainer.training_step
    monkeypatch.setattr(
        trainer, "training_step", lambda *inputs: steps.append(trainer.state.global_step) or step(*inputs)
    )
    trainer.train(resume_from_checkpoint=True)
    assert steps == [2, 3, 4, 5]
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_failed_save_leaves_the_last_one(llama, tokenizer, tmp_path, monkeypatch):
    trainer = RKLDTrainer(llama, args=config(tmp_path), train_dataset=rows(FORGET), processing_class=tokenizer)
    trainer.save_model()
    before = load_file(tmp_path / "output/model.safetensors")
    trainer.train()

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer.__class__, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()
    after = load_file(tmp_path / "output/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("precompute_teacher, name", [(True, "teacher"), (False, "augmented")])
def test_private_folder(precompute_teacher, name, tokenizer, tmp_path, monkeypatch):
    unfinished(tokenizer, tmp_path, monkeypatch, precompute_teacher=precompute_teacher)
    (folder,) = (path for path in (tmp_path / "teacher").iterdir() if path.is_dir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.glob("*.safetensors"))
    assert [path.name for path in files] == [f"{name}.safetensors"]
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600


def test_callbacks_that_upload_the_model_save_the_student_alone(llama_path, tokenizer, tmp_path):
    """As W&B's does where `WANDB_LOG_MODEL` is set: a live teacher's adapters are still there."""

    class Uploads(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            assert "augmented" in model.peft_config
            Trainer(model=model, args=TrainingArguments(str(tmp_path / "x"), use_cpu=True)).save_model(
                tmp_path / "upload"
            )

    trainer = lora_trainer(llama_path, tokenizer, tmp_path, precompute_teacher=False, max_steps=1)
    trainer.add_callback(Uploads())
    trainer.train()
    assert (tmp_path / "upload" / "adapter_model.safetensors").is_file()
    assert not [path for path in (tmp_path / "upload").iterdir() if path.is_dir()]
    assert "save_pretrained" not in vars(trainer.model)


def test_weights_that_are_put_aside_are_private(llama, tmp_path):
    path = tmp_path / "original.safetensors"
    with restored_weights(llama, path, is_writer=True, wait=lambda: None):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_a_finished_run_marks_its_models(tmp_path):
    """Its checkpoints and its best epoch are models like any other from then on."""
    for name in ("checkpoint-2", "best"):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, {"method": "RKLD", "finished": False})
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    mark_finished(str(tmp_path))
    for name in ("checkpoint-2", "best"):
        assert read_record(tmp_path / name) == {"method": "RKLD", "finished": True}


def test_dead_runs_are_removed(tmp_path):
    """What a dead run left is removed at the next start, unless it has a checkpoint to resume from."""
    script = (
        "import sys, os\n"
        "from trl_rkld.teacher.private_folder import PrivateFolder\n"
        "folder = PrivateFolder(sys.argv[1], sys.argv[2])\n"
        "folder.open(resuming=False, needed_bytes=0)\n"
        "(folder.path / 'teacher.safetensors').write_text('secret')\n"
        "print(folder.path, flush=True)\n"
        "os._exit(9)\n"
    )

    def die(name):
        command = [sys.executable, "-c", script, str(tmp_path / "root"), str(tmp_path / name)]
        output = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
        return next(path for path in (tmp_path / "root").iterdir() if str(path) == output.stdout.strip())

    checkpoint = tmp_path / "resumable" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    write_record(checkpoint, {"finished": False})
    foreign = tmp_path / "root" / "mine"
    foreign.mkdir(parents=True)
    (foreign / "run.json").write_text(json.dumps({"output_dir": str(tmp_path / "thesis")}))
    hopeless, resumable = die("hopeless"), die("resumable")
    alive = PrivateFolder(tmp_path / "root", tmp_path / "alive")
    alive.open(resuming=False, needed_bytes=0)
    assert not hopeless.exists()
    assert (resumable / "teacher.safetensors").exists()
    another = PrivateFolder(tmp_path / "root", tmp_path / "another")
    another.open(resuming=False, needed_bytes=0)
    assert alive.path.exists()  # its lock is held
    with pytest.raises(RuntimeError, match="Another run with `output_dir=.* is going on"):
        PrivateFolder(tmp_path / "root", tmp_path / "alive").open(resuming=False, needed_bytes=0)
    again = PrivateFolder(tmp_path / "root", tmp_path / "resumable")
    again.open(resuming=True, needed_bytes=0)
    assert (again.path / "teacher.safetensors").exists()
    again.release()
    again.open(resuming=False, needed_bytes=0)
    assert not (again.path / "teacher.safetensors").exists()
    for folder in (alive, another, again):
        folder.remove()
        folder.release()
    assert list((tmp_path / "root").iterdir()) == [foreign]


@pytest.mark.parametrize(("threshold", "epochs"), [(0.9, 1), (1e-9, 3)])
def test_stops_when_forgotten(threshold, epochs, llama, tokenizer, tmp_path):
    trainer = RKLDTrainer(
        llama,
        args=config(tmp_path, num_train_epochs=3, stop_at_forget_prob=threshold),
        train_dataset=rows(FORGET),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.epoch == epochs


class _Killed(Exception):
    pass


class _KillAtTheEnd(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        raise _Killed


def test_stopped_run_goes_no_further_when_resumed(llama_path, tokenizer, tmp_path):
    """Killed after the checkpoint of the epoch in which it was stopped."""

    def make(name, **kwargs):
        settings = {"num_train_epochs": 6, "stop_at_forget_prob": 0.9, "save_strategy": "epoch"}
        args = config(tmp_path / name, **settings)
        return RKLDTrainer(llama_path, args=args, train_dataset=rows(FORGET), processing_class=tokenizer, **kwargs)

    with pytest.raises(_Killed):
        make("cut", callbacks=[_KillAtTheEnd()]).train()
    weights = []
    for name in ("whole", "cut"):
        trainer = make(name)
        trainer.train(resume_from_checkpoint=name == "cut")
        assert (trainer.state.epoch, trainer.args.max_steps) == (1.0, -1)
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


def test_forgotten_at_a_checkpoint_before_the_end_of_its_epoch(llama_path, tokenizer, tmp_path, capsys):
    """Saved at the epoch's last step, before anyone asked whether all is forgotten: that is asked when it is resumed."""

    def make(**kwargs):
        args = config(tmp_path, num_train_epochs=4, stop_at_forget_prob=0.9, save_strategy="steps", save_steps=1)
        return RKLDTrainer(llama_path, args=args, train_dataset=rows(FORGET), processing_class=tokenizer, **kwargs)

    trainer = make()
    trainer.add_callback(_KillAtTheEpochsEnd())
    trainer.callback_handler.callbacks.reverse()  # before the question is asked
    with pytest.raises(_Killed):
        trainer.train()
    steps = trainer.state.global_step
    trainer = make()
    capsys.readouterr()
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.state.epoch, trainer.state.global_step) == (1.0, steps)
    assert capsys.readouterr().out.count("Stopping: the forgotten answers are at") == 1


class _KillAtTheEpochsEnd(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        raise _Killed


class _StopAtTheSecondStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_run_stopped_in_an_epoch_goes_no_further_when_resumed(llama_path, tokenizer, tmp_path):
    """Not by one step either."""

    def make(**settings):
        args = config(tmp_path, num_train_epochs=3, save_strategy="steps", save_steps=2, **settings)
        callbacks = [_StopAtTheSecondStep()]
        return RKLDTrainer(
            llama_path, args=args, train_dataset=rows(FORGET), processing_class=tokenizer, callbacks=callbacks
        )

    whole = make(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    whole.train()
    resumed = make(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert whole.state.global_step == resumed.state.global_step == 2
    weights = [trainer.model.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


@pytest.mark.parametrize("lost", [False, True])
def test_a_kept_teacher_needs_no_space(lost, tokenizer, tmp_path, monkeypatch):
    """A run that had filled the disk can be resumed, unless its teacher must be written anew."""
    unfinished(tokenizer, tmp_path, monkeypatch)
    if lost:
        next((tmp_path / "teacher").rglob("teacher.safetensors")).unlink()
    trainer = RKLDTrainer(
        tiny_llama(len(tokenizer), tie_word_embeddings=True),
        args=config(tmp_path, save_strategy="no"),
        train_dataset=rows(FORGET),
        processing_class=tokenizer,
    )
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    if lost:
        with pytest.raises(ValueError, match="`teacher_cache_dir=.*has 0.0 GB free"):
            trainer.train(resume_from_checkpoint=True)
    else:
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step > 2


def test_verdict_names_what_to_raise(llama, tokenizer, tmp_path, caplog):
    args = config(tmp_path, learning_rate=1e-9, max_steps=2)
    trainer = RKLDTrainer(llama, args=args, train_dataset=rows(FORGET), processing_class=tokenizer)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "Raise `learning_rate` first" in caplog.text


def test_dropout_is_off(llama_path, tokenizer, tmp_path):
    for disable in (True, False):
        args = config(tmp_path, disable_dropout=disable)
        trainer = RKLDTrainer(
            llama_path,
            args=args,
            train_dataset=rows(FORGET),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5),
        )
        rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == ({0} if disable else {0.5})


def test_dropout_of_attention_is_off(tokenizer, tmp_path):
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True, attention_dropout=0.5)
    args = config(tmp_path, max_steps=1, augmented_num_train_epochs=1)
    RKLDTrainer(model, args=args, train_dataset=rows(FORGET), processing_class=tokenizer).train()  # or it raises
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.0}


@pytest.mark.parametrize("config_class", [TrainingArguments, SFTConfig])
def test_training_arguments_are_converted(config_class, llama, tokenizer, tmp_path):
    args = config_class(str(tmp_path), use_cpu=True, learning_rate=3e-4, num_train_epochs=2, hub_token="hf_secret")
    trainer = RKLDTrainer(llama, args=args, train_dataset=rows(FORGET), processing_class=tokenizer)
    assert trainer.args.alpha == 8.0
    assert trainer.args.learning_rate == 3e-4
    assert trainer.args.hub_token == "hf_secret"


def test_defaults_are_the_papers(tmp_path):
    args = RKLDConfig(str(tmp_path), use_cpu=True)
    assert (args.alpha, args.beta, args.learning_rate, args.weight_decay) == (8.0, 1.0, 1e-5, 0.01)
    assert (args.num_train_epochs, args.augmented_num_train_epochs) == (10, 10)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    assert args.warmup_steps == pytest.approx(0.1)  # as a ratio: the first of ten epochs
    assert RKLDConfig(str(tmp_path), use_cpu=True, num_train_epochs=1).warmup_steps == 0
    assert RKLDConfig(str(tmp_path), use_cpu=True, warmup_steps=7).warmup_steps == 7


def test_logs_show_forgetting(memorised, tokenizer, tmp_path):
    trainer = RKLDTrainer(
        memorised,
        args=config(
            tmp_path,
            model_init_kwargs={"dtype": "float32"},
            per_device_train_batch_size=len(FORGET),
            num_train_epochs=8,
            alpha=32.0,
        ),
        train_dataset=rows(FORGET),
        retain_dataset=rows(RETAIN),
        processing_class=tokenizer,
    )
    trainer.train()
    entries = history(trainer, "forget_prob", "teacher_gap", "teacher_entropy", "forget_loss", "retain_prob")
    assert len(entries) == trainer.state.max_steps
    assert entries[-1][0] < 0.5 * entries[0][0]
    state = json.dumps(trainer.state.log_history)
    assert all(answer not in state for _, answer in FORGET)
