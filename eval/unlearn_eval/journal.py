# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
What is computed already, for a run that was interrupted or is repeated.

One file for each way to run a model: its name is a hash of the bytes of weights and adapter, of precision, backend and
versions, never of a path (unlearned models are saved to the same path again and again). Entries are keyed by token ids
and sampling. They hold numbers only, unless the user asked for texts.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .backends import AnswerScores, GenerateRequest, ScoreRequest
from .fingerprint import hash_json


class Journal:
    """
    Append-only file of finished requests. A line is written as soon as its batch is done; a torn last line is dropped.

    Args:
        folder (`str` or `Path`):
            Where the file lies; created with mode 0700.
        fingerprint (`dict[str, Any]`):
            What the results depend on beside the requests.
    """

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any]):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / f"{hash_json(fingerprint)[:32]}.jsonl"
        self.entries: dict[str, Any] = {}
        if self.path.is_file():
            self._read()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def add(self, key: str, value: Any) -> None:
        """Write an entry: a value that JSON can hold."""
        self.entries[key] = value
        self._file.write(json.dumps({"key": key, "value": value}, allow_nan=False) + "\n")
        self._file.flush()  # to the system: what comes after this line may kill the process, not the entry

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            entry = json.loads(line)
            self.entries[entry["key"]] = entry["value"]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))


def score_key(request: ScoreRequest) -> str:
    """Key of the scores of an answer."""
    return hash_json(["score", request.prompt_ids, request.answer_ids])


def generation_key(request: GenerateRequest, reference: str, log_texts: bool) -> str:
    """Key of the ROUGE scores of a generation (and its text, with `log_texts`)."""
    return hash_json(["generate", request.prompt_ids, request.max_new_tokens, reference, log_texts])


def encode_scores(scores: AnswerScores) -> dict[str, str]:
    """Scores as JSON: the bytes of the arrays, so that nothing is rounded. Not what is not a number: it would stay."""
    if not np.isfinite(scores.logprobs).all():
        raise ValueError("An answer's log-probabilities are not finite: check the weights, or use `dtype=float32`.")
    return {
        name: base64.b64encode(np.ascontiguousarray(values)).decode()
        for name, values in scores._asdict().items()
        if values is not None
    }


def decode_scores(value: dict[str, str]) -> AnswerScores:
    """Read back what [`encode_scores`] made."""
    arrays = {
        name: np.frombuffer(base64.b64decode(text), bool if name == "matches" else np.float32)
        for name, text in value.items()
    }
    return AnswerScores(**arrays)
