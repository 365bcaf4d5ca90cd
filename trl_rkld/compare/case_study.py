# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
The case study of the RKLD paper: answers before and after, and the likeliest next words of a sentence's beginning.

The only part of a comparison that writes texts of the forget set, and only where it is asked for.
"""

from pathlib import Path
from typing import Any

import torch

from unlearn_eval import EvalConfig
from unlearn_eval.backends import GenerateRequest
from unlearn_eval.checkpoints import resolve_checkpoint, transformers_backends
from unlearn_eval.documents import markdown_table
from unlearn_eval.files import read_json, write_atomically, write_json
from unlearn_eval.questions import ends_of_answers, load_configuration

from .plan import Job


FILE = "case_study.json"
_TOP = 5


@torch.inference_mode()
def examine(model: str, folder: Path, settings: dict[str, Any], case_study: dict[str, Any]) -> None:
    """
    Ask a model, and write what it says to `case_study.json`.

    Args:
        model (`str`):
            Folder or Hub id of a model or an adapter.
        folder (`Path`):
            Where to.
        settings (`dict`):
            The job's settings: split and evaluation.
        case_study (`dict`):
            `"questions"`, rows of the forget set, and `"beginnings"`, each with a `"row"` and a number of `"words"`.
    """
    if not any(case_study.values()) or (folder / FILE).is_file():
        return
    evaluation = {key: value for key, value in settings["evaluation"].items() if key != "backend"}
    config = EvalConfig(model_name_or_path=[model], output_dir=str(folder), backend="transformers", **evaluation)
    checkpoint = resolve_checkpoint(model, config)
    tokenizer = checkpoint.tokenizer(False)
    rows = load_configuration(config.dataset_name, settings["forget_split"])
    asked = [(rows[index]["question"], rows[index]["answer"]) for index in case_study["questions"]]
    tokens = [config.template.tokenize(tokenizer, *one) for one in asked]
    end_ids = ends_of_answers(tokenizer, checkpoint.eos_token_id, tokens)
    with transformers_backends([checkpoint], config, end_ids, None) as activate:
        backend = activate(checkpoint)
        answers = dict(backend.generate([GenerateRequest(one.prompt_ids, config.max_new_tokens) for one in tokens]))
        completions = [
            _completions(backend.model, tokenizer, rows[one["row"]], one["words"], config)
            for one in case_study["beginnings"]
        ]
    write_json(
        folder / FILE,
        {
            "answers": [
                {"question": question, "true": true, "answer": tokenizer.decode(answers[i], skip_special_tokens=True)}
                for i, (question, true) in enumerate(asked)
            ],
            "completions": completions,
        },
    )


def _completions(model, tokenizer, row: dict[str, str], num_words: int, config: EvalConfig) -> dict[str, Any]:
    beginning = " ".join(row["answer"].split()[:num_words])
    tokens = config.template.tokenize(tokenizer, row["question"], beginning)
    ids = tokens.prompt_ids + tokens.answer_ids[:-1]  # without the end of the turn
    ids = torch.tensor([ids], device=model.device)
    top = model(input_ids=ids, use_cache=False).logits[0, -1].float().softmax(-1).topk(_TOP)
    words = [tokenizer.decode([token]).strip() for token in top.indices.tolist()]
    return {
        "question": row["question"],
        "beginning": beginning,
        "top": list(zip(words, top.values.tolist(), strict=True)),
    }


def write_case_study(jobs: list[Job], output_dir: Path) -> Path | None:
    """
    Write `case_study.md`: what target, retain-only model and each method's chosen epoch (first seed) say.

    Args:
        jobs (`list[Job]`):
            The plan.
        output_dir (`Path`):
            Folder.

    Returns:
        `Path` or `None`:
            The file, if a case study was asked for.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for job in jobs:
        path = job.folder / ("chosen" if job.kind == "unlearn" else "") / FILE
        if job.row is None or not job.is_done or not path.is_file():
            continue
        setting = "" if job.row["setting"] is None else f" ({job.row['setting']})"
        found.setdefault(job.row["split"], {}).setdefault(f"{job.row['method']}{setting}", read_json(path))
    if not found:
        return None
    parts = []
    for split, by_model in found.items():
        # Jobs that were done at different starts may have been asked different things.
        for question, true in _asked(by_model, "answers", "question", "true"):
            cells = [["model", "answer"], ["(truth)", _cell(true)]]
            for name, said in by_model.items():
                cells += [[name, _cell(one["answer"])] for one in said["answers"] if one["question"] == question]
            parts.append(f"## {split}: {question}\n\n{markdown_table(cells, ['<', '<'])}")
        for question, beginning in _asked(by_model, "completions", "question", "beginning"):
            cells = [["model", f"likeliest next tokens after “{_cell(beginning)}”"]]
            for name, said in by_model.items():
                tops = [
                    one["top"]
                    for one in said["completions"]
                    if (one["question"], one["beginning"]) == (question, beginning)
                ]
                cells += [[name, ", ".join(f"{_cell(word)} {p:.3f}" for word, p in top)] for top in tops]
            parts.append(f"## {split}: {question}\n\n{markdown_table(cells, ['<', '<'])}")
    path = output_dir / "case_study.md"
    write_atomically(path, "\n".join(parts).encode())
    return path


def _asked(by_model: dict[str, dict[str, Any]], part: str, *names: str) -> list[tuple[str, ...]]:
    """What any of the models was asked, each once."""
    return list(dict.fromkeys(tuple(one[name] for name in names) for said in by_model.values() for one in said[part]))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
