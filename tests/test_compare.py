# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What a finished `trl-rkld compare` leaves, and that it survives kills and failing runs."""

import csv
import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
from compare_setup import (
    NPO,
    RKLD,
    RUNS,
    Finished,
    compare,
    is_alive,
    plan_of,
    read_log,
    read_rows,
    settings,
    snapshot,
    weights_below,
    write_config,
    write_data,
)
from tofu_like import all_texts, tofu_rows

from trl_rkld.compare.table import ALL_COLUMNS
from trl_rkld.scripts.compare import run
from unlearn_eval.metrics import MODEL_UTILITY_METRICS
from unlearn_eval.plots import COLUMNS
from unlearn_eval.rows import read_csv


# Columns that only the full evaluation fills.
FULL = ("model_utility", "retain_utility", "forget_rouge", *MODEL_UTILITY_METRICS)


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


# ---- Kills and failures ----


def killed_comparison(config, folder, moment):
    """Run a comparison whose process is killed at a moment of one of its workers; that worker's process id."""
    (folder / "sitecustomize.py").write_text("import killed_worker\n")
    killed = compare(
        config,
        FIRST_PATH=os.pathsep.join([str(folder), str(Path(__file__).parent)]),
        KILL_AT=moment,
        KILLED_WORKER=str(folder / "pid"),
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    return int((folder / "pid").read_text())


def test_killed_comparison_goes_on(finished, tmp_path):
    """Its process is killed five times, each time with a worker in the middle of something, that would take long."""
    config = write_config(tmp_path, settings(finished.data, tmp_path / "out"))
    for job, moment, what, finished_before in (
        ("retain", "rmtree", "checkpoint-12", None),  # trained, with half of the last checkpoint removed
        ("target", "_save_optimizer_and_scheduler", 2, "references/retain-forget01"),  # with half a checkpoint written
        ("target-forget01", "generate", 1, "models/target"),
        (RKLD, "training_step", 8, "references/target-forget01"),
        (RKLD, "generate", 2, "references/target-forget01"),  # of the last epoch
    ):
        pid = killed_comparison(config, tmp_path, f"{job} {moment} {what}")
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


def test_a_run_whose_teacher_is_gone_begins_anew(finished, tmp_path):
    """Made again on another device it has other last digits; the checkpoint can't be resumed, and must not block the run."""
    values = settings(finished.data, tmp_path / "out", models_dir=str(finished.folder / "models"), runs=RUNS[:1])
    config = write_config(tmp_path, values)
    killed_comparison(config, tmp_path, f"{RKLD} training_step 8")
    folder = tmp_path / "out" / "runs" / RKLD
    (record,) = folder.glob("model/checkpoint-6/unlearning.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"teacher_digest": "of another device"}))
    failed, last = compare(config), compare(config)
    assert failed.returncode == 1 and f"✗ {RKLD} failed" in failed.stdout
    assert "Start again: this run begins anew." in (folder / "log.txt").read_text()
    assert last.returncode == 0, last.stdout + last.stderr
    whole = [row for row in read_rows(finished.folder / "results.csv") if row["method"] != "npo"]
    assert read_rows(tmp_path / "out" / "results.csv") == whole


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
    assert (
        f"✗ {failing} failed (exit code 1); its log: {other.folder / 'runs' / failing / 'log.txt'}"
        in other.process.stdout
    )
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


# ---- Its plan, and other settings for its folder ----


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


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"finetune": {"learning_rate": 3e-3}},
            "models/retain`.* other settings are there. In the first, arguments.learning_rate differ",
        ),
        ({"common": {"learning_rate": 3e-3}}, "runs/forget01-rkld-rt-seed1.*, arguments.learning_rate differ"),
        ({"evaluation": {"max_new_tokens": 7}}, "references/retain-forget01.*, evaluation.max_new_tokens differ"),
        ({"epoch_retain_samples": 3}, "runs/forget01-rkld-rt-seed1.*, epoch_retain_samples differ"),
        ({"max_retain_samples": 4}, "models/retain.*, sets.max_retain_samples differ"),
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
