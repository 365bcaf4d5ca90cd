# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`trl-rkld compare`: what it plans, what it refuses, what it writes, and that it survives kills and failing runs."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import test_callback
import yaml
from conftest import FORGET, REPOSITORY, RETAIN, build_tokenizer, tiny_llama
from tofu_like import all_texts, pairs_of, save, tofu_rows, write_lines, write_tofu

from trl_rkld.cli import main
from trl_rkld.compare.case_study import FILE, write_case_study
from trl_rkld.compare.config import CompareConfig
from trl_rkld.compare.peak import PeakCallback
from trl_rkld.compare.plan import Job, make_plan
from trl_rkld.compare.runner import slots
from trl_rkld.compare.table import ALL_COLUMNS, tables
from trl_rkld.scripts.compare import run
from unlearn_eval.callback import TofuEvalCallback
from unlearn_eval.metrics import MODEL_UTILITY_METRICS
from unlearn_eval.plots import COLUMNS
from unlearn_eval.rows import read_csv


RUNS = [{"command": "rkld", "setting": "+RT", "retain": "nll", "alpha": 8.0}, {"command": "npo", "retain": "kl"}]
RKLD, NPO = "forget01-rkld-rt-seed1", "forget01-npo-seed1"
P = "forget quality p, geometric mean (range)"
# Columns that only the full evaluation fills.
FULL = ("model_utility", "retain_utility", "forget_rouge", *MODEL_UTILITY_METRICS)


def write_data(folder):
    """A model, TOFU's files for the evaluation, and those for training."""
    write_tofu(folder / "tofu")
    questions = {name: [{"question": q, "answer": a} for q, a in pairs_of(name)] for name in ("forget", "retain")}
    write_lines(folder / "tofu" / "forget01.jsonl", questions["forget"])
    write_lines(folder / "tofu" / "full.jsonl", questions["retain"] + questions["forget"])
    tokenizer = build_tokenizer()
    save(tiny_llama(len(tokenizer), tie_word_embeddings=True), folder / "base", tokenizer)
    return folder


def settings(data, output_dir, **changed):
    """Settings of a comparison that takes seconds."""
    return {
        "model_name_or_path": str(data / "base"),
        "dataset_name": str(data / "tofu"),
        "output_dir": str(output_dir),
        "splits": ["forget01"],
        "seeds": [1],
        "max_retain_samples": 5,
        "use_cpu": True,
        "finetune": {
            "learning_rate": 1e-2,
            "num_train_epochs": 12,
            "per_device_train_batch_size": 5,
            "bf16": False,
            "dtype": "float32",
        },
        "augment": {"num_train_epochs": 4},
        "common": {
            "learning_rate": 1e-2,
            "num_train_epochs": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "bf16": False,
            "dtype": "float32",
        },
        "evaluation": {"backend": "transformers", "max_new_tokens": 6, "dtype": "float32"},
        "epoch_retain_samples": 5,
        "runs": RUNS,
    } | changed


def write_config(folder, values):
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def compare(config, *arguments, **environment):
    """Run the command in a process of its own, as a user does."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    paths = [environment.pop("FIRST_PATH", None), str(REPOSITORY), str(REPOSITORY / "eval"), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "trl_rkld.cli", "compare", "--config", str(config), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)


def read_rows(path):
    """The CSV with its fields as text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_log(*parts):
    return json.loads(Path(*parts, "TOFU_EVAL.json").read_text())


def snapshot(folder, *patterns):
    """Bytes and time of files."""
    paths = [path for pattern in patterns or ("*",) for path in folder.rglob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def everything_below(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def weights_below(folder):
    """Folders of models."""
    return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("*.safetensors"))


@dataclass
class Finished:
    """A comparison that has run."""

    data: Path
    config: Path
    folder: Path
    process: subprocess.CompletedProcess
    weights: list[str]

    @property
    def printed(self):
        return self.process.stdout + self.process.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """RKLD with a retain term and NPO, from the first fine-tuning on."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, settings(data, folder / "out"))
    process = compare(config)
    assert process.returncode == 0, process.stdout + process.stderr
    return Finished(data, config, folder / "out", process, weights_below(folder / "out"))


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory):
    """With the models of the first comparison: a run that fails, one that trains by TRL, one without epochs; with texts."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "refusals.txt").write_text("I don't know.\nI can't say.\n")
    values = settings(
        finished.data,
        folder / "out",
        models_dir=str(finished.folder / "models"),
        refusals_path=str(folder / "refusals.txt"),
        case_study={
            "questions": [0, 3],
            "beginnings": [{"row": 0, "words": 5}],
        },
        keep_models=True,
        runs=[
            {"command": "npo", "setting": "too fast", "learning_rate": 1e30},
            {"command": "idk", "num_train_epochs": 1, "gradient_checkpointing": False},
            {"command": "task-vector", "scale": 1.0},
        ],
    )
    config = write_config(folder, values)
    before = snapshot(finished.folder / "models")
    process = compare(config)
    after = snapshot(finished.folder / "models")
    assert {name: after[name] for name in before} == before, "the shared models were made anew"
    weights = weights_below(folder / "out") + weights_below(finished.folder)
    return Finished(finished.data, config, folder / "out", process, weights)


def test_two_jobs_at_once(finished, tmp_path):
    values = settings(finished.data, tmp_path / "out", models_dir=str(finished.folder / "models"), cpu_jobs=2)
    process = compare(write_config(tmp_path, values))
    assert process.returncode == 0, process.stdout + process.stderr
    assert (tmp_path / "out" / "results.csv").read_bytes() == (finished.folder / "results.csv").read_bytes()
    jobs = [path.parent for path in (tmp_path / "out").rglob("done.json")]
    times = sorted([(job / file).stat().st_mtime for file in ("job.json", "done.json")] for job in jobs)
    assert len(times) == 4 and any(second[0] < first[1] for first, second in pairwise(times))


def test_cores_are_shared(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert slots(use_cpu=True, cpu_jobs=1) == [{"CUDA_VISIBLE_DEVICES": ""}]
    assert slots(use_cpu=True, cpu_jobs=3) == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert slots(use_cpu=True, cpu_jobs=3) == [{"CUDA_VISIBLE_DEVICES": ""}] * 3


# ---- The table ----


def test_columns_and_order(finished):
    with open(finished.folder / "results.csv", newline="") as file:
        assert next(csv.reader(file)) == list(ALL_COLUMNS)
    assert ALL_COLUMNS[: len(COLUMNS)] == COLUMNS
    keys = [
        (row["method"], row["setting"], row["seed"], row["epoch"]) for row in read_csv(finished.folder / "results.csv")
    ]
    rkld = [("rkld", "+RT", 1, epoch) for epoch in (1, 2, 3, 4)]
    npo = [("npo", None, 1, epoch) for epoch in (1, 2, 3, 4)]
    assert keys == [("retain", None, None, None), ("target", None, None, None), *rkld, *npo]
    assert {(row["split"], row["n"]) for row in read_csv(finished.folder / "results.csv")} == {("forget01", 5)}


def test_chosen_epoch(finished):
    """The first of the highest forget quality, one a run. The settings are such that the runs differ in it."""
    rows = read_rows(finished.folder / "results.csv")
    chosen = {}
    for method in ("rkld", "npo"):
        run = [row for row in rows if row["method"] == method]
        qualities = [float(row["forget_quality"]) for row in run]
        best = qualities.index(max(qualities))
        assert [row["chosen"] for row in run] == ["1" if i == best else "0" for i in range(len(run))]
        chosen[method] = best + 1
        # A run that never gets better, or has no equals, would show nothing.
        assert len(set(qualities)) > 1
    qualities = [float(row["forget_quality"]) for row in rows if row["method"] == "rkld"]
    assert qualities.count(max(qualities)) > 1 and chosen["rkld"] < 4, "no equals to choose among"
    assert chosen["npo"] == 4, "no run whose chosen epoch is the last"
    assert all(row["chosen"] in ("", "0") for row in rows if row["method"] in ("retain", "target"))


def test_first_of_equals(tokenizer, tmp_path):
    """Where `TofuEvalCallback` asks which of two epochs has the higher utility, `PeakCallback` takes the first."""
    answers = test_callback.write_data(tmp_path)
    # What the model learns is what is kept, here: utility rises.
    answers = {"forget_dataset": answers["retain_dataset"], "retain_dataset": answers["forget_dataset"]}
    target = test_callback.fit(tmp_path / "target", RETAIN[:3] + FORGET[:3], tokenizer)
    test_callback.score(target, answers, tmp_path / "log")  # any model's, to compare with
    chosen = []
    for make, settings in ((TofuEvalCallback, {"min_utility": 0}), (PeakCallback, {})):
        trainer = test_callback.learner(target, tmp_path / make.__name__, num_train_epochs=4)
        callback = make(trainer, **answers, **settings, retain_logs=str(tmp_path / "log" / "TOFU_EVAL.json"))
        trainer.add_callback(callback)
        trainer.train()
        qualities = [entry["forget_quality"] for entry in callback.history[1:]]
        equals = [entry for entry in callback.history[1:] if entry["forget_quality"] == max(qualities)]
        assert len(equals) > 1 and max(equals, key=lambda entry: entry["utility"]) != equals[0]
        chosen.append((callback.best["epoch"], equals[0]["epoch"]))
    assert chosen[1][0] == chosen[1][1] and chosen[0][0] != chosen[0][1]


def test_references(finished):
    retain, target = read_rows(finished.folder / "results.csv")[:2]
    assert (float(retain["forget_quality"]), float(retain["ks_d"])) == (1, 0)
    log = read_log(finished.folder, "references", "target-forget01")
    assert float(target["forget_quality"]) == log["forget_quality"]["agg_value"] < 0.05
    assert float(target["forget_prob"]) > 0.9 > 0.1 > float(retain["forget_prob"])


def test_full_evaluation_of_chosen_and_last(finished):
    """What the full evaluation alone gives is there for these two only, and is that of the log."""
    names = {"model_utility": "model_utility", "forget_rouge": "forget_Q_A_ROUGE", "forget_prob": "forget_Q_A_Prob"}
    names |= {"extraction_strength": "extraction_strength", "forget_quality": "forget_quality"}
    names |= {name: name for name in MODEL_UTILITY_METRICS}
    seen = 0
    for row in read_rows(finished.folder / "results.csv"):
        if row["method"] in ("retain", "target"):
            log = read_log(finished.folder, "references", f"{row['method']}-forget01")
        elif row["chosen"] == "1":
            log = read_log(finished.folder, "runs", RKLD if row["method"] == "rkld" else NPO, "chosen")
        elif row["epoch"] == "4":
            log = read_log(finished.folder, "runs", RKLD, "last")
        else:
            assert [row[name] for name in FULL] == [""] * len(FULL)
            continue
        seen += 1
        for name, metric in names.items():
            if log[metric]["agg_value"] is None:  # the retain-only model's forget quality
                assert (row["method"], name) == ("retain", "forget_quality")
            else:
                assert float(row[name]) == log[metric]["agg_value"], name
        retain = [float(row[name]) for name in MODEL_UTILITY_METRICS[:3]]
        assert float(row["retain_utility"]) == pytest.approx(3 / sum(1 / value for value in retain), rel=1e-9)
    assert seen == 5
    assert not (finished.folder / "runs" / NPO / "last").exists()  # one model, one evaluation


def test_callback_agrees_with_the_full_evaluation(finished):
    """The model in training and the one that was saved and loaded again, on two ways to the same numbers."""
    names = {"forget_quality": "forget_quality", "forget_prob": "forget_Q_A_Prob"}
    names |= {"forget_truth_ratio": "forget_truth_ratio", "extraction_strength": "extraction_strength"}
    names |= {"retain_prob": "retain_Q_A_Prob", "retain_truth_ratio": "retain_Truth_Ratio"}
    rows = read_rows(finished.folder / "results.csv")
    for name_of_run, which in ((RKLD, "chosen"), (RKLD, "last"), (NPO, "chosen")):
        history = json.loads((finished.folder / "runs" / name_of_run / "history.json").read_text())
        assert [entry["epoch"] for entry in history["epochs"]] == [1, 2, 3, 4]
        (entry,) = (entry for entry in history["epochs"] if entry["epoch"] == history[which])
        log = read_log(finished.folder, "runs", name_of_run, which)
        for name, metric in names.items():
            assert entry[name] == pytest.approx(log[metric]["agg_value"], abs=1e-4), (name_of_run, which, name)
        assert entry["ks_d"] == pytest.approx(log["forget_quality"]["ks_d"], abs=1e-4)
        # The other epochs' rows are those of the callback.
        of_run = [row for row in rows if row["seed"] == "1" and row["method"] == name_of_run.split("-")[1]]
        for row, epoch in zip(of_run, history["epochs"], strict=True):
            for name in ("forget_quality", "ks_d", *names):
                assert float(row[name]) == pytest.approx(epoch[name], abs=1e-4)
            for name in ("retain_prob", "retain_truth_ratio"):
                assert float(row[name]) == epoch[name]


def test_tables_and_figure_are_written(finished):
    table = (finished.folder / "table.md").read_text()
    assert table in finished.process.stdout
    first, last = table.split("## forget01, last epoch")
    assert [line.split("|")[1].strip() for line in first.splitlines()[4:] if line.startswith("|")] == [
        "retain", "target", "rkld", "npo",
    ]  # fmt: skip
    assert [line.split("|")[4].strip() for line in first.splitlines() if "| rkld" in line] == ["3"]
    assert [line.split("|")[4].strip() for line in last.splitlines() if "| rkld" in line] == ["4"]
    assert {path.name for path in finished.folder.glob("figure.*")} == {
        f"figure.{s}" for s in ("png", "svg", "md", "csv")
    }
    points = read_csv(finished.folder / "figure.csv")
    assert [(row["method"], row["epoch"]) for row in points] == [
        ("retain", None), ("target", None), ("rkld", 3), ("npo", 4),
    ]  # fmt: skip


def test_models_are_removed(finished):
    """Only target and retain-only model stay: none unlearned, none that knows the forget set even better, no checkpoint."""
    assert finished.weights == ["models/retain", "models/target"]
    assert not list(finished.folder.rglob("checkpoint-*"))


def table_rows(*several):
    return [dict.fromkeys(ALL_COLUMNS) | {"split": "forget05", "n": 200} | row for row in several]


def cells_of(text, heading):
    """The cells of the table below a heading, by column."""
    (section,) = [part for part in text.split("## ")[1:] if part.startswith(heading)]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_tables_by_hand():
    seeds = [
        {"seed": 1, "epoch": 3, "forget_quality": 1e-2, "ks_d": 0.2, "retain_utility": 0.5, "forget_prob": 0.25},
        {"seed": 2, "epoch": 5, "forget_quality": 1e-4, "ks_d": 0.4, "retain_utility": 0.6, "forget_prob": 0.25},
        {"seed": 3, "epoch": 4, "forget_quality": 1e-6, "ks_d": 0.9, "retain_utility": 0.7, "forget_prob": 0.25},
    ]
    chosen = [{"method": "npo", "setting": "+RT", "chosen": 1} | row for row in seeds]
    last = [
        {"method": "npo", "setting": "+RT", "chosen": 0, "seed": seed, "epoch": 10, "forget_quality": p, "ks_d": 0.5}
        for seed, p in ((1, 0.0), (2, 0.5), (3, 0.5))
    ]
    runs = [row for pair in zip(chosen, last, strict=True) for row in pair]
    rows = table_rows(
        {"method": "retain", "forget_quality": 1.0, "ks_d": 0.0, "model_utility": 0.61},
        {"method": "target", "forget_quality": 2e-19, "ks_d": 0.45, "model_utility": 0.625, "retain_utility": 0.8},
        *runs,
        {"method": "npo", "setting": None, "seed": 1, "epoch": 2, "chosen": 1, "forget_quality": 0.0312},
    )
    text = tables(rows)
    retain, target, three, one = cells_of(text, "forget05, epoch of the highest forget quality")
    assert (retain["method"], retain["seeds"], retain["model utility"]) == ("retain", "", "0.610")
    assert target[P] == "2e-19"
    assert (three["method"], three["setting"], three["seeds"], three["epoch"]) == ("npo", "+RT", "3", "4 ± 1")
    # Mean 0.5, deviations -0.3, -0.1, 0.4: sqrt(0.26 / 2).
    assert three["D"] == "0.500 ± 0.361"
    assert three["retain utility"] == "0.600 ± 0.100"
    # Mean of 0.625, 0.75, 0.875.
    assert (target["over the target's"], three["over the target's"]) == ("1.00", "0.75 ± 0.12")
    assert (retain["over the target's"], one["over the target's"]) == ("", "")
    assert three["forget prob"] == "0.250 ± 0.000"
    assert three[P] == "0.0001 (1e-06 to 0.01)"  # 10 to the mean of -2, -4, -6
    assert (three["model utility"], three["forget ROUGE"]) == ("", "")
    assert (one["setting"], one["seeds"], one["epoch"], one[P]) == ("", "1", "2", "0.031")

    *_, three, one = cells_of(text, "forget05, last epoch")
    assert (three["epoch"], three["D"]) == ("10 ± 0", "0.500 ± 0.000")
    # A p of zero is taken for 1e-300: the cube root of 1e-300 * 0.25.
    assert three[P] == "6.3e-101 (0 to 0.5)"
    assert one["epoch"] == "2"


def test_tables_of_two_splits():
    rows = table_rows({"method": "target", "ks_d": 0.25}) + table_rows(
        {"method": "target", "ks_d": 0.75, "split": "forget10"}
    )
    text = tables(rows)
    assert [cells_of(text, f"{split}, last epoch")[0]["D"] for split in ("forget05", "forget10")] == [
        "0.250",
        "0.750",
    ]


# ---- Kills and failures ----


def is_alive(pid):
    """Whether a process is there, and not only waiting to be reaped."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_killed_comparison_goes_on(finished, tmp_path):
    """Its process is killed five times, each time with a worker in the middle of something, that would take long."""
    (tmp_path / "sitecustomize.py").write_text("import killed_worker\n")
    config = write_config(tmp_path, settings(finished.data, tmp_path / "out"))
    for job, moment, what, finished_before in (
        ("retain", "rmtree", "checkpoint-12", None),  # trained, with half of the last checkpoint removed
        ("target", "_save_optimizer_and_scheduler", 2, "references/retain-forget01"),  # with half a checkpoint written
        ("target-forget01", "generate", 1, "models/target"),
        (RKLD, "training_step", 8, "references/target-forget01"),
        (RKLD, "generate", 2, "references/target-forget01"),  # of the last epoch
    ):
        killed = compare(
            config,
            FIRST_PATH=os.pathsep.join([str(tmp_path), str(Path(__file__).parent)]),
            KILL_AT=f"{job} {moment} {what}",
            KILLED_WORKER=str(tmp_path / "pid"),
        )
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
        pid = int((tmp_path / "pid").read_text())
        until = time.monotonic() + 20
        while is_alive(pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not is_alive(pid), f"the worker of {job} outlives the comparison"
        assert finished_before is None or (tmp_path / "out" / finished_before / "done.json").is_file()
        (folder,) = (path for path in (tmp_path / "out").glob(f"*/{job}"))
        assert not (folder / "done.json").exists()
        if moment == "training_step":  # two epochs are done, which need not be done again
            assert [path.name for path in (folder / "model").glob("checkpoint-*")] == ["checkpoint-6"]

    last = compare(config)
    assert last.returncode == 0, last.stdout + last.stderr
    for name in ("results.csv", "table.md", "figure.csv", "figure.svg"):
        assert (tmp_path / "out" / name).read_bytes() == (finished.folder / name).read_bytes(), name
    histories = [
        json.loads((one / "runs" / RKLD / "history.json").read_text()) for one in (tmp_path / "out", finished.folder)
    ]
    assert histories[0] == histories[1]
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert weights_below(tmp_path / "out") == finished.weights


def test_finished_comparison_trains_nothing(finished):
    """No job is started; the files are the same."""
    names = ("results.csv", "table.md", "figure.*")
    written = {name: content for name, (content, _) in snapshot(finished.folder, *names).items()}
    jobs = snapshot(finished.folder, "log.txt", "done.json", "task.json", "history.json", "*.safetensors")
    for name in written:
        (finished.folder / name).unlink()
    # As after a kill in the middle of removing what is not needed any more.
    plan = plan_of(finished.data, finished.folder)
    (augmented,) = (job.folder for job in plan if job.name.startswith("model-augmented"))
    augmented.mkdir()
    (augmented / "model.safetensors").touch()
    left = augmented.with_name("augmented-of-a-run-that-is-gone")
    left.mkdir()
    again = compare(finished.config)
    assert not augmented.exists()
    assert f"{left} is an augmented model of no run in this file" in again.stdout
    left.rmdir()
    assert again.returncode == 0, again.stderr
    assert {name: content for name, (content, _) in snapshot(finished.folder, *names).items()} == written
    assert snapshot(finished.folder, "log.txt", "done.json", "task.json", "history.json", "*.safetensors") == jobs
    assert again.stdout.count(" done\n") == 6 and again.stdout.count(" not needed any more\n") == 1
    assert "✓" not in again.stdout


def test_failing_run(other):
    """It stops no other, is named, and is tried again at the next start, alone."""
    failing = "forget01-npo-too-fast-seed1"
    assert other.process.returncode == 1
    assert f"✗ {failing} failed; its log: {other.folder / 'runs' / failing / 'log.txt'}" in other.process.stdout
    assert (
        f"1 jobs failed or could not start: {failing}. Start again for them." in other.process.stdout.splitlines()[-1]
    )
    log = (other.folder / "runs" / failing / "log.txt").read_text()
    assert log.count("FloatingPointError: ") == 1
    keys = [(row["method"], row["epoch"], row["chosen"]) for row in read_csv(other.folder / "results.csv")]
    assert keys == [("retain", None, None), ("target", None, None), ("idk", 1, True), ("task_vector", None, True)]

    results = (other.folder / "results.csv").read_bytes()
    done = snapshot(other.folder, "done.json")
    again = compare(other.config)
    assert again.returncode == 1
    assert again.stdout.splitlines()[-1] == other.process.stdout.splitlines()[-1]
    assert (other.folder / "runs" / failing / "log.txt").read_text().count("FloatingPointError: ") == 2
    assert (other.folder / "results.csv").read_bytes() == results
    assert snapshot(other.folder, "done.json") == done


def test_models_are_shared(finished, other):
    """Made once (see the fixture); the evaluations of the same models on the same questions agree."""
    assert not (other.folder / "models").exists()
    rows = [read_rows(one.folder / "results.csv")[:2] for one in (finished, other)]
    assert rows[0] == rows[1]


def test_models_are_kept(other):
    """With `keep_models`, those of the runs and the augmented one."""
    names = [f"runs/forget01-{name}-seed1/model" for name in ("idk", "task_vector")]
    assert {f"{names[0]}/best", f"{names[0]}/last", f"{names[1]}/best", "models/target"} <= set(other.weights)
    assert any(name.startswith("models/augmented-forget01-seed1-") for name in other.weights)


# ---- Texts ----


def test_no_text_is_written(finished):
    texts = [text.encode() for text in all_texts()]
    paths = [path for path in finished.folder.rglob("*") if path.is_file()]
    # Of the tokenizer's files, the merges hold words of any text.
    paths = [path for path in paths if path.name != "tokenizer.json"]
    names = {path.name for path in paths}
    assert {"results.csv", "table.md", "log.txt", "job.json", "task.json", "history.json", "TOFU_EVAL.json"} <= names
    found = [(str(path), text) for path in paths for text in texts if text in path.read_bytes()]
    assert not found
    assert not [text for text in all_texts() if text in finished.printed]
    assert not (finished.folder / "case_study.md").exists()


def test_case_study(other):
    text = (other.folder / "case_study.md").read_text()
    for index in (0, 3):
        row = tofu_rows("forget")[index]
        section = text.split(f"## forget01: {row['question']}\n")[1].split("##")[0]
        cells = dict(line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|"))
        cells = {name.strip(): answer.strip() for name, answer in cells.items()}
        assert cells["(truth)"] == row["answer"]
        assert {"retain", "target", "idk", "task_vector"} <= cells.keys()
        # The target knows the answer by heart, as far as six tokens go.
        assert row["answer"].startswith(cells["target"]) and len(cells["target"]) > 5
        assert cells["retain"] != cells["target"]
    words = [line for line in text.splitlines() if line.startswith("| target") and ", " in line][-1]
    top = [word.rsplit(" ", 1) for word in words.strip("| ").split("|")[1].strip().split(", ")]
    assert len(top) == 5 and "Quito".startswith(top[0][0]) and float(top[0][1]) > 0.5
    assert [float(p) for _, p in top] == sorted((float(p) for _, p in top), reverse=True)
    # Elsewhere, texts are in the case study's own files only.
    allowed = {"case_study.md", "case_study.json", "tokenizer.json", "task.json"}
    paths = [path for path in other.folder.rglob("*") if path.is_file() and path.name not in allowed]
    assert not [(path, t) for path in paths for t in all_texts() if t.encode() in path.read_bytes()]


def test_case_studies_of_two_starts(tmp_path):
    """A finished job is not asked again; what was asked at another start is never taken for the answer to this."""

    def job(method, asked, kind="unlearn"):
        folder = tmp_path / method
        answers = [{"question": f"Q{i}", "true": f"A{i}", "answer": f"{method} on {i}"} for i in asked]
        completions = [{"question": f"Q{i}", "beginning": f"B{i}", "top": [[f"{method}{i}", 0.5]]} for i in asked]
        path = folder / ("chosen" if kind == "unlearn" else "") / FILE
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"answers": answers, "completions": completions}))
        (folder / "done.json").write_text("{}")
        return Job(method, kind, folder, {}, row={"split": "forget01", "method": method, "setting": None})

    text = write_case_study(
        [job("target", [0, 1], "evaluate"), job("npo", [1]), job("whp", [2])], tmp_path
    ).read_text()
    sections = [(section.splitlines()[0], section) for section in text.split("## forget01: ")[1:]]
    assert [question for question, _ in sections] == ["Q0", "Q1", "Q2"] * 2
    for i, models in enumerate((["target"], ["target", "npo"], ["whp"])):
        answers, completions = sections[i][1], sections[3 + i][1]
        for method in ("target", "npo", "whp"):
            assert (f"{method} on {i}" in answers) == (f"{method}{i} 0.500" in completions) == (method in models)
        assert answers.count(" on ") == completions.count(" 0.500") == len(models)


# ---- The plan ----


def plan_of(data, folder, **changed):
    return make_plan(CompareConfig(**settings(data, folder, **changed)))


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


def test_plan_is_printed(finished):
    lines = finished.process.stdout.splitlines()
    start = lines.index("Plan, in the order of value:")
    names = ["model-retain", "retain-forget01", "model-target", "target-forget01", "model-augmented", RKLD, NPO]
    for line, name in zip(lines[start + 1 :], names, strict=False):
        assert line.strip().startswith(name) and line.rstrip().endswith(" min"), line
    assert lines[start + 8].startswith("About ") and ", 1 at once." in lines[start + 8]
    done = [line for line in lines if " ✓ " in line]
    assert [line.split()[2].split("-seed1-")[0] for line in done] == [
        "model-retain", "retain-forget01", "model-target", "target-forget01", "model-augmented-forget01", RKLD, NPO,
    ]  # fmt: skip
    assert "; 0 left, " in done[-1]


def test_dry_run(data, tmp_path, capsys):
    config = write_config(tmp_path, settings(data, tmp_path / "out"))
    before = everything_below(tmp_path)
    assert run(["--config", str(config), "--dry_run", "true"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Plan, in the order of value:") and "About " in printed
    assert len(printed.splitlines()) == 9
    assert everything_below(tmp_path) == before


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
        ({"augment": {"epochs": 3}, "runs": RUNS}, "`epochs` is no setting of `trl-rkld finetune`"),
        ({"runs": [{"command": "rkld", "augment": {"epochs": 3}}]}, "`epochs` is no setting of `trl-rkld finetune`"),
        ({"evaluation": {"max_new_token": 3}}, "`evaluation`: .*max_new_token"),
        ({"evaluation": {"max_new_tokens": -3}}, "`evaluation`: `max_new_tokens=-3` must be at least 0"),
        ({"evaluation": {"retain_logs": "x"}}, "`evaluation`: .*decided by the comparison"),
        ({"evaluation": {"forget_split": "forget05"}}, "`evaluation`: .*decided by the comparison"),
        ({"runs": [{"command": "teacher", "alpha": "x"}]}, "`runs`, teacher.*`alpha` must be a number"),
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
({"evaluation": {"forget_dataset": "x.jsonl"}}, "`evaluation`: `forget_dataset` is decided by the comparison"),
        ({"evaluation": {"compat": "open_unlearning"}}, "`evaluation`: `compat` is decided by the comparison"),
        ({"runs": [{"command": "npo", "augment": {"num_train_epochs": 3}}]}, r"`runs\[0\]` \(npo\) has no augmented model"),
        ({"runs": [{"command": "rkld", "augment": None}]}, r"`runs\[0\]`, and its `augment`, must hold names"),
        ({"runs": ["npo"]}, r"`runs\[0\]`.* must hold names and values"),
        ({"common": None}, "`common` must hold names and values, and is None"),
        ({"seeds": 1}, "`seeds` must be a list"),({"splits": "forget01"}, "`splits` must be a list"),({"runs": [{"command": "npo", "seeds": 1}]}, r"`seeds` of `runs\[0\]` must be a list"),
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
        ({"evaluation": {"max_retain_samples": 0}}, "`evaluation`: `max_retain_samples=0`"),
        ({"model_name_or_path": "nowhere/nothing"}, "`model_name_or_path`: nowhere/nothing"),
        ({"target_model_name_or_path": "nowhere/nothing"}, "`target_model_name_or_path`: nowhere/nothing"),({"retain_model_name_or_path": {"forget01": "nowhere"}}, r"`retain_model_name_or_path\[forget01\]`: nowhere can"),
    ],
)  # fmt: skip
def test_bad_settings(changed, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"finetune": {"learning_rate": 3e-3}},
            "models/retain` holds the result of other settings: arguments.learning_rate differ",
        ),
        ({"common": {"learning_rate": 3e-3}}, "runs/forget01-rkld-rt-seed1.*: arguments.learning_rate differ"),
        ({"evaluation": {"max_new_tokens": 7}}, "references/retain-forget01.*: evaluation.max_new_tokens differ"),
        ({"epoch_retain_samples": 3}, "runs/forget01-rkld-rt-seed1.*: epoch_retain_samples differ"),
        ({"max_retain_samples": 4}, "models/retain.*: sets.max_retain_samples differ"),
    ],
)
def test_folder_of_other_settings(changed, message, finished, tmp_path):
    values = settings(finished.data, finished.folder)
    for name, value in changed.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    config = write_config(tmp_path, values)
    before = snapshot(finished.folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run(["--config", str(config), "--dry_run", "true"])
    assert snapshot(finished.folder) == before


def test_other_files_of_the_same_names(data, tmp_path):
    """What was made of files that have changed since is not taken for the result of those that are there now."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(data / "base", tmp_path / "given")
    values = settings(tmp_path / "data", tmp_path / "out", target_model_name_or_path=str(tmp_path / "given"))
    jobs = make_plan(CompareConfig(**values))
    for job in jobs:
        job.folder.mkdir(parents=True)
        (job.folder / "job.json").write_text(json.dumps(job.settings))
    config = write_config(tmp_path, values)
    assert run(["--config", str(config), "--dry_run", "true"]) == 0
    weights = next((tmp_path / "given").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="target-forget01.*: contents.* differ"):
        run(["--config", str(config), "--dry_run", "true"])
    weights.write_bytes(content)
    assert run(["--config", str(config), "--dry_run", "true"]) == 0


def test_command_line_says_it_in_one_line(data, tmp_path, capsys):
    config = write_config(tmp_path, settings(data, tmp_path / "out", runs=[{"command": "npo", "betta": 1}]))
    assert main(["compare", "--config", str(config)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("trl-rkld compare: `runs`, npo (None): `betta` is no")
