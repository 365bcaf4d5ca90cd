# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""JSON and other small files: each there as a whole, in its old state or its new one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> dict[str, Any]:
    """
    Read a JSON object.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `dict`:
            The object.

    Raises:
        [`ValueError`]: If the file is not JSON or not an object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # bad UTF-8 as well as bad JSON
        raise ValueError(f"{path} is not JSON ({error}): was its writing interrupted?") from None
    if type(data) is not dict:
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, not an object.")
    return data


def write_atomically(path: str | Path, data: bytes) -> None:
    """
    Write a file so that a crash leaves the old one or the new one, never a part.

    Args:
        path (`str` or `Path`):
            The file. Its folder is created where absent.
        data (`bytes`):
            The new content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary file must lie in the same folder: a rename is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """
    Write a JSON object, laid out as open-unlearning does, by [`write_atomically`].

    Args:
        path (`str` or `Path`):
            The file.
        data (`Mapping[str, Any]`):
            The object; NaN and infinities are refused, since JSON has none.
    """
    write_atomically(path, json.dumps(data, indent=4, allow_nan=False).encode("utf-8"))
