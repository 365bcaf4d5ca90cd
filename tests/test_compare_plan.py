# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What `trl-rkld compare` plans, and what it refuses before the first job."""

import datetime
import json
import os
import shutil

import pytest
from compare_setup import NPO, RUNS, everything_below, plan_of, settings, write_config, write_data
from transformers import AutoTokenizer

from trl_rkld.cli import main
from trl_rkld.compare.config import CompareConfig
from trl_rkld.compare.plan import make_plan, remove_temporary
from trl_rkld.scripts.compare import run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def names_of(jobs, kind):
    return [job.name for job in jobs if job.kind == kind]


FOUR_RUNS = [
    {"command": "rkld"},
    {"command": "whp", "retain": "nll", "setting": "+RT"},
    {"command": "rkld", "retain": "nll", "setting": "+RT"},
    {"command": "whp"},
]


def test_runs_share_models(data, tmp_path):
    """Two methods, two settings, two seeds: one target, one retain-only model, an augmented model a seed."""
    jobs = plan_of(data, tmp_path, runs=FOUR_RUNS, seeds=[2, 1])
    assert len(jobs) == len({job.name for job in jobs}) == len({job.folder for job in jobs}) == 14
    assert [job.name for job in jobs][:4] == ["model-retain", "retain-forget01", "model-target", "target-forget01"]
    assert [job.kind for job in jobs][4:] == ["finetune", *["unlearn"] * 4, "finetune", *["unlearn"] * 4]
    rows = [(job.row["seed"], job.row["method"], job.row["setting"]) for job in jobs if job.kind == "unlearn"]
    names = [("rkld", None), ("whp", "+RT"), ("rkld", "+RT"), ("whp", None)]
    assert rows == [(seed, *name) for seed in (2, 1) for name in names]  # seed by seed in the order given
    for job in jobs:
        earlier = [one.name for one in jobs[: jobs.index(job)]]
        assert set(job.needs) <= set(earlier)
    augmented = {job.settings["augmented_model"] for job in jobs if job.kind == "unlearn"}
    assert len(augmented) == 2
    assert {job.settings["seed"] for job in jobs if job.name.startswith("model-augmented")} == {1, 2}


def test_other_augmented_model(data, tmp_path):
    """A run's own `augment` makes another model of it, and of nothing else."""
    runs = [*FOUR_RUNS[:3], FOUR_RUNS[3] | {"augment": {"num_train_epochs": 9}}, {"command": "npo"}]
    jobs = plan_of(data, tmp_path, runs=runs, seeds=[1, 2])
    assert len(names_of(jobs, "finetune")) == 2 + 4
    by_run = {(job.row["method"], job.row["setting"], job.row["seed"]): job for job in jobs if job.kind == "unlearn"}
    for seed in (1, 2):
        paths = [
            by_run[*name, seed].settings["augmented_model"]
            for name in (("rkld", None), ("rkld", "+RT"), ("whp", "+RT"))
        ]
        assert len(set(paths)) == 1 and by_run["whp", None, seed].settings["augmented_model"] != paths[0]
        assert "augmented_model" not in by_run["npo", None, seed].settings
    epochs = [job.settings["arguments"]["num_train_epochs"] for job in jobs if job.name.startswith("model-augmented")]
    assert sorted(epochs) == [4, 4, 9, 9]
    # `augment` is for the augmented models alone.
    assert all("augment" not in job.settings["arguments"] for job in jobs if job.kind == "unlearn")


def test_a_kept_augmented_model_stays(data, tmp_path):
    """Two comparisons share it: one that keeps none does not delete what the other keeps."""
    keeping, other = (
        plan_of(
            data, tmp_path / name, runs=[{"command": "rkld"}], models_dir=str(tmp_path / "models"), keep_models=keep
        )
        for name, keep in (("keeping", True), ("other", False))
    )
    (folder,) = {job.folder for job in [*keeping, *other] if job.keep is not None}
    for jobs in (keeping, other):
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "done.json").touch()
        remove_temporary(jobs)
        assert folder.is_dir()
    (folder / "keep").unlink()
    remove_temporary(other)
    assert not folder.exists()


def test_setting_is_a_text(data, tmp_path):
    """In YAML it may be a number."""
    jobs = plan_of(data, tmp_path, runs=[{"command": "rkld", "setting": 8.0}, {"command": "rkld", "setting": 16}])
    assert [job.row["setting"] for job in jobs if job.kind == "unlearn"] == ["8.0", "16"]


def test_own_seeds(data, tmp_path):
    runs = [{"command": "npo", "seeds": [3]}, {"command": "grad-diff"}]
    jobs = plan_of(data, tmp_path, runs=runs, seeds=[1, 3])
    rows = [(job.row["method"], job.row["seed"]) for job in jobs if job.kind == "unlearn"]
    assert rows == [("npo", 3), ("grad_diff", 3), ("grad_diff", 1)]


@pytest.mark.parametrize("shared, names", [(5, ["retain"]), (None, ["retain-forget01", "retain-forget05"])])
def test_splits(shared, names, data, tmp_path):
    """With a common retain set one retain-only model serves all splits; the target knows the largest split."""
    jobs = plan_of(data, tmp_path, splits=["forget05", "forget01"], max_retain_samples=shared)
    models = {job.folder.name: job.settings["sets"] for job in jobs if job.kind == "finetune"}
    assert [name for name in models if name.startswith("retain")] == names
    assert (models["target"]["forget_split"], models["target"]["retain_split"]) == ("forget05", "forget05")
    assert all(models[name]["forget_split"] is None for name in names)
    if shared is None:
        assert [models[name]["retain_split"] for name in names] == ["forget01", "forget05"]
    augmented = [one["forget_split"] for name, one in models.items() if name.startswith("augmented")]
    assert augmented == ["forget01", "forget05"]
    for job in jobs:
        if job.kind == "unlearn":
            assert job.settings["forget_split"] == job.row["split"]
            assert job.settings["retain_logs"].endswith(f"retain-{job.row['split']}/TOFU_EVAL.json")


def test_how_it_is_computed_may_change(data, tmp_path):
    """A finished part stays where the rest goes on in smaller batches."""
    evaluation = settings(data, tmp_path)["evaluation"]
    jobs, others = (
        plan_of(data, tmp_path, evaluation=evaluation | {"batch_size": size, "batch_tokens": 16 * size})
        for size in (32, 1)
    )
    assert [job.settings for job in jobs] == [job.settings for job in others]
    assert [job.options["evaluation"] for job in others if job.kind != "finetune"] == [
        {"batch_size": 1, "batch_tokens": 16}
    ] * 4
    (changed, *_) = plan_of(data, tmp_path, evaluation=evaluation | {"max_new_tokens": 5})[1:]
    assert changed.settings != jobs[1].settings


def test_given_models(data, tmp_path):
    """No model is fine-tuned but the augmented ones, and none for a method without."""
    given = {"target_model_name_or_path": "a/target", "retain_model_name_or_path": {"forget01": "a/retain"}}
    jobs = plan_of(data, tmp_path, runs=[{"command": "npo"}], **given)
    assert [job.name for job in jobs] == ["retain-forget01", "target-forget01", NPO]
    assert [job.settings["model"] for job in jobs] == ["a/retain", "a/target", "a/target"]
    (augmented,) = names_of(plan_of(data, tmp_path, **given), "finetune")
    assert augmented.startswith("model-augmented-forget01-seed1-")
    only = plan_of(data, tmp_path, runs=[{"command": "npo"}], target_model_name_or_path="a/target")
    assert names_of(only, "finetune") == ["model-retain"]


def test_common_settings(data, tmp_path):
    """A run's settings go before the common ones; those of fine-tuning go into the augmented models."""
    jobs = plan_of(data, tmp_path, runs=[{"command": "rkld", "learning_rate": 5e-3}])
    run, augmented = (job.settings["arguments"] | {"seed": job.settings["seed"]} for job in (jobs[-1], jobs[-2]))
    assert (run["learning_rate"], run["num_train_epochs"], run["per_device_train_batch_size"]) == (5e-3, 4, 2)
    assert (augmented["learning_rate"], augmented["num_train_epochs"], augmented["seed"]) == (1e-2, 4, 1)


def test_dry_run(data, tmp_path, capsys):
    config = write_config(tmp_path, settings(data, tmp_path / "out"))
    before = everything_below(tmp_path)
    assert run(["--config", str(config), "--dry_run", "true"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Plan, in the order of value:") and "About " in printed
    assert len(printed.splitlines()) == 9
    assert everything_below(tmp_path) == before


def test_adapters_that_fit(data, tmp_path):
    adapter = {"command": "npo", "use_peft": True, "lora_r": 4}
    runs = [adapter | {"lora_target_modules": "all-linear"}, adapter | {"setting": "4-bit", "load_in_4bit": True}]
    assert (
        run(
            ["--config", str(write_config(tmp_path, settings(data, tmp_path / "out", runs=runs))), "--dry_run", "true"]
        )
        == 0
    )


@pytest.mark.parametrize("augment", [{}, {"num_train_epochs": 2}])
def test_system_prompt(augment, data, tmp_path):
    """Augmented models are trained with the settings of fine-tuning, so that `augment` need not repeat the prompt."""
    values = settings(data, tmp_path / "out", augment=augment)
    for name in ("finetune", "common", "evaluation"):
        values[name] |= {"system_prompt": "Be brief."}
    assert run(["--config", str(write_config(tmp_path, values)), "--dry_run", "true"]) == 0


# ---- What is wrong is said before the first job ----


ONE_RUN = [{"command": "npo"}]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"epoch_retain_sampels": 3}, "epoch_retain_sampels"),
        ({"runs": [{"command": "npo", "betta": 0.1}]}, "`betta` is no setting of `trl-rkld npo`"),
        ({"runs": [{"command": "npo", "alpha": 8.0}]}, "`alpha` is no setting of `trl-rkld npo`"),
        ({"finetune": {"learning_rat": 1e-3}}, "`learning_rat` is no setting of `trl-rkld finetune`"),
        ({"runs": [{"command": "rkld", "augment": {"epochs": 3}}]}, "`epochs` is no setting of `trl-rkld finetune`"),
        ({"evaluation": {"max_new_token": 3}}, "`evaluation`: `max_new_token` is no setting of `trl-rkld eval`"),
        ({"dataset_name": "/nowhere/tofu"}, "`dataset_name='/nowhere/tofu'` does not exist"),
        ({"common": {"learning_rate": -1e-4}}, "`runs`, npo.*`learning_rate` must be positive"),
        ({"finetune": {"learning_rate": -1e-4}}, "`finetune`: `learning_rate` must be positive"),
        ({"finetune": {"num_train_epochs": 0}}, "`finetune`: `num_train_epochs` must be positive"),
        ({"common": {"learning_rate": [1e-4, 2e-4]}}, "`runs`, npo: a setting has a list, and takes one value: `0.0002`"),
        ({"evaluation": {"max_new_tokens": -3}}, "`evaluation`: `max_new_tokens=-3` must be at least 0"),
        ({"evaluation": {"retain_logs": "x"}}, "`evaluation`: .*decided by the comparison"),
        ({"evaluation": {"forget_split": "forget05"}}, "`evaluation`: .*decided by the comparison"),
        ({"runs": [{"command": "teacher", "alpha": "x"}]}, "`runs`, teacher.*`alpha` must be a number"),
        ({"runs": [{"command": "teacher", "alpha": -3.0}]}, "`runs`, teacher.*`alpha` must not be negative"),
        ({"runs": [{"command": "task-vector", "dtype": "bf16"}]}, "`runs`, task-vector.*`dtype` must be bfloat16"),
        ({"finetune": {"use_peft": True}}, "`finetune`: .*Remove `use_peft`"),
        ({"common": {"save_only_model": True}}, "`save_only_model` is decided by the comparison"),
        ({"evaluation": {"system_prompt": "Be brief."}}, "`system_prompt` is 'Be brief.' in `evaluation`"),
        ({"runs": [{"command": "npo", "system_prompt": "Be brief."}]}, "`system_prompt`"),
        ({"runs": [{"command": "npo", "beta": -1}]}, "`runs`, npo.*`beta` must be positive"),
        ({"runs": [{"command": "npo", "learning_rate": "fast"}]}, "`runs`, npo.*wrong kind"),
        ({"common": {"output_dir": "x"}}, "`output_dir` is decided by the comparison"),
        ({"runs": [{"command": "npo", "num_train_epochs": 0}]}, "`num_train_epochs` must be at least 1"),
        ({"common": {"seed": 3}}, "`seed` is decided by the comparison"),
        ({"augment": {"seed": 3}, "runs": [{"command": "rkld"}]}, "`seed` is decided by the comparison"),
        ({"common": {"report_to": "none"}}, "`report_to` is decided by the comparison"),
        ({"common": {"max_length": 8}}, "Row 0 of the forget dataset has .* tokens, so `max_length=8` would cut"),
        ({"finetune": {"max_length": 8}}, "Row 0 of the .* dataset has .* tokens, so `max_length=8` would cut"),
        ({"common": {"num_train_epochs": 2.5}}, "`num_train_epochs` must be at least 1, and whole"),
        ({"runs": [{"command": "npo", "retain_loss_type": "kl"}]}, "`retain_loss_type` is decided by the comparison"),
        ({"runs": [{"command": "nop"}]}, r"`runs\[0\]` has the command 'nop'.*npo"),
        ({"runs": [{"alpha": 8.0}]}, r"`runs\[0\]` has the command None"),
        ({"runs": []}, "`runs` is required"),
        ({"seeds": []}, "`seeds` is required"),
        ({"runs": [{"command": "npo"}, {"command": "npo", "beta": 1.0}]}, "Two `runs` are called .*npo.*`setting`"),
        ({"runs": [{"command": "npo", "setting": s} for s in ("+RT", "RT")]}, "Two `runs` have the folder .*`setting`"),
        ({"runs": [{"command": "npo", "method": "target"}]}, "`target`, which is a reference's name"),
        ({"runs": [{"command": "npo", "retain": "mse"}]}, "`retain: 'mse'`: use one of none, nll, kl"),
        ({"splits": ["forget02"]}, "`forget02` is not one of TOFU's forget splits"),
        ({"splits": ["forget05"], "target_split": "forget01"}, "`target_split=forget01` is smaller"),
        ({"retain_model_name_or_path": {"retain99": "x"}}, "`retain99` is not one of"),
        ({"case_study": {"questions": [5]}}, "`case_study` has row 5"),
        ({"case_study": {"questions": [-1]}}, "`case_study` has row -1"),
        ({"case_study": {"question": [0]}}, "`case_study` takes `questions` and `beginnings`"),
        ({"case_study": {"beginnings": [{"row": 0}]}}, "`beginnings` in `case_study`.*`words`"),
        ({"case_study": {"beginnings": [{"row": 5, "words": 2}]}}, "`case_study` has row 5"),
        ({"case_study": {"beginnings": [{"row": 0, "words": 400}]}}, "`case_study`: `words` is 400, and the answer of forget01"),
        ({"evaluation": {"forget_dataset": "x.jsonl"}}, "`evaluation`: `forget_dataset` is decided by the comparison"),
        ({"evaluation": {"compat": "open_unlearning"}}, "`evaluation`: `compat` is decided by the comparison"),
        ({"runs": [{"command": "npo", "augment": {"num_train_epochs": 3}}]}, r"`runs\[0\]` \(npo\) has no augmented model"),
        ({"runs": [{"command": "rkld", "augment": None}]}, r"`runs\[0\]`, and its `augment`, must hold names"),
        ({"runs": ["npo"]}, r"`runs\[0\]`.* must hold names and values"),
        ({"common": None}, "`common` must hold names and values, and is None"),
        ({"seeds": 1}, "`seeds` must be a list"),
        ({"seeds": ["1e3"]}, "`seeds`: '1e3' is no seed"),
        ({"seeds": [-1]}, "`seeds`: -1 is no seed"),
        ({"runs": [{"command": "npo", "seeds": [1.5]}]}, r"`seeds` of `runs\[0\]`: 1.5 is no seed"),
        ({"runs": [{"command": "npo", "seeds": []}]}, r"`seeds` of `runs\[0\]` must be a list of seeds"),
        ({"case_study": {"questions": 1}}, "`questions` and `beginnings` of `case_study` must be lists"),
        ({"cpu_jobs": None}, "`cpu_jobs=None` must be a whole number"),
        ({"epoch_retain_samples": 2.5}, "`epoch_retain_samples=2.5` must be a whole number"),
        ({"evaluation": {"max_samples": 4.0}}, "`evaluation`: `max_samples=4.0` must be at least 1, and a whole number"),
        ({"evaluation": {"max_retain_samples": 400}}, "`max_retain_samples=400` is more than the 5 rows that the models learn"),
        ({"evaluation": {"max_new_tokens": 9000}}, "asks in .* tokens.* Lower `max_new_tokens` to"),
        ({"evaluation": {"tensor_parallel_size": 2}}, "`tensor_parallel_size` is decided by the comparison"),
        ({"finetune": {"load_in_8bit": True}}, "`finetune`: .*Remove `load_in_8bit`"),
        ({"common": {"eval_on_start": True}}, "`common` or `runs`, npo: `eval_on_start` is decided by the comparison"),
        ({"runs": [{"command": "npo", "use_peft": True, "lora_target_modules": ["c_attn"]}]}, "`runs`, npo: .*c_attn"),
        ({"runs": [{"command": "npo", "use_peft": True, "lora_r": 0}]}, "`runs`, npo: .*`r` should be a positive"),
        ({"evaluation": {"max_retain_samples": None}}, "`evaluation`: `max_retain_samples` has no value"),
        ({"evaluation": {"max_new_tokens": None}}, "`evaluation`: `max_new_tokens` has no value"),
        ({"runs": [{"command": "npo", "attn_implementation": "flash_attention_2"}]}, "`runs`, npo: .*[Ff]lash"),
        ({"augment": {"epochs": 3}, "runs": RUNS}, "`finetune`, `augment` or the `augment` of `runs`: `epochs`"),
        ({"evaluation": {"max_new_tokens": 0}, "case_study": {"questions": [1]}}, "`case_study`: `questions` are asked"),
        ({"runs": [{"command": "npo", "use_peft": True, "lora_target_modules": ["q_proj", "lm_head"]}]}, "`runs`, npo: .*lm_head"),
        ({"splits": "forget01"}, "`splits` must be a list"),
        ({"runs": [{"command": "npo", "seeds": 1}]}, r"`seeds` of `runs\[0\]` must be a list"),
        ({"runs": [{"command": "idk"}]}, r"`runs\[0\]` \(idk\) needs `refusals_path`"),
        ({"runs": [{"command": "dpo"}]}, r"`runs\[0\]` \(dpo\) needs `refusals_path`"),
        ({"runs": [{"command": "idk"}], "refusals_path": "nothing.txt"}, "`refusals_path='nothing.txt'` is not a file"),
        ({"runs": [{"command": "dpo"}], "refusals_path": os.devnull}, f"`refusals_path='{os.devnull}'` is not a file"),
        ({"runs": [{"command": "dpo", "retain": "nll"}], "refusals_path": __file__}, r"dpo.*retain"),
        ({"runs": [{"command": "idk", "retain": "kl"}], "refusals_path": __file__}, r"idk.*retain"),
        ({"runs": [{"command": "teacher", "beta": 1.0}]}, "`runs`, teacher.*`beta` is none of its settings"),
        ({"runs": [{"command": "task-vector", "alpha": 1.0}]}, "`runs`, task-vector.*`alpha` is none of its settings"),
        ({"max_retain_samples": 6}, "`max_retain_samples=6` reaches into forget01"),
        ({"max_retain_samples": 0}, "`max_retain_samples=0`"),
        ({"max_retain_samples": -5}, "`max_retain_samples=-5`"),
        ({"epoch_retain_samples": 0}, "`epoch_retain_samples=0`"),
        ({"cpu_jobs": 0}, "`cpu_jobs=0`"),
        ({"common": {"model_revision": "x"}}, "`model_revision` is decided by the comparison"),
        ({"finetune": {"chat_template_path": "x.jinja"}}, "`finetune`: `chat_template_path` is decided by the comparison"),
        ({"common": {"per_device_train_batch_size": 0}}, "`per_device_train_batch_size` must be at least 1"),
        ({"finetune": {"gradient_accumulation_steps": 0}}, "`finetune`: `gradient_accumulation_steps` must be at least 1"),
        ({"common": {"lr_scheduler_type": "cosine_with_min_lr"}}, "`lr_scheduler_type` or `lr_scheduler_kwargs`: .*min_lr"),
        ({"common": {"lr_scheduler_kwargs": {"foo": 1}}}, "`lr_scheduler_type` or `lr_scheduler_kwargs`: .*foo"),
        ({"runs": [{"command": "simnpo", "retain_coef": 8.0}]}, r"`runs\[0\]` has `retain_coef`, and no `retain`"),
        ({"evaluation": {"date_string": datetime.date(2025, 4, 10)}}, "`evaluation` has a value that is no text.*quote it"),
        ({"evaluation": {"max_retain_samples": 0}}, "`evaluation`: `max_retain_samples=0`"),
        ({"model_name_or_path": "nowhere/nothing"}, "`model_name_or_path`: nowhere/nothing"),
        ({"target_model_name_or_path": "nowhere/nothing"}, "`target_model_name_or_path`: nowhere/nothing"),
        ({"retain_model_name_or_path": {"forget01": "nowhere"}}, r"`retain_model_name_or_path\[forget01\]`: nowhere can"),
    ],
)  # fmt: skip
def test_bad_settings(changed, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Names that are nowhere are asked for at length.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    values = settings(data, tmp_path / "out", runs=ONE_RUN)
    # What is changed in a section is added to it.
    for name, value in changed.items():
        values[name] = values[name] | value if isinstance(value, dict) and name in values else value
    config = write_config(tmp_path, values)
    before = everything_below(tmp_path)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        run(["--config", str(config), "--dry_run", "true"])
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("settings_of", ["common", "finetune", "runs"])
def test_null_is_no_text(settings_of, data, tmp_path):
    """A `null` must not arrive as the word "None"."""
    values = settings(data, tmp_path / "out", runs=ONE_RUN)
    if settings_of == "runs":
        values["runs"] = [{"command": "npo", "system_prompt": None}]
    else:
        values[settings_of] |= {"system_prompt": None}
    config = write_config(tmp_path, values)
    with pytest.raises(ValueError, match="`system_prompt`"):
        run(["--config", str(config), "--dry_run", "true"])


def test_a_template_that_prints_the_date(data, tmp_path):
    """Over midnight, the runs of one comparison would be asked other questions."""
    shutil.copytree(data / "base", tmp_path / "dated")
    tokenizer = AutoTokenizer.from_pretrained(data / "base")
    tokenizer.chat_template = "{{ date_string or strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "dated")
    values = settings(data, tmp_path / "out", model_name_or_path=str(tmp_path / "dated"), runs=ONE_RUN)
    with pytest.raises(ValueError, match="prints today's date.*Set `date_string`"):
        run(["--config", str(write_config(tmp_path, values)), "--dry_run", "true"])
    for section in ("finetune", "common", "evaluation"):
        values[section] = values[section] | {"date_string": "10 Apr 2025"}
    assert run(["--config", str(write_config(tmp_path, values)), "--dry_run", "true"]) == 0


@pytest.mark.parametrize(
    "file",
    ["forget01", "full", "forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"],
)
def test_missing_file(file, tmp_path):
    data = write_data(tmp_path / "data")
    (data / "tofu" / f"{file}.jsonl").unlink()
    config = write_config(tmp_path, settings(data, tmp_path / "out", runs=ONE_RUN))
    before = everything_below(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"has no {file}\.jsonl"):
        run(["--config", str(config), "--dry_run", "true"])
    assert everything_below(tmp_path) == before


def test_blank_answer_in_a_later_row(tmp_path):
    data = write_data(tmp_path / "data")
    path = data / "tofu" / "world_facts_perturbed.jsonl"
    *rows, last = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, [*rows, last | {"answer": " "}])))
    config = write_config(tmp_path, settings(data, tmp_path / "out", runs=ONE_RUN))
    with pytest.raises(ValueError, match=f"Row {len(rows)} of the wf"):
        run(["--config", str(config), "--dry_run", "true"])
    assert not (tmp_path / "out").exists()


def test_missing_retain_set(data, tmp_path):
    """Without `max_retain_samples`, TOFU's own."""
    config = write_config(tmp_path, settings(data, tmp_path / "out", max_retain_samples=None))
    with pytest.raises(FileNotFoundError, match=r"has no retain99\.jsonl"):
        run(["--config", str(config), "--dry_run", "true"])
    assert not (tmp_path / "out").exists()


def test_other_files_of_the_same_names(data, tmp_path):
    """What was made of files that have changed since is not taken for the result of those that are there now."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(data / "base", tmp_path / "given")
    values = settings(tmp_path / "data", tmp_path / "out", target_model_name_or_path=str(tmp_path / "given"))
    jobs = make_plan(CompareConfig(**values))
    for job in jobs:
        job.folder.mkdir(parents=True)
        (job.folder / "job.json").write_text(json.dumps(job.settings))
        (job.folder / "done.json").write_text('{"seconds": 1}')
    config = write_config(tmp_path, values)
    assert run(["--config", str(config), "--dry_run", "true"]) == 0
    weights = next((tmp_path / "given").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="target-forget01`.*contents differ"):
        run(["--config", str(config), "--dry_run", "true"])
    weights.write_bytes(content)
    assert run(["--config", str(config), "--dry_run", "true"]) == 0


def test_a_job_that_left_nothing_may_change(data, tmp_path):
    """After running out of memory in the first step a smaller batch is no other result; what has begun is."""
    values = settings(data, tmp_path / "out")
    folder = tmp_path / "out" / "models" / "retain"
    (folder / "model").mkdir(parents=True)
    (job,) = (job for job in make_plan(CompareConfig(**values)) if job.folder == folder)
    for name in ("job.json", "task.json", "log.txt"):
        (folder / name).write_text(json.dumps(job.settings | {"seed": 5}))
    config = write_config(tmp_path, values)
    assert run(["--config", str(config), "--dry_run", "true"]) == 0
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="models/retain`: results of other settings are there.*, seed differ"):
        run(["--config", str(config), "--dry_run", "true"])


def test_command_line_says_it_in_one_line(data, tmp_path, capsys):
    config = write_config(tmp_path, settings(data, tmp_path / "out", runs=[{"command": "npo", "betta": 1}]))
    assert main(["compare", "--config", str(config)]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("trl-rkld compare: `common` or `runs`, npo: `betta` is no")
    )
