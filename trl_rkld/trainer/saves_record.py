# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
from functools import partial

from peft import PeftModel

from ..run_record import complete_checkpoint, plain_record, read_record, write_record


class ResumesAdapter:
    """
    Mixin: an adapter goes on in the precision in which it was trained. TRL trains that of a 4-bit model in bfloat16, and
    PEFT makes float32 of what it loads: a resumed run would not be the uninterrupted one.
    """

    def _load_from_checkpoint(self, *args, **kwargs):
        if isinstance(self.model, PeftModel):
            self.model.load_adapter = partial(self.model.load_adapter, autocast_adapter_dtype=False)
        try:
            return super()._load_from_checkpoint(*args, **kwargs)
        finally:
            self.model.__dict__.pop("load_adapter", None)


class SavesRecord(ResumesAdapter):
    """
    Mixin for TRL's own trainers: beside what they save stands `unlearning.json`, so that a 4-bit adapter is merged and
    evaluated on the base that it was trained on. They resume as an [`UnlearningTrainer`] does, from a run's folder, too.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        checkpoint = complete_checkpoint(self.args.output_dir, resume_from_checkpoint)
        record = None if checkpoint is None else read_record(checkpoint)
        if record is not None and record["method"] != self._name:
            raise ValueError(
                f"`resume_from_checkpoint`: {checkpoint!r} was made by {record['method']}, not {self._name}."
            )
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        write_record(output_dir or self.args.output_dir, plain_record(self._name, self.model))
