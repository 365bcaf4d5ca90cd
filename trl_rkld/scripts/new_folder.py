# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""An output folder that is new, and there as a whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(output_dir: str) -> None:
    """Raise where an output folder (`str`) holds anything."""
    if Path(output_dir).exists() and any(Path(output_dir).iterdir()):
        raise ValueError(f"`output_dir={output_dir!r}` is not empty. Choose a new folder.")


@contextmanager
def new_folder(output_dir: str) -> Iterator[Path]:
    """A folder to write into (`Path`), which gets the name `output_dir` (`str`) when all went well."""
    output = Path(output_dir)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if output.exists():
        output.rmdir()
    partial.replace(output)
