# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Weights, files, samples and settings as hashes."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn


def hash_tensors(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """
    SHA-256 of tensors' names, dtypes, shapes and bytes.

    Args:
        named_tensors (`Iterable[tuple[str, torch.Tensor]]`):
            Tensors with their names, in a fixed order.

    Returns:
        `str`:
            Hexadecimal digest.
    """
    digest = hashlib.sha256()
    for name, tensor in named_tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_model(model: nn.Module) -> str:
    """SHA-256 of all weights of a model, quantised ones as they are stored."""
    return hash_tensors(sorted(model.state_dict().items()))


def hash_weights(folder: Path) -> str:
    """
    SHA-256 of a model's or an adapter's weights, and of the configuration that they need.

    Args:
        folder (`Path`):
            Folder of a checkpoint.

    Returns:
        `str`:
            Hexadecimal digest.

    Raises:
        [`ValueError`]: If there are no weights in it.
    """
    weights = [*folder.glob("*.safetensors")] or [*folder.glob("*model*.bin")]  # the optimizer's are .bin, too
    if not weights:
        raise ValueError(f"`{folder}` holds no weights (*.safetensors).")
    configs = [folder / name for name in ("config.json", "generation_config.json", "adapter_config.json")]
    return _hash_all(weights + [path for path in configs if path.is_file()])


def hash_contents(path: Path) -> str:
    """SHA-256 of a file, or of all files that lie in a folder, with their names."""
    return _hash_all([path] if path.is_file() else [one for one in path.iterdir() if one.is_file()])


def _hash_all(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hash_samples(dataset: Dataset) -> str:
    """SHA-256 of the token ids and labels of a data set."""
    return hash_json([dataset["input_ids"][:], dataset["labels"][:]])


def hash_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of the rows of a question set."""
    return hash_json([*map(dict, rows)])


def hash_json(value: Any) -> str:
    """SHA-256 of a value that JSON can hold, or whose parts (dates, say) are what they are printed as."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
