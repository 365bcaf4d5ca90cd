# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`trl-rkld plot`, and the rows it draws."""

import csv
import json

import pytest
from conftest import REFERENCE_LOGS

from trl_rkld.cli import main
from unlearn_eval.files import write_json
from unlearn_eval.plots import COLUMNS, rows_to_csv
from unlearn_eval.results import read_log
from unlearn_eval.rows import read_csv, row_from_log


FULL, RETAIN = (
    REFERENCE_LOGS / f"Llama-3.2-1B-Instruct_{kind}_TOFU_EVAL.json" for kind in ("full_forget01", "retain99")
)
PICTURES = ["forget_quality.csv", "forget_quality.md", "forget_quality.png", "forget_quality.svg"]


def items(agg_value, values, field="score"):
    return {"agg_value": agg_value, "value_by_index": {str(i): {field: value} for i, value in enumerate(values)}}


def small_log(ratios=(0.1, 0.2, 0.3, 0.4), **change):
    """Four forget items; the numbers are made for computing by head."""
    return {
        "metadata": {"forget_split": "forget05"},
        "forget_truth_ratio": items(0.25, ratios),
        "forget_Q_A_Prob": items(0.75, (0.5, 1.0, 0.5, 1.0), "prob"),
        "forget_Q_A_ROUGE": {"agg_value": 0.625},
        "extraction_strength": {"agg_value": 0.125},
        "retain_Q_A_Prob": {"agg_value": 0.5},
        "retain_Q_A_ROUGE": {"agg_value": 0.5},
        "retain_Truth_Ratio": {"agg_value": 0.25},
        "model_utility": {"agg_value": 0.4},
        "forget_quality": {"agg_value": 0.5, "ks_d": 0.25, "n": 4},
    } | change


NO_QUALITY = {"forget_quality": {"agg_value": None, "reason": "needs the retain-only model's log"}}


def write_log(folder, log):
    write_json(folder / "TOFU_EVAL.json", log)
    return str(folder)


def plot(*arguments):
    return main(["plot", *map(str, arguments)])


def written(folder):
    assert sorted(path.name for path in folder.iterdir()) == PICTURES
    with open(folder / "forget_quality.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_row_by_hand():
    row = row_from_log(small_log(), "RKLD", setting="LoRA", seed=3, epoch=2, chosen=True)
    assert row == {
        "split": "forget05",
        "method": "RKLD",
        "setting": "LoRA",
        "seed": 3,
        "epoch": 2,
        "chosen": True,
        "n": 4,
        "forget_quality": 0.5,
        "ks_d": 0.25,
        "model_utility": 0.4,
        "retain_utility": pytest.approx(3 / (2 + 2 + 4)),
        "forget_prob": 0.75,
        "forget_rouge": 0.625,
        "extraction_strength": 0.125,
    }
    assert tuple(row) == COLUMNS


def test_forget_quality_from_the_retain_log():
    retain = small_log(ratios=(0.5, 0.6, 0.7, 0.8))
    row = row_from_log(small_log(**NO_QUALITY), "RKLD", retain_log=retain)
    # All ratios of one lie below those of the other: D = 1, and 2 of the (8 choose 4) orders are as extreme.
    assert (row["forget_quality"], row["ks_d"]) == (pytest.approx(2 / 70), 1.0)
    # A stored test may be against another retain-only model.
    for stored in ({"agg_value": 0.5}, {"agg_value": 0.5, "ks_d": 0.25}):
        row = row_from_log(small_log(forget_quality=stored), "RKLD", retain_log=retain)
        assert (row["forget_quality"], row["ks_d"]) == (pytest.approx(2 / 70), 1.0)
    # Own data without wrong answers have no truth ratios.
    log = small_log(**NO_QUALITY)
    del log["forget_truth_ratio"]
    assert row_from_log(log, "RKLD", retain_log=retain)["forget_quality"] is None


def test_nulls_and_splits():
    log = {"forget_Q_A_Prob": items(0.5, [0.5] * 200, "prob"), "model_utility": {"agg_value": None}}
    row = row_from_log(log, "RKLD")
    assert (row["split"], row["n"], row["forget_prob"]) == ("forget05", 200, 0.5)
    assert all(row[column] is None for column in COLUMNS[7:] if column != "forget_prob")
    assert row_from_log({"forget_Q_A_Prob": items(0.5, [0.5] * 7, "prob")}, "RKLD")["split"] == "own data"
    row = row_from_log({"retain_Q_A_Prob": {"agg_value": 0.5}}, "RKLD")
    assert (row["split"], row["n"]) == ("own data", None)


def test_published_logs(tmp_path, capsys):
    if not FULL.is_file():
        pytest.skip(f"no published logs in {REFERENCE_LOGS}: set TRL_RKLD_SHARED")
    folder = tmp_path / "figure"
    assert plot("--results", FULL, "--labels", "full", "--retain", RETAIN, "--output_dir", folder) == 0
    retain, full = written(folder)
    assert (full["split"], full["method"], full["n"]) == ("forget01", "full", "40")
    assert float(full["forget_quality"]) == pytest.approx(0.0067607323)
    assert float(full["ks_d"]) == 0.375, "open-unlearning does not store D"
    assert float(full["model_utility"]) == pytest.approx(0.5991534707)
    parts = 0.8706601643562317, 0.7932626474213142, 0.5179621870037618
    assert float(full["retain_utility"]) == pytest.approx(3 / sum(1 / part for part in parts))
    assert [float(full[column]) for column in COLUMNS[-3:]] == pytest.approx(
        [0.9011520192, 0.8731383440, 0.7431993189]
    )
    assert (retain["method"], float(retain["forget_quality"])) == ("retain", 1.0), "null in its own log"
    output = capsys.readouterr().out
    assert "| forget01 | full   |" in output and "Not drawn" not in output
    assert all(f"Written: {folder / name}" in output for name in PICTURES)
    # Without the retain log, what is stored is what there is.
    assert row_from_log(read_log(RETAIN), "x")["forget_quality"] is None


@pytest.mark.parametrize("below", ["", "evals"])
def test_epochs_of_one_run(tmp_path, below):
    utilities = {5: 0.5, 40: 0.3, 100: 0.2}
    for step, utility in utilities.items():
        log = small_log(model_utility={"agg_value": utility})
        write_log(tmp_path / "run" / f"checkpoint-{step}" / below, log)
    (tmp_path / "run" / "checkpoint-7").mkdir()  # not evaluated
    for epoch in (10, 2):
        write_log(tmp_path / "other" / f"epoch-{epoch}" / below, small_log())
    target = write_log(tmp_path / "full", small_log(model_utility={"agg_value": 0.6}))
    arguments = ["--results", tmp_path / "run", tmp_path / "other", "--target", target]
    assert plot(*arguments, "--output_dir", tmp_path / "figure") == 0
    rows = [(row["method"], row["epoch"], row["model_utility"]) for row in written(tmp_path / "figure")]
    run = [("run", "1", "0.5"), ("run", "2", "0.3"), ("run", "3", "0.2")]
    assert rows == [("target", "", "0.6"), *run, ("other", "2", "0.4"), ("other", "10", "0.4")]


def test_retain_logs_by_split(tmp_path):
    results, retain_logs = [], []
    for split, low in (("forget01", 0.5), ("forget05", 0.25)):
        log = small_log(metadata={"forget_split": split}, **NO_QUALITY)
        results.append(write_log(tmp_path / split / "RKLD", log))
        retain = small_log(ratios=(low, 0.6, 0.7, 0.8), metadata={"forget_split": split})
        retain_logs.append(write_log(tmp_path / split / "retain", retain))
    arguments = ["--results", *results, "--retain_logs", *reversed(retain_logs), "--output_dir", tmp_path / "figure"]
    assert plot(*arguments) == 0
    rows = written(tmp_path / "figure")
    assert [(row["split"], row["method"], float(row["ks_d"])) for row in rows] == [
        ("forget01", "RKLD", 1.0),
        ("forget05", "RKLD", 0.75),
    ]


def test_what_cannot_be_drawn_is_named(tmp_path, capsys):
    own = small_log(metadata={"forget_split": "own data"}, model_utility={"agg_value": None}, **NO_QUALITY)
    folders = [write_log(tmp_path / "RKLD", small_log()), write_log(tmp_path / "mine", own)]
    assert plot("--results", *folders, "--output_dir", tmp_path / "figure") == 0
    output = capsys.readouterr().out
    assert "Not drawn: mine on own data (no forget_quality and no model_utility)\n" in output
    assert "| own data | mine " in output and "Not drawn: RKLD" not in output
    assert [row["method"] for row in written(tmp_path / "figure")] == ["RKLD", "mine"]

    assert plot("--results", folders[1], "--output_dir", tmp_path / "nothing") == 2
    captured = capsys.readouterr()
    assert "| own data | mine " in captured.out, "the table is there even so"
    assert "no row with both" in captured.err and not (tmp_path / "nothing").exists()


def test_csv_comes_back(tmp_path, capsys):
    rows = [
        row_from_log(small_log(), "RKLD", setting="a, b", seed=0, epoch=epoch, chosen=epoch == 2) for epoch in (1, 2)
    ]
    rows.append(row_from_log(small_log(**NO_QUALITY), "retain"))
    path = tmp_path / "rows.csv"
    path.write_text(rows_to_csv(rows))
    assert read_csv(path) == rows
    assert plot("--csv", path, "--output_dir", tmp_path / "figure") == 0
    assert (tmp_path / "figure" / "forget_quality.csv").read_text() == path.read_text()
    assert "Not drawn" not in capsys.readouterr().out, "a retain-only model needs no forget quality"
    # Other columns, another order, fewer columns, and a spreadsheet's byte-order mark.
    path.write_text(
        "\ufeffnote,method,split,epoch,chosen,model_utility\nx,NPO,forget01,1.5,no,3e-1\n", encoding="utf-8"
    )
    row = {"split": "forget01", "method": "NPO", "epoch": 1.5, "chosen": False, "model_utility": 0.3}
    assert read_csv(path) == [row]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split,n\nforget01,40\n", "has no column `method`: its first line must name split, method"),
        ("", "has no column `split`"),
        ("split,method,n\nforget01,NPO,many\n", "line 2: n is 'many': give a number, or nothing"),
        ("split,method,n\nforget01,NPO,nan\n", "line 2: n is 'nan': give a number"),
        ("split,method,chosen\na,b,\na,b,maybe\n", "line 3: chosen is 'maybe': give True or False"),
        ("split,method\nforget01,NPO,1\n", "another number of fields in line 2"),
        ("split,method,n\nforget01,NPO\n", "another number of fields in line 2"),
        ("split,method\n", "`rows` is empty"),
        ("split,method,forget_quality,model_utility\na,b,-3.2,0.5\n", "forget_quality = -3.2 at 0: give a number"),
    ],
)
def test_faulty_csv(tmp_path, capsys, text, message):
    (tmp_path / "rows.csv").write_text(text)
    assert plot("--csv", tmp_path / "rows.csv", "--output_dir", tmp_path / "figure") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "figure").exists()


def test_faults(tmp_path, capsys):
    good, twin = (write_log(tmp_path / name / "RKLD", small_log()) for name in ("a", "b"))
    broken = small_log()
    del broken["forget_Q_A_Prob"]["value_by_index"]["2"]
    other = write_log(tmp_path / "other", small_log(metadata={"forget_split": "forget10"}))
    both = tmp_path / "both"
    for name in ("checkpoint-1", "epoch-1"):
        write_log(both / name, small_log())
    cases = {
        (
            "--results",
            tmp_path / "nothing",
        ): "nothing has no TOFU_EVAL.json, nor have sub-folders called checkpoint-<step>",
        ("--results", good, "--target", both): "TOFU_EVAL.json does not exist",
        ("--results", both): "results of both `checkpoint-<step>` and `epoch-<n>`: remove those of one",
        ("--results", good, twin): "Two results on forget05 are called `RKLD`: tell them apart by --labels",
        ("--results", good, "--labels", "a", "b"): "--labels has 2 names and --results 1 folders",
        ("--results", write_log(tmp_path / "broken", broken)): "forget_Q_A_Prob misses items",
        ("--results", good, "--retain_logs", other): "--retain_logs has a log of forget10, on which no result is",
        ("--csv", tmp_path / "rows.csv"): "rows.csv does not exist: give a CSV file",
        ("--csv", tmp_path / "rows.csv", "--labels", "a"): "go with --results",
    }
    for arguments, message in cases.items():
        assert plot(*arguments, "--output_dir", tmp_path / "figure") == 2
        assert message in capsys.readouterr().err
    assert plot("--results", good, twin, "--labels", "a", "b", "--output_dir", tmp_path / "fine") == 0
    assert json.loads((tmp_path / "a" / "RKLD" / "TOFU_EVAL.json").read_text()) == small_log(), "inputs stay"
    assert not (tmp_path / "figure").exists()
