# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""A folder for what must not lie around: readable by its owner alone, and gone when the run that owns it is."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.trainer_utils import get_last_checkpoint


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
        self.path = self.root / hashlib.sha256(str(self.output_dir).encode()).hexdigest()[:16]
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
            self._lock.acquire()
            if not resuming:
                shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(exist_ok=True, mode=0o700)
            (self.path / "run.json").write_text(json.dumps({"output_dir": str(self.output_dir)}))
        except Timeout:
            raise RuntimeError(
                f"Another run with `output_dir={str(self.output_dir)!r}` is going on. Wait for it, or choose another."
            ) from None
        except OSError as error:
            raise ValueError(
                f"`teacher_cache_dir={str(self.root)!r}` can't be written to ({error.strerror}). Set it to a folder "
                "of yours."
            ) from error
        free = shutil.disk_usage(self.root).free
        if free < needed_bytes:
            raise ValueError(
                f"`teacher_cache_dir={str(self.root)!r}` has {free / 1e9:.1f} GB free, and {needed_bytes / 1e9:.1f} GB "
                "are needed. Free some, set it to another disk, or set `precompute_teacher=False`."
            )

    def release(self) -> None:
        """Give the folder free, for a later start to resume from."""
        self._lock.release()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _remove_dead_runs(self) -> None:
        for path in self.root.iterdir():
            if path == self.path or not (path / "run.json").is_file():
                continue
            try:
                with FileLock(f"{path}.lock", timeout=0) as lock:
                    output_dir = json.loads((path / "run.json").read_text())["output_dir"]
                    # A dead run that has a checkpoint may still be resumed, and then needs its teacher.
                    if not os.path.isdir(output_dir) or get_last_checkpoint(output_dir) is None:
                        shutil.rmtree(path, ignore_errors=True)
                        Path(lock.lock_file).unlink(missing_ok=True)
            except Timeout:  # alive
                continue
