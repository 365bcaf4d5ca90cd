# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Parts of `trl-rkld compare` by themselves: sharing cores, choosing an epoch, the tables and the case study."""

import json
from dataclasses import replace

import compare_setup
import pytest
import torch
from callback_setup import fit, learner, score, write_data
from conftest import FORGET, RETAIN

from trl_rkld.compare.case_study import FILE, write_case_study
from trl_rkld.compare.peak import PeakCallback
from trl_rkld.compare.plan import Job
from trl_rkld.compare.runner import run_jobs, slots
from trl_rkld.compare.table import ALL_COLUMNS, tables
from unlearn_eval.callback import TofuEvalCallback


P = "forget quality p, geometric mean (range)"


def test_cores_are_shared(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert slots(use_cpu=True, cpu_jobs=1) == [{"CUDA_VISIBLE_DEVICES": ""}]
    assert slots(use_cpu=True, cpu_jobs=3) == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert slots(use_cpu=True, cpu_jobs=3) == [{"CUDA_VISIBLE_DEVICES": ""}] * 3


@pytest.mark.parametrize(
    "visible, devices",
    [
        (None, ["0", "1"]),
        ("", ["0", "1"]),
        ("3, 1", ["3", "1"]),
        ("1,", ["1"]),
        ("0,1,2,3", ["0", "1"]),  # of another machine: only two are there
        ("GPU-4b1f", ["GPU-4b1f"]),
        ("MIG-4b1f,MIG-77aa,MIG-90c3", ["MIG-4b1f", "MIG-77aa", "MIG-90c3"]),
    ],
)
def test_a_job_a_gpu(visible, devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert slots(use_cpu=False, cpu_jobs=5) == [{"CUDA_VISIBLE_DEVICES": device} for device in devices]


def test_a_broken_gpu_or_folder_does_not_stop_the_others(tmp_path, capsys):
    """Where nothing can run, each job would fail at once, and the next one be taken."""
    (model, *_) = compare_setup.plan_of(compare_setup.write_data(tmp_path / "data"), tmp_path / "out")
    jobs = [replace(model, name=f"model{i}", folder=tmp_path / f"model{i}", row={}) for i in range(4)]
    (tmp_path / "file").touch()
    no_folder = replace(model, name="no-folder", folder=tmp_path / "file" / "model", row={})
    # On the broken one a worker starts an engine, as vLLM does, and dies.
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import os, subprocess\n"
        "engine = subprocess.Popen(['sleep', '300'])\n"
        f"open({str(tmp_path / 'engines')!r}, 'a').write(f'{{engine.pid}} ')\n"
        "os._exit(1)\n"
    )
    broken = {"CUDA_VISIBLE_DEVICES": "7", "PYTHONPATH": str(tmp_path / "broken")}
    gpus = [broken, {"CUDA_VISIBLE_DEVICES": "0"}]
    failed = run_jobs([*jobs[:3], no_folder, jobs[3]], gpus, lambda job, seconds: None)
    assert failed == [jobs[0], jobs[2], no_folder]
    assert [job.is_done for job in jobs] == [False, True, False, True]
    printed = capsys.readouterr().out
    assert printed.count("failed (exit code 1)") == 2 and printed.count("GPU 7 is left out") == 1
    assert printed.count("no-folder could not start: ") == 1
    engines = (tmp_path / "engines").read_text().split()
    assert len(engines) == 2 and not any(compare_setup.is_alive(int(pid)) for pid in engines)


def test_first_of_equals(tokenizer, tmp_path):
    """Where `TofuEvalCallback` asks which of two epochs has the higher utility, `PeakCallback` takes the first."""
    answers = write_data(tmp_path)
    # What the model learns is what is kept, here: utility rises.
    answers = {"forget_dataset": answers["retain_dataset"], "retain_dataset": answers["forget_dataset"]}
    target = fit(tmp_path / "target", RETAIN[:3] + FORGET[:3], tokenizer)
    score(target, answers, tmp_path / "log")  # any model's, to compare with
    chosen = []
    for make, settings in ((TofuEvalCallback, {"min_utility": 0}), (PeakCallback, {})):
        trainer = learner(target, tmp_path / make.__name__, num_train_epochs=4)
        callback = make(trainer, **answers, **settings, retain_logs=str(tmp_path / "log" / "TOFU_EVAL.json"))
        trainer.add_callback(callback)
        trainer.train()
        qualities = [entry["forget_quality"] for entry in callback.history[1:]]
        equals = [entry for entry in callback.history[1:] if entry["forget_quality"] == max(qualities)]
        assert len(equals) > 1 and max(equals, key=lambda entry: entry["utility"]) != equals[0]
        chosen.append((callback.best["epoch"], equals[0]["epoch"]))
    assert chosen[1][0] == chosen[1][1] and chosen[0][0] != chosen[0][1]


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

    assert "can't tell methods apart" not in text
    *_, three, one = cells_of(text, "forget05, last epoch")
    assert (three["epoch"], three["D"]) == ("10 ± 0", "0.500 ± 0.000")
    # A p of zero is taken for 1e-300: the cube root of 1e-300 * 0.25.
    assert three[P] == "6.3e-101 (0 to 0.5)"
    assert one["epoch"] == "2"


def test_a_target_of_no_utility():
    """It says nothing, say: of nothing there is no share, and no error."""
    rows = table_rows(
        {"method": "target", "forget_quality": 1e-9, "ks_d": 0.45, "retain_utility": 0.0},
        {"method": "npo", "setting": None, "seed": 1, "epoch": 2, "chosen": 1, "retain_utility": 0.5},
    )
    target, run = cells_of(tables(rows), "forget05, last epoch")
    assert (target["retain utility"], target["over the target's"]) == ("0.000", "")
    assert (run["retain utility"], run["over the target's"]) == ("0.500", "")


def test_tables_of_two_splits():
    rows = table_rows({"method": "target", "ks_d": 0.25, "forget_quality": 0.01}) + table_rows(
        {"method": "target", "ks_d": 0.75, "split": "forget10", "forget_quality": 0.0099}
    )
    text = tables(rows)
    assert text.count("The target itself has p = 0.01: ") == text.count("can't tell methods apart") == 1
    assert [cells_of(text, f"{split}, last epoch")[0]["D"] for split in ("forget05", "forget10")] == [
        "0.250",
        "0.750",
    ]


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
