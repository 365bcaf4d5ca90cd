# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""A folder for what must not lie around: readable by its owner alone, and gone when the run that owns it is."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from unlearn_eval.files import write_json

from ..run_record import checkpoints, read_record


# Seconds for which another run that starts may hold the lock, to see whether this one is dead.
_PATIENCE = 5


def default_root() -> Path:
    """`trl_rkld` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trl_rkld"


class PrivateFolder:
    """
    Folder (mode 0700) of one run, named after its `output_dir` and locked while the run lives.

    Args:
        root (`str`, *optional*):
            Folder in which the folders of all runs lie.
        output_dir (`str`):
            `output_dir` of the run.
    """

    def __init__(self, root: str | None, output_dir: str):
        self.root = Path(root).expanduser().resolve() if root is not None else default_root()
        self.output_dir = Path(output_dir).resolve()
        self.path = self.root / _name(str(self.output_dir))
        self._lock = FileLock(f"{self.path}.lock", timeout=0)

    def open(self, resuming: bool, needed_bytes: int) -> None:
        """
        Take the folder, emptied unless the run is being resumed, after removing what dead runs left in `root`.

        Args:
            resuming (`bool`):
                Whether what an earlier start of this run left there is still needed.
            needed_bytes (`int`):
                Space that the run will need.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._remove_dead_runs()
            self._lock.acquire(timeout=_PATIENCE)
            if not resuming:
                shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(exist_ok=True)
            self.path.chmod(0o700)
            write_json(self.path / "run.json", {"output_dir": str(self.output_dir)})
        except Timeout:
            raise RuntimeError(
                f"Another run with `output_dir={str(self.output_dir)!r}` is going on. Wait for it, or choose another."
            ) from None
        except OSError as error:
            self.release()
            raise ValueError(
                f"`teacher_cache_dir={str(self.root)!r}` can't be written to ({error.strerror}). Set it to a folder "
                "of yours."
            ) from error
        free = shutil.disk_usage(self.root).free
        if free < needed_bytes:
            self.release()
            raise ValueError(
                f"`teacher_cache_dir={str(self.root)!r}` has {free / 1e9:.1f} GB free, and {needed_bytes / 1e9:.1f} GB "
                "are needed. Free some, or set it to a folder on another disk."
            )

    @property
    def teacher_file(self) -> Path:
        """Where the cached teacher lies."""
        return self.path / "teacher.safetensors"

    @property
    def is_open(self) -> bool:
        """Whether this process holds the folder."""
        return self._lock.is_locked

    def release(self) -> None:
        """Give the folder free, for a later start to resume from."""
        self._lock.release()

    def remove(self) -> None:
        """Delete the folder. To be called while it is held, and released after that."""
        shutil.rmtree(self.path, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _remove_dead_runs(self) -> None:
        for path in self.root.iterdir():
            output_dir = _owner(path)
            if path == self.path or output_dir is None:
                continue
            try:
                with FileLock(f"{path}.lock", timeout=0) as lock:
                    if not _can_be_resumed(output_dir):
                        shutil.rmtree(path, ignore_errors=True)
                        Path(lock.lock_file).unlink(missing_ok=True)
            except Timeout:  # alive
                continue


def save_private(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """
    Write tensors to a file that only its owner can read, complete or not at all.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            Contiguous tensors by name.
        path (`Path`):
            File, in a private folder.
        metadata (`dict[str, str]`, *optional*):
            What else the file says.
    """
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    partial.chmod(0o600)
    partial.replace(path)


def _name(output_dir: str) -> str:
    return hashlib.sha256(output_dir.encode()).hexdigest()[:16]


def _owner(path: Path) -> str | None:
    """`output_dir` of the run that a folder belongs to; `None` where it is not one of ours."""
    try:
        output_dir = json.loads((path / "run.json").read_text())["output_dir"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return output_dir if path.name == _name(output_dir) else None


def _can_be_resumed(output_dir: str) -> bool:
    """Whether a dead run has a checkpoint that is whole and unfinished: it then still needs its teacher."""
    records = (read_record(path) for path in checkpoints(output_dir))
    return any(record is not None and not record["finished"] for record in records)
