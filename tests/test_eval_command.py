# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`trl-rkld eval`: its configurations, the table that it prints, and what it refuses; and the canary's verdicts."""

import json

import pytest
from tofu_like import knowing_model, save, write_lines, write_tofu

from trl_rkld.cli import main
from trl_rkld.recipes_index import recipe_path, resolve_config
from trl_rkld.scripts import eval as command
from unlearn_eval.backends import ScoreRequest
from unlearn_eval.canary import CANARY_SIZE, check_adapter, check_agreement, choose


# ---- The command ----


@pytest.mark.parametrize("name", ["deletion_request", "tofu", "tofu_llama3", "tofu_open_unlearning"])
def test_every_configuration_parses(name, tmp_path, monkeypatch):
    """With the command's own parser: a stale or misspelt key raises."""
    assert name in command.configs()
    monkeypatch.chdir(
        recipe_path("deletion_request/config_qlora").parent
    )  # the data of the configuration of that name
    folder = str(tmp_path)
    arguments = [
        f"--config={name}",
        "--model_name_or_path",
        folder,
        "--output_dir",
        folder,
        "--backend",
        "transformers",
    ]
    arguments = resolve_config(arguments, command.configs(), "there")
    (config,) = command.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=True)
    assert config.model_name_or_path == [str(tmp_path)]
    assert f"trl-rkld eval --config {name}" in command.configs()[name].read_text()


def test_all_configurations_are_tested():
    assert len(command.configs()) == 4


def test_table_of_two_models(tokenizer, tmp_path, capsys):
    """The aggregates of the logs, a column for each model, the distance behind p, and why a metric is missing."""
    paths = [save(knowing_model(tokenizer, steps), tmp_path / f"after {steps}", tokenizer) for steps in (5, 60)]
    common = [
        "--dataset_name",
        write_tofu(tmp_path / "tofu"),
        "--forget_split",
        "forget01",
        "--backend",
        "transformers",
    ]
    common += ["--dtype", "float32", "--max_new_tokens", "0", "--config", "tofu", "--model_name_or_path"]
    assert main(["eval", *common, paths[0], "--output_dir", str(tmp_path / "retain")]) == 0
    assert "forget_quality: " in capsys.readouterr().out  # no retain-only model: why there is none
    output = tmp_path / "results"
    retain_log = str(tmp_path / "retain" / "TOFU_EVAL.json")
    assert main(["eval", *common, *paths, "--retain_logs", retain_log, "--output_dir", str(output)]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    table = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}
    logs = [json.loads(path.read_text()) for path in sorted(output.rglob("TOFU_EVAL.json"))]
    logs.sort(key=lambda log: table["metric"].index(log["metadata"]["model"]))
    assert len(logs) == 2
    for metric in ("forget_quality", "forget_Q_A_Prob", "extraction_strength"):
        assert table[metric] == [f"{log[metric]['agg_value']:.4g}" for log in logs]
    assert table["KS distance D (n)"] == ["0 (5)", f"{logs[1]['forget_quality']['ks_d']:.4g} (5)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "tofuu"], "`--config tofuu` is neither a file nor one of deletion_request, tofu, "),
        (["--config", "{own}"], "Unknown arguments from config file: ['--forget_splitt'"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys):
    write_lines(tmp_path / "own.yaml", [{"forget_splitt": "forget01", "output_dir": str(tmp_path)}])  # JSON is YAML
    arguments = [argument.format(own=tmp_path / "own.yaml") for argument in arguments]
    assert main(["eval", *arguments, "--model_name_or_path", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


# ---- The canary ----


def test_answers_to_look_at():
    """Spread over the longer half, shortest and longest of it among them."""
    requests = [ScoreRequest([1], [2] * length) for length in (3, 40, 1, 2, *range(10, 38))]
    lengths = [len(request.answer_ids) for request in choose(requests)]
    assert len(lengths) == CANARY_SIZE and lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (23, 40)  # of 32, the 17th by length and the last
    assert choose(requests[:1]) == requests[:1]


@pytest.mark.parametrize("loss", [0.5, 4.0])
def test_agreement(loss):
    """Within a tenth of a nat and three per cent of the loss."""
    expected, limit = [1.0, loss], 0.1 + 0.03 * loss
    check_agreement("model", expected, [1.0, loss + 0.99 * limit])
    for wrong in (loss + 1.01 * limit, loss - 1.01 * limit, float("nan")):
        with pytest.raises(ValueError, match="vLLM scores `model` otherwise than transformers does"):
            check_agreement("model", expected, [1.0, wrong])


def test_an_adapter_that_does_nothing():
    check_adapter("adapter", [1.0, 2.0], [1.0, 2.001])
    with pytest.raises(ValueError, match="the adapter `adapter` scores 2 answers exactly as its base does"):
        check_adapter("adapter", [1.0, 2.0], [1.0, 2.0])
