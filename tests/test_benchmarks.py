# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of the loss, with tiny sizes: what it prints, and that both losses are the same. Nothing is timed."""

import csv
import json
import sys

import pytest
from conftest import REPOSITORY


PEAKS = {
    ("dense", "trained", 64): 4_000_000,
    ("chunked", "trained", 64): 505_120,
    ("chunked", "trained", 96): 1_007_680,
    ("dense", "frozen", 64): 2_000_000,
    ("chunked", "frozen", 64): 255_120,
    ("chunked", "frozen", 96): 257_680,
}


@pytest.fixture
def loss_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "eval" / "benchmarks"))
    import loss_memory

    yield loss_memory
    for name in ("loss_memory", "common"):
        sys.modules.pop(name, None)


def test_loss_memory_prints_its_ratios(loss_memory, monkeypatch, capsys, tmp_path):
    # In this process, as one for each setting takes seconds; memory that was freed before hides the peaks then, so
    # that they are given.
    def measure(setting):
        return loss_memory.measure(*setting) | {"bytes": PEAKS[setting[:3]]}

    monkeypatch.setattr(loss_memory, "measure_in_own_process", measure)
    path = tmp_path / "benchmarks.csv"
    sizes = ["--num_tokens", "64", "--vocab_size", "500", "--hidden_size", "16", "--more_tokens", "96"]
    for _ in range(2):
        loss_memory.main([*sizes, "--csv", str(path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])

    expected = {
        "chunked_over_dense_trained_head": 505_120 / 4_000_000,
        "chunked_over_dense_frozen_head": 255_120 / 2_000_000,
        # Less the gradients of the hidden states, 4 · (16 + 4) bytes a token.
        "flatness_trained_head": 2.0,
        "flatness_frozen_head": 1.0,
        "raw_flatness_trained_head": 1_007_680 / 505_120,
        "raw_flatness_frozen_head": 257_680 / 255_120,
    }
    assert {ratio: result[ratio] for ratio in expected} == pytest.approx(expected, abs=1e-5)
    facts = {
        "device",
        "dtype",
        "gradient_checkpointing",
        "counted_tokens",
        "total_tokens",
        "threads",
        "versions",
        "date",
    }
    assert facts <= result.keys()
    assert result["loss"]["chunked_trained_64"] == pytest.approx(result["loss"]["dense_trained_64"], rel=1e-5)
    assert result["loss"]["chunked_frozen_64"] == pytest.approx(result["loss"]["dense_frozen_64"], rel=1e-5)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 * 2  # runs × settings × quantities: the second run was appended
    assert {"date", "device", "versions"} <= rows[0].keys()


def test_peak_in_a_process_of_its_own(loss_memory):
    vocab_size, hidden_size, num_tokens = 20_000, 16, 1000
    measured = loss_memory.measure_in_own_process(("chunked", "trained", num_tokens, vocab_size, hidden_size))
    # At least the head's gradient and one chunk of logits, 32 MiB; not more than a handful of those.
    chunk = 4 * vocab_size * (2**23 // vocab_size)
    assert 4 * vocab_size * hidden_size + chunk < measured["bytes"] < 6 * chunk
